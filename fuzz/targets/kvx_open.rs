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
    // Two parts, the second of which may be empty.
    let (first, all) = (u32::from(blocks & 15), u32::from(blocks));
    let parts = vec![0..first, first..all];
    let chunk_bytes = usize::from(chunk) * usize::from(factor);
    // A peer that may ask for this much has proved itself; here it would only take long.
    let n = |range: &std::ops::Range<u32>| u64::from(range.end.saturating_sub(range.start));
    let (asked, s) = (n(&open.selection.blocks), &open.selection);
    if asked.saturating_mul(s.block_size.into()) > 1 << 16 {
        return;
    }
    let Some(pieces) = pieces(&layout, parts.clone(), &open, chunk_bytes) else {
        return;
    };
    for (part, piece) in &pieces {
        let bytes = |part: &usize| layout.block_bytes() * parts[*part].len();
        assert!(piece.start < piece.end);
        assert!(part.as_ref().is_none_or(|part| piece.end <= bytes(part)));
    }
    let sent: usize = pieces.iter().map(|(_, piece)| piece.len()).sum();
    assert!(sent as u64 <= open.credit);
    let vector = u64::from(layout.head_dim) * layout.dtype.bytes() as u64;
    let asked = asked * u64::from(s.block_size) * 2 * vector * n(&s.heads) * n(&s.layers);
    if open.want.is_empty() && open.credit >= asked {
        assert_eq!(sent as u64, asked);
    }
});
