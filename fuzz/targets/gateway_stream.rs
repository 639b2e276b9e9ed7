//! A server's stream on its way to a client: the same bytes however they were cut, and never an end without `[DONE]`.
//! Input: `0xff` ends a piece.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

const DONE: &[u8] = b"data: [DONE]";

fuzz_target!(|stream: &[u8]| {
    let pieces: Vec<Bytes> = stream
        .split(|&b| b == 0xff)
        .map(Bytes::copy_from_slice)
        .collect();
    let sent = pieces.concat();
    let own = baton_gateway::fuzzing::streamed(pieces.clone(), false);
    assert_eq!(own.concat(), sent);
    let done = baton_gateway::fuzzing::streamed(pieces, true).concat();
    let is_told =
        (0..done.len()).any(|at| done[at..].starts_with(DONE) && begins_event(&done[..at]));
    assert!(is_told, "the client waits for [DONE]");
});

fn begins_event(before: &[u8]) -> bool {
    let gap = &before[before.trim_ascii_end().len()..];
    gap.len() == before.len() || gap.iter().filter(|&&b| b == b'\n').count() > 1
}
