//! Prompts as work: what a server has to compute before a request's first token, and what is left of what it was sent.
//!
//! Work is counted in prompt tokens at short contexts. A token at a long context is more work, since it attends to all of
//! it. Everything here is known to whoever sends requests and sees when they are answered; nothing is asked of servers,
//! so nothing is out of date.

use std::time::Duration;

/// How fast a server's answers are taken into account: what was learned counts half after so many answers.
const MEMORY: f64 = 50.0;

/// Work a second of a server that has not answered yet.
pub(crate) const UNKNOWN_PACE: f64 = 10_000.0;

/// Of work that should be done by now and is not answered, this part is taken to be left.
const LEAST_LEFT: f64 = 0.02;

/// What counts how much when a server is chosen, and how long contexts weigh.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// For work that waits at a server, beside 1 for the request's own: the request would wait for it, but what it has to
    /// compute again elsewhere delays others as well, and pushes something out of a cache.
    pub queued: f64,
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
            queued: 0.04,
            active: 10.0,
            double_at: 52_000.0,
        }
    }
}

/// Work that was sent to a server and not answered yet, and the pace at which the server was seen to do such work.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Backlog {
    work: f64,
    requests: u32,
    /// When the first of the requests was begun.
    since: Duration,
    pace: Pace,
}

/// Work that a server did, and how long it took; what is long ago counts less.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Pace {
    work: f64,
    seconds: f64,
}

impl Costs {
    /// The work of a prompt of `tokens`, the last `uncached` of which have to be computed.
    #[must_use]
    pub fn work(&self, tokens: f64, uncached: f64) -> f64 {
        let uncached = uncached.min(tokens);
        uncached * (1.0 + (tokens - uncached / 2.0) / self.double_at)
    }

    /// What it costs to send a request to a server, in prompt tokens: less is better. `own` is the request's work there,
    /// `left` the work that waits there, `active` the number of requests under way there.
    #[must_use]
    pub fn of(&self, own: f64, left: f64, active: u32) -> f64 {
        own + self.queued * left + self.active * f64::from(active)
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

    /// Notes that a request was answered at the time `now`; prompts are computed in the order in which they came, so the
    /// next one is begun now.
    pub fn answer(&mut self, work: f64, now: Duration) {
        self.pace.learn(work, now.saturating_sub(self.since));
        self.since = now;
        self.give_up(work);
    }

    /// Notes that a request will not be answered: nothing is learned of it.
    pub fn give_up(&mut self, work: f64) {
        self.requests = self.requests.saturating_sub(1);
        self.work = if self.requests == 0 {
            0.0
        } else {
            (self.work - work).max(0.0)
        };
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
    pub fn left(&self, now: Duration) -> f64 {
        if self.requests == 0 {
            return 0.0;
        }
        let pace = self.pace().unwrap_or(UNKNOWN_PACE);
        let done = now.saturating_sub(self.since).as_secs_f64() * pace;
        (self.work - done).max(self.work * LEAST_LEFT)
    }

    /// Work a second while there is some; `None` before the first answer.
    #[must_use]
    pub fn pace(&self) -> Option<f64> {
        (self.pace.seconds > 0.0).then(|| self.pace.work / self.pace.seconds)
    }
}

impl Pace {
    fn learn(&mut self, work: f64, time: Duration) {
        let keep = 1.0 - std::f64::consts::LN_2 / MEMORY;
        self.work = self.work * keep + work;
        // Several are answered at once where several prompts fit into a step.
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
        assert!((costs.work(1000.0, 1000.0) - 1500.0).abs() < 1e-9);
        assert!((costs.work(1000.0, 100.0) - 195.0).abs() < 1e-9);
        assert!(costs.work(100.0, 500.0) <= costs.work(100.0, 100.0) + 1e-9);
    }

    #[test]
    fn what_waits_is_worked_off_at_the_pace_that_was_seen() {
        let mut backlog = Backlog::default();
        backlog.send(20_000.0, secs(0.0));
        backlog.send(10_000.0, secs(0.5));
        assert!((backlog.left(secs(0.5)) - 25_000.0).abs() < 1e-9);
        assert!((backlog.left(secs(9.0)) - 600.0).abs() < 1e-9);
        backlog.answer(20_000.0, secs(4.0));
        assert_eq!((backlog.pace(), backlog.requests()), (Some(5000.0), 1));
        assert!((backlog.left(secs(5.0)) - 5000.0).abs() < 1e-9);
        backlog.answer(10_000.0, secs(6.0));
        assert_eq!((backlog.requests(), backlog.work()), (0, 0.0));
        for _ in 0..500 {
            backlog.send(10.0, secs(10.0));
            backlog.answer(10.0, secs(10.2));
        }
        let pace = backlog.pace().unwrap();
        assert!((pace - 50.0).abs() < 5.0, "{pace}");
    }

    #[test]
    fn nothing_is_learned_of_what_failed() {
        let mut backlog = Backlog::default();
        backlog.send(1000.0, secs(0.0));
        backlog.send(1000.0, secs(0.0));
        backlog.give_up(1000.0);
        assert_eq!((backlog.pace(), backlog.work()), (None, 1000.0));
    }

    #[test]
    fn a_wait_counts_less_than_work_of_ones_own() {
        let costs = Costs::default();
        assert!(costs.of(100.0, 0.0, 0) < costs.of(100.0, 10.0, 0));
        assert!(costs.of(100.0, 100.0, 0) < costs.of(110.0, 0.0, 0));
    }
}
