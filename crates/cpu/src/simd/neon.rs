//! NEON with DOTPROD: four registers are sixteen lanes.
#![expect(
    unsafe_code,
    reason = "the instructions are only there if the processor has them"
)]

use super::{Simd, Task};
use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

/// Proof that the processor has the instructions: [`Neon::run`] is the only one who makes it.
#[derive(Clone, Copy)]
pub(super) struct Neon(());

/// Whether the processor has them. The standard library remembers the answer.
pub(super) fn available() -> bool {
    is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod")
}

impl Neon {
    /// Runs a task; [`available`] must hold.
    #[inline]
    pub(super) fn run<T: Task>(task: T) -> T::Output {
        #[target_feature(enable = "neon,dotprod")]
        fn compiled<T: Task>(task: T) -> T::Output {
            task.run(Neon(()))
        }
        assert!(available());
        // SAFETY: the processor has every instruction that the function may use.
        unsafe { compiled(task) }
    }
}

/// Calls intrinsics.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: a `Neon` exists only where the processor has these instructions; pointers come from references to
        // arrays that hold what is read or written, and no alignment is asked for.
        unsafe { $e }
    };
}

/// Calls an intrinsic for each register of every operand in turn.
macro_rules! each {
    ($f:ident $(::<$n:literal>)? ($($x:expr),+)) => {
        intrinsic!([
            $f $(::<$n>)? ($($x[0]),+),
            $f $(::<$n>)? ($($x[1]),+),
            $f $(::<$n>)? ($($x[2]),+),
            $f $(::<$n>)? ($($x[3]),+),
        ])
    };
}

type F = [float32x4_t; 4];
type I = [uint32x4_t; 4];

/// Adds the products of each lane's four signed bytes in `a` and `b`.
#[inline(always)]
fn signed_dot4(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut out = sum;
    // SAFETY: registers only, and `Neon` exists only where the processor has the instruction. The standard library does
    // not offer it in stable Rust yet.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {out:v}.4s, {a:v}.16b, {b:v}.16b",
            out = inout(vreg) out,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}

/// Adds the products of each lane's four unsigned bytes in `u` with the four signed ones in `i`. The instruction wants
/// both signed: what 128 less in every unsigned byte makes less is added back. With the same `i` in every register, the
/// compiler reckons that once.
#[inline(always)]
fn dot4(sum: uint32x4_t, u: uint32x4_t, i: uint32x4_t) -> uint32x4_t {
    intrinsic!({
        let i = vreinterpretq_s8_u32(i);
        let less = signed_dot4(vdupq_n_s32(0), vdupq_n_s8(-128), i);
        let u = veorq_u8(vreinterpretq_u8_u32(u), vdupq_n_u8(128));
        let sum = vsubq_s32(vreinterpretq_s32_u32(sum), less);
        vreinterpretq_u32_s32(signed_dot4(sum, vreinterpretq_s8_u8(u), i))
    })
}

/// Sets the bits of `value` in the bytes whose bit in `mask` is set; the two bytes of the mask are `FROM` and its next.
#[inline(always)]
fn add_where<const FROM: u8>(x: uint32x4_t, mask: u64, value: u8) -> uint32x4_t {
    intrinsic!({
        let mask = vreinterpretq_u8_u64(vdupq_n_u64(mask));
        let from = vcombine_u8(vdup_n_u8(FROM), vdup_n_u8(FROM + 1));
        let own_bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
        let set = vtstq_u8(vqtbl1q_u8(mask, from), own_bit);
        let value = vandq_u8(set, vdupq_n_u8(value));
        vorrq_u32(x, vreinterpretq_u32_u8(value))
    })
}

/// The nearest bf16, the even one of two. What is not a number stays none.
#[inline(always)]
fn to_bf16(x: float32x4_t) -> uint16x4_t {
    intrinsic!({
        let bits = vreinterpretq_u32_f32(x);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x40_0000));
        vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(x, x), rounded, quiet))
    })
}

/// Four half-precision floats at `x`.
///
/// # Safety
/// They are there, and so is a [`Neon`].
#[inline(always)]
unsafe fn load_f16(x: *const u8) -> float32x4_t {
    // SAFETY: the caller's promise; bytes need no alignment.
    unsafe { vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(x))) }
}

/// Unsigned numbers as floats.
#[inline(always)]
fn unsigned(x: I) -> F {
    each!(vcvtq_f32_u32(x))
}

impl Simd for Neon {
    type F = F;
    type I = I;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [intrinsic!(vdupq_n_f32(x)); 4]
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> F {
        let x = x.as_ptr();
        intrinsic!([
            vld1q_f32(x),
            vld1q_f32(x.add(4)),
            vld1q_f32(x.add(8)),
            vld1q_f32(x.add(12)),
        ])
    }

    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; 16]) {
        let to = to.as_mut_ptr();
        intrinsic!({
            vst1q_f32(to, x[0]);
            vst1q_f32(to.add(4), x[1]);
            vst1q_f32(to.add(8), x[2]);
            vst1q_f32(to.add(12), x[3]);
        });
    }

    #[inline(always)]
    fn load_f16(self, x: &[u8; 32]) -> F {
        let x = x.as_ptr();
        intrinsic!([
            load_f16(x),
            load_f16(x.add(8)),
            load_f16(x.add(16)),
            load_f16(x.add(24)),
        ])
    }

    #[inline(always)]
    fn load_u8(self, x: &[u8; 16]) -> F {
        let lanes = intrinsic!({
            let x = vld1q_u8(x.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x));
            [
                vmovl_u16(vget_low_u16(low)),
                vmovl_high_u16(low),
                vmovl_u16(vget_low_u16(high)),
                vmovl_high_u16(high),
            ]
        });
        unsigned(lanes)
    }

    #[inline(always)]
    fn load_i8(self, x: &[u8; 16]) -> F {
        let lanes = intrinsic!({
            let x = vreinterpretq_s8_u8(vld1q_u8(x.as_ptr()));
            let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
            [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ]
        });
        each!(vcvtq_f32_s32(lanes))
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        each!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        each!(vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        each!(vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        each!(vdivq_f32(a, b))
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        each!(vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        let greater = each!(vcgtq_f32(a, b));
        each!(vbslq_f32(greater, a, b))
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        let less = each!(vcltq_f32(a, b));
        each!(vbslq_f32(less, a, b))
    }

    #[inline(always)]
    fn abs(self, a: F) -> F {
        each!(vabsq_f32(a))
    }

    #[inline(always)]
    fn round(self, a: F) -> F {
        each!(vrndnq_f32(a))
    }

    #[inline(always)]
    fn scale2(self, x: F, n: F) -> F {
        let n = each!(vcvtnq_s32_f32(n));
        let bias = [intrinsic!(vdupq_n_s32(127)); 4];
        let exponent = each!(vaddq_s32(n, bias));
        let power = each!(vshlq_n_s32::<23>(exponent));
        self.mul(x, each!(vreinterpretq_f32_s32(power)))
    }

    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        intrinsic!(vaddvq_f32(vaddq_f32(
            vaddq_f32(a[0], a[1]),
            vaddq_f32(a[2], a[3])
        )))
    }

    #[inline(always)]
    fn greatest(self, a: F) -> f32 {
        intrinsic!(vmaxnmvq_f32(vmaxnmq_f32(
            vmaxnmq_f32(a[0], a[1]),
            vmaxnmq_f32(a[2], a[3])
        )))
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        [intrinsic!(vdupq_n_u32(x.cast_unsigned())); 4]
    }

    #[inline(always)]
    fn load_i(self, x: &[u8; 64]) -> I {
        let x = x.as_ptr();
        let x = intrinsic!([
            vld1q_u8(x),
            vld1q_u8(x.add(16)),
            vld1q_u8(x.add(32)),
            vld1q_u8(x.add(48)),
        ]);
        each!(vreinterpretq_u32_u8(x))
    }

    #[inline(always)]
    fn to_f(self, x: I) -> F {
        let x = each!(vreinterpretq_s32_u32(x));
        each!(vcvtq_f32_s32(x))
    }

    #[inline(always)]
    fn low_nibbles(self, x: I) -> I {
        let low = self.splat_i(0x0f0f_0f0f);
        each!(vandq_u32(x, low))
    }

    #[inline(always)]
    fn high_nibbles(self, x: I) -> I {
        let x = each!(vreinterpretq_u8_u32(x));
        let high = each!(vshrq_n_u8::<4>(x));
        each!(vreinterpretq_u32_u8(high))
    }

    #[inline(always)]
    fn add_where(self, x: I, mask: u64, value: u8) -> I {
        [
            add_where::<0>(x[0], mask, value),
            add_where::<2>(x[1], mask, value),
            add_where::<4>(x[2], mask, value),
            add_where::<6>(x[3], mask, value),
        ]
    }

    #[inline(always)]
    fn byte(self, x: I, j: u32) -> F {
        let right = [intrinsic!(vdupq_n_s32(-(8 * j).cast_signed())); 4];
        let shifted = each!(vshlq_u32(x, right));
        let low = self.splat_i(255);
        unsigned(each!(vandq_u32(shifted, low)))
    }

    #[inline(always)]
    fn dot4(self, sum: I, u: I, i: I) -> I {
        [
            dot4(sum[0], u[0], i[0]),
            dot4(sum[1], u[1], i[1]),
            dot4(sum[2], u[2], i[2]),
            dot4(sum[3], u[3], i[3]),
        ]
    }

    #[inline(always)]
    fn dot2(self, sum: F, a: I, b: I) -> F {
        let low = self.fma(self.low_bf16(a), self.low_bf16(b), sum);
        self.fma(self.high_bf16(a), self.high_bf16(b), low)
    }

    #[inline(always)]
    fn low_bf16(self, x: I) -> F {
        let low = each!(vshlq_n_u32::<16>(x));
        each!(vreinterpretq_f32_u32(low))
    }

    #[inline(always)]
    fn high_bf16(self, x: I) -> F {
        let high = self.splat_i(-65536);
        let high = each!(vandq_u32(x, high));
        each!(vreinterpretq_f32_u32(high))
    }

    #[inline(always)]
    fn store_i8(self, x: F, to: &mut [i8; 16]) {
        let x = each!(vcvtnq_s32_f32(x));
        intrinsic!({
            let low = vcombine_s16(vmovn_s32(x[0]), vmovn_s32(x[1]));
            let high = vcombine_s16(vmovn_s32(x[2]), vmovn_s32(x[3]));
            vst1q_s8(
                to.as_mut_ptr(),
                vcombine_s8(vmovn_s16(low), vmovn_s16(high)),
            );
        });
    }

    #[inline(always)]
    fn store_bf16(self, x: F, to: &mut [u16; 16]) {
        let to = to.as_mut_ptr();
        let low = intrinsic!(vcombine_u16(to_bf16(x[0]), to_bf16(x[1])));
        let high = intrinsic!(vcombine_u16(to_bf16(x[2]), to_bf16(x[3])));
        intrinsic!({
            vst1q_u16(to, low);
            vst1q_u16(to.add(8), high);
        });
    }
}
