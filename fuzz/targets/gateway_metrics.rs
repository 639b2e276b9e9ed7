//! A server's metrics page: whatever it says, its KV pool is in use between not at all and wholly.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let usage = baton_gateway::fuzzing::kv_usage(text);
    assert!(usage.is_none_or(|u| (0.0..=1.0).contains(&u)));
});
