//! A model's `config.json`: what is accepted holds the invariants that the graph builds on.
#![no_main]

use baton_model::{Config, inverse_frequencies, weights};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|json: &[u8]| {
    if let Ok(config) = Config::from_json(json) {
        config.validate().expect("validated while it was read");
        for weight in weights(&config) {
            let sizes = weight.axes.iter().map(|&(_, n)| n);
            let elements = sizes.fold(Some(1usize), |all, n| all?.checked_mul(n));
            assert!(elements.is_some_and(|n| n > 0), "{}", weight.name);
        }
        // A head as wide as the bound allows would only cost time here.
        if config.head_dim <= 1 << 12 {
            assert_eq!(
                inverse_frequencies(&config.rope, config.head_dim).len(),
                config.head_dim / 2
            );
        }
    }
});
