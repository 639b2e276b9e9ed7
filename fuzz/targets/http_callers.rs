//! What a client sends before it is a request: by whatever name it calls, it is read alike, however its bytes come, and the
//! rest of what it says stays. Input: the size of the pieces, then the bytes.
#![no_main]

use baton_http::fuzzing::{authorities, hello};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&step, bytes)) = input.split_first() else {
        return;
    };
    let read = authorities(bytes, 1 << 16);
    assert_eq!(authorities(bytes, usize::from(step).max(1)), read);
    assert_eq!(authorities(&read, 1 << 16), read, "what was mended is not mended again");
    let (hidden, hashed) = hello(bytes);
    assert_eq!(hidden.len(), bytes.len());
    assert!(hidden == bytes || hashed == bytes, "hashed as it was sent");
});
