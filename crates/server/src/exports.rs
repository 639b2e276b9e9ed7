//! Room for KV that other servers will fetch, promised before it is computed: a prompt whose KV cannot be kept would be
//! computed for nothing, and then once more by whoever asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use baton_kv::KvLayout;

/// The room of one server.
#[derive(Debug)]
pub(crate) struct ExportRoom {
    limit: u64,
    layout: KvLayout,
    /// Bytes of KV that is yet to be computed.
    promised: Arc<AtomicU64>,
}

impl ExportRoom {
    pub(crate) fn new(limit: u64, layout: KvLayout) -> Self {
        Self {
            limit,
            layout,
            promised: Arc::default(),
        }
    }

    /// Promises room for the KV of `n_tokens` tokens beside the bytes `held` already; `None` if there is none.
    pub(crate) fn promise(&self, n_tokens: usize, held: u64) -> Option<Promise> {
        let bytes = self.layout.blocks_for(n_tokens) * self.layout.block_bytes();
        let promise = Promise {
            promised: Arc::clone(&self.promised),
            bytes: bytes as u64,
        };
        let before = self.promised.fetch_add(promise.bytes, Ordering::Relaxed);
        let needed = held.saturating_add(before).saturating_add(promise.bytes);
        (needed <= self.limit).then_some(promise)
    }
}

/// Room that is kept free for one prompt. Dropping it gives back what was not used.
#[derive(Debug)]
pub(crate) struct Promise {
    promised: Arc<AtomicU64>,
    bytes: u64,
}

impl Promise {
    /// So many of its bytes are held now.
    pub(crate) fn keep(&mut self, bytes: usize) {
        let kept = self.bytes.min(bytes as u64);
        self.bytes -= kept;
        self.promised.fetch_sub(kept, Ordering::Relaxed);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.promised.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_kv::DType;

    #[test]
    fn what_is_promised_and_what_is_held_share_the_room() {
        let layout = KvLayout {
            n_layers: 1,
            n_kv_heads: 1,
            head_dim: 1,
            block_size: 10,
            dtype: DType::F32,
            model_fingerprint: 1,
        };
        let block = layout.block_bytes() as u64;
        let room = ExportRoom::new(5 * block, layout);
        let mut first = room.promise(21, 0).unwrap();
        assert!(room.promise(21, 0).is_none());
        let second = room.promise(20, 0).unwrap();
        assert!(room.promise(1, 0).is_none());
        drop(second);
        first.keep(2 * block as usize);
        assert!(room.promise(30, 2 * block).is_none());
        assert!(room.promise(20, 2 * block).is_some());
        drop(first);
        assert!(room.promise(50, 0).is_some() && room.promise(50, 1).is_none());
    }
}
