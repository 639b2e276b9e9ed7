//! Log-probabilities of one position, from its logits on the host.

use crate::TokenLogprobs;

impl TokenLogprobs {
    /// Of `token` and the `n_top` likeliest; `token` is below `logits.len()`.
    pub fn of(logits: &[f32], token: u32, n_top: usize) -> Self {
        let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&x| f64::from(x - peak).exp()).sum();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "f32 is what the logits are"
        )]
        let log_sum = sum.ln() as f32 + peak;
        let own = logits
            .get(token as usize)
            .copied()
            .unwrap_or(f32::NEG_INFINITY);
        let likelier = logits.iter().filter(|&&x| x > own).count();
        Self {
            sampled: own - log_sum,
            rank: u32::try_from(likelier)
                .unwrap_or(u32::MAX)
                .saturating_add(1),
            top: top(logits, n_top)
                .into_iter()
                .map(|(id, x)| (id, x - log_sum))
                .collect(),
        }
    }
}

/// The `n` greatest with their indices, best first; among equals the lower index first.
fn top(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(n.min(logits.len()) + 1);
    for (id, &x) in (0..).zip(logits) {
        if best.len() == n && best.last().is_none_or(|&(_, least)| x <= least) {
            continue;
        }
        let place = best.partition_point(|&(_, y)| y >= x);
        best.insert(place, (id, x));
        best.truncate(n);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_normalised_and_ranked() {
        let logits = [1.0_f32, 3.0, 2.0, 3.0];
        let found = TokenLogprobs::of(&logits, 2, 3);
        assert_eq!(found.rank, 3);
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(found.top[2].1, found.sampled);
        let all = TokenLogprobs::of(&logits, 0, 4);
        let sum: f32 = all.top.iter().map(|t| t.1.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
    }

    #[test]
    fn no_top_tokens_are_asked_for_and_none_given() {
        assert!(TokenLogprobs::of(&[0.5, 0.25], 1, 0).top.is_empty());
    }
}
