//! Blocks of every storage type: all bytes stand for something, and slices that do not fit are left alone.
//! Input: the type, the room for elements beyond what fits, then blocks.
#![no_main]

use baton_model::Storage;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&[id, more], bytes)) = input.split_first_chunk() else {
        return;
    };
    let Some(storage) = Storage::from_ggml(u32::from(id)) else {
        return;
    };
    let elements = bytes.len() / storage.block_bytes() * storage.block_elements();
    let mut out = vec![f32::MAX; elements + usize::from(more)];
    storage.dequantize(bytes, &mut out);
    assert!(out[elements..].iter().all(|&x| x == f32::MAX));
    storage.dequantize(bytes, &mut out[..elements / 2]);
});
