//! What a picker that knows the secret tells another: nothing of it panics, grows without bound, or stays when it is gone.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| baton_peers::fuzzing::hear(input));
