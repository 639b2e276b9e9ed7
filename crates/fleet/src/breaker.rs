//! Whether a server that seems healthy is used, by what became of the requests sent to it: one that fails several in a
//! row gets none for a while, then one to show whether it has recovered.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Failures in a row after which a server gets nothing.
const LIMIT: u32 = 5;
/// How long it then gets nothing, in milliseconds; doubled after every failure that follows.
const FIRST_PAUSE_MS: u64 = 1_000;
const LONGEST_PAUSE_MS: u64 = 30_000;
/// How long the one request that shows how it is may take, in milliseconds, until another one is sent.
const TRIAL_MS: u64 = 5_000;

/// Times are milliseconds of the fleet's clock. Requests tell at the same time what became of them; an update that gets
/// lost costs a request more or less.
#[derive(Debug, Default)]
pub(crate) struct Breaker {
    failures: AtomicU32,
    closed_until: AtomicU64,
}

impl Breaker {
    /// Whether a request may be sent.
    pub(crate) fn admits(&self, now: u64) -> bool {
        self.failures.load(Relaxed) < LIMIT || now >= self.closed_until.load(Relaxed)
    }

    /// A request is sent. If the server is on trial, the next one waits.
    pub(crate) fn sent(&self, now: u64) {
        if self.failures.load(Relaxed) >= LIMIT {
            self.closed_until.store(now + TRIAL_MS, Relaxed);
        }
    }

    /// A request failed.
    pub(crate) fn failed(&self, now: u64) {
        let before = self.failures.load(Relaxed);
        self.failures.store(before.saturating_add(1), Relaxed);
        if before + 1 >= LIMIT {
            let doublings = (before + 1 - LIMIT).min(8);
            let pause = (FIRST_PAUSE_MS << doublings).min(LONGEST_PAUSE_MS);
            self.closed_until.store(now + pause, Relaxed);
        }
    }

    /// A request was answered, or the server begins anew.
    pub(crate) fn recovered(&self) {
        self.failures.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_in_a_row_close_it_and_one_trial_at_a_time_opens_it() {
        let breaker = Breaker::default();
        for _ in 0..4 {
            breaker.failed(0);
        }
        assert!(breaker.admits(0));
        breaker.recovered();
        for _ in 0..5 {
            assert!(breaker.admits(10));
            breaker.failed(10);
        }
        assert!(!breaker.admits(10) && !breaker.admits(1_009));
        assert!(breaker.admits(1_010));
        breaker.sent(1_010);
        assert!(!breaker.admits(1_011) && breaker.admits(6_010));
        breaker.failed(1_020);
        assert!(!breaker.admits(3_019) && breaker.admits(3_020));
        for _ in 0..100 {
            breaker.failed(5_000);
        }
        assert!(!breaker.admits(34_999) && breaker.admits(35_000));
        breaker.recovered();
        assert!(breaker.admits(0));
    }
}
