//! A batch of KV events of a server: what is understood keeps its promises, and is bounded by the bytes that came.
#![no_main]

use baton_kv::BlockEvent;
use baton_kv_events::{Groups, decode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payload: &[u8]| {
    let mut groups = Groups::default();
    // Twice: what the first leaves behind must not make the second stumble.
    for _ in 0..2 {
        let Ok(batch) = decode(payload, &mut groups) else {
            return;
        };
        assert!(batch.events.len() + batch.dropped as usize <= payload.len());
        for event in &batch.events {
            if let BlockEvent::Stored(stored) = event {
                let n = stored.hashes.len();
                assert!(stored.tokens.is_empty() || stored.tokens.len() == n * stored.block_size as usize);
                assert!(stored.extra.is_empty() || stored.extra.len() == n);
            }
        }
    }
});
