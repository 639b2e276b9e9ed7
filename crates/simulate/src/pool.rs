//! A modelled server's KV pool: blocks in use, and blocks kept in case their prefix comes again.

use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// A KV pool with a prefix cache that lets go of what was used longest ago.
#[derive(Debug)]
pub(crate) struct Pool {
    capacity: usize,
    /// Blocks that can be found.
    named: FxHashMap<u64, Named>,
    /// Blocks in use that cannot be found: answers, and prompts that are not computed yet.
    unnamed: usize,
    /// Those of `named` that are in use.
    in_use: usize,
    /// Blocks in the order in which they were let go; what was used since, or let go again, is in it still.
    idle: VecDeque<(u64, u64)>,
    clock: u64,
    changes: Option<Vec<Change>>,
}

#[derive(Clone, Copy, Debug)]
struct Named {
    uses: u32,
    /// When it was let go.
    since: u64,
}

/// What can be found now, or cannot any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A block, after its parent.
    Stored(Option<u64>, u64),
    Removed(u64),
}

impl Pool {
    /// A pool of `capacity` blocks. `watched`: changes are noted.
    pub(crate) fn new(capacity: usize, watched: bool) -> Self {
        Self {
            capacity,
            named: FxHashMap::default(),
            unnamed: 0,
            in_use: 0,
            idle: VecDeque::new(),
            clock: 0,
            changes: watched.then(Vec::new),
        }
    }

    /// How many leading blocks are there.
    pub(crate) fn matched(&self, blocks: &[u64]) -> usize {
        blocks
            .iter()
            .take_while(|b| self.named.contains_key(b))
            .count()
    }

    /// Part of the pool that is in use.
    pub(crate) fn usage(&self) -> f64 {
        (self.in_use + self.unnamed) as f64 / self.capacity.max(1) as f64
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Blocks that can be found.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.named.len()
    }

    /// Takes the `found` blocks, and as many fresh ones as `fresh`. False, and nothing is taken, if there is no room.
    pub(crate) fn take(&mut self, found: &[u64], fresh: usize) -> bool {
        let idle = found
            .iter()
            .filter(|b| self.named.get(b).is_some_and(|n| n.uses == 0));
        if self.in_use + self.unnamed + idle.count() + fresh > self.capacity {
            return false;
        }
        for block in found {
            if let Some(named) = self.named.get_mut(block) {
                self.in_use += usize::from(named.uses == 0);
                named.uses += 1;
            }
        }
        self.unnamed += fresh;
        while self.named.len() + self.unnamed > self.capacity && self.evict() {}
        true
    }

    /// A fresh block has been computed and can be found; it stays in use.
    pub(crate) fn name(&mut self, parent: Option<u64>, block: u64) {
        // If another request computed the same meanwhile, the two share that from now on.
        self.unnamed -= 1;
        let mut new = false;
        let named = self.named.entry(block).or_insert_with(|| {
            new = true;
            Named { uses: 0, since: 0 }
        });
        self.in_use += usize::from(named.uses == 0);
        named.uses += 1;
        if let (true, Some(changes)) = (new, &mut self.changes) {
            changes.push(Change::Stored(parent, block));
        }
    }

    /// Lets go of blocks, the last one first, and of fresh ones.
    pub(crate) fn free(&mut self, blocks: &[u64], fresh: usize) {
        self.unnamed -= fresh;
        for &block in blocks.iter().rev() {
            let Some(named) = self.named.get_mut(&block) else {
                continue;
            };
            named.uses -= 1;
            if named.uses == 0 {
                self.in_use -= 1;
                self.clock += 1;
                named.since = self.clock;
                self.idle.push_back((block, self.clock));
            }
        }
        if self.idle.len() > 4 * self.capacity + 64 {
            let named = &self.named;
            self.idle.retain(|(block, since)| {
                named
                    .get(block)
                    .is_some_and(|n| n.uses == 0 && n.since == *since)
            });
        }
    }

    /// What changed since it was last asked.
    pub(crate) fn changes(&mut self) -> Vec<Change> {
        self.changes
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    fn evict(&mut self) -> bool {
        while let Some((block, since)) = self.idle.pop_front() {
            let stale = (self.named.get(&block)).is_none_or(|n| n.uses > 0 || n.since != since);
            if stale {
                continue;
            }
            self.named.remove(&block);
            if let Some(changes) = &mut self.changes {
                changes.push(Change::Removed(block));
            }
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_longest_ago_goes_first_and_tails_before_roots() {
        let mut pool = Pool::new(4, true);
        assert!(pool.take(&[], 3));
        for (parent, block) in [(None, 1), (Some(1), 2), (Some(2), 3)] {
            pool.name(parent, block);
        }
        pool.free(&[1, 2, 3], 0);
        assert_eq!(pool.matched(&[1, 2, 3, 4]), 3);
        assert!(pool.take(&[], 2));
        assert_eq!(
            (pool.matched(&[1, 2, 3]), pool.changes().last().copied()),
            (2, Some(Change::Removed(3)))
        );
        assert!(pool.take(&[1], 1) && !pool.take(&[], 1));
        assert_eq!(pool.matched(&[1, 2]), 1);
        pool.free(&[1], 3);
        assert!(pool.usage() < 1e-9 && pool.len() == 1);
    }

    #[test]
    fn two_who_compute_the_same_share_it() {
        let mut pool = Pool::new(4, false);
        assert!(pool.take(&[], 1) && pool.take(&[], 1));
        pool.name(None, 1);
        pool.name(None, 1);
        pool.free(&[1], 0);
        assert!(pool.take(&[], 3) && !pool.take(&[], 1));
        assert_eq!(pool.matched(&[1]), 1);
    }
}
