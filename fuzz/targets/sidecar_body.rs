//! A client's body and prefill's answer on their way through the sidecar: only the named fields change.
//! Input: a byte that chooses the route, the body, a line `--`, the answer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

const NAME: &str = "kv_transfer_params";

const SEPARATOR: &[u8] = b"\n--\n";

fuzz_target!(|input: &[u8]| {
    let Some((&route, texts)) = input.split_first() else {
        return;
    };
    let split = texts.windows(SEPARATOR.len()).position(|w| w == SEPARATOR);
    let Some((body, answer)) = split.map(|at| (&texts[..at], &texts[at + SEPARATOR.len()..])) else {
        return;
    };
    let Some((own, prefill, decode)) = baton_sidecar::fuzzing::legs(route, body, answer) else {
        return;
    };
    let without = baton_sidecar::fuzzing::without_params(decode.clone()).expect("still an object");
    // The blanks of an empty object go with its only field.
    let is_empty = own.iter().all(|b| b.is_ascii_whitespace() || b"{}".contains(b));
    assert!(without == own || is_empty, "taken out again, the client's bytes are left");
    // What nests too deeply for a `Value` is passed over unread, and refused by the server.
    let object = |text: &[u8]| serde_json::from_slice::<Map<String, Value>>(text);
    let (Ok(mut before), Ok(answer)) = (object(body), object(answer)) else {
        return;
    };
    let mut after = object(&decode).expect("still an object");
    let params = answer.get(NAME).cloned().unwrap_or_default();
    assert_eq!(after.remove(NAME), Some(params));
    for steering in [NAME, "ec_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room"] {
        before.remove(steering);
    }
    for nested in ["sampling_params", "extra_args", "vllm_xargs"] {
        before.remove(nested);
        after.remove(nested);
    }
    assert_eq!(before, after);
    let prefill = object(&prefill).expect("still an object");
    assert_eq!(prefill.get("stream"), Some(&Value::Bool(false)));
    assert_eq!(prefill[NAME]["do_remote_decode"], Value::Bool(true));
});
