//! A GGUF header: every tensor lies within the file, and asking for more bytes ends when there are no more.
#![no_main]

use baton_model::gguf::Gguf;
use baton_model::{Config, weights};
use libfuzzer_sys::fuzz_target;

/// As though a header were followed by so many bytes of tensors.
const DATA: u64 = 1 << 16;

fuzz_target!(|bytes: &[u8]| {
    let file_len = bytes.len() as u64 + DATA;
    let Ok(gguf) = Gguf::parse(bytes, file_len) else {
        return;
    };
    for tensor in gguf.tensors.values() {
        let end = tensor.offset.checked_add(tensor.n_bytes as u64);
        assert!(end.is_some_and(|end| end <= file_len));
        let elements: usize = tensor.shape.iter().product();
        assert_eq!(tensor.storage.bytes_of(elements), Some(tensor.n_bytes));
    }
    if let Ok(config) = Config::from_gguf(&gguf, None) {
        for weight in weights(&config) {
            let _: usize = weight.axes.iter().map(|&(_, n)| n).product();
        }
    }
});
