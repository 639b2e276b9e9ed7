//! Blocks in rungs: how a list of blocks is cut into launches, and how padded host arrays become canonical ones.

use baton_kv::KvLayout;
use std::ops::Range;

/// Cuts `n` blocks into launches of the given rungs (ascending): the greatest of which at most half is padding.
pub(crate) fn cut(n: usize, rungs: &[usize]) -> Vec<(Range<usize>, usize)> {
    let mut cuts = Vec::new();
    let mut done = 0;
    while done < n {
        let left = n - done;
        let fitting = rungs.iter().copied().rfind(|&r| r > 0 && r <= 2 * left);
        let Some(rung) = fitting.or(rungs.first().copied()).filter(|&r| r > 0) else {
            break;
        };
        let end = n.min(done + rung);
        cuts.push((done..end, rung));
        done = end;
    }
    cuts
}

/// Copies one launch's padded array into its place in the canonical array of all blocks.
pub(crate) fn unpad(
    layout: &KvLayout,
    padded: &[u8],
    rung: usize,
    range: Range<usize>,
    all: &mut [u8],
    n: usize,
) {
    let size = layout.head_block_bytes();
    let rows = padded
        .chunks_exact(rung * size)
        .zip(all.chunks_exact_mut(n * size));
    for (from, to) in rows {
        to[range.start * size..range.end * size].copy_from_slice(&from[..range.len() * size]);
    }
}

/// Copies one launch's share of the canonical array of all blocks into a padded array.
pub(crate) fn pad(
    layout: &KvLayout,
    all: &[u8],
    n: usize,
    range: Range<usize>,
    padded: &mut [u8],
    rung: usize,
) {
    let size = layout.head_block_bytes();
    let rows = padded
        .chunks_exact_mut(rung * size)
        .zip(all.chunks_exact(n * size));
    for (to, from) in rows {
        to[..range.len() * size].copy_from_slice(&from[range.start * size..range.end * size]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_kv::DType;

    const LAYOUT: KvLayout = KvLayout {
        n_layers: 2,
        n_kv_heads: 3,
        head_dim: 1,
        block_size: 1,
        dtype: DType::BF16,
        model_fingerprint: 0,
    };

    #[test]
    fn blocks_are_cut_without_gaps_and_with_little_padding() {
        assert_eq!(cut(0, &[8, 64]), []);
        assert_eq!(cut(3, &[8, 64]), [(0..3, 8)]);
        assert_eq!(cut(40, &[8, 64]), [(0..40, 64)]);
        assert_eq!(cut(9, &[8, 64]), [(0..8, 8), (8..9, 8)]);
        assert_eq!(cut(70, &[8, 64]), [(0..64, 64), (64..70, 8)]);
    }

    #[test]
    fn padding_and_unpadding_are_each_others_inverse() {
        let n = 5;
        let all: Vec<u8> = (0..n * LAYOUT.block_bytes())
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        let mut back = vec![0; all.len()];
        for (range, rung) in cut(n, &[2, 4]) {
            let mut padded = vec![0xee; rung * LAYOUT.block_bytes()];
            pad(&LAYOUT, &all, n, range.clone(), &mut padded, rung);
            unpad(&LAYOUT, &padded, rung, range, &mut back, n);
        }
        assert_eq!(all, back);
    }
}
