//! What is known of a pool, as events make it. No waiting, no talking: events in, snapshots out.

use crate::PoolName;
use crate::rules::{Objective, Pod, Pool, Rewrite};
use baton_fleet::EndpointSpec;
use std::collections::BTreeMap;

/// A pool and all that belongs to it, at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PoolState {
    /// The pool; `None` while there is none of that name.
    pub pool: Option<Pool>,
    /// Its endpoints, by name of pod and rank.
    pub endpoints: Vec<EndpointSpec>,
    /// Its objectives, by name.
    pub objectives: BTreeMap<String, Objective>,
    /// Its rewrites, in the order in which they are tried: the oldest first.
    pub rewrites: Vec<Rewrite>,
    /// Whether the pool is there and its pods were listed. Objectives and rewrites are not waited for.
    pub synced: bool,
}

/// A piece of news about objects of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum News<T> {
    /// A new list begins. What was known stays until it is complete.
    Begin,
    /// The object is there with this content; `None` means that it counts for nothing.
    Put(String, Option<T>),
    /// The object is gone.
    Remove(String),
    /// The list is complete: what was not in it is gone.
    Complete,
}

/// News of any of the kinds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Pool(News<Pool>),
    Pod(News<Pod>),
    Objective(News<Objective>),
    Rewrite(News<Rewrite>),
}

/// All objects of one kind that count.
#[derive(Debug)]
struct Table<T> {
    known: BTreeMap<String, T>,
    /// The list that is being read.
    coming: Option<BTreeMap<String, T>>,
    /// A list was once complete.
    listed: bool,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            known: BTreeMap::new(),
            coming: None,
            listed: false,
        }
    }
}

impl<T> Table<T> {
    /// Takes the news in and says whether that changed what is known.
    fn apply(&mut self, news: News<T>) -> bool
    where
        T: PartialEq,
    {
        match news {
            News::Begin => {
                self.coming = Some(BTreeMap::new());
                false
            }
            News::Put(name, Some(value)) => match &mut self.coming {
                Some(coming) => {
                    coming.insert(name, value);
                    false
                }
                None if self.known.get(&name) == Some(&value) => false,
                None => {
                    self.known.insert(name, value);
                    true
                }
            },
            News::Put(name, None) | News::Remove(name) => match &mut self.coming {
                Some(coming) => {
                    coming.remove(&name);
                    false
                }
                None => self.known.remove(&name).is_some(),
            },
            News::Complete => {
                let Some(coming) = self.coming.take() else {
                    return false;
                };
                let changed = !self.listed || coming != self.known;
                self.known = coming;
                self.listed = true;
                changed
            }
        }
    }
}

/// Everything known of one pool.
#[derive(Debug)]
pub(crate) struct Known {
    name: PoolName,
    pools: Table<Pool>,
    pods: Table<Pod>,
    objectives: Table<Objective>,
    rewrites: Table<Rewrite>,
}

impl Known {
    pub(crate) fn new(name: PoolName) -> Self {
        Self {
            name,
            pools: Table::default(),
            pods: Table::default(),
            objectives: Table::default(),
            rewrites: Table::default(),
        }
    }

    /// Takes an event in and says whether that changed the state.
    pub(crate) fn apply(&mut self, event: Event) -> bool {
        match event {
            Event::Pool(news) => {
                let changed = self.pools.apply(news);
                if changed {
                    self.pool_changed();
                }
                changed
            }
            Event::Pod(news) => self.pods.apply(news),
            Event::Objective(news) => self.objectives.apply(news),
            Event::Rewrite(news) => self.rewrites.apply(news),
        }
    }

    /// The pool, if it is there.
    pub(crate) fn pool(&self) -> Option<&Pool> {
        self.pools.known.get(&self.name.name)
    }

    /// Pods that a new selector leaves out go at once; those it adds come with the next list.
    fn pool_changed(&mut self) {
        match self.pools.known.get(&self.name.name) {
            Some(pool) => self.pods.known.retain(|_, pod| pool.selects(pod)),
            None => self.pods = Table::default(),
        }
    }

    /// Everything as it is now.
    pub(crate) fn snapshot(&self) -> PoolState {
        let pool = self.pool();
        let namespace = &self.name.namespace;
        let of_pod = |pool: &'_ Pool| -> Vec<EndpointSpec> {
            let pods = self.pods.known.iter().filter(|(_, pod)| pool.selects(pod));
            pods.flat_map(|(name, pod)| pool.endpoints(namespace, name, pod))
                .collect()
        };
        let mut rewrites: Vec<Rewrite> = self.rewrites.known.values().cloned().collect();
        rewrites.sort_by_key(|r| r.created);
        PoolState {
            endpoints: pool.map(of_pod).unwrap_or_default(),
            objectives: self.objectives.known.clone(),
            rewrites,
            synced: pool.is_some() && self.pods.listed,
            pool: pool.cloned(),
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
