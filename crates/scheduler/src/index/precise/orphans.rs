//! Blocks of one server whose parent is not known yet, because its report was missed or comes later.

use crate::index::holders::Tiers;
use baton_kv::EngineHash;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// A block without a key, since its parent has none.
#[derive(Debug)]
pub(super) struct Orphan {
    pub(super) hash: EngineHash,
    pub(super) tier: Tiers,
    tokens: Box<[u32]>,
    extra: Box<[Box<str>]>,
}

/// A server's orphans.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    /// By parent.
    waiting: FxHashMap<EngineHash, Vec<Orphan>>,
    /// What each waits for.
    parents: FxHashMap<EngineHash, EngineHash>,
    /// In the order of arrival; those that are gone stay in it for a while.
    order: VecDeque<EngineHash>,
    /// What they cost in all.
    cost: usize,
}

impl Orphan {
    pub(super) fn new<'a>(
        hash: EngineHash,
        tokens: &[u32],
        extra: impl Iterator<Item = &'a str>,
        tier: Tiers,
    ) -> Self {
        Self {
            hash,
            tier,
            tokens: tokens.into(),
            extra: extra.map(Into::into).collect(),
        }
    }

    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub(super) fn extra(&self) -> impl Iterator<Item = &str> {
        self.extra.iter().map(|e| &**e)
    }

    /// In tokens; four bytes of text count as one.
    fn cost(&self) -> usize {
        let text: usize = self.extra.iter().map(|e| e.len()).sum();
        self.tokens.len() + text.div_ceil(4)
    }
}

impl Orphans {
    pub(super) fn is_empty(&self) -> bool {
        self.parents.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Keeps `orphan` until `parent` is known, and at most `most` tokens in all.
    pub(super) fn add(&mut self, parent: EngineHash, orphan: Orphan, most: usize) {
        self.remove(orphan.hash);
        let cost = orphan.cost();
        if cost > most {
            return;
        }
        while self.cost + cost > most {
            let Some(oldest) = self.order.pop_front() else {
                return;
            };
            self.remove(oldest);
        }
        self.cost += cost;
        self.parents.insert(orphan.hash, parent);
        self.order.push_back(orphan.hash);
        self.waiting.entry(parent).or_default().push(orphan);
        if self.order.len() > 2 * self.parents.len() + 64 {
            let parents = &self.parents;
            self.order.retain(|hash| parents.contains_key(hash));
        }
    }

    /// The orphans that waited for `parent`.
    pub(super) fn take(&mut self, parent: EngineHash) -> Vec<Orphan> {
        let found = self.waiting.remove(&parent).unwrap_or_default();
        for orphan in &found {
            self.parents.remove(&orphan.hash);
            self.cost -= orphan.cost();
        }
        found
    }

    /// Forgets one: it is no longer cached.
    pub(super) fn remove(&mut self, hash: EngineHash) {
        let Some(parent) = self.parents.remove(&hash) else {
            return;
        };
        let Some(waiting) = self.waiting.get_mut(&parent) else {
            return;
        };
        waiting.retain(|orphan| {
            let stays = orphan.hash != hash;
            if !stays {
                self.cost -= orphan.cost();
            }
            stays
        });
        if waiting.is_empty() {
            self.waiting.remove(&parent);
        }
    }
}
