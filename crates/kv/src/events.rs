//! What a server says of its prefix cache: which blocks it has now, and which no longer. The words are vLLM's
//! (`vllm/distributed/kv_events.py`); how they travel is another crate's.

use crate::BlockHash;

/// A block's name in the server's own cache: the number it published, or the last eight bytes of a longer hash, big
/// endian. Two servers may use the same number for different blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineHash(pub u64);

impl EngineHash {
    /// The name that stands for a hash published as bytes, of whatever length.
    #[must_use]
    pub fn from_bytes(hash: &[u8]) -> Self {
        let mut last = [0; 8];
        let n = hash.len().min(8);
        last[8 - n..].copy_from_slice(&hash[hash.len() - n..]);
        Self(u64::from_be_bytes(last))
    }
}

impl From<BlockHash> for EngineHash {
    fn from(hash: BlockHash) -> Self {
        Self::from_bytes(&hash.0)
    }
}

/// What an engine of ours says of its own cache, of which it knows whole hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheChange {
    /// Blocks can be found now, each the parent of the next.
    Stored {
        /// The block before the first one; `None` if it begins a prompt.
        parent: Option<BlockHash>,
        /// The blocks.
        hashes: Vec<BlockHash>,
        /// Their tokens, one block after another.
        tokens: Vec<u32>,
    },
    /// Blocks cannot be found any more.
    Removed(Vec<BlockHash>),
    /// Nothing can be found any more.
    Cleared,
}

impl CacheChange {
    /// The same as others hear it, from a server whose blocks have `block_size` tokens.
    #[must_use]
    pub fn to_event(&self, block_size: u32) -> BlockEvent {
        let names = |hashes: &[BlockHash]| hashes.iter().map(|&h| h.into()).collect();
        match self {
            Self::Stored {
                parent,
                hashes,
                tokens,
            } => BlockEvent::Stored(Stored {
                hashes: names(hashes),
                parent: parent.map(EngineHash::from),
                tokens: tokens.clone(),
                block_size,
                ..Stored::default()
            }),
            Self::Removed(hashes) => BlockEvent::Removed(Removed {
                hashes: names(hashes),
                ..Removed::default()
            }),
            Self::Cleared => BlockEvent::Cleared,
        }
    }
}

/// Something that happened in a server's cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockEvent {
    /// Blocks can be found now.
    Stored(Stored),
    /// Blocks cannot be found any more.
    Removed(Removed),
    /// Nothing is cached any more, on no tier.
    Cleared,
}

/// A run of blocks, each the parent of the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// The blocks, first to last.
    pub hashes: Vec<EngineHash>,
    /// The block before the first one; `None` if it begins a prompt.
    pub parent: Option<EngineHash>,
    /// Their tokens, one block after another. Empty: the blocks were known, and are on `medium` now as well.
    pub tokens: Vec<u32>,
    /// Tokens of one block.
    pub block_size: u32,
    /// Name of the adapter, or its number as text; `None` for the base model.
    pub adapter: Option<Box<str>>,
    /// Where they are.
    pub medium: Medium,
    /// What else went into each block's hash (images, a cache salt), one list a block; empty if nothing did.
    pub extra: Vec<Vec<Box<str>>>,
    /// The group of layers that shares these blocks, in models that have several.
    pub group: Option<u32>,
}

/// Blocks that are gone from one tier.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// The blocks.
    pub hashes: Vec<EngineHash>,
    /// Where they were.
    pub medium: Medium,
    /// The group of layers, as in [`Stored::group`].
    pub group: Option<u32>,
}

/// Where a block is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Medium {
    /// In the accelerator's memory, or unsaid.
    #[default]
    Device,
    /// In host memory.
    Host,
    /// On a disk, or further away.
    Other,
}
