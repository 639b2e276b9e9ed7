//! Plain arrays of sixteen: right everywhere, and as fast as the compiler makes them.

use super::Simd;
use half::{bf16, f16};
use std::array::from_fn;

/// Plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Portable;

type F = [f32; 16];
type I = [u32; 16];

/// The four bytes of a lane.
#[inline(always)]
fn bytes(x: u32) -> [u8; 4] {
    x.to_le_bytes()
}

impl Simd for Portable {
    type F = F;
    type I = I;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; 16]
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> F {
        *x
    }

    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; 16]) {
        *to = x;
    }

    #[inline(always)]
    fn load_f16(self, x: &[u8; 32]) -> F {
        from_fn(|i| f16::from_le_bytes([x[2 * i], x[2 * i + 1]]).to_f32())
    }

    #[inline(always)]
    fn load_u8(self, x: &[u8; 16]) -> F {
        from_fn(|i| f32::from(x[i]))
    }

    #[inline(always)]
    fn load_i8(self, x: &[u8; 16]) -> F {
        from_fn(|i| f32::from(x[i].cast_signed()))
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        // Without a fused instruction `mul_add` is a call; two roundings are good enough.
        from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn abs(self, a: F) -> F {
        a.map(f32::abs)
    }

    #[inline(always)]
    fn round(self, a: F) -> F {
        a.map(f32::round_ties_even)
    }

    #[inline(always)]
    fn scale2(self, x: F, n: F) -> F {
        #[expect(clippy::cast_possible_truncation, reason = "whole and small")]
        from_fn(|i| x[i] * f32::from_bits(((n[i] as i32 + 127) << 23).cast_unsigned()))
    }

    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        a.iter().sum()
    }

    #[inline(always)]
    fn greatest(self, a: F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        [x.cast_unsigned(); 16]
    }

    #[inline(always)]
    fn load_i(self, x: &[u8; 64]) -> I {
        let (lanes, _) = x.as_chunks::<4>();
        from_fn(|i| u32::from_le_bytes(lanes[i]))
    }

    #[inline(always)]
    fn to_f(self, x: I) -> F {
        #[expect(
            clippy::cast_precision_loss,
            reason = "as the processor's conversion does"
        )]
        x.map(|x| x.cast_signed() as f32)
    }

    #[inline(always)]
    fn low_nibbles(self, x: I) -> I {
        x.map(|x| x & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn high_nibbles(self, x: I) -> I {
        x.map(|x| x >> 4 & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn add_where(self, x: I, mask: u64, value: u8) -> I {
        from_fn(|i| {
            let mut lane = bytes(x[i]);
            for (j, byte) in lane.iter_mut().enumerate() {
                *byte |= value * (mask >> (4 * i + j) & 1) as u8;
            }
            u32::from_le_bytes(lane)
        })
    }

    #[inline(always)]
    fn byte(self, x: I, j: u32) -> F {
        x.map(|x| f32::from((x >> (8 * j)) as u8))
    }

    #[inline(always)]
    fn dot4(self, sum: I, u: I, i: I) -> I {
        from_fn(|lane| {
            let (u, i) = (bytes(u[lane]), bytes(i[lane]));
            let products: i32 = (0..4)
                .map(|j| i32::from(u[j]) * i32::from(i[j].cast_signed()))
                .sum();
            sum[lane].wrapping_add(products.cast_unsigned())
        })
    }

    #[inline(always)]
    fn dot2(self, sum: F, a: I, b: I) -> F {
        let low = self.fma(self.low_bf16(a), self.low_bf16(b), sum);
        self.fma(self.high_bf16(a), self.high_bf16(b), low)
    }

    #[inline(always)]
    fn low_bf16(self, x: I) -> F {
        x.map(|x| f32::from_bits(x << 16))
    }

    #[inline(always)]
    fn high_bf16(self, x: I) -> F {
        x.map(|x| f32::from_bits(x & 0xffff_0000))
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "within ±127")]
    fn store_i8(self, x: F, to: &mut [i8; 16]) {
        *to = x.map(|x| x.round_ties_even() as i8);
    }

    #[inline(always)]
    fn store_bf16(self, x: F, to: &mut [u16; 16]) {
        *to = x.map(|x| bf16::from_f32(x).to_bits());
    }
}
