//! A priority's part of the queue, and the flows in it.
//!
//! Turns are kept by self-clocked fair queueing: a flow's tag is where it will be once its first request has been served,
//! the flow with the least tag is next, and the band's virtual time is the tag served last. A flow that was idle starts
//! at that time, so that nobody saves up turns, and nobody who makes up new flows can pass those that wait.

use super::heap::{Heap, Key};
use super::room::Need;
use super::{BandConfig, Fairness, Usage};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A band.
#[derive(Debug)]
pub(super) struct Band {
    pub(super) config: BandConfig,
    pub(super) usage: Usage,
    pub(super) last_used: Duration,
    pub(super) virtual_time: u64,
    /// One for each [`Need`]: what one of them lacks must not hold up the other.
    pub(super) rings: [Ring; 2],
}

/// Flows whose requests need the same kinds of servers.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// Those with requests, in the order of their turns.
    pub(super) waiting: Heap,
    /// All of them by name.
    pub(super) flows: BTreeMap<Arc<str>, u32>,
}

impl Band {
    pub(super) fn new(config: BandConfig) -> Self {
        Self {
            config,
            usage: Usage::default(),
            last_used: Duration::ZERO,
            virtual_time: 0,
            rings: Default::default(),
        }
    }

    /// Whose turn it is, with its key.
    pub(super) fn next(&self, prefill_too: bool) -> Option<(Key, u32)> {
        let rings = if prefill_too { 2 } else { 1 };
        let firsts = self.rings[..rings].iter().filter_map(|r| r.waiting.first());
        firsts.min()
    }

    /// The flow with this tag was served.
    pub(super) fn served(&mut self, tag: u64) {
        if self.config.fairness != Fairness::GlobalStrict {
            self.virtual_time = self.virtual_time.max(tag);
        }
    }

    pub(super) fn is_used(&self) -> bool {
        self.rings.iter().any(|ring| !ring.flows.is_empty())
    }
}

/// Where a flow is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In its band's ring: it has requests.
    Ring,
    /// Among the idle.
    Idle,
}

/// A tenant's requests of one priority and one need.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) name: Arc<str>,
    pub(super) priority: i32,
    pub(super) need: Need,
    pub(super) queue: Heap,
    /// Its tag without its first request.
    base: u64,
    /// When it was served last, or began to wait: who waits longer goes first among equals.
    turn: u64,
    pub(super) place: Place,
    pub(super) at: u32,
}

impl Flow {
    pub(super) fn new(name: Arc<str>, priority: i32, need: Need) -> Self {
        Self {
            name,
            priority,
            need,
            queue: Heap::default(),
            base: 0,
            turn: 0,
            place: Place::Idle,
            at: 0,
        }
    }

    /// It has requests again.
    pub(super) fn wake(&mut self, virtual_time: u64, turn: u64) {
        self.place = Place::Ring;
        self.base = self.base.max(virtual_time);
        self.turn = turn;
    }

    /// One of its requests was served.
    pub(super) fn had_turn(&mut self, virtual_time: u64, turn: u64) {
        (self.base, self.turn) = (virtual_time, turn);
    }

    /// What it is ordered by, its first request being the one at `head`, with `tokens`.
    pub(super) fn key(&self, fairness: Fairness, head: Key, tokens: u32) -> Key {
        match fairness {
            Fairness::GlobalStrict => head,
            Fairness::RoundRobin => (self.base + 1, self.turn),
            Fairness::Tokens => (self.base + u64::from(tokens.max(1)), self.turn),
        }
    }
}
