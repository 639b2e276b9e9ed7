//! KV that is published while it is being computed.

use std::sync::Arc;

use baton_kv::{BlockId, KvTransferParams};

use baton_shm::Room;

use super::{PublishError, Shared};

/// A lease that grows. Consumers fetch what is there and are told of what comes; dropped before its end, it takes the lease
/// with it.
#[derive(Debug)]
pub struct Building {
    shared: Arc<Shared>,
    /// As it was announced; ids come as blocks do.
    params: KvTransferParams,
    n_tokens: u32,
    n_blocks: u32,
}

impl Building {
    pub(super) fn new(
        shared: Arc<Shared>,
        params: KvTransferParams,
        n_tokens: u32,
        n_blocks: u32,
    ) -> Self {
        Self {
            shared,
            params,
            n_tokens,
            n_blocks,
        }
    }

    /// Tokens that the lease will hold.
    #[must_use]
    pub fn n_tokens(&self) -> u32 {
        self.n_tokens
    }

    /// Memory for the next `n_blocks` blocks.
    ///
    /// # Errors
    /// When the pool has none.
    pub fn room(&self, n_blocks: usize) -> Result<Room, PublishError> {
        self.shared.room(n_blocks)
    }

    /// Adds the next blocks: `data` holds their bytes in the canonical order of [`KvLayout`](baton_kv::KvLayout), of just
    /// these blocks.
    ///
    /// # Errors
    /// When blocks and bytes do not go together or are more than was announced, or the lease is gone.
    pub fn append(&mut self, blocks: &[BlockId], data: Room) -> Result<(), PublishError> {
        let known = self.params.remote_block_ids.len() + blocks.len();
        let fits = !blocks.is_empty()
            && known <= self.n_blocks as usize
            && self
                .shared
                .terms
                .ours
                .block_bytes()
                .checked_mul(blocks.len())
                == Some(data.len());
        if !fits {
            return Err(PublishError::Shape {
                blocks: known,
                tokens: self.n_tokens,
                bytes: data.len(),
            });
        }
        // As many as the layout's sizes allow, so it fits.
        let n = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
        self.shared.append(self.params.uuid, data, n)?;
        self.params
            .remote_block_ids
            .extend(blocks.iter().map(|block| block.0));
        Ok(())
    }

    /// Says how to fetch it, all blocks being there. `None` if blocks are missing; the lease is gone then.
    #[must_use]
    pub fn finish(mut self) -> Option<KvTransferParams> {
        if self.params.remote_block_ids.len() < self.n_blocks as usize {
            return None;
        }
        self.n_blocks = 0;
        let mut params = self.params.clone();
        if let Some(kvx) = &mut params.kvx {
            kvx.early = false;
        }
        Some(params)
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        if self.n_blocks > 0 {
            self.shared.abort(self.params.uuid);
        }
    }
}
