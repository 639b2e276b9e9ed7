//! Chained block hashes.

/// Hash of a block's tokens and of every block before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 32]);

/// Hashes blocks of one chain.
#[derive(Clone, Debug)]
pub struct BlockHasher {
    root: BlockHash,
}

impl BlockHasher {
    /// A hasher whose chains start from `seed` (vLLM: the value of `PYTHONHASHSEED`).
    pub fn new(_seed: &str) -> Self {
        Self { root: BlockHash([0; 32]) }
    }

    /// The parent of a chain's first block.
    pub fn root(&self) -> BlockHash {
        self.root
    }
}
