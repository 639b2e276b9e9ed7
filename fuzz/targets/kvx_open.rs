//! An `OPEN` against leases of several shapes: what is sent lies within the lease and is never more than was granted.
//! Input: four bytes of shape, then the message's body.
#![no_main]

use baton_kv::{DType, KvLayout};
use baton_kv_transfer::fuzzing::pieces;
use baton_kv_transfer::wire::{Message, decode_message};
use libfuzzer_sys::fuzz_target;

const OPEN: u8 = 7;

fuzz_target!(|input: &[u8]| {
    let Some((&[shape, blocks, chunk, factor], body)) = input.split_first_chunk() else {
        return;
    };
    let Ok(Message::Open(open)) = decode_message(OPEN, body) else {
        return;
    };
    let layout = KvLayout {
        n_layers: u32::from(shape & 3),
        n_kv_heads: u32::from(shape >> 2 & 3),
        head_dim: u32::from(shape >> 4 & 3),
        block_size: u32::from(shape >> 6),
        dtype: DType::BF16,
        model_fingerprint: 0,
    };
    let lease_blocks = u32::from(blocks);
    let chunk_bytes = usize::from(chunk) * usize::from(factor);
    let Some(pieces) = pieces(&layout, lease_blocks, &open, chunk_bytes) else {
        return;
    };
    let lease_bytes = layout.block_bytes() * lease_blocks as usize;
    assert!(
        pieces
            .iter()
            .all(|p| p.start < p.end && p.end <= lease_bytes)
    );
    let sent: usize = pieces.iter().map(ExactSizeIterator::len).sum();
    assert!(sent as u64 <= open.credit);
    let asked = layout.block_bytes() * open.n_blocks as usize;
    if open.want.is_empty() && open.credit >= asked as u64 {
        assert_eq!(sent, asked);
    }
});
