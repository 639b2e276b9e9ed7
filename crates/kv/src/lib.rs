//! The words that every part of baton uses for KV cache: block ids, chained block hashes, layouts,
//! events of a prefix cache.
//! Plain data and pure functions; no I/O.
#![forbid(unsafe_code)]

mod events;
pub mod fp8;
mod hash;
mod layout;
mod params;

pub use events::{BlockEvent, CacheChange, EngineHash, Medium, Removed, Stored};
pub use hash::{BlockHash, BlockHasher};
pub use layout::{DType, KvLayout, LayoutError};
pub use params::{
    Fingerprint, KvTransferParams, KvTransferRequest, Kvx, LeaseToken, ParamsError, UUID_LIMIT,
};

/// Index of a block in one server's pool. A private handle: it means nothing on another server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);
