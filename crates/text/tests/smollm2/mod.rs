//! The model file that tests read.

use baton_model::gguf::{Gguf, GgufError};
use std::io::Read as _;

/// The header of the file that `BATON_SMOLLM2` names.
pub(crate) fn gguf() -> Gguf {
    let path = std::env::var("BATON_SMOLLM2").expect(
        "BATON_SMOLLM2 must name the file that `baton fetch smollm2` prints; `make test` sets it",
    );
    let mut file = std::fs::File::open(&path).unwrap();
    let file_len = file.metadata().unwrap().len();
    let mut bytes = Vec::new();
    loop {
        file.by_ref().take(4 << 20).read_to_end(&mut bytes).unwrap();
        match Gguf::parse(&bytes, file_len) {
            Err(GgufError::NeedMore { .. }) if (bytes.len() as u64) < file_len => {}
            parsed => break parsed.unwrap(),
        }
    }
}
