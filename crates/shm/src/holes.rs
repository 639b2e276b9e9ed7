//! Which ranges of the arena are free. Pure.
//!
//! The lowest hole that is large enough is taken, so that memory that was touched before is used before fresh memory, which
//! costs a page fault every 4 KiB.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges begin and end at multiples of a cache line.
pub(crate) const GRAIN: usize = 64;

/// The free ranges, none of which touches another.
#[derive(Debug)]
pub(crate) struct Holes {
    /// End by beginning.
    holes: BTreeMap<usize, usize>,
    free: usize,
}

impl Holes {
    /// All of `range` is free, as far as whole grains go.
    pub(crate) fn new(range: Range<usize>) -> Self {
        let range = range.start.next_multiple_of(GRAIN)..range.end / GRAIN * GRAIN;
        let free = range.len();
        let holes = (free > 0).then_some((range.start, range.end));
        Self {
            holes: holes.into_iter().collect(),
            free,
        }
    }

    /// Free bytes, which may lie apart.
    pub(crate) fn free(&self) -> usize {
        self.free
    }

    /// Takes `bytes`, rounded up to whole grains.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<Range<usize>> {
        let bytes = bytes.max(1).checked_next_multiple_of(GRAIN)?;
        let (&start, &end) = self
            .holes
            .iter()
            .find(|&(&start, &end)| end - start >= bytes)?;
        self.holes.remove(&start);
        if end - start > bytes {
            self.holes.insert(start + bytes, end);
        }
        self.free -= bytes;
        Some(start..start + bytes)
    }

    /// Gives back what [`take`](Self::take) gave.
    pub(crate) fn give_back(&mut self, range: Range<usize>) {
        self.free += range.len();
        let Range { mut start, mut end } = range;
        if let Some((&before, _)) = self
            .holes
            .range(..start)
            .next_back()
            .filter(|h| *h.1 == start)
        {
            self.holes.remove(&before);
            start = before;
        }
        if let Some(after) = self.holes.remove(&end) {
            end = after;
        }
        self.holes.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_taken_never_overlaps_and_comes_back_whole(
            steps in prop::collection::vec((any::<bool>(), 0usize..2000), 1..200),
        ) {
            let all = 10..20_000;
            let mut holes = Holes::new(all.clone());
            let total = holes.free();
            let mut taken: Vec<Range<usize>> = Vec::new();
            for (gives, n) in steps {
                if gives && !taken.is_empty() {
                    holes.give_back(taken.swap_remove(n % taken.len()));
                } else if let Some(new) = holes.take(n) {
                    prop_assert!(new.len() >= n && all.start <= new.start && new.end <= all.end);
                    prop_assert!(taken.iter().all(|old| old.end <= new.start || new.end <= old.start));
                    taken.push(new);
                }
                prop_assert_eq!(holes.free(), total - taken.iter().map(Range::len).sum::<usize>());
            }
            taken.into_iter().for_each(|range| holes.give_back(range));
            prop_assert_eq!(holes.take(total).map(|range| range.len()), Some(total), "the holes have joined");
        }
    }

    #[test]
    fn memory_used_before_is_used_first() {
        let mut holes = Holes::new(0..1024);
        let first = holes.take(100).unwrap();
        holes.take(64).unwrap();
        holes.give_back(first.clone());
        assert_eq!(holes.take(128), Some(first));
    }

    #[test]
    fn no_length_overflows() {
        let mut holes = Holes::new(0..1024);
        assert_eq!((holes.take(usize::MAX), holes.take(1025)), (None, None));
        assert_eq!(Holes::new(70..100).take(1), None);
    }
}
