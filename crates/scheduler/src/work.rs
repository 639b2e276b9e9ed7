//! Prompts as work: what a server has to compute before a request's first token, and what is left of what it was sent.
//!
//! Work is counted in prompt tokens at short contexts. A token at a long context is more work, since it attends to all of
//! it. Everything here is known to whoever sends requests and sees when they are answered; nothing is asked of servers,
//! so nothing is out of date.

use std::time::Duration;

/// How fast servers' answers are taken into account: what was learned counts half after so many answers.
const MEMORY: f64 = 200.0;

/// More waiting requests a server than this make no difference: were a wait to count nothing, one server would get it all.
const MOST_CROWDED: f64 = 4.0;

/// What counts how much when a server is chosen, and how long contexts weigh.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// For work that waits at a server, beside 1 for the request's own: the request would wait for it, but what it has to
    /// compute again elsewhere delays others as well, and pushes something out of a cache.
    pub queued: f64,
    /// How much less waiting work counts for each request that waits at a server, on average over the fleet: when all
    /// are busy, work saved is worth more than a short wait.
    pub crowd: f64,
    /// For a request that is under way at a server, in prompt tokens: it slows down every step.
    pub active: f64,
    /// Tokens of context at which a prompt token is twice the work.
    pub double_at: f64,
}

/// Chosen with `baton simulate`: the published conversation trace on 8 servers, at 60, 90 and 120 % of what they can do.
/// `double_at` is that of Llama-3.3-70B: 2.6 MFLOP for each pair of tokens, 137 GFLOP for each token.
impl Default for Costs {
    fn default() -> Self {
        Self {
            queued: 0.1,
            crowd: 0.3,
            active: 10.0,
            double_at: 52_000.0,
        }
    }
}

/// Work that was sent to a server and not answered yet.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Backlog {
    work: f64,
    requests: u32,
    /// When the first of the requests was begun.
    since: Duration,
}

/// How fast servers work, learned from when they answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    work: f64,
    seconds: f64,
}

impl Costs {
    /// The work of a prompt of `tokens`, the last `uncached` of which have to be computed.
    #[must_use]
    pub fn work(&self, tokens: u64, uncached: u64) -> f64 {
        let (tokens, uncached) = (tokens as f64, uncached.min(tokens) as f64);
        uncached * (1.0 + (tokens - uncached / 2.0) / self.double_at)
    }

    /// What waiting work counts in a fleet where, on average, `waiting` requests wait at a server.
    #[must_use]
    pub fn queued_with(&self, waiting: f64) -> f64 {
        self.queued / (1.0 + self.crowd * waiting.min(MOST_CROWDED))
    }

    /// What it costs to send a request to a server, in prompt tokens: less is better. `own` is the request's work there,
    /// `left` the work that waits there, `queued` what that counts, `active` the number of requests under way there.
    #[must_use]
    pub fn of(&self, own: f64, left: f64, queued: f64, active: u32) -> f64 {
        own + queued * left + self.active * f64::from(active)
    }
}

impl Backlog {
    /// Notes a request that was sent at the time `now`.
    pub fn send(&mut self, work: f64, now: Duration) {
        if self.requests == 0 {
            self.since = now;
        }
        self.requests += 1;
        self.work += work;
    }

    /// Notes that a request was answered, or given up, at the time `now`; prompts are computed in the order in which they
    /// came, so the next one is begun now.
    pub fn answer(&mut self, work: f64, now: Duration, pace: &mut Pace) {
        pace.learn(work, now.saturating_sub(self.since));
        self.requests = self.requests.saturating_sub(1);
        self.work = if self.requests == 0 {
            0.0
        } else {
            (self.work - work).max(0.0)
        };
        self.since = now;
    }

    /// How many requests it is.
    #[must_use]
    pub fn requests(&self) -> u32 {
        self.requests
    }

    /// All of it, what is done of it included.
    #[must_use]
    pub fn work(&self) -> f64 {
        self.work
    }

    /// What is probably left of it. At least a little, as long as there is no answer.
    #[must_use]
    pub fn left(&self, now: Duration, pace: &Pace) -> f64 {
        let done = now.saturating_sub(self.since).as_secs_f64() * pace.per_second();
        (self.work - done).max(self.work * 0.02)
    }
}

impl Pace {
    /// A pace of `per_second`, until something is learned.
    #[must_use]
    pub fn new(per_second: f64) -> Self {
        Self {
            work: per_second,
            seconds: 1.0,
        }
    }

    /// Work a second of a server that has some.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        self.work / self.seconds
    }

    fn learn(&mut self, work: f64, time: Duration) {
        let keep = 1.0 - std::f64::consts::LN_2 / MEMORY;
        self.work = self.work * keep + work;
        self.seconds = (self.seconds * keep + time.as_secs_f64()).max(1e-6);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_token_at_a_long_context_is_more_work() {
        let costs = Costs {
            double_at: 1000.0,
            ..Costs::default()
        };
        assert!((costs.work(1000, 1000) - 1500.0).abs() < 1e-9);
        assert!((costs.work(1000, 100) - 195.0).abs() < 1e-9);
        assert!(costs.work(100, 500) <= costs.work(100, 100) + 1e-9);
    }

    #[test]
    fn what_waits_is_worked_off_at_the_pace_that_was_seen() {
        let (mut backlog, mut pace) = (Backlog::default(), Pace::new(100.0));
        backlog.send(100.0, secs(0.0));
        backlog.send(50.0, secs(0.5));
        assert!((backlog.left(secs(0.5), &pace) - 100.0).abs() < 1e-9);
        assert!((backlog.left(secs(9.0), &pace) - 3.0).abs() < 1e-9);
        backlog.answer(100.0, secs(2.0), &mut pace);
        assert!(pace.per_second() < 100.0 && backlog.requests() == 1);
        assert!((backlog.left(secs(2.0), &pace) - 50.0).abs() < 1e-9);
        backlog.answer(50.0, secs(3.0), &mut pace);
        assert_eq!((backlog.requests(), backlog.work()), (0, 0.0));
        for _ in 0..2000 {
            backlog.send(10.0, secs(10.0));
            backlog.answer(10.0, secs(10.2), &mut pace);
        }
        assert!((pace.per_second() - 50.0).abs() < 1.0, "{pace:?}");
    }

    #[test]
    fn the_busier_all_are_the_less_a_wait_counts() {
        let costs = Costs::default();
        assert!(costs.queued_with(4.0) < costs.queued_with(0.0) / 2.0);
        assert!(costs.of(100.0, 0.0, 0.1, 0) < costs.of(100.0, 10.0, 0.1, 0));
    }
}
