//! What is remembered of earlier decisions beside prefixes: when a server was last used for a prompt that nobody had,
//! and where sessions are. Both are bounded.

use crate::EndpointId;
use rustc_hash::FxHashMap;
use std::time::Duration;

/// The order in which servers were last used.
#[derive(Debug)]
pub(crate) struct Recency {
    most: usize,
    clock: u64,
    last: FxHashMap<EndpointId, u64>,
}

impl Recency {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            clock: 0,
            last: FxHashMap::default(),
        }
    }

    /// When `server` was used, as a number that grows; 0 for never.
    pub(crate) fn of(&self, server: EndpointId) -> u64 {
        self.last.get(&server).copied().unwrap_or(0)
    }

    pub(crate) fn used(&mut self, server: EndpointId) {
        self.clock += 1;
        if self.last.len() >= self.most
            && !self.last.contains_key(&server)
            && let Some(oldest) = (self.last.iter())
                .min_by_key(|(_, when)| **when)
                .map(|(server, _)| *server)
        {
            self.last.remove(&oldest);
        }
        self.last.insert(server, self.clock);
    }

    pub(crate) fn forget(&mut self, server: EndpointId) {
        self.last.remove(&server);
    }
}

/// Most sessions of each generation.
const PER_GENERATION: usize = 1 << 16;

/// Which server a session is at; sessions are known by keyed hashes of their names, and two with the same hash share a
/// server, which costs nothing. Two generations: when the young one is full it becomes the old one, whose sessions
/// are forgotten unless they come again before the next time.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    young: FxHashMap<u64, Stay>,
    old: FxHashMap<u64, Stay>,
}

#[derive(Clone, Copy, Debug)]
struct Stay {
    server: EndpointId,
    since: Duration,
}

impl Sessions {
    /// The session's server, if it was there less than `idle` ago.
    pub(crate) fn find(&self, session: u64, now: Duration, idle: Duration) -> Option<EndpointId> {
        let stay = self
            .young
            .get(&session)
            .or_else(|| self.old.get(&session))?;
        (now.saturating_sub(stay.since) < idle).then_some(stay.server)
    }

    pub(crate) fn stays(&mut self, session: u64, server: EndpointId, now: Duration) {
        if self.young.len() >= PER_GENERATION && !self.young.contains_key(&session) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(session, Stay { server, since: now });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_that_was_used_longest_ago_is_forgotten_first() {
        let mut recency = Recency::new(2);
        for server in [1, 2, 1, 3] {
            recency.used(EndpointId(server));
        }
        assert_eq!([1, 2, 3].map(|s| recency.of(EndpointId(s))), [3, 0, 4]);
        recency.forget(EndpointId(3));
        assert_eq!(recency.of(EndpointId(3)), 0);
    }

    #[test]
    fn a_session_stays_until_it_was_idle_too_long_or_too_many_came_after_it() {
        let s = Duration::from_secs;
        let mut sessions = Sessions::default();
        sessions.stays(1, EndpointId(1), s(10));
        let find = |sessions: &Sessions, now| sessions.find(1, s(now), s(5));
        assert_eq!(
            [10, 14, 15].map(|now| find(&sessions, now)),
            [Some(EndpointId(1)), Some(EndpointId(1)), None]
        );
        for i in 0..PER_GENERATION as u64 {
            sessions.stays(2 + i, EndpointId(2), s(11));
        }
        assert_eq!(find(&sessions, 11), Some(EndpointId(1)));
        for i in 0..=PER_GENERATION as u64 {
            sessions.stays(1 << 32 | i, EndpointId(2), s(11));
        }
        assert_eq!(find(&sessions, 11), None);
        assert!(sessions.young.len() + sessions.old.len() <= 2 * PER_GENERATION);
    }
}
