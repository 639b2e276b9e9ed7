//! The last batches, numbered: what subscribers read as they come, and what is answered to who missed some.

use std::collections::VecDeque;

use bytes::Bytes;

/// Most bytes of all batches that are kept.
const MAX_BYTES: usize = 64 << 20;

/// Batches in the order of their numbers, the oldest of which are forgotten.
#[derive(Debug)]
pub(super) struct Log {
    batches: VecDeque<Bytes>,
    /// The number of the first one kept.
    first: u64,
    n_bytes: usize,
    max_batches: usize,
}

impl Log {
    /// A log of at most so many batches; one is kept in any case.
    pub(super) const fn new(max_batches: usize) -> Self {
        Self {
            batches: VecDeque::new(),
            first: 0,
            n_bytes: 0,
            max_batches,
        }
    }

    /// Adds a batch.
    pub(super) fn push(&mut self, batch: Bytes) {
        self.n_bytes += batch.len();
        self.batches.push_back(batch);
        while self.batches.len() > 1
            && (self.batches.len() > self.max_batches || self.n_bytes > MAX_BYTES)
        {
            if let Some(oldest) = self.batches.pop_front() {
                self.n_bytes -= oldest.len();
                self.first += 1;
            }
        }
    }

    /// The number that the next batch will have.
    pub(super) fn next(&self) -> u64 {
        self.first + self.batches.len() as u64
    }

    /// The first batch from `from` on that is kept, with its number, unless it is one of the last `within` ones or
    /// there is none.
    pub(super) fn at(&self, from: u64, within: usize) -> Option<(u64, Bytes)> {
        let oldest = self.next().saturating_sub(within as u64);
        let number = from.max(self.first).max(oldest);
        let i = usize::try_from(number - self.first).ok()?;
        Some((number, self.batches.get(i)?.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_of(n: u8, max_batches: usize) -> Log {
        let mut log = Log::new(max_batches);
        (0..n).for_each(|i| log.push(Bytes::from(vec![i])));
        log
    }

    fn numbers(log: &Log, from: u64, within: usize) -> Vec<u64> {
        let mut next = from;
        let mut seen = Vec::new();
        while let Some((number, batch)) = log.at(next, within) {
            assert_eq!(batch[0], number as u8);
            seen.push(number);
            next = number + 1;
        }
        seen
    }

    #[test]
    fn what_is_asked_for_is_given_as_far_as_it_is_kept() {
        let log = log_of(5, 3);
        assert_eq!(log.next(), 5);
        assert_eq!(numbers(&log, 0, 9), [2, 3, 4]);
        assert_eq!(numbers(&log, 3, 9), [3, 4]);
        assert_eq!(numbers(&log, 0, 1), [4]);
        assert_eq!(numbers(&log, 5, 9), [0; 0]);
        assert_eq!(numbers(&log, 0, 0), [0; 0]);
        assert_eq!(numbers(&log, u64::MAX, 9), [0; 0]);
    }

    #[test]
    fn the_newest_is_kept_whatever_it_weighs() {
        let mut log = log_of(3, 0);
        assert_eq!(numbers(&log, 0, 9), [2]);
        log.push(Bytes::from(vec![3; MAX_BYTES + 1]));
        assert_eq!(numbers(&log, 0, 9), [3]);
        assert_eq!(log.n_bytes, MAX_BYTES + 1);
    }
}
