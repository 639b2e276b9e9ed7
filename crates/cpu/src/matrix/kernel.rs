//! The products themselves: one tile of sixteen outputs with a few rows of activations at a time.
//!
//! Weights of a block go into registers once for all of these rows; sums stay in registers until the tile ends.

use super::codec::{Codec, Codes, Floats};
use crate::rows::{BLOCK, QBlock};
use crate::simd::Simd;
use std::marker::PhantomData;

/// Rows of activations, one after another.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    /// All of them.
    pub(crate) data: &'a [T],
    /// From one row to the next.
    pub(crate) stride: usize,
}

impl<'a, T> Rows<'a, T> {
    #[inline(always)]
    fn take<const M: usize>(self, first: usize) -> [&'a [T]; M] {
        let mut rows: [&[T]; M] = [&[]; M];
        for (m, row) in rows.iter_mut().enumerate() {
            *row = &self.data[(first + m) * self.stride..][..self.stride];
        }
        rows
    }
}

/// What multiplies a tile with rows of activations.
pub(crate) trait Kernel: Copy {
    /// Sums of each of `M` rows from `first` on.
    fn sums<S: Simd, const M: usize>(self, s: S, tile: &[u8], first: usize) -> [S::F; M];
}

/// Codes times activations in bytes: exact in integers, scaled for every 32 inputs.
#[derive(Clone, Copy)]
pub(crate) struct Integer<'a, C>(Rows<'a, QBlock>, PhantomData<C>);

impl<'a, C> Integer<'a, C> {
    pub(crate) const fn new(rows: Rows<'a, QBlock>) -> Self {
        Self(rows, PhantomData)
    }
}

/// Codes times f32: as exact as the dequantized weights.
#[derive(Clone, Copy)]
pub(crate) struct Dequantized<'a, C>(Rows<'a, f32>, PhantomData<C>);

impl<'a, C> Dequantized<'a, C> {
    pub(crate) const fn new(rows: Rows<'a, f32>) -> Self {
        Self(rows, PhantomData)
    }
}

/// Floats times f32.
#[derive(Clone, Copy)]
pub(crate) struct Float<'a, C>(Rows<'a, f32>, PhantomData<C>);

impl<'a, C> Float<'a, C> {
    pub(crate) const fn new(rows: Rows<'a, f32>) -> Self {
        Self(rows, PhantomData)
    }
}

/// Pairs of bf16 times pairs of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Pairs<'a>(pub(crate) Rows<'a, u32>);

impl<C: Codec> Kernel for Integer<'_, C> {
    #[inline(always)]
    fn sums<S: Simd, const M: usize>(self, s: S, tile: &[u8], first: usize) -> [S::F; M] {
        let rows = self.0.take::<M>(first);
        let mut sums = [s.zero(); M];
        for (u, unit) in C::units(tile).iter().enumerate() {
            let head = C::head(s, unit);
            for j in 0..C::BLOCKS {
                let block = C::codes(s, head, unit, j);
                for m in 0..M {
                    sums[m] =
                        integer_block::<S, C>(s, &block, &rows[m][u * C::BLOCKS + j], sums[m]);
                }
            }
        }
        sums
    }
}

/// Adds the products of one block with one row.
#[inline(always)]
fn integer_block<S: Simd, C: Codec>(s: S, block: &Codes<S>, x: &QBlock, sum: S::F) -> S::F {
    let scale = s.splat(x.scale);
    let sum = if C::HALVES {
        let low = integer_half::<S, C, 0, 4>(s, block, x, x.sums[0]);
        let high = integer_half::<S, C, 4, 8>(s, block, x, x.sums[1]);
        let both = s.fma(high, block.scale[1], s.mul(low, block.scale[0]));
        s.fma(both, scale, sum)
    } else {
        let whole = integer_half::<S, C, 0, 8>(s, block, x, x.sums[0] + x.sums[1]);
        s.fma(s.mul(whole, block.scale[0]), scale, sum)
    };
    if C::HAS_MIN {
        s.fma(block.min, s.splat(x.scaled_sum), sum)
    } else {
        sum
    }
}

/// The products of some groups, the codes' offset taken off beforehand.
#[inline(always)]
fn integer_half<S: Simd, C: Codec, const FROM: usize, const TO: usize>(
    s: S,
    block: &Codes<S>,
    x: &QBlock,
    row_sum: i32,
) -> S::F {
    let mut sum = s.splat_i(-C::OFFSET * row_sum);
    for g in FROM..TO {
        sum = s.dot4(sum, block.codes[g], s.splat_i(x.group(g)));
    }
    s.to_f(sum)
}

/// The weights of a block as f32, by input.
#[inline(always)]
fn dequantize<S: Simd, C: Codec>(s: S, block: &Codes<S>) -> [S::F; BLOCK] {
    let mut weights = [s.zero(); BLOCK];
    #[expect(clippy::cast_precision_loss, reason = "a small power of two")]
    let offset = s.splat(-(C::OFFSET as f32));
    for g in 0..8 {
        let scale = block.scale[g / 4];
        let min = if C::HAS_MIN {
            block.min
        } else {
            s.mul(offset, scale)
        };
        for j in 0..4 {
            weights[4 * g + j as usize] = s.fma(s.byte(block.codes[g], j), scale, min);
        }
    }
    weights
}

impl<C: Codec> Kernel for Dequantized<'_, C> {
    #[inline(always)]
    fn sums<S: Simd, const M: usize>(self, s: S, tile: &[u8], first: usize) -> [S::F; M] {
        let rows = self.0.take::<M>(first);
        let mut sums = [s.zero(); M];
        for (u, unit) in C::units(tile).iter().enumerate() {
            let head = C::head(s, unit);
            for j in 0..C::BLOCKS {
                let weights = dequantize::<S, C>(s, &C::codes(s, head, unit, j));
                let at = (u * C::BLOCKS + j) * BLOCK;
                for (k, &weight) in weights.iter().enumerate() {
                    for m in 0..M {
                        sums[m] = s.fma(weight, s.splat(rows[m][at + k]), sums[m]);
                    }
                }
            }
        }
        sums
    }
}

/// Sums of one row that grow apart, since one sum alone waits for itself at every step: unit `u` belongs to chain
/// `u % CHAINS`. However many rows are computed together, each adds up in the same order, so that what a row gives does
/// not depend on what it is batched with.
const CHAINS: usize = 4;

/// Rows with which one chain at a time keeps the processor busy.
const MANY: usize = 8;

impl<C: Floats + Copy> Kernel for Float<'_, C> {
    #[inline(always)]
    fn sums<S: Simd, const M: usize>(self, s: S, tile: &[u8], first: usize) -> [S::F; M] {
        let rows = self.0.take::<M>(first);
        let quads = C::units(tile).as_chunks::<CHAINS>().0;
        let mut sums = [[s.zero(); M]; CHAINS];
        if M < MANY {
            for (q, units) in quads.iter().enumerate() {
                for c in 0..CHAINS {
                    sums[c] = float_unit::<S, C, M>(s, &units[c], q * CHAINS + c, rows, sums[c]);
                }
            }
        } else {
            for c in 0..CHAINS {
                let mut chain = [s.zero(); M];
                for (q, units) in quads.iter().enumerate() {
                    chain = float_unit::<S, C, M>(s, &units[c], q * CHAINS + c, rows, chain);
                }
                sums[c] = chain;
            }
        }
        together(s, sums)
    }
}

/// Adds the products of one unit.
#[inline(always)]
fn float_unit<S: Simd, C: Floats, const M: usize>(
    s: S,
    unit: &C::Unit,
    u: usize,
    rows: [&[f32]; M],
    mut sums: [S::F; M],
) -> [S::F; M] {
    let weights = C::load(s, unit);
    for i in 0..C::INPUTS {
        for m in 0..M {
            sums[m] = s.fma(weights[i], s.splat(rows[m][u * C::INPUTS + i]), sums[m]);
        }
    }
    sums
}

impl Kernel for Pairs<'_> {
    #[inline(always)]
    fn sums<S: Simd, const M: usize>(self, s: S, tile: &[u8], first: usize) -> [S::F; M] {
        let rows = self.0.take::<M>(first);
        let quads = tile.as_chunks::<64>().0.as_chunks::<CHAINS>().0;
        let mut sums = [[s.zero(); M]; CHAINS];
        if M < MANY {
            for (q, units) in quads.iter().enumerate() {
                for c in 0..CHAINS {
                    sums[c] = pair_unit(s, &units[c], q * CHAINS + c, rows, sums[c]);
                }
            }
        } else {
            for c in 0..CHAINS {
                let mut chain = [s.zero(); M];
                for (q, units) in quads.iter().enumerate() {
                    chain = pair_unit(s, &units[c], q * CHAINS + c, rows, chain);
                }
                sums[c] = chain;
            }
        }
        together(s, sums)
    }
}

/// Adds the products of one unit.
#[inline(always)]
fn pair_unit<S: Simd, const M: usize>(
    s: S,
    unit: &[u8; 64],
    u: usize,
    rows: [&[u32]; M],
    mut sums: [S::F; M],
) -> [S::F; M] {
    let weights = s.load_i(unit);
    for m in 0..M {
        sums[m] = s.dot2(sums[m], weights, s.splat_i(rows[m][u].cast_signed()));
    }
    sums
}

/// Adds the chains up.
#[inline(always)]
fn together<S: Simd, const M: usize>(s: S, sums: [[S::F; M]; CHAINS]) -> [S::F; M] {
    let [mut whole, rest @ ..] = sums;
    for chain in rest {
        for m in 0..M {
            whole[m] = s.add(whole[m], chain[m]);
        }
    }
    whole
}

/// Weights of one input-major stretch of a tile as f32: `out[input]` has the sixteen rows.
#[inline(always)]
pub(crate) fn expand_codes<S: Simd, C: Codec>(s: S, tile: &[u8], out: &mut [[f32; 16]]) {
    for (u, unit) in C::units(tile).iter().enumerate() {
        let head = C::head(s, unit);
        for j in 0..C::BLOCKS {
            let weights = dequantize::<S, C>(s, &C::codes(s, head, unit, j));
            let at = (u * C::BLOCKS + j) * BLOCK;
            for (weight, out) in weights.iter().zip(&mut out[at..at + BLOCK]) {
                s.store(*weight, out);
            }
        }
    }
}

/// As [`expand_codes`] for floats.
#[inline(always)]
pub(crate) fn expand_floats<S: Simd, C: Floats>(s: S, tile: &[u8], out: &mut [[f32; 16]]) {
    for (unit, out) in C::units(tile).iter().zip(out.chunks_mut(C::INPUTS)) {
        for (weight, out) in C::load(s, unit).iter().zip(out) {
            s.store(*weight, out);
        }
    }
}
