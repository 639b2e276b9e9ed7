//! What a part computes: a stretch of context with a few rows.
//!
//! Both products multiply *units*, sixteen lanes as they lie in the pool, with *words*, what one lane needs of a row: a
//! number, or a pair of bf16. Scores have slots as lanes and grow along the dimensions; outputs have dimensions as lanes
//! and grow along the slots. Every sum grows in one order, whatever is computed beside it.

use crate::kv_cache::SLOTS;
use crate::shared::Plain;
use crate::simd::Simd;
use baton_kv::fp8;

/// Tiles of keys in a stretch.
const STRETCH: usize = 8;
/// Context positions in a stretch. Stretches begin at its multiples.
pub(super) const POSITIONS: usize = STRETCH * SLOTS;
/// Rows that share what is loaded.
const BLOCK: usize = 4;

/// How the pool's numbers are multiplied.
pub(super) trait Numbers {
    type Stored: Plain;
    /// Sixteen lanes in the pool.
    type Unit: Copy;
    /// Sixteen lanes in registers.
    type Lanes<S: Simd>: Copy;
    /// Numbers in a lane.
    const PAIR: usize;

    fn units(stored: &[Self::Stored]) -> &[Self::Unit];
    fn load<S: Simd>(s: S, unit: &Self::Unit) -> Self::Lanes<S>;
    fn splat<S: Simd>(s: S, word: u32) -> Self::Lanes<S>;
    /// Adds the products of all numbers of each lane.
    fn dot<S: Simd>(s: S, sum: S::F, a: Self::Lanes<S>, b: Self::Lanes<S>) -> S::F;
    /// Makes nothing of all but the first number of each lane.
    fn keep_first(unit: &mut Self::Unit);
    /// Sixteen numbers as words.
    fn put<S: Simd>(s: S, x: S::F, words: &mut [u32]);
}

/// A pool of f32.
pub(super) struct Singles;

/// A pool of bf16, in pairs.
pub(super) struct Pairs;

impl Numbers for Singles {
    type Stored = f32;
    type Unit = [f32; 16];
    type Lanes<S: Simd> = S::F;
    const PAIR: usize = 1;

    #[inline(always)]
    fn units(stored: &[f32]) -> &[[f32; 16]] {
        stored.as_chunks().0
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, unit: &[f32; 16]) -> S::F {
        s.load(unit)
    }

    #[inline(always)]
    fn splat<S: Simd>(s: S, word: u32) -> S::F {
        s.splat(f32::from_bits(word))
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, sum: S::F, a: S::F, b: S::F) -> S::F {
        s.fma(a, b, sum)
    }

    #[inline(always)]
    fn keep_first(_: &mut [f32; 16]) {}

    #[inline(always)]
    fn put<S: Simd>(s: S, x: S::F, words: &mut [u32]) {
        let (words, _) = bytemuck::cast_slice_mut::<u32, f32>(words).as_chunks_mut();
        s.store(x, &mut words[0]);
    }
}

impl Numbers for Pairs {
    type Stored = u16;
    type Unit = [u16; 32];
    type Lanes<S: Simd> = S::I;
    const PAIR: usize = 2;

    #[inline(always)]
    fn units(stored: &[u16]) -> &[[u16; 32]] {
        stored.as_chunks().0
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, unit: &[u16; 32]) -> S::I {
        s.load_i(bytemuck::cast_ref(unit))
    }

    #[inline(always)]
    fn splat<S: Simd>(s: S, word: u32) -> S::I {
        s.splat_i(word.cast_signed())
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, sum: S::F, a: S::I, b: S::I) -> S::F {
        s.dot2(sum, a, b)
    }

    #[inline(always)]
    fn keep_first(unit: &mut [u16; 32]) {
        for pair in unit.as_chunks_mut::<2>().0 {
            pair[1] = 0;
        }
    }

    #[inline(always)]
    fn put<S: Simd>(s: S, x: S::F, words: &mut [u32]) {
        let (words, _) = bytemuck::cast_slice_mut::<u32, u16>(words).as_chunks_mut();
        s.store_bf16(x, &mut words[0]);
    }
}

/// A pool of e4m3. Words are [`fp8::UNIT`] times greater, since what is read is so much smaller.
pub(super) struct Eighths;

impl Numbers for Eighths {
    type Stored = u8;
    type Unit = [u8; 16];
    type Lanes<S: Simd> = S::F;
    const PAIR: usize = 1;

    #[inline(always)]
    fn units(stored: &[u8]) -> &[[u8; 16]] {
        stored.as_chunks().0
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, unit: &[u8; 16]) -> S::F {
        let halves = unit.map(fp8::half);
        s.load_f16(bytemuck::cast_ref(&halves))
    }

    #[inline(always)]
    fn splat<S: Simd>(s: S, word: u32) -> S::F {
        s.splat(f32::from_bits(word))
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, sum: S::F, a: S::F, b: S::F) -> S::F {
        s.fma(a, b, sum)
    }

    #[inline(always)]
    fn keep_first(_: &mut [u8; 16]) {}

    #[inline(always)]
    fn put<S: Simd>(s: S, x: S::F, words: &mut [u32]) {
        Singles::put(s, s.mul(x, s.splat(fp8::UNIT)), words);
    }
}

/// A stretch's tiles of keys and values, each `[..][lanes]`, and how many positions they hold; what the last tile has after
/// them is not looked at.
pub(super) struct Tiles<'a, N: Numbers> {
    pub(super) keys: [&'a [N::Unit]; STRETCH],
    pub(super) values: [&'a [N::Unit]; STRETCH],
    pub(super) n_slots: usize,
}

impl<N: Numbers> Tiles<'_, N> {
    /// No tiles yet, for so many positions.
    #[inline(always)]
    pub(super) const fn new(n_slots: usize) -> Self {
        Self {
            keys: [&[]; STRETCH],
            values: [&[]; STRETCH],
            n_slots,
        }
    }

    #[inline(always)]
    pub(super) const fn len(&self) -> usize {
        self.n_slots.div_ceil(SLOTS)
    }
}

/// Running results of a row: all weights are relative to `2^peak`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running {
    pub(super) peak: f32,
    pub(super) sum: f32,
}

/// Nothing seen yet.
pub(super) const NOTHING: Running = Running {
    peak: f32::NEG_INFINITY,
    sum: 0.0,
};

impl Running {
    /// Takes what a stretch gave in. Returns what outputs so far and the stretch's are multiplied with before they are added.
    /// Parts and merges both fold stretch after stretch, so how a context is split changes nothing.
    #[inline(always)]
    pub(super) fn fold(&mut self, stretch: Self) -> [f32; 2] {
        let scales = if stretch.peak == f32::NEG_INFINITY {
            [1.0, 0.0]
        } else if stretch.peak > self.peak {
            [(self.peak - stretch.peak).exp2(), 1.0]
        } else {
            [1.0, (stretch.peak - self.peak).exp2()]
        };
        self.peak = self.peak.max(stretch.peak);
        self.sum = self.sum * scales[0] + stretch.sum * scales[1];
        scales
    }
}

/// Scores of all rows: `scores[row]` has a stretch's positions. `q` has `n` words for each row.
#[inline(always)]
pub(super) fn scores<S: Simd, N: Numbers>(
    s: S,
    (q, n): (&[u32], usize),
    tiles: &Tiles<'_, N>,
    scores: &mut [[f32; POSITIONS]],
) {
    let mut first = 0;
    while first < scores.len() {
        let (q, scores) = (&q[first * n..], &mut scores[first..]);
        first += match scores.len() {
            1 => score_rows::<S, N, 1>(s, (q, n), tiles, scores),
            2 => score_rows::<S, N, 2>(s, (q, n), tiles, scores),
            3 => score_rows::<S, N, 3>(s, (q, n), tiles, scores),
            _ => score_rows::<S, N, BLOCK>(s, (q, n), tiles, scores),
        };
    }
}

/// The first `R` rows, with as many tiles at once as registers have sums for. Returns `R`.
#[inline(always)]
fn score_rows<S: Simd, N: Numbers, const R: usize>(
    s: S,
    q: (&[u32], usize),
    tiles: &Tiles<'_, N>,
    scores: &mut [[f32; POSITIONS]],
) -> usize {
    let mut t = 0;
    if R * 8 <= S::SUMS && tiles.len() == 8 {
        score_block::<S, N, R, 8>(s, q, &tiles.keys, 0, scores);
        return R;
    }
    while R * 4 <= S::SUMS && t + 4 <= tiles.len() {
        score_block::<S, N, R, 4>(s, q, &tiles.keys, t, scores);
        t += 4;
    }
    while R * 2 <= S::SUMS && t + 2 <= tiles.len() {
        score_block::<S, N, R, 2>(s, q, &tiles.keys, t, scores);
        t += 2;
    }
    while t < tiles.len() {
        score_block::<S, N, R, 1>(s, q, &tiles.keys, t, scores);
        t += 1;
    }
    R
}

#[inline(always)]
fn score_block<S: Simd, N: Numbers, const R: usize, const T: usize>(
    s: S,
    (q, n): (&[u32], usize),
    tiles: &[&[N::Unit]; STRETCH],
    first: usize,
    scores: &mut [[f32; POSITIONS]],
) {
    let mut rows: [&[u32]; R] = [&[]; R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = &q[r * n..][..n];
    }
    let mut keys: [&[N::Unit]; T] = [&[]; T];
    for (t, keys) in keys.iter_mut().enumerate() {
        *keys = &tiles[first + t][..n];
    }
    let mut sums = [[s.zero(); T]; R];
    for d in 0..n {
        let mut lanes = [N::load(s, &keys[0][d]); T];
        for t in 1..T {
            lanes[t] = N::load(s, &keys[t][d]);
        }
        for r in 0..R {
            let x = N::splat(s, rows[r][d]);
            for t in 0..T {
                sums[r][t] = N::dot(s, sums[r][t], lanes[t], x);
            }
        }
    }
    for r in 0..R {
        let (to, _) = scores[r].as_chunks_mut::<SLOTS>();
        for t in 0..T {
            s.store(sums[r][t], &mut to[first + t]);
        }
    }
}

/// A row's scores become weights of the first `seen` positions, and nothing of the others up to `n_tiles`.
#[inline(always)]
pub(super) fn soften<S: Simd, N: Numbers>(
    s: S,
    (seen, n_tiles): (usize, usize),
    scores: &mut [f32; POSITIONS],
    weights: &mut [u32],
) -> Running {
    let computed = seen.next_multiple_of(SLOTS);
    scores[seen..computed].fill(f32::NEG_INFINITY);
    let (weights, rest) = weights[..n_tiles * SLOTS / N::PAIR].split_at_mut(computed / N::PAIR);
    rest.fill(0);
    if seen == 0 {
        return NOTHING;
    }
    let tiles = &scores[..computed].as_chunks::<SLOTS>().0;
    let mut greatest = s.load(&tiles[0]);
    for tile in &tiles[1..] {
        greatest = s.max(greatest, s.load(tile));
    }
    let peak = s.greatest(greatest);
    let base = s.splat(peak);
    let mut sum = s.zero();
    for (tile, words) in tiles.iter().zip(weights.chunks_exact_mut(SLOTS / N::PAIR)) {
        let weight = s.exp2(s.sub(s.load(tile), base));
        sum = s.add(sum, weight);
        N::put(s, weight, words);
    }
    // What is masked must not weigh 2^-126 of something infinite.
    if seen < computed {
        clear::<N>(weights, seen, computed);
    }
    let sum = s.sum(sum);
    Running { peak, sum }
}

/// Sets the weights of these positions to nothing.
#[inline(always)]
fn clear<N: Numbers>(weights: &mut [u32], from: usize, to: usize) {
    if N::PAIR == 2 {
        bytemuck::cast_slice_mut::<u32, u16>(weights)[from..to].fill(0);
    } else {
        weights[from..to].fill(0);
    }
}

/// Adds a stretch's values by weight: `out = out * scale[0] + values * scale[1]`, with `dim` numbers in each row of `out`.
#[inline(always)]
pub(super) fn values<S: Simd, N: Numbers>(
    s: S,
    weights: &[u32],
    tiles: &Tiles<'_, N>,
    scales: &[[f32; 2]],
    (out, dim): (&mut [f32], usize),
) {
    let mut first = 0;
    while first < scales.len() {
        let weights = &weights[first * (POSITIONS / N::PAIR)..];
        let (scales, out) = (&scales[first..], (&mut out[first * dim..], dim));
        first += match scales.len() {
            1 => value_rows::<S, N, 1>(s, weights, tiles, scales, out),
            2 => value_rows::<S, N, 2>(s, weights, tiles, scales, out),
            3 => value_rows::<S, N, 3>(s, weights, tiles, scales, out),
            _ => value_rows::<S, N, BLOCK>(s, weights, tiles, scales, out),
        };
    }
}

/// The first `R` rows, with as many lanes at once as registers have sums for. Returns `R`.
#[inline(always)]
fn value_rows<S: Simd, N: Numbers, const R: usize>(
    s: S,
    weights: &[u32],
    tiles: &Tiles<'_, N>,
    scales: &[[f32; 2]],
    (out, dim): (&mut [f32], usize),
) -> usize {
    let mut j = 0;
    while R * 4 <= S::SUMS && j + 4 <= dim / 16 {
        value_block::<S, N, R, 4>(s, weights, tiles, (scales, j), (out, dim));
        j += 4;
    }
    while R * 2 <= S::SUMS && j + 2 <= dim / 16 {
        value_block::<S, N, R, 2>(s, weights, tiles, (scales, j), (out, dim));
        j += 2;
    }
    while j < dim / 16 {
        value_block::<S, N, R, 1>(s, weights, tiles, (scales, j), (out, dim));
        j += 1;
    }
    R
}

#[inline(always)]
fn value_block<S: Simd, N: Numbers, const R: usize, const J: usize>(
    s: S,
    weights: &[u32],
    tiles: &Tiles<'_, N>,
    (scales, first): (&[[f32; 2]], usize),
    (out, dim): (&mut [f32], usize),
) {
    let per_tile = SLOTS / N::PAIR;
    let mut sums = [[s.zero(); J]; R];
    for t in 0..tiles.len() {
        let n_slots = (tiles.n_slots - t * SLOTS).min(SLOTS);
        let mut rows: [&[u32]; R] = [&[]; R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = &weights[r * STRETCH * per_tile + t * per_tile..][..per_tile];
        }
        let n = n_slots / N::PAIR;
        let mut units = tiles.values[t].chunks_exact(dim / 16);
        for i in 0..n {
            let Some(units) = units.next() else { break };
            sums = grow::<S, N, R, J>(s, (&rows, i), &units[first..first + J], sums);
        }
        if n * N::PAIR < n_slots
            && let Some(units) = units.next()
        {
            // The second half of an odd last slot's pair belongs to nobody yet.
            let mut last = [units[first]; J];
            last.copy_from_slice(&units[first..first + J]);
            last.iter_mut().for_each(N::keep_first);
            sums = grow::<S, N, R, J>(s, (&rows, n), &last, sums);
        }
    }
    for r in 0..R {
        let (out, _) = out[r * dim..][..dim].as_chunks_mut::<16>();
        let [older, newer] = [s.splat(scales[r][0]), s.splat(scales[r][1])];
        for j in 0..J {
            let out = &mut out[first + j];
            // Not fused, as a merge does it.
            let sum = s.add(s.mul(s.load(out), older), s.mul(sums[r][j], newer));
            s.store(sum, out);
        }
    }
}

/// Adds `J` units by weight `i` of each row.
#[inline(always)]
fn grow<S: Simd, N: Numbers, const R: usize, const J: usize>(
    s: S,
    (rows, i): (&[&[u32]; R], usize),
    units: &[N::Unit],
    mut sums: [[S::F; J]; R],
) -> [[S::F; J]; R] {
    let mut lanes = [N::load(s, &units[0]); J];
    for j in 1..J {
        lanes[j] = N::load(s, &units[j]);
    }
    for r in 0..R {
        let x = N::splat(s, rows[r][i]);
        for j in 0..J {
            sums[r][j] = N::dot(s, sums[r][j], lanes[j], x);
        }
    }
    sums
}
