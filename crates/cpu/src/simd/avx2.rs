//! AVX2 with FMA and F16C: two registers are sixteen lanes.
#![expect(
    unsafe_code,
    reason = "the instructions are only there if the processor has them"
)]

use super::{Simd, Task};
use std::arch::x86_64::*;

/// Proof that the processor has the instructions: [`Avx2::run`] is the only one who makes it.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Whether the processor has them. The standard library remembers the answer.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

impl Avx2 {
    /// Runs a task; [`available`] must hold.
    #[inline]
    pub(super) fn run<T: Task>(task: T) -> T::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<T: Task>(task: T) -> T::Output {
            task.run(Avx2(()))
        }
        assert!(available());
        // SAFETY: the processor has every instruction that the function may use.
        unsafe { compiled(task) }
    }
}

/// Calls intrinsics.
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: an `Avx2` exists only where the processor has these instructions; pointers come from references to
        // arrays that hold what is read or written, and no alignment is asked for.
        unsafe { $e }
    };
}

/// Calls an intrinsic for the first register of every operand, then for the second.
macro_rules! both {
    ($f:ident($($x:expr),+)) => {
        intrinsic!([$f($($x[0]),+), $f($($x[1]),+)])
    };
}

type F = [__m256; 2];
type I = [__m256i; 2];

/// Puts packed halves in order: packing takes 128 bits of each operand in turn.
#[inline(always)]
fn in_order(packed: __m256i) -> __m256i {
    intrinsic!(_mm256_permute4x64_epi64::<0b11_01_10_00>(packed))
}

/// The products of four bytes with four, added up. A sum of two such products fits 16 bits only while the unsigned byte
/// is below 128 (255 * 127 * 2 is too much), so its highest bit is multiplied by itself: 128 * -128 * 2 just fits.
/// Where the compiler sees that the bit is never set, as with codes of less than eight bits, it leaves that half out.
#[inline(always)]
fn products(u: __m256i, i: __m256i) -> __m256i {
    intrinsic!({
        let ones = _mm256_set1_epi16(1);
        let low = _mm256_and_si256(u, _mm256_set1_epi8(0x7f));
        let high = _mm256_and_si256(u, _mm256_set1_epi8(-0x80));
        _mm256_add_epi32(
            _mm256_madd_epi16(_mm256_maddubs_epi16(low, i), ones),
            _mm256_madd_epi16(_mm256_maddubs_epi16(high, i), ones),
        )
    })
}

/// `value` in the bytes whose bit in `mask` is set, zero in the others.
#[inline(always)]
fn where_set(mask: u32, value: u8) -> __m256i {
    intrinsic!({
        // Byte `n` of the register gets the byte of the mask that has bit `n`.
        let from = _mm256_setr_epi64x(
            0,
            0x0101_0101_0101_0101,
            0x0202_0202_0202_0202,
            0x0303_0303_0303_0303,
        );
        let own_bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
        let mask = _mm256_shuffle_epi8(_mm256_set1_epi32(mask.cast_signed()), from);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(mask, own_bit), own_bit);
        _mm256_and_si256(set, _mm256_set1_epi8(value.cast_signed()))
    })
}

/// bf16 in the low halves of lanes: the nearest, the even one of two. What is not a number stays none.
#[inline(always)]
fn to_bf16(x: __m256) -> __m256i {
    intrinsic!({
        let bits = _mm256_castps_si256(x);
        let cut = _mm256_srli_epi32::<16>(bits);
        let odd = _mm256_and_si256(cut, _mm256_set1_epi32(1));
        let up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, up));
        let quiet = _mm256_or_si256(cut, _mm256_set1_epi32(0x40));
        let none = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        _mm256_blendv_epi8(rounded, quiet, none)
    })
}

impl Simd for Avx2 {
    type F = F;
    type I = I;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [intrinsic!(_mm256_set1_ps(x)); 2]
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> F {
        let x = x.as_ptr();
        intrinsic!([_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))])
    }

    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; 16]) {
        let to = to.as_mut_ptr();
        intrinsic!({
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(8), x[1]);
        });
    }

    #[inline(always)]
    fn load_f16(self, x: &[u8; 32]) -> F {
        let x = x.as_ptr();
        intrinsic!([
            _mm256_cvtph_ps(_mm_loadu_si128(x.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(x.add(16).cast())),
        ])
    }

    #[inline(always)]
    fn load_u8(self, x: &[u8; 16]) -> F {
        let x = x.as_ptr();
        let lanes = intrinsic!([
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(x.cast())),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(x.add(8).cast())),
        ]);
        self.to_f(lanes)
    }

    #[inline(always)]
    fn load_i8(self, x: &[u8; 16]) -> F {
        let x = x.as_ptr();
        let lanes = intrinsic!([
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(x.cast())),
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(x.add(8).cast())),
        ]);
        self.to_f(lanes)
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        both!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        both!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        both!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        both!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        both!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        both!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        both!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn abs(self, a: F) -> F {
        let sign = self.splat(-0.0);
        both!(_mm256_andnot_ps(sign, a))
    }

    #[inline(always)]
    fn round(self, a: F) -> F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        intrinsic!([
            _mm256_round_ps::<NEAREST>(a[0]),
            _mm256_round_ps::<NEAREST>(a[1]),
        ])
    }

    #[inline(always)]
    fn scale2(self, x: F, n: F) -> F {
        let n = both!(_mm256_cvtps_epi32(n));
        let bias = self.splat_i(127);
        let exponent = both!(_mm256_add_epi32(n, bias));
        let power = intrinsic!([
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent[0])),
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent[1])),
        ]);
        self.mul(x, power)
    }

    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        intrinsic!({
            let eight = _mm256_add_ps(a[0], a[1]);
            let four = _mm_add_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn greatest(self, a: F) -> f32 {
        intrinsic!({
            let eight = _mm256_max_ps(a[0], a[1]);
            let four = _mm_max_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        [intrinsic!(_mm256_set1_epi32(x)); 2]
    }

    #[inline(always)]
    fn load_i(self, x: &[u8; 64]) -> I {
        let x = x.as_ptr();
        intrinsic!([
            _mm256_loadu_si256(x.cast()),
            _mm256_loadu_si256(x.add(32).cast()),
        ])
    }

    #[inline(always)]
    fn to_f(self, x: I) -> F {
        both!(_mm256_cvtepi32_ps(x))
    }

    #[inline(always)]
    fn low_nibbles(self, x: I) -> I {
        let low = self.splat_i(0x0f0f_0f0f);
        both!(_mm256_and_si256(x, low))
    }

    #[inline(always)]
    fn high_nibbles(self, x: I) -> I {
        self.low_nibbles(intrinsic!([
            _mm256_srli_epi16::<4>(x[0]),
            _mm256_srli_epi16::<4>(x[1]),
        ]))
    }

    #[inline(always)]
    fn add_where(self, x: I, mask: u64, value: u8) -> I {
        let value = [
            where_set(mask as u32, value),
            where_set((mask >> 32) as u32, value),
        ];
        // Bits that are clear: to set them is to add, and the compiler follows what is still clear.
        both!(_mm256_or_si256(x, value))
    }

    #[inline(always)]
    fn byte(self, x: I, j: u32) -> F {
        let shift = [intrinsic!(_mm_cvtsi32_si128((8 * j).cast_signed())); 2];
        let shifted = both!(_mm256_srl_epi32(x, shift));
        let low = self.splat_i(255);
        self.to_f(both!(_mm256_and_si256(shifted, low)))
    }

    #[inline(always)]
    fn dot4(self, sum: I, u: I, i: I) -> I {
        let products = [products(u[0], i[0]), products(u[1], i[1])];
        both!(_mm256_add_epi32(sum, products))
    }

    #[inline(always)]
    fn dot2(self, sum: F, a: I, b: I) -> F {
        let low = self.fma(self.low_bf16(a), self.low_bf16(b), sum);
        self.fma(self.high_bf16(a), self.high_bf16(b), low)
    }

    #[inline(always)]
    fn low_bf16(self, x: I) -> F {
        intrinsic!([
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x[0])),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x[1])),
        ])
    }

    #[inline(always)]
    fn high_bf16(self, x: I) -> F {
        let high = self.splat_i(-65536);
        let high = both!(_mm256_and_si256(x, high));
        both!(_mm256_castsi256_ps(high))
    }

    #[inline(always)]
    fn store_i8(self, x: F, to: &mut [i8; 16]) {
        let x = both!(_mm256_cvtps_epi32(x));
        intrinsic!({
            let halves = in_order(_mm256_packs_epi32(x[0], x[1]));
            let bytes = _mm_packs_epi16(
                _mm256_castsi256_si128(halves),
                _mm256_extracti128_si256::<1>(halves),
            );
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        });
    }

    #[inline(always)]
    fn store_bf16(self, x: F, to: &mut [u16; 16]) {
        let halves = [to_bf16(x[0]), to_bf16(x[1])];
        intrinsic!(_mm256_storeu_si256(
            to.as_mut_ptr().cast(),
            in_order(_mm256_packus_epi32(halves[0], halves[1]))
        ));
    }
}
