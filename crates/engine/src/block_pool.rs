//! The pool of KV blocks: reference counts, and blocks found again by what they hold.
//!
//! A block is free when nobody refers to it. A free block keeps its hash until it is reused, so that a later prompt can
//! find it; the one that was free longest goes first, and blocks without a hash before all others.
//! All operations take constant time; none allocates once the pool is built.

use baton_kv::{BlockHash, BlockId};
use rustc_hash::FxHashMap;

/// End of the free list in either direction. Block 0 is never in the list, so its id is free to say so.
const NONE: u32 = 0;

#[derive(Clone, Debug, Default)]
struct Slot {
    refs: u32,
    hash: Option<BlockHash>,
    /// Neighbours in the free list, while free.
    older: u32,
    newer: u32,
}

/// All blocks of a device but block 0, which is the device's scratch.
#[derive(Debug)]
pub(crate) struct BlockPool {
    slots: Vec<Slot>,
    by_hash: FxHashMap<BlockHash, BlockId>,
    oldest: u32,
    newest: u32,
    n_free: usize,
}

impl BlockPool {
    /// A pool of `n_blocks`, block 0 included; the others are free.
    pub(crate) fn new(n_blocks: u32) -> Self {
        let mut pool = Self {
            slots: vec![Slot::default(); n_blocks as usize],
            by_hash: FxHashMap::with_capacity_and_hasher(n_blocks as usize, Default::default()),
            oldest: NONE,
            newest: NONE,
            n_free: 0,
        };
        for id in 1..n_blocks {
            pool.link_newest(id);
        }
        pool
    }

    /// Blocks nobody refers to, those that can still be found by hash included.
    pub(crate) fn n_free(&self) -> usize {
        self.n_free
    }

    /// Blocks in use.
    pub(crate) fn n_used(&self) -> usize {
        self.capacity() - self.n_free
    }

    /// Blocks in all, without block 0.
    pub(crate) fn capacity(&self) -> usize {
        self.slots.len().saturating_sub(1)
    }

    /// Takes the free block that is least worth keeping; it can no longer be found by its old hash.
    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        let id = self.oldest;
        if id == NONE {
            return None;
        }
        self.unlink(id);
        let slot = &mut self.slots[id as usize];
        slot.refs = 1;
        if let Some(hash) = slot.hash.take() {
            self.by_hash.remove(&hash);
        }
        Some(BlockId(id))
    }

    /// The block that holds what `hash` stands for.
    pub(crate) fn find(&self, hash: &BlockHash) -> Option<BlockId> {
        self.by_hash.get(hash).copied()
    }

    /// Adds a reference to a block that [`find`](Self::find) returned.
    pub(crate) fn share(&mut self, id: BlockId) {
        if self.slots[id.0 as usize].refs == 0 {
            self.unlink(id.0);
        }
        self.slots[id.0 as usize].refs += 1;
    }

    /// Whether nobody refers to the block.
    pub(crate) fn is_free(&self, id: BlockId) -> bool {
        self.slots[id.0 as usize].refs == 0
    }

    /// Drops a reference.
    pub(crate) fn release(&mut self, id: BlockId) {
        let slot = &mut self.slots[id.0 as usize];
        debug_assert!(slot.refs > 0, "block {} released twice", id.0);
        slot.refs = slot.refs.saturating_sub(1);
        if slot.refs > 0 {
            return;
        }
        if slot.hash.is_some() {
            self.link_newest(id.0);
        } else {
            self.link_oldest(id.0);
        }
    }

    /// Makes a block in use findable. If another block already holds the same, that one stays the one to be found.
    pub(crate) fn register(&mut self, id: BlockId, hash: BlockHash) {
        let slot = &mut self.slots[id.0 as usize];
        debug_assert!(slot.refs > 0, "only a block in use gets a hash");
        if slot.hash.is_none() && !self.by_hash.contains_key(&hash) {
            slot.hash = Some(hash);
            self.by_hash.insert(hash, id);
        }
    }

    fn link_newest(&mut self, id: u32) {
        let before = self.newest;
        let slot = &mut self.slots[id as usize];
        (slot.older, slot.newer) = (before, NONE);
        self.newest = id;
        if before == NONE {
            self.oldest = id;
        } else {
            self.slots[before as usize].newer = id;
        }
        self.n_free += 1;
    }

    fn link_oldest(&mut self, id: u32) {
        let after = self.oldest;
        let slot = &mut self.slots[id as usize];
        (slot.older, slot.newer) = (NONE, after);
        self.oldest = id;
        if after == NONE {
            self.newest = id;
        } else {
            self.slots[after as usize].older = id;
        }
        self.n_free += 1;
    }

    fn unlink(&mut self, id: u32) {
        let Slot { older, newer, .. } = self.slots[id as usize];
        if older == NONE {
            self.oldest = newer;
        } else {
            self.slots[older as usize].newer = newer;
        }
        if newer == NONE {
            self.newest = older;
        } else {
            self.slots[newer as usize].older = older;
        }
        self.n_free -= 1;
    }
}
