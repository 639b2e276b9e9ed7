//! Answers on their way through the sidecar: however they are cut, the same comes out, and only the count differs.
//! Input: a line whose bytes are the lengths of the first pieces, then the answer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

fuzz_target!(|input: &[u8]| {
    let Some(line) = input.iter().position(|&b| b == b'\n') else {
        return;
    };
    let (cuts, answer) = (&input[..line], &input[line + 1..]);
    let [stream, whole] = baton_sidecar::fuzzing::patched(answer, cuts);
    let [same_stream, same_whole] = baton_sidecar::fuzzing::patched(answer, &[]);
    assert_eq!(stream, same_stream);
    assert_eq!(whole, same_whole);
    let object = |text: &[u8]| serde_json::from_slice::<Map<String, Value>>(text);
    let Ok(mut before) = object(answer) else {
        return;
    };
    let mut after = object(&whole).expect("still an object");
    for object in [&mut before, &mut after] {
        if let Some(Value::Object(usage)) = object.get_mut("usage") {
            usage.remove("prompt_tokens_details");
        }
    }
    assert_eq!(before, after);
});
