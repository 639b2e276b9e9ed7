//! Host memory that leases hold, and its bound. The last reference to a lease's bytes frees them and their share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::PublishError;

/// The bound, and what is in use of it.
#[derive(Debug)]
pub(super) struct Pool {
    limit: u64,
    used: AtomicU64,
}

/// Bytes that count against a pool as long as they live.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) data: Vec<u8>,
    bytes: u64,
    pool: Arc<Pool>,
}

impl Pool {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            used: AtomicU64::new(0),
        }
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn store(pool: &Arc<Self>, data: Vec<u8>) -> Result<Stored, PublishError> {
        // What the allocator gave counts, not what of it is filled.
        let (bytes, limit) = (data.capacity() as u64, pool.limit);
        let grown = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= limit);
        pool.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown)
            .map_err(|used| PublishError::PoolFull { bytes, used, limit })?;
        Ok(Stored {
            data,
            bytes,
            pool: Arc::clone(pool),
        })
    }
}

impl Drop for Stored {
    fn drop(&mut self) {
        self.pool.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
