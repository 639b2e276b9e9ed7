//! A file that lists endpoints: whatever it says, what comes of it has a name and an address.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    if let Ok(specs) = baton_fleet::parse_file(text) {
        assert!(specs.iter().all(|s| !s.name.is_empty() && s.address.as_str().contains(':')));
    }
});
