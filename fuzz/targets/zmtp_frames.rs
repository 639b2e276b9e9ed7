//! What a ZeroMQ peer sends: cut into pieces of any size it is the same, or as wrong.
//! Input: the size of the pieces, then the bytes.
#![no_main]

use baton_kv_events::fuzzing::zmtp;
use libfuzzer_sys::fuzz_target;

const MAX_MESSAGE: usize = 1 << 10;

fuzz_target!(|input: &[u8]| {
    let Some((&step, bytes)) = input.split_first() else {
        return;
    };
    let at_once = zmtp(bytes, usize::MAX, MAX_MESSAGE);
    assert_eq!(zmtp(bytes, step.into(), MAX_MESSAGE), at_once);
});
