//! Which requests that are being answered are given up, so that others of higher priority can go.
//!
//! Only sheddable requests, those of priority below 0, are given up: the lowest priority first, of equals the newest,
//! which has lost least. At most two at a time, and not before the room that the last ones leave had time to be seen.
//! Room is that of servers that generate: prompts are soon computed, and who waits for that loses little.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::time::Duration;

/// Most requests given up at a time.
const AT_ONCE: usize = 2;
/// Least time between two decisions.
const GRACE: Duration = Duration::from_millis(500);
/// How long the end of a request is waited for before others are given up.
pub const EVICTION_PATIENCE: Duration = Duration::from_secs(10);

/// A request that was let go and has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Running {
    priority: i32,
    /// When it was let go, and its name: of equals the last one.
    newest: Reverse<(Duration, u64)>,
}

impl Running {
    /// A request of `priority` that was let go at `started`. No two have the same `id`.
    pub(super) fn new(id: u64, priority: i32, started: Duration) -> Self {
        Self {
            priority,
            newest: Reverse((started, id)),
        }
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.newest.0.1
    }

    /// Whether it may be given up.
    #[must_use]
    pub fn is_sheddable(&self) -> bool {
        self.priority < 0
    }
}

/// Chooses whom to give up.
#[derive(Debug, Default)]
pub(super) struct Evictor {
    /// Requests that run, those that cannot be given up included.
    in_flight: u32,
    sheddable: BTreeSet<Running>,
    /// Those that were told to end and have not ended yet, and when they were told.
    ending: Vec<(Running, Duration)>,
    decided: Option<Duration>,
}

impl Evictor {
    /// A request was let go.
    pub(super) fn started(&mut self, running: Running) {
        self.in_flight += 1;
        if running.is_sheddable() {
            self.sheddable.insert(running);
        }
    }

    /// It has ended, for whatever reason. Returns how long ago it was told to, if it was.
    pub(super) fn ended(&mut self, now: Duration, running: &Running) -> Option<Duration> {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.sheddable.remove(running);
        let at = self.ending.iter().position(|(r, _)| r == running)?;
        let (_, told) = self.ending.swap_remove(at);
        Some(now.saturating_sub(told))
    }

    /// Whether nobody can be given up.
    pub(super) fn is_empty(&self) -> bool {
        self.sheddable.is_empty()
    }

    /// When time alone may make [`victims`](Self::victims) name somebody next.
    pub(super) fn next_wakeup(&self) -> Option<Duration> {
        let decided = self.decided.filter(|_| !self.is_empty())?;
        let wait = match self.waits(decided) {
            true => EVICTION_PATIENCE,
            false => GRACE,
        };
        Some(decided.saturating_add(wait))
    }

    /// Whom to give up now that requests of priority `blocked` wait, servers being at `saturation`, and nothing let go
    /// from `ceiling` on. Each is named once.
    pub(super) fn victims(
        &mut self,
        now: Duration,
        blocked: i32,
        (saturation, ceiling): (f64, f64),
    ) -> impl Iterator<Item = Running> + use<> {
        let n = if self.may_decide(now) {
            wanted(saturation, ceiling, self.in_flight)
        } else {
            0
        };
        let mut chosen = [None; AT_ONCE];
        for place in chosen.iter_mut().take(n) {
            let lowest = self.sheddable.first().copied();
            let Some(victim) = lowest.filter(|r| r.priority < blocked) else {
                break;
            };
            self.sheddable.remove(&victim);
            self.ending.push((victim, now));
            self.decided = Some(now);
            *place = Some(victim);
        }
        chosen.into_iter().flatten()
    }

    fn may_decide(&self, now: Duration) -> bool {
        let Some(decided) = self.decided else {
            return true;
        };
        let passed = now.saturating_sub(decided);
        // Who does not end by then holds what is not coming back soon.
        passed >= EVICTION_PATIENCE || passed >= GRACE && !self.waits(decided)
    }

    /// Whether any of those that were `decided` on last has not ended.
    fn waits(&self, decided: Duration) -> bool {
        self.ending.iter().any(|(_, told)| *told == decided)
    }
}

/// How many requests have to go until there is room, each leaving an equal part.
fn wanted(saturation: f64, ceiling: f64, in_flight: u32) -> usize {
    let each = saturation / f64::from(in_flight.max(1));
    let excess = saturation - ceiling;
    if !(excess >= 0.0 && each > 0.0) {
        return 0;
    }
    // At the ceiling itself one has to go.
    ((excess / each).ceil() as usize).clamp(1, AT_ONCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn evictor(running: &[(u64, i32, u32)]) -> Evictor {
        let mut evictor = Evictor::default();
        for &(id, priority, started) in running {
            evictor.started(Running::new(id, priority, started * MS));
        }
        // Each of ten is a tenth of what servers bear.
        evictor.in_flight = 10;
        evictor
    }

    fn victims(e: &mut Evictor, now: u32, blocked: i32, saturation: f64) -> Vec<u64> {
        e.victims(now * MS, blocked, (saturation, 1.0))
            .map(|r| r.id())
            .collect()
    }

    #[test]
    fn the_lowest_and_of_equals_the_newest_goes_first() {
        let mut e = evictor(&[(1, -1, 5), (2, -2, 3), (3, -2, 4), (4, 0, 9), (5, 3, 9)]);
        assert_eq!(victims(&mut e, 10, 0, 1.5), [3, 2]);
    }

    #[test]
    fn nobody_goes_for_an_equal_or_without_need() {
        let mut e = evictor(&[(1, -1, 5)]);
        assert_eq!(victims(&mut e, 10, -1, 2.0), [0; 0]);
        assert_eq!(victims(&mut e, 10, -5, 2.0), [0; 0]);
        assert_eq!(victims(&mut e, 10, 0, 0.9), [0; 0]);
        assert_eq!(victims(&mut e, 10, 0, f64::NAN), [0; 0]);
        assert_eq!(victims(&mut e, 10, 0, 1.0), [1]);
    }

    #[test]
    fn one_after_another_with_time_to_see_what_it_brought() {
        let mut e = evictor(&[(1, -1, 5), (2, -1, 6), (3, -1, 7), (4, -1, 8)]);
        assert_eq!(victims(&mut e, 10, 0, 1.05), [4]);
        assert_eq!(victims(&mut e, 509, 0, 1.05), [0; 0]);
        // It has not ended.
        assert_eq!(victims(&mut e, 510, 0, 1.05), [0; 0]);
        let ended = |e: &mut Evictor, now, id, started| {
            e.ended(now * MS, &Running::new(id, -1, started * MS))
        };
        assert_eq!(ended(&mut e, 511, 4, 8), Some(501 * MS));
        e.in_flight = 10;
        assert_eq!(victims(&mut e, 511, 0, 1.15), [3, 2]);
        ended(&mut e, 600, 3, 7);
        assert_eq!(victims(&mut e, 5_000, 0, 1.05), [0; 0]);
        // The other one does not end at all.
        e.in_flight = 10;
        assert_eq!(victims(&mut e, 10_511, 0, 1.05), [1]);
        assert_eq!(ended(&mut e, 20_511, 2, 6), Some(20_000 * MS));
        assert_eq!(ended(&mut e, 20_511, 2, 6), None);
    }
}
