//! The leases that a consumer holds at one producer: what to say about them, when, and which transfers wait for their blocks.
//! Pure: a thread around it speaks and keeps the time.
//!
//! Holders only touch short lists here; what they leave is said with the next news.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_kv::LeaseToken;

use crate::wire::Message;

/// Longest time between heartbeats.
const MAX_INTERVAL: Duration = Duration::from_secs(3);
/// Shortest time between heartbeats.
const MIN_INTERVAL: Duration = Duration::from_millis(10);
/// Leases in one heartbeat.
const MAX_HEARTBEAT: usize = 1 << 14;
/// Intervals without an answer after which a connection counts as dead.
const MAX_SILENCE: u32 = 3;

/// The leases; `J` is a transfer that waits.
#[derive(Debug)]
pub(crate) struct Holdings<J> {
    held: BTreeMap<u64, Holding<J>>,
    /// Held since the last heartbeat: they may be old, and cannot wait for the next.
    fresh: Vec<u64>,
    /// Bounded by the leases held: each holder leaves at most one.
    to_release: Vec<(u64, LeaseToken)>,
    interval: Option<Duration>,
}

/// A lease that somebody holds.
#[derive(Debug)]
struct Holding<J> {
    holders: usize,
    /// The producer does not have it, as far as is known. Who holds it still counts, so that who holds it anew is not taken
    /// for them.
    is_gone: bool,
    /// The right to it.
    token: LeaseToken,
    /// Whether it grows, and how is to be told.
    is_growing: bool,
    /// Tokens whose KV can be fetched, as far as is known.
    n_ready: u32,
    /// Transfers whose blocks are yet to be computed.
    waiting: Vec<J>,
}

impl<J> Holding<J> {
    /// Held by nobody yet.
    fn new(token: LeaseToken) -> Self {
        Self {
            holders: 0,
            is_gone: false,
            token,
            is_growing: false,
            n_ready: 0,
            waiting: Vec::new(),
        }
    }
}

impl<J> Default for Holdings<J> {
    fn default() -> Self {
        Self {
            held: BTreeMap::new(),
            fresh: Vec::new(),
            to_release: Vec::new(),
            interval: None,
        }
    }
}

/// What there is to say, and what is over.
#[derive(Debug)]
pub(crate) struct News<J> {
    /// To be said in this order.
    pub(crate) messages: Vec<Message>,
    /// Transfers that nobody waits for any more.
    pub(crate) cancelled: Vec<J>,
    /// Whether nothing is held.
    pub(crate) is_idle: bool,
}

impl<J> Holdings<J> {
    /// One holder more, of a lease that lives for `ttl` without heartbeats, and is still growing or not. `false` if others
    /// hold it by another right: one of the two is none, and what the producer says of it must not be taken for the other.
    #[must_use]
    pub(crate) fn hold(
        &mut self,
        lease: u64,
        token: LeaseToken,
        is_growing: bool,
        ttl: Duration,
    ) -> bool {
        if self
            .held
            .get(&lease)
            .is_some_and(|held| held.token != token)
        {
            return false;
        }
        let interval = (ttl / 5).clamp(MIN_INTERVAL, MAX_INTERVAL);
        let shortest = self.interval.filter(|_| !self.is_empty());
        self.interval = Some(shortest.map_or(interval, |known| known.min(interval)));
        let holding = self.held.entry(lease);
        let holding = holding.or_insert_with(|| Holding::new(token));
        holding.holders += 1;
        holding.is_gone = false;
        holding.is_growing |= is_growing;
        self.fresh.push(lease);
        true
    }

    /// One holder less. The last one has the lease released, if there is still somebody to say it and to hear it.
    pub(crate) fn let_go(&mut self, lease: u64, is_to_be_said: bool) {
        let Some(holding) = self.held.get_mut(&lease) else {
            return;
        };
        holding.holders -= 1;
        if holding.holders > 0 {
            return;
        }
        let (is_gone, token) = (holding.is_gone, holding.token);
        // Nothing waits any more: a transfer that does is a holder itself.
        self.held.remove(&lease);
        self.fresh.retain(|fresh| *fresh != lease);
        if is_to_be_said && !is_gone {
            self.to_release.push((lease, token));
        }
    }

    /// Tokens of a lease whose KV can be fetched; `None` if it is gone.
    pub(crate) fn n_ready(&self, lease: u64) -> Option<u32> {
        let holding = self.held.get(&lease).filter(|holding| !holding.is_gone);
        Some(holding?.n_ready)
    }

    /// Keeps a transfer until its lease, which is there, has grown.
    pub(crate) fn keep(&mut self, lease: u64, job: J) {
        if let Some(holding) = self.held.get_mut(&lease) {
            holding.waiting.push(job);
        }
    }

    /// The KV of more tokens of a lease can be fetched: the transfers that have waited for it.
    pub(crate) fn grown(&mut self, lease: u64, n_ready: u32) -> Vec<J> {
        let Some(holding) = self.held.get_mut(&lease) else {
            return Vec::new();
        };
        holding.n_ready = holding.n_ready.max(n_ready);
        std::mem::take(&mut holding.waiting)
    }

    /// No further heartbeats, and no release, for a lease that the producer does not have. Returns what waits in vain.
    pub(crate) fn forget(&mut self, lease: u64) -> Vec<J> {
        let Some(holding) = self.held.get_mut(&lease) else {
            return Vec::new();
        };
        holding.is_gone = true;
        std::mem::take(&mut holding.waiting)
    }

    /// The producer has forgotten, if it ever knew, who watches.
    pub(crate) fn reconnected(&mut self) {
        self.fresh = self.alive();
    }

    /// The producer cannot be reached: releases are lost, and what waits returned.
    pub(crate) fn unreachable(&mut self) -> Vec<J> {
        self.to_release.clear();
        self.end_waiting()
    }

    /// Nothing will grow any more.
    pub(crate) fn end_waiting(&mut self) -> Vec<J> {
        let holdings = self.held.values_mut();
        let waiting = holdings.flat_map(|holding| std::mem::take(&mut holding.waiting));
        waiting.collect()
    }

    /// Whether something cannot wait for the next heartbeat.
    pub(crate) fn is_pressing(&self) -> bool {
        !self.to_release.is_empty() || !self.fresh.is_empty()
    }

    /// Whether there is anything to say at all.
    pub(crate) fn is_needed(&self) -> bool {
        !self.is_empty() || !self.to_release.is_empty()
    }

    /// Whether nothing is held that the producer has.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.values().all(|holding| holding.is_gone)
    }

    fn alive(&self) -> Vec<u64> {
        let alive = self.held.iter().filter(|(_, holding)| !holding.is_gone);
        alive.map(|(&lease, _)| lease).collect()
    }

    /// What is to be said now: of all leases if their heartbeat is due, else of the new ones and those let go.
    pub(crate) fn news(&mut self, is_due: bool, is_cancelled: impl Fn(&J) -> bool) -> News<J> {
        let fresh = std::mem::take(&mut self.fresh);
        let release = |(lease, token)| Message::Release { lease, token };
        let released = std::mem::take(&mut self.to_release);
        let mut messages: Vec<_> = released.into_iter().map(release).collect();
        let watch = |&lease: &u64| {
            let growing = self.held.get(&lease).filter(|held| held.is_growing);
            let token = growing?.token;
            Some(Message::Watch { lease, token })
        };
        messages.extend(fresh.iter().filter_map(watch));
        let to_beat = match is_due {
            true => self.alive(),
            false => fresh,
        };
        let right = |&lease: &u64| Some((lease, self.held.get(&lease)?.token));
        let heartbeat = |leases: &[u64]| Message::Heartbeat {
            leases: leases.iter().filter_map(right).collect(),
        };
        messages.extend(to_beat.chunks(MAX_HEARTBEAT).map(heartbeat));
        let is_idle = self.is_empty();
        if is_due && is_idle {
            messages.push(Message::Ping { id: 0 });
        }
        let is_cancelled = |job: &mut J| is_cancelled(job);
        let waiting = self.held.values_mut().map(|holding| &mut holding.waiting);
        let cancelled = waiting.flat_map(|jobs| jobs.extract_if(.., is_cancelled));
        News {
            messages,
            cancelled: cancelled.collect(),
            is_idle,
        }
    }

    /// Between two heartbeats: the shortest that a lease needs.
    pub(crate) fn interval(&self) -> Duration {
        self.interval.unwrap_or(MAX_INTERVAL)
    }

    /// How long a producer may say nothing.
    pub(crate) fn patience(&self) -> Duration {
        (self.interval() * MAX_SILENCE).max(MAX_INTERVAL * 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(5);
    const TOKEN: LeaseToken = LeaseToken([7; 32]);

    fn said(holdings: &mut Holdings<u8>, is_due: bool) -> Vec<Message> {
        holdings.news(is_due, |_| false).messages
    }

    fn beat(leases: &[u64]) -> Message {
        let leases = leases.iter().map(|&lease| (lease, TOKEN)).collect();
        Message::Heartbeat { leases }
    }

    fn release(lease: u64) -> Message {
        let token = TOKEN;
        Message::Release { lease, token }
    }

    fn hold(holdings: &mut Holdings<u8>, lease: u64, ttl: Duration) {
        assert!(holdings.hold(lease, TOKEN, false, ttl));
    }

    fn hold_growing(holdings: &mut Holdings<u8>, lease: u64) {
        assert!(holdings.hold(lease, TOKEN, true, TTL));
    }

    #[test]
    fn a_new_lease_is_spoken_of_at_once_and_the_others_when_it_is_time() {
        let mut holdings = Holdings::default();
        hold(&mut holdings, 1, TTL);
        assert_eq!(said(&mut holdings, false), [beat(&[1])]);
        hold_growing(&mut holdings, 2);
        let watch = Message::Watch {
            lease: 2,
            token: TOKEN,
        };
        assert!(holdings.is_pressing());
        assert_eq!(said(&mut holdings, false), [watch.clone(), beat(&[2])]);
        assert!(!holdings.is_pressing());
        assert_eq!(said(&mut holdings, true), [beat(&[1, 2])]);
        holdings.reconnected();
        assert_eq!(said(&mut holdings, false), [watch, beat(&[1, 2])]);
    }

    #[test]
    fn the_last_holder_has_the_lease_released() {
        let mut holdings = Holdings::default();
        hold(&mut holdings, 1, TTL);
        hold(&mut holdings, 1, TTL);
        said(&mut holdings, false);
        holdings.let_go(1, true);
        assert_eq!(said(&mut holdings, false), []);
        holdings.let_go(1, true);
        assert!(holdings.is_needed() && holdings.is_empty());
        assert_eq!(
            said(&mut holdings, true),
            [release(1), Message::Ping { id: 0 }]
        );
        hold(&mut holdings, 2, TTL);
        holdings.let_go(2, false);
        assert!(!holdings.is_needed());
    }

    #[test]
    fn what_waits_goes_on_when_its_lease_grows_and_ends_when_it_is_gone() {
        let mut holdings = Holdings::default();
        hold_growing(&mut holdings, 1);
        assert_eq!(holdings.n_ready(1), Some(0));
        holdings.keep(1, 10);
        assert_eq!(holdings.grown(1, 8), [10]);
        assert_eq!(
            (holdings.grown(1, 4), holdings.n_ready(1)),
            (vec![], Some(8))
        );
        holdings.keep(1, 11);
        holdings.keep(1, 12);
        assert_eq!(holdings.news(false, |job| *job == 11).cancelled, [11]);
        assert_eq!(holdings.forget(1), [12]);
        assert_eq!((holdings.n_ready(1), holdings.grown(1, 9)), (None, vec![]));
    }

    #[test]
    fn who_held_a_lease_before_it_was_gone_takes_nothing_from_who_holds_it_again() {
        let mut holdings = Holdings::default();
        hold_growing(&mut holdings, 1);
        assert!(holdings.forget(1).is_empty());
        assert_eq!((holdings.n_ready(1), holdings.is_needed()), (None, false));
        hold_growing(&mut holdings, 1);
        holdings.keep(1, 10);
        holdings.let_go(1, true);
        assert!(!said(&mut holdings, true).is_empty(), "it is held");
        assert_eq!(holdings.grown(1, 4), [10]);
        holdings.let_go(1, true);
        assert_eq!(said(&mut holdings, false), [release(1)]);
        hold(&mut holdings, 2, TTL);
        assert!(holdings.forget(2).is_empty());
        holdings.let_go(2, true);
        assert!(!holdings.is_needed(), "what is gone is not released");
    }

    #[test]
    fn a_lease_is_not_held_by_two_rights() {
        let mut holdings = Holdings::default();
        hold_growing(&mut holdings, 1);
        assert!(!holdings.hold(1, LeaseToken([8; 32]), true, TTL));
        holdings.let_go(1, true);
        assert_eq!(said(&mut holdings, false), [release(1)]);
        assert!(holdings.hold(1, LeaseToken([8; 32]), true, TTL));
    }

    #[test]
    fn heartbeats_come_as_often_as_the_shortest_lease_needs() {
        let mut holdings = Holdings::<u8>::default();
        assert_eq!(holdings.interval(), MAX_INTERVAL);
        hold(&mut holdings, 1, 2 * TTL);
        assert_eq!(holdings.interval(), 2 * TTL / 5);
        hold(&mut holdings, 2, TTL);
        hold(&mut holdings, 3, 2 * TTL);
        assert_eq!(holdings.interval(), TTL / 5);
        (1..=3).for_each(|lease| holdings.let_go(lease, false));
        hold(&mut holdings, 4, 100 * TTL);
        assert_eq!(holdings.interval(), MAX_INTERVAL);
    }
}
