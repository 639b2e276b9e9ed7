//! The words that every part of baton uses for KV cache: block ids, chained block hashes, layouts.
//! Plain data and pure functions; no I/O.

mod hash;
mod layout;

pub use hash::{BlockHash, BlockHasher};
pub use layout::{DType, KvLayout, LayoutError};

/// Index of a block in one server's pool. A private handle: it means nothing on another server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);
