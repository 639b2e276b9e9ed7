//! A proxy's stream to the picker: however it is cut, the same answers, all of which can be read, and every exchange that
//! begins ends once. Input: a line whose bytes are the lengths of the first pieces, then the stream.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some(line) = input.iter().position(|&b| b == b'\n') else {
        return;
    };
    let (cuts, stream) = (&input[..line], &input[line + 1..]);
    let cut = baton_ext_proc::fuzzing::conversation(cuts, stream);
    assert_eq!(cut.begun, cut.ended);
    assert!(cut.messages.is_some(), "an answer that no proxy reads");
    assert_eq!(cut, baton_ext_proc::fuzzing::conversation(&[], stream));
});
