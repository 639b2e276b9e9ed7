//! A client's body on its way to a server: it loses its `kv_transfer_params` and nothing else.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

const NAME: &str = "kv_transfer_params";

fuzz_target!(|body: &[u8]| {
    let Some(forwarded) = baton_gateway::fuzzing::forwarded(body) else {
        return;
    };
    // What nests too deeply for a `Value` is passed over unread, and refused by the server.
    let Ok(mut before) = serde_json::from_slice::<Map<String, Value>>(body) else {
        return;
    };
    let after: Map<String, Value> = serde_json::from_slice(&forwarded).expect("still an object");
    assert!(after.get(NAME).is_none_or(Value::is_null));
    if let Some(params) = before.get_mut(NAME) {
        *params = Value::Null;
    }
    assert_eq!(before, after);
    let again = baton_gateway::fuzzing::forwarded(&forwarded).expect("still an object");
    assert_eq!(again, forwarded);
});
