//! An endpoint picker's configuration, as YAML. What is taken can be printed and means the same when it is read again.
#![no_main]

use baton_scheduler::config::{load, report};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|text: &[u8]| {
    let Ok(value) = serde_norway::from_slice::<Value>(text) else {
        return;
    };
    let (said, usable) = report(&value);
    assert!(!said.is_empty());
    let loaded = load(&value);
    assert_eq!(loaded.is_ok(), usable);
    if let Ok(config) = loaded {
        let again = load(&config.effective).expect("what is printed can be read");
        assert_eq!(again.plan, config.plan);
    }
});
