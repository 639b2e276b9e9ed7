//! A server's metrics page: its KV pool is in use between not at all and wholly, and how the page was cut does not matter.
#![no_main]

use baton_fleet::{Reader, Wanted, adapters};
use baton_scheduler::engines::EngineMetrics;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    for engine in EngineMetrics::known() {
        let wanted = Wanted::new(&engine);
        let mut reader = Reader::default();
        reader.push(&wanted, text);
        let whole = reader.finish(&wanted);
        assert!(whole.kv_usage.is_none_or(|u| (0.0..=1.0).contains(&u)));
        if let Some(labels) = reader.lora_labels() {
            assert!(adapters(labels, 4).running.len() <= 4);
        }
        reader.clear();
        for piece in text.chunks(7) {
            reader.push(&wanted, piece);
        }
        assert_eq!(reader.finish(&wanted), whole);
    }
});
