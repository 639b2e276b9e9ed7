//! Who may be chosen.

use crate::picker::Dice;
use crate::plan::Source;
use crate::saturation::{Concurrency, Utilization, usage};
use crate::workspace::View;
use crate::{Endpoint, Load, Roles, Unschedulable};

/// Keeps some of the candidates.
#[derive(Clone, Debug, PartialEq)]
pub enum Filter {
    /// Those with one of these roles.
    Roles(Roles),
    /// Those whose label has one of these values.
    Label {
        /// The label.
        key: Box<str>,
        /// The values.
        values: Vec<Box<str>>,
        /// Whether servers without the label are kept.
        or_missing: bool,
    },
    /// Those whose labels are as all of these say.
    Selector(Vec<Requirement>),
    /// Those that have a large part of the prompt, if there are any.
    PrefixAffinity {
        /// Least part of the prompt's blocks, above 0.
        threshold: f64,
        /// Chance that everybody is kept all the same.
        exploration: f64,
        /// Who knows what is cached.
        source: Source,
    },
    /// Those whose range of context lengths, in a label, has the prompt's; a server without the label is kept.
    ContextLength {
        /// The label, whose value is `least-most`.
        label: Box<str>,
    },
    /// Those that are not busy by what they say; all, if all are.
    Utilization(Utilization),
    /// Those that have not been sent too much.
    Concurrency(Concurrency),
    /// Those that exceed no bound.
    Caps {
        /// The bounds.
        caps: Vec<(Measure, f64)>,
        /// Whether all are kept if all exceed one.
        or_all: bool,
    },
    /// The session's server, if it is among them.
    Session,
    /// Those that a test named; nobody, if it named none.
    Selection,
}

/// What a label must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// One of these.
    In(Box<str>, Vec<Box<str>>),
    /// None of these, or not there.
    NotIn(Box<str>, Vec<Box<str>>),
    /// There.
    Exists(Box<str>),
    /// Not there.
    Missing(Box<str>),
}

/// A number that a server has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Requests that are there or on their way.
    Active,
    /// Requests in the batch.
    Running,
    /// Requests that wait.
    Waiting,
    /// Part of the KV pool in use.
    KvUsage,
}

impl Measure {
    /// The number; one that is too old is taken for infinite.
    fn of(self, load: &Load) -> f64 {
        match self {
            Self::Active => load.active.into(),
            _ if !load.fresh => f64::INFINITY,
            Self::Running => load.running.into(),
            Self::Waiting => load.waiting.into(),
            Self::KvUsage => usage(load),
        }
    }
}

impl Requirement {
    fn holds(&self, endpoint: &Endpoint) -> bool {
        let has = |key: &str, values: &[Box<str>]| {
            let value = endpoint.identity.label(key);
            value.is_some_and(|value| values.iter().any(|v| **v == *value))
        };
        match self {
            Self::In(key, values) => has(key, values),
            Self::NotIn(key, values) => !has(key, values),
            Self::Exists(key) => endpoint.identity.label(key).is_some(),
            Self::Missing(key) => endpoint.identity.label(key).is_none(),
        }
    }
}

impl Filter {
    /// What the filter knows servers' caches by, if it asks.
    pub(crate) fn source(&self) -> Option<Source> {
        match self {
            Self::PrefixAffinity { source, .. } => Some(*source),
            _ => None,
        }
    }

    /// Says of every candidate whether it is kept.
    pub(crate) fn keep(&self, view: &View<'_>, dice: &mut Dice, keep: &mut Vec<bool>) {
        keep.clear();
        let each = view.endpoints();
        match self {
            Self::Roles(roles) => keep.extend(each.map(|e| roles.contains(e.role))),
            Self::Label {
                key,
                values,
                or_missing,
            } => keep.extend(each.map(|e| match e.identity.label(key) {
                Some(value) => values.iter().any(|v| **v == *value),
                None => *or_missing,
            })),
            Self::Selector(all) => keep.extend(each.map(|e| all.iter().all(|r| r.holds(e)))),
            Self::PrefixAffinity {
                threshold,
                exploration,
                source,
            } => {
                let explores = dice.fraction() <= *exploration;
                let held = view.held(*source).iter();
                keep.extend(held.map(|h| explores || h.part() >= *threshold));
                or_all(keep);
            }
            Self::ContextLength { label } => {
                let length = view.request.prompt.tokens();
                keep.extend(each.map(|e| match e.identity.label(label) {
                    None => true,
                    Some(range) => Range::parse(range).is_some_and(|r| r.has(length)),
                }));
            }
            Self::Utilization(u) => {
                keep.extend(each.map(|e| u.has_room(&e.load)));
                or_all(keep);
            }
            Self::Concurrency(c) => keep.extend(each.map(|e| c.has_room(&e.load))),
            Self::Caps { caps, or_all: all } => {
                keep.extend(each.map(|e| caps.iter().all(|(m, most)| m.of(&e.load) <= *most)));
                if *all {
                    or_all(keep);
                }
            }
            Self::Session => {
                keep.extend(each.map(|e| Some(e.id) == view.pinned));
                or_all(keep);
            }
            Self::Selection => {
                let named = view.request.selection.unwrap_or(&[]);
                keep.extend(each.map(|e| named.binary_search(&e.id).is_ok()));
            }
        }
    }

    /// What it means if nobody is kept.
    pub(crate) fn emptied(&self) -> Unschedulable {
        match self {
            Self::Utilization(_) | Self::Concurrency(_) | Self::Caps { .. } => {
                Unschedulable::Saturated
            }
            _ => Unschedulable::NoneHealthy,
        }
    }
}

/// Keeps everybody if nobody is kept.
fn or_all(keep: &mut [bool]) {
    if !keep.contains(&true) {
        keep.fill(true);
    }
}

/// Lengths of contexts, in tokens, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) least: u32,
    pub(crate) most: u32,
}

impl Range {
    /// Reads `least-most`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (least, most) = text.split_once('-')?;
        let (least, most) = (least.trim().parse().ok()?, most.trim().parse().ok()?);
        (least <= most).then_some(Self { least, most })
    }

    pub(crate) fn has(self, length: u32) -> bool {
        (self.least..=self.most).contains(&length)
    }
}
