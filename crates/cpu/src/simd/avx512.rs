//! AVX-512: one register is sixteen lanes.
#![expect(
    unsafe_code,
    reason = "the instructions are only there if the processor has them"
)]

use super::{Simd, Task};
use std::arch::x86_64::*;

/// Proof that the processor has the instructions: [`Avx512::run`] is the only one who makes it.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// Whether the processor has them. The standard library remembers the answer.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

impl Avx512 {
    /// Runs a task; [`available`] must hold.
    #[inline]
    pub(super) fn run<T: Task>(task: T) -> T::Output {
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma,f16c,avx2,bmi2"
        )]
        fn compiled<T: Task>(task: T) -> T::Output {
            task.run(Avx512(()))
        }
        assert!(available());
        // SAFETY: the processor has every instruction that the function may use.
        unsafe { compiled(task) }
    }
}

/// Calls an intrinsic.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: an `Avx512` exists only where the processor has these instructions; pointers come from references to
        // arrays of the size that is read or written, and no alignment is asked for.
        unsafe { $e }
    };
}

/// The same bits as pairs of bf16.
#[inline(always)]
fn pairs(x: __m512i) -> __m512bh {
    // SAFETY: same size, and every bit pattern is a bf16.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(x) }
}

impl Simd for Avx512 {
    const SUMS: usize = 16;
    type F = __m512;
    type I = __m512i;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        intrinsic!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> __m512 {
        intrinsic!(_mm512_loadu_ps(x.as_ptr()))
    }

    #[inline(always)]
    fn store(self, x: __m512, to: &mut [f32; 16]) {
        intrinsic!(_mm512_storeu_ps(to.as_mut_ptr(), x));
    }

    #[inline(always)]
    fn load_f16(self, x: &[u8; 32]) -> __m512 {
        intrinsic!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }

    #[inline(always)]
    fn load_u8(self, x: &[u8; 16]) -> __m512 {
        intrinsic!(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
            x.as_ptr().cast()
        ))))
    }

    #[inline(always)]
    fn load_i8(self, x: &[u8; 16]) -> __m512 {
        intrinsic!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
            x.as_ptr().cast()
        ))))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        intrinsic!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        intrinsic!(_mm512_abs_ps(a))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        intrinsic!(_mm512_roundscale_ps::<
            { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
        >(a))
    }

    #[inline(always)]
    fn scale2(self, x: __m512, n: __m512) -> __m512 {
        intrinsic!(_mm512_scalef_ps(x, n))
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        intrinsic!(_mm512_reduce_add_ps(a))
    }

    #[inline(always)]
    fn greatest(self, a: __m512) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(a))
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> __m512i {
        intrinsic!(_mm512_set1_epi32(x))
    }

    #[inline(always)]
    fn load_i(self, x: &[u8; 64]) -> __m512i {
        intrinsic!(_mm512_loadu_si512(x.as_ptr().cast()))
    }

    #[inline(always)]
    fn to_f(self, x: __m512i) -> __m512 {
        intrinsic!(_mm512_cvtepi32_ps(x))
    }

    #[inline(always)]
    fn low_nibbles(self, x: __m512i) -> __m512i {
        intrinsic!(_mm512_and_si512(x, _mm512_set1_epi8(15)))
    }

    #[inline(always)]
    fn high_nibbles(self, x: __m512i) -> __m512i {
        intrinsic!(_mm512_and_si512(
            _mm512_srli_epi16::<4>(x),
            _mm512_set1_epi8(15)
        ))
    }

    #[inline(always)]
    fn add_where(self, x: __m512i, mask: u64, value: u8) -> __m512i {
        intrinsic!(_mm512_mask_add_epi8(
            x,
            mask,
            x,
            _mm512_set1_epi8(value.cast_signed())
        ))
    }

    #[inline(always)]
    fn byte(self, x: __m512i, j: u32) -> __m512 {
        let shift = intrinsic!(_mm_cvtsi32_si128((8 * j).cast_signed()));
        intrinsic!(_mm512_cvtepi32_ps(_mm512_and_si512(
            _mm512_srl_epi32(x, shift),
            _mm512_set1_epi32(255)
        )))
    }

    #[inline(always)]
    fn dot4(self, sum: __m512i, u: __m512i, i: __m512i) -> __m512i {
        intrinsic!(_mm512_dpbusd_epi32(sum, u, i))
    }

    #[inline(always)]
    fn dot2(self, sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        intrinsic!(_mm512_dpbf16_ps(sum, pairs(a), pairs(b)))
    }

    #[inline(always)]
    fn low_bf16(self, x: __m512i) -> __m512 {
        intrinsic!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)))
    }

    #[inline(always)]
    fn high_bf16(self, x: __m512i) -> __m512 {
        intrinsic!(_mm512_castsi512_ps(_mm512_and_si512(
            x,
            _mm512_set1_epi32(-65536)
        )))
    }

    #[inline(always)]
    fn store_i8(self, x: __m512, to: &mut [i8; 16]) {
        intrinsic!(_mm_storeu_si128(
            to.as_mut_ptr().cast(),
            _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))
        ));
    }

    #[inline(always)]
    fn store_bf16(self, x: __m512, to: &mut [u16; 16]) {
        let half = intrinsic!(_mm512_cvtneps_pbh(x));
        // SAFETY: same size, and every bit pattern is an integer.
        let half: __m256i = unsafe { std::mem::transmute::<__m256bh, __m256i>(half) };
        intrinsic!(_mm256_storeu_si256(to.as_mut_ptr().cast(), half));
    }
}
