//! The header of a safetensors file: every tensor lies within the file, behind the header. Input: a whole file.
#![no_main]

use baton_model::safetensors::{PREFIX, header_len, parse_header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let Some((&prefix, rest)) = file.split_first_chunk::<PREFIX>() else {
        return;
    };
    let file_len = file.len() as u64;
    let Ok(n) = header_len(prefix, file_len) else {
        return;
    };
    let Ok(tensors) = parse_header(&rest[..n], file_len) else {
        return;
    };
    for tensor in tensors.values() {
        assert!(tensor.offset >= (PREFIX + n) as u64);
        let end = tensor.offset.checked_add(tensor.n_bytes as u64);
        assert!(end.is_some_and(|end| end <= file_len));
        let elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.storage.bytes_of(elements), Some(tensor.n_bytes));
    }
});
