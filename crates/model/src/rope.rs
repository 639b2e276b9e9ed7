//! Inverse frequencies of the rotary embedding, by Hugging Face's rules, in f64.

use crate::{Rope, RopeScaling};
use std::f64::consts::PI;

/// One frequency for each pair of a head's elements.
#[expect(
    clippy::cast_possible_truncation,
    reason = "angles are computed in f32"
)]
pub fn inverse_frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|pair| {
            let plain = rope.theta.powf(-as_f64(2 * pair) / as_f64(head_dim));
            scaled(plain, pair, &rope.scaling) as f32
        })
        .collect()
}

fn scaled(frequency: f64, pair: usize, scaling: &RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Factors(factors) => {
            frequency / factors.get(pair).map_or(1.0, |&f| f64::from(f))
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position,
        } => {
            let turns = as_f64(*original_max_position) * frequency / (2.0 * PI);
            if turns < *low_freq_factor {
                return frequency / factor;
            }
            if turns > *high_freq_factor {
                return frequency;
            }
            let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - kept) * frequency / factor + kept * frequency
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "positions and head sizes are far below 2^53"
)]
fn as_f64(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192,
    };

    #[test]
    fn frequencies_fall_geometrically_from_one() {
        let f = inverse_frequencies(
            &Rope {
                theta: 10_000.0,
                scaling: RopeScaling::None,
            },
            8,
        );
        for (found, expected) in f.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((found - expected).abs() < 1e-9);
        }
    }

    #[test]
    fn llama3_keeps_fast_pairs_divides_slow_ones_and_passes_smoothly_between() {
        let at = |turns: f64| {
            let plain = turns * 2.0 * PI / 8192.0;
            scaled(plain, 0, &LLAMA3) / plain
        };
        assert_eq!(at(5.0), 1.0);
        assert!((at(0.5) - 0.125).abs() < 1e-12);
        assert!((at(2.5) - (0.5 + 0.5 / 8.0)).abs() < 1e-12);
    }

    #[test]
    fn gguf_factors_divide_pair_by_pair() {
        let plain = inverse_frequencies(
            &Rope {
                theta: 500_000.0,
                scaling: RopeScaling::None,
            },
            4,
        );
        let scaling = RopeScaling::Factors(vec![1.0, 8.0]);
        let scaled = inverse_frequencies(
            &Rope {
                theta: 500_000.0,
                scaling,
            },
            4,
        );
        assert_eq!(scaled, [plain[0], plain[1] / 8.0]);
    }
}
