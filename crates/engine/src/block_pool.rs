//! The pool of KV blocks: reference counts, and blocks found again by what they hold.
//!
//! A block is free when nobody refers to it. A free block keeps its hash until it is reused, so that a later prompt can
//! find it; the one that was free longest goes first, and blocks without a hash before all others.
//! All operations take constant time; none allocates once the pool is built.

use crate::cache_log::CacheLog;
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
    /// What can be found and what no longer.
    pub(crate) log: CacheLog,
}

impl BlockPool {
    /// A pool of `n_blocks`, block 0 included; the others are free.
    pub(crate) fn new(n_blocks: u32, log: CacheLog) -> Self {
        let n = n_blocks as usize;
        let mut pool = Self {
            slots: vec![Slot::default(); n],
            // Twice the room, so that the table clears what deletions leave behind in place rather than by growing.
            by_hash: FxHashMap::with_capacity_and_hasher(2 * n, Default::default()),
            oldest: NONE,
            newest: NONE,
            n_free: 0,
            log,
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
            self.log.removed(hash);
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

    /// Makes a block in use findable. If another block already holds the same, that one stays the one to be found, and
    /// the answer is no.
    pub(crate) fn register(&mut self, id: BlockId, hash: BlockHash) -> bool {
        let slot = &mut self.slots[id.0 as usize];
        debug_assert!(slot.refs > 0, "only a block in use gets a hash");
        let is_new = slot.hash.is_none() && !self.by_hash.contains_key(&hash);
        if is_new {
            slot.hash = Some(hash);
            self.by_hash.insert(hash, id);
        }
        is_new
    }

    /// Everything that can be found.
    pub(crate) fn findable(&self) -> impl Iterator<Item = &BlockHash> {
        self.by_hash.keys()
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn hash(n: u64) -> BlockHash {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        BlockHash(bytes)
    }

    #[test]
    fn block_zero_is_never_handed_out() {
        let mut pool = BlockPool::new(3, CacheLog::default());
        assert_eq!((pool.capacity(), pool.n_free()), (2, 2));
        let taken = [pool.allocate(), pool.allocate(), pool.allocate()];
        assert_eq!(taken, [Some(BlockId(1)), Some(BlockId(2)), None]);
        assert_eq!(pool.n_used(), 2);
    }

    #[test]
    fn a_free_block_is_found_until_it_is_reused() {
        let mut pool = BlockPool::new(2, CacheLog::default());
        let block = pool.allocate().unwrap();
        pool.register(block, hash(7));
        pool.release(block);
        assert!(pool.is_free(block));
        assert_eq!(pool.find(&hash(7)), Some(block));
        pool.allocate();
        assert_eq!(pool.find(&hash(7)), None);
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn a_double_release_is_noticed() {
        let mut pool = BlockPool::new(2, CacheLog::default());
        let block = pool.allocate().unwrap();
        pool.release(block);
        pool.release(block);
    }

    #[test]
    fn no_churn_of_hashes_makes_the_table_grow() {
        for n_blocks in [2, 8, 56, 57, 113, 1000] {
            let mut pool = BlockPool::new(n_blocks, CacheLog::default());
            let most = pool.by_hash.capacity();
            for n in 0..20_000 {
                let block = pool.allocate().unwrap();
                pool.register(block, hash(n));
                pool.release(block);
                assert!(pool.by_hash.capacity() <= most, "{n_blocks} blocks");
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Allocate,
        /// Finds a hash and shares what is found.
        Share(u64),
        /// Drops the n-th reference that is held.
        Release(usize),
        /// Gives the block of the n-th reference a hash.
        Register(usize, u64),
    }

    const HASHES: u64 = 10;

    fn any_op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => Just(Op::Allocate),
            2 => (0..HASHES).prop_map(Op::Share),
            3 => any::<usize>().prop_map(Op::Release),
            2 => (any::<usize>(), 0..HASHES).prop_map(|(n, h)| Op::Register(n, h)),
        ]
    }

    /// What the pool should do, written down without regard to cost.
    struct Model {
        /// By block; block 0 is there and unused.
        hashes: Vec<Option<u64>>,
        /// Oldest first.
        free: VecDeque<usize>,
        /// A block once for each reference to it.
        held: Vec<usize>,
    }

    impl Model {
        fn find(&self, h: u64) -> Option<usize> {
            self.hashes.iter().position(|&hash| hash == Some(h))
        }

        fn obey(&mut self, op: &Op, pool: &mut BlockPool) {
            match *op {
                Op::Allocate => {
                    let expected = self.free.pop_front();
                    assert_eq!(pool.allocate(), expected.map(|id| BlockId(id as u32)));
                    if let Some(id) = expected {
                        self.hashes[id] = None;
                        self.held.push(id);
                    }
                }
                Op::Share(h) => {
                    if let Some(id) = self.find(h) {
                        pool.share(BlockId(id as u32));
                        self.free.retain(|&free| free != id);
                        self.held.push(id);
                    }
                }
                Op::Release(n) if !self.held.is_empty() => {
                    let id = self.held.swap_remove(n % self.held.len());
                    pool.release(BlockId(id as u32));
                    match (self.held.contains(&id), self.hashes[id]) {
                        (true, _) => {}
                        (false, Some(_)) => self.free.push_back(id),
                        (false, None) => self.free.push_front(id),
                    }
                }
                Op::Register(n, h) if !self.held.is_empty() => {
                    let id = self.held[n % self.held.len()];
                    pool.register(BlockId(id as u32), hash(h));
                    if self.hashes[id].is_none() && self.find(h).is_none() {
                        self.hashes[id] = Some(h);
                    }
                }
                Op::Release(_) | Op::Register(..) => {}
            }
        }

        fn check(&self, pool: &BlockPool) {
            assert_eq!(pool.n_free(), self.free.len());
            assert_eq!(pool.n_used(), self.hashes.len() - 1 - self.free.len());
            for h in 0..HASHES {
                let expected = self.find(h).map(|id| BlockId(id as u32));
                assert_eq!(pool.find(&hash(h)), expected);
            }
            for id in 1..self.hashes.len() {
                let refs = self.held.iter().filter(|&&held| held == id).count();
                assert_eq!(pool.slots[id].refs as usize, refs);
                assert_eq!(pool.is_free(BlockId(id as u32)), self.free.contains(&id));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_pool_does_what_its_model_does(
            n_blocks in 1..9_u32,
            ops in prop::collection::vec(any_op(), 0..120),
        ) {
            let mut pool = BlockPool::new(n_blocks, CacheLog::default());
            let mut model = Model {
                hashes: vec![None; n_blocks as usize],
                free: (1..n_blocks as usize).collect(),
                held: Vec::new(),
            };
            for op in &ops {
                model.obey(op, &mut pool);
                model.check(&pool);
            }
            // Walks the whole list: what is free can be had, in the order of the model.
            for _ in 0..n_blocks {
                model.obey(&Op::Allocate, &mut pool);
            }
            model.check(&pool);
        }
    }
}
