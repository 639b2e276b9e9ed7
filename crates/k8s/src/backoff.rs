//! How long to wait before the next try.

use std::time::Duration;

/// Waits that double from try to try, each shortened by chance so that many who failed together do not return together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    most: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            failures: 0,
        }
    }

    /// The wait after one more failure. `chance` is a fair draw among all numbers.
    pub(crate) fn next(&mut self, chance: u32) -> Duration {
        let doubled = self.first.saturating_mul(1 << self.failures.min(20));
        self.failures = self.failures.saturating_add(1);
        shortened(doubled.min(self.most), chance)
    }

    /// Something went well.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Between half of `wait` and all of it.
pub(crate) fn shortened(wait: Duration, chance: u32) -> Duration {
    let half = wait / 2;
    half + half.mul_f64(f64::from(chance) / f64::from(u32::MAX))
}

/// A draw for [`Backoff::next`].
pub(crate) fn chance() -> u32 {
    // Without randomness, everyone waits the whole time.
    getrandom::u32().unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_limit_and_begin_again() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(100), ms(1000));
        let waits: Vec<_> = (0..6).map(|_| backoff.next(u32::MAX)).collect();
        assert_eq!(
            waits,
            [ms(100), ms(200), ms(400), ms(800), ms(1000), ms(1000)]
        );
        for _ in 0..100 {
            assert_eq!(backoff.next(0), ms(500));
        }
        backoff.reset();
        assert_eq!(backoff.next(0), ms(50));
    }
}
