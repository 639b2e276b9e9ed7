//! Rows of activations in the forms that products eat: f32, pairs of bf16, or bytes with a scale for every 32.

use crate::simd::Simd;

/// Activations of a block.
pub(crate) const BLOCK: usize = 32;

/// 32 activations as signed bytes: each stands for itself times `scale`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct QBlock {
    q: [i8; BLOCK],
    /// Not a number if an activation was none or infinite.
    pub(crate) scale: f32,
    /// Sum of all bytes, times the scale.
    pub(crate) scaled_sum: f32,
    /// Sums of the first and the second sixteen bytes.
    pub(crate) sums: [i32; 2],
}

impl QBlock {
    /// Four bytes as one number.
    #[inline(always)]
    pub(crate) fn group(&self, g: usize) -> i32 {
        let at = 4 * g;
        let [a, b, c, d] = [self.q[at], self.q[at + 1], self.q[at + 2], self.q[at + 3]];
        i32::from_le_bytes([a, b, c, d].map(i8::cast_unsigned))
    }

    /// The nearest bytes: the largest activation becomes ±127.
    #[inline(always)]
    pub(crate) fn quantize<S: Simd>(s: S, x: &[f32; BLOCK]) -> Self {
        let (halves, _) = x.as_chunks::<16>();
        let (low, high) = (s.load(&halves[0]), s.load(&halves[1]));
        let (low_size, high_size) = (s.abs(low), s.abs(high));
        let peak = s.greatest(s.max(low_size, high_size));
        // A sum keeps what a maximum may lose: infinities and what is not a number.
        let total = s.sum(s.add(low_size, high_size));
        let inverse = s.splat(if peak > 0.0 { 127.0 / peak } else { 0.0 });
        let low = s.round(s.mul(low, inverse));
        let high = s.round(s.mul(high, inverse));
        let scale = if total.is_finite() {
            peak / 127.0
        } else {
            f32::NAN
        };
        let mut q = [0; BLOCK];
        let (parts, _) = q.as_chunks_mut::<16>();
        s.store_i8(low, &mut parts[0]);
        s.store_i8(high, &mut parts[1]);
        let (low, high) = (s.sum(low), s.sum(high));
        #[expect(
            clippy::cast_possible_truncation,
            reason = "whole numbers up to 16 times 127"
        )]
        let sums = [low as i32, high as i32];
        Self {
            q,
            scale,
            scaled_sum: (low + high) * scale,
            sums,
        }
    }
}

/// Rounds a row to bf16. Both have the same length, a multiple of 16.
#[inline(always)]
pub(crate) fn round_bf16<S: Simd>(s: S, x: &[f32], out: &mut [u16]) {
    let (x, out) = (x.as_chunks::<16>().0, out.as_chunks_mut::<16>().0);
    for (x, out) in x.iter().zip(out) {
        s.store_bf16(s.load(x), out);
    }
}
