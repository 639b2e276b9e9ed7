//! Sixteen lanes, whatever the machine calls them: what the kernels are written in.
//!
//! A kernel is a [`Task`], generic over [`Simd`], and [`Isa::run`] compiles it once for each instruction set and picks
//! one at run time. Everything a kernel calls must be `#[inline(always)]`, or it is compiled without the instructions.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
use neon::Neon;
use portable::Portable;

/// An instruction set that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust, for every machine.
    Portable,
    /// NEON with DOTPROD: Armv8.2 and later, Apple M1 and later.
    Neon,
    /// AVX2 with FMA and F16C: Haswell, Zen and later.
    Avx2,
    /// AVX-512 with F, BW, DQ, VL, VNNI and BF16: Zen 4, Sapphire Rapids and later.
    Avx512,
}

/// All instruction sets, the better after the worse.
const ISAS: [Isa; 4] = [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512];

/// A computation over lanes.
pub(crate) trait Task {
    /// What comes out.
    type Output;

    /// Runs it; `#[inline(always)]` in every implementation.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

impl Isa {
    /// The best that this machine has.
    pub fn detect() -> Self {
        Self::all().last().copied().unwrap_or(Self::Portable)
    }

    /// All that this machine has, the best last.
    pub fn all() -> Vec<Self> {
        ISAS.into_iter().filter(|isa| isa.available()).collect()
    }

    /// Whether this machine has it.
    fn available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::available(),
            _ => false,
        }
    }

    /// Runs a task with this instruction set. An instruction set that the machine lacks is replaced by a portable one.
    #[inline]
    pub(crate) fn run<T: Task>(self, task: T) -> T::Output {
        match self {
            #[cfg(target_arch = "aarch64")]
            Self::Neon if neon::available() => Neon::run(task),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if avx2::available() => Avx2::run(task),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 if avx512::available() => Avx512::run(task),
            _ => task.run(Portable),
        }
    }
}

/// Asks for a cache line that will be read soon; nothing where there is no way to.
#[inline(always)]
pub(crate) fn fetch(line: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "the hint takes a pointer")]
    // SAFETY: every x86-64 processor has it, and it touches nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Sixteen lanes of f32 ([`Simd::F`]) and of 32 bits ([`Simd::I`]: an i32, four bytes, or two bf16).
pub(crate) trait Simd: Copy {
    /// Sums that a kernel may grow at once: they fit into registers, beside what they are made of.
    const SUMS: usize = 4;
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen times 32 bits.
    type I: Copy;

    /// The same number in every lane.
    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; 16]) -> Self::F;
    fn store(self, x: Self::F, to: &mut [f32; 16]);
    /// Sixteen half-precision floats, little-endian.
    fn load_f16(self, x: &[u8; 32]) -> Self::F;
    /// Sixteen bytes as unsigned integers.
    fn load_u8(self, x: &[u8; 16]) -> Self::F;
    /// Sixteen bytes as signed integers.
    fn load_i8(self, x: &[u8; 16]) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once or twice.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The greater; `b` where either is not a number.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The lesser; `b` where either is not a number.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// The nearest whole number, the even one of two.
    fn round(self, a: Self::F) -> Self::F;
    /// `x * 2^n`, rounded once, for whole `n` from -126 to 127.
    fn scale2(self, x: Self::F, n: Self::F) -> Self::F;
    /// Sum of all lanes, in any order.
    fn sum(self, a: Self::F) -> f32;
    /// Greatest lane, if all are numbers; otherwise any of them.
    fn greatest(self, a: Self::F) -> f32;

    fn splat_i(self, x: i32) -> Self::I;
    /// 64 bytes as they lie.
    fn load_i(self, x: &[u8; 64]) -> Self::I;
    fn to_f(self, x: Self::I) -> Self::F;
    /// Low half of every byte.
    fn low_nibbles(self, x: Self::I) -> Self::I;
    /// High half of every byte.
    fn high_nibbles(self, x: Self::I) -> Self::I;
    /// Adds `value` to the bytes whose bit in `mask` is set; no byte has any of its bits yet.
    fn add_where(self, x: Self::I, mask: u64, value: u8) -> Self::I;
    /// Byte `j` (0 to 3) of every lane, unsigned.
    fn byte(self, x: Self::I, j: u32) -> Self::F;
    /// Adds the products of each lane's four unsigned bytes in `u` with the four signed ones in `i`: exact for all bytes,
    /// and the sum wraps. Fastest where the compiler can see that no byte in `u` has its highest bit.
    fn dot4(self, sum: Self::I, u: Self::I, i: Self::I) -> Self::I;
    /// Adds the products of each lane's two bf16 in `a` and `b`, rounded after each or less often. Subnormal operands,
    /// products and sums may count as zero.
    fn dot2(self, sum: Self::F, a: Self::I, b: Self::I) -> Self::F;
    /// The bf16 in the low half of every lane.
    fn low_bf16(self, x: Self::I) -> Self::F;
    /// The bf16 in the high half of every lane.
    fn high_bf16(self, x: Self::I) -> Self::F;
    /// Each lane rounded to signed bytes, the nearest, the even one of two; within ±127 already. What is not a number
    /// becomes any byte.
    fn store_i8(self, x: Self::F, to: &mut [i8; 16]);
    /// Each lane rounded to bf16, the nearest, the even one of two. Subnormal numbers may become zero; what is not a
    /// number stays none.
    fn store_bf16(self, x: Self::F, to: &mut [u16; 16]);

    /// 0 in every lane.
    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }

    /// `2^x`, to 1e-7 of itself, for `x` from -126 to 126. Beyond, it is `2^-126`, which is as good as nothing, or
    /// `2^126`; so it is for what is not a number.
    #[inline(always)]
    fn exp2(self, x: Self::F) -> Self::F {
        let x = self.max(self.min(x, self.splat(126.0)), self.splat(-126.0));
        let whole = self.round(x);
        let part = self.sub(x, whole);
        // Taylor's series of 2^x around 0 on [-0.5, 0.5]: the next term is under 1e-7 of the sum.
        let mut power = self.splat(1.525_273_4e-5);
        for term in [
            1.540_353e-4,
            1.333_355_8e-3,
            9.618_129e-3,
            5.550_411e-2,
            2.402_265e-1,
            std::f32::consts::LN_2,
            1.0,
        ] {
            power = self.fma(power, part, self.splat(term));
        }
        self.scale2(power, whole)
    }
}

#[cfg(test)]
mod tests;
