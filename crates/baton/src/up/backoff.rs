//! How long to wait before a child that ended is started again.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(30);
/// A child that lived this long is taken to be well.
const WELL: Duration = Duration::from_secs(60);

/// The ends in a row of a child that was not well.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The wait after an end, when the child had been ready for `lived`: half a second, doubled after each short life,
    /// at most half a minute.
    pub(super) fn after(&mut self, lived: Duration) -> Duration {
        if lived >= WELL {
            self.failures = 0;
        }
        // 2^6 half seconds are more than the longest wait.
        let wait = FIRST * 2u32.pow(self.failures.min(6));
        self.failures = self.failures.saturating_add(1);
        wait.min(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_half_a_minute_and_starts_anew_after_a_good_minute() {
        let mut backoff = Backoff::default();
        let short: Vec<u128> = (0..9)
            .map(|_| backoff.after(Duration::from_secs(59)).as_millis())
            .collect();
        assert_eq!(
            short,
            [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]
        );
        assert_eq!(backoff.after(WELL), FIRST);
        assert_eq!(backoff.after(Duration::ZERO), 2 * FIRST);
    }
}
