//! Causal attention over the paged pool: scores, probabilities and weighted values of a few rows at a time, stretch of
//! context after stretch, with a running maximum.
//!
//! A *row* is one query head of one token; the rows of a part share a KV head. Scores and outputs are the same two
//! kernels as the weights' products, since the pool lies in their tiles.

mod plan;

use crate::kv_cache::{KvCache, Pool, SLOTS, Shape};
use crate::matrix::kernel::{Float, Kernel, Pairs, Rows};
use crate::matrix::{F32, ROWS};
use crate::rows::round_bf16;
use crate::shared::Shared;
use crate::simd::{Isa, Simd, Task};
use baton_kv::BlockId;
pub(crate) use plan::Span;
use plan::{Cut, Merge, Part, cut};
use std::ops::Range;

/// Most rows of a part.
const MOST: usize = 16;
/// Tiles of keys in a stretch.
const STRETCH: usize = 8;
/// Context positions in a stretch.
const POSITIONS: usize = STRETCH * SLOTS;

/// A step's attention, cut into parts. Reused from step to step.
#[derive(Default)]
pub(crate) struct Attention {
    spans: Vec<Span>,
    tables: Vec<BlockId>,
    parts: Vec<Part>,
    merges: Vec<Merge>,
    /// Query heads of each KV head.
    group: usize,
    /// `[partial][row][padded dim + 2]`: outputs not yet divided, their sum, their maximum.
    partials: Option<Shared<f32>>,
}

/// Queries and outputs of all tokens: `[token][head][head_dim]`, tokens `stride` apart.
pub(crate) struct Heads<'a> {
    pub(crate) q: &'a Shared<f32>,
    pub(crate) q_stride: usize,
    pub(crate) out: &'a Shared<f32>,
    pub(crate) out_stride: usize,
}

/// Room that a thread computes a part in. Reused.
#[derive(Default)]
pub(crate) struct Scratch {
    q: Vec<f32>,
    q_pairs: Vec<u16>,
    scores: Vec<f32>,
    p_pairs: Vec<u16>,
    out: Vec<f32>,
}

impl Attention {
    /// Cuts the step of these sequences.
    pub(crate) fn plan(&mut self, spans: &[Span], tables: &[BlockId], shape: &Shape, how: How) {
        self.spans.clear();
        self.spans.extend_from_slice(spans);
        self.tables.clear();
        self.tables.extend_from_slice(tables);
        self.group = how.group;
        let how = Cut {
            n_kv_heads: shape.n_kv_heads,
            tokens: (MOST / how.group).max(1),
            parts: how.parts,
        };
        cut(spans, how, &mut self.parts, &mut self.merges);
        let n = self.merges.last().map_or(0, |merge| merge.partials.end);
        let len = n * self.partial_len(shape);
        if self.partials.as_ref().map_or(0, Shared::len) < len {
            self.partials = Some(Shared::zeroed(len));
        }
    }

    /// Parts, each of which may run on any thread.
    pub(crate) fn n_parts(&self) -> usize {
        self.parts.len()
    }

    /// Merges, to be run after all parts.
    pub(crate) fn n_merges(&self) -> usize {
        self.merges.len()
    }

    /// Rows of one token's partial result.
    fn partial_len(&self, shape: &Shape) -> usize {
        MOST.max(self.group) * (shape.padded_dim + 2)
    }

    /// Computes a part of a layer.
    pub(crate) fn part(
        &self,
        isa: Isa,
        (i, layer): (usize, usize),
        cache: &KvCache,
        heads: &Heads<'_>,
        scratch: &mut Scratch,
    ) {
        isa.run(PartTask {
            attention: self,
            part: &self.parts[i],
            layer,
            cache,
            heads,
            scratch,
        });
    }

    /// Makes one output of partial results.
    pub(crate) fn merge(&self, i: usize, shape: &Shape, heads: &Heads<'_>) {
        let merge = &self.merges[i];
        let span = &self.spans[merge.span];
        let n_rows = merge.tokens.len() * self.group;
        for row in 0..n_rows {
            let token = span.first_row + merge.tokens.start + row / self.group;
            let head = merge.head * self.group + row % self.group;
            let at = token * heads.out_stride + head * shape.head_dim;
            // SAFETY: each row is one merge's, and all parts are done.
            #[expect(unsafe_code, reason = "rows are shared between threads")]
            let out = unsafe { heads.out.get_mut(at..at + shape.head_dim) };
            self.merge_row(merge.partials.clone(), row, shape, out);
        }
    }

    fn merge_row(&self, partials: Range<usize>, row: usize, shape: &Shape, out: &mut [f32]) {
        let (len, width) = (self.partial_len(shape), shape.padded_dim + 2);
        let of = |partial: usize| {
            let at = partial * len + row * width;
            // SAFETY: parts wrote them before the last meeting; nobody writes them now.
            #[expect(unsafe_code, reason = "partial results are shared between threads")]
            let values = unsafe { self.partials.as_ref().map(|p| p.get(at..at + width)) };
            values.unwrap_or_default().split_at(shape.padded_dim)
        };
        let peak = partials
            .clone()
            .map(|p| of(p).1[1])
            .fold(f32::NEG_INFINITY, f32::max);
        out.fill(0.0);
        let mut sum = 0.0;
        for partial in partials {
            let (values, about) = of(partial);
            let weight = (about[1] - peak).exp2();
            sum += about[0] * weight;
            for (out, value) in out.iter_mut().zip(values) {
                *out += value * weight;
            }
        }
        let scale = 1.0 / sum;
        out.iter_mut().for_each(|x| *x *= scale);
    }
}

/// What a plan depends on besides the sequences.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    /// Query heads of each KV head.
    pub(crate) group: usize,
    /// Parts that are wanted at least.
    pub(crate) parts: usize,
}

struct PartTask<'a> {
    attention: &'a Attention,
    part: &'a Part,
    layer: usize,
    cache: &'a KvCache,
    heads: &'a Heads<'a>,
    scratch: &'a mut Scratch,
}

impl Task for PartTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let n_rows = self.part.tokens.len() * self.attention.group;
        // A group larger than a part's rows is done in turns.
        for first in (0..n_rows).step_by(MOST) {
            let rows = first..n_rows.min(first + MOST);
            match rows.len() {
                5.. => self.rows::<S, 16>(s, rows),
                2.. => self.rows::<S, 4>(s, rows),
                _ => self.rows::<S, 1>(s, rows),
            }
        }
    }
}

#[expect(
    unsafe_code,
    reason = "rows and the pool are shared between threads: a step's KV is written before the meeting that precedes its \
              attention, each part writes rows of its own, and nobody writes what it reads"
)]
impl PartTask<'_> {
    /// Place of a row in the heads' buffers.
    #[inline(always)]
    fn place(&self, row: usize, stride: usize) -> usize {
        let group = self.attention.group;
        let span = &self.attention.spans[self.part.span];
        let token = span.first_row + self.part.tokens.start + row / group;
        let head = self.part.head * group + row % group;
        token * stride + head * self.cache.shape.head_dim
    }

    /// Positions that a row may look at.
    #[inline(always)]
    fn limit(&self, row: usize) -> usize {
        let span = &self.attention.spans[self.part.span];
        span.start + self.part.tokens.start + row / self.attention.group + 1
    }

    /// Up to `M` rows; what is missing computes with zeros and is forgotten.
    #[inline(always)]
    fn rows<S: Simd, const M: usize>(&mut self, s: S, rows: Range<usize>) {
        let dim = self.cache.shape.padded_dim;
        self.load_queries::<S, M>(s, &rows);
        self.scratch.out.clear();
        self.scratch.out.resize(M * dim, 0.0);
        self.scratch.scores.resize(M * POSITIONS, 0.0);
        self.scratch.p_pairs.resize(M * POSITIONS, 0);
        let (mut peaks, mut sums) = ([f32::NEG_INFINITY; M], [0.0; M]);
        let end = self.part.context.end.min(self.limit(rows.end - 1));
        let mut at = self.part.context.start;
        while at < end {
            let stretch = at..end.min(at + POSITIONS);
            let homes = self.homes(stretch.clone());
            self.scores::<S, M>(s, &homes);
            self.mask::<M>(&rows, stretch.clone());
            let scales = self.softmax::<S, M>(s, homes.len(), &mut peaks, &mut sums);
            self.values::<S, M>(s, &homes, scales);
            at = stretch.end;
        }
        self.put::<M>(&rows, &peaks, &sums);
    }

    /// Queries, scaled so that powers of two make probabilities.
    #[inline(always)]
    fn load_queries<S: Simd, const M: usize>(&mut self, s: S, rows: &Range<usize>) {
        let (head_dim, dim) = (self.cache.shape.head_dim, self.cache.shape.padded_dim);
        #[expect(clippy::cast_precision_loss, reason = "heads are small")]
        let scale = std::f32::consts::LOG2_E / (head_dim as f32).sqrt();
        self.scratch.q.clear();
        self.scratch.q.resize(M * dim, 0.0);
        for (m, row) in rows.clone().enumerate() {
            let at = self.place(row, self.heads.q_stride);
            // SAFETY: see above.
            let q = unsafe { self.heads.q.get(at..at + head_dim) };
            for (out, q) in self.scratch.q[m * dim..].iter_mut().zip(q) {
                *out = q * scale;
            }
        }
        if matches!(self.cache.pool, Pool::Bf16(_)) {
            self.scratch.q_pairs.resize(M * dim, 0);
            round_bf16(s, &self.scratch.q, &mut self.scratch.q_pairs);
        }
    }

    /// The tiles of a stretch, which begins with one.
    #[inline(always)]
    fn homes(&self, stretch: Range<usize>) -> Tiles {
        let shape = &self.cache.shape;
        let table = &self.attention.spans[self.part.span].blocks;
        let mut tiles = Tiles {
            keys: [0; STRETCH],
            values: [0; STRETCH],
            n_slots: stretch.len(),
        };
        for (t, position) in stretch.step_by(SLOTS).enumerate() {
            let block = self.attention.tables[table.start + position / shape.block_size];
            let home = shape.home(block.0, self.part.head).start;
            let at = position % shape.block_size * shape.padded_dim;
            tiles.keys[t] = home + at;
            tiles.values[t] = home + shape.values_at() + at;
        }
        tiles
    }

    /// Scores of a stretch, `[row][position]`.
    #[inline(always)]
    fn scores<S: Simd, const M: usize>(&mut self, s: S, tiles: &Tiles) {
        let dim = self.cache.shape.padded_dim;
        for (t, &at) in tiles.keys[..tiles.len()].iter().enumerate() {
            let tile = at..at + SLOTS * dim;
            let sums: [S::F; M] = match &self.cache.pool {
                Pool::F32(layers) => {
                    // SAFETY: see above.
                    let keys = unsafe { layers[self.layer].get(tile) };
                    let (data, stride) = (&self.scratch.q[..], dim);
                    let q = Rows { data, stride };
                    Float::<F32>::new(q).sums::<S, M>(s, bytemuck::cast_slice(keys), 0)
                }
                Pool::Bf16(layers) => {
                    // SAFETY: see above.
                    let keys = unsafe { layers[self.layer].get(tile) };
                    let (data, stride) = (pairs(&self.scratch.q_pairs), dim / 2);
                    Pairs(Rows { data, stride }).sums::<S, M>(s, bytemuck::cast_slice(keys), 0)
                }
            };
            let (lanes, _) = self.scratch.scores.as_chunks_mut::<SLOTS>();
            for (m, &sum) in sums.iter().enumerate() {
                s.store(sum, &mut lanes[m * STRETCH + t]);
            }
        }
    }

    /// Adds a stretch's values by weight, the older ones scaled.
    #[inline(always)]
    fn values<S: Simd, const M: usize>(&mut self, s: S, tiles: &Tiles, scales: [f32; M]) {
        let dim = self.cache.shape.padded_dim;
        for j in 0..dim / ROWS {
            let (lanes, _) = self.scratch.out.as_chunks::<ROWS>();
            let mut sums = [s.zero(); M];
            for (m, sum) in sums.iter_mut().enumerate() {
                let older = s.load(&lanes[m * (dim / ROWS) + j]);
                *sum = s.mul(older, s.splat(scales[m]));
            }
            for t in 0..tiles.len() {
                let n_slots = (tiles.n_slots - t * SLOTS).min(SLOTS);
                let at = tiles.values[t];
                sums = match &self.cache.pool {
                    Pool::F32(layers) => {
                        // SAFETY: see above.
                        let values = unsafe { layers[self.layer].get(at..at + n_slots * dim) };
                        self.tile_f32(s, (values, j), t * SLOTS, sums)
                    }
                    Pool::Bf16(layers) => {
                        let n = n_slots.next_multiple_of(2);
                        // SAFETY: see above.
                        let values = unsafe { layers[self.layer].get(at..at + n * dim) };
                        self.tile_bf16(s, (values, j), (t * SLOTS, n_slots), sums)
                    }
                };
            }
            let (lanes, _) = self.scratch.out.as_chunks_mut::<ROWS>();
            for m in 0..M {
                s.store(sums[m], &mut lanes[m * (dim / ROWS) + j]);
            }
        }
    }

    /// Lanes `j` of a tile's values, `[slot][dim]`.
    #[inline(always)]
    fn tile_f32<S: Simd, const M: usize>(
        &self,
        s: S,
        (values, j): (&[f32], usize),
        first: usize,
        mut sums: [S::F; M],
    ) -> [S::F; M] {
        let lanes = values.as_chunks::<ROWS>().0.iter();
        let of_slots = lanes.skip(j).step_by(self.cache.shape.padded_dim / ROWS);
        for (i, lanes) in of_slots.enumerate() {
            let value = s.load(lanes);
            for (m, sum) in sums.iter_mut().enumerate() {
                let weight = self.scratch.scores[m * POSITIONS + first + i];
                *sum = s.fma(value, s.splat(weight), *sum);
            }
        }
        sums
    }

    /// Lanes `j` of a tile's values, `[slot / 2][dim][2]`. Of an odd number of slots the last pair's second half belongs
    /// to nobody yet, and is not looked at.
    #[inline(always)]
    fn tile_bf16<S: Simd, const M: usize>(
        &self,
        s: S,
        (values, j): (&[u16], usize),
        (first, n_slots): (usize, usize),
        mut sums: [S::F; M],
    ) -> [S::F; M] {
        let weights = pairs(&self.scratch.p_pairs);
        let lanes = bytemuck::cast_slice::<u16, u8>(values).as_chunks::<64>().0;
        let of_pairs = lanes
            .iter()
            .skip(j)
            .step_by(self.cache.shape.padded_dim / ROWS);
        for (i, lanes) in of_pairs.enumerate() {
            let value = s.load_i(lanes);
            let at = first / 2 + i;
            if 2 * i + 1 == n_slots {
                let value = s.low_bf16(value);
                for m in 0..M {
                    let weight = s.splat_i(weights[m * (POSITIONS / 2) + at].cast_signed());
                    sums[m] = s.fma(value, s.low_bf16(weight), sums[m]);
                }
            } else {
                for m in 0..M {
                    let weight = s.splat_i(weights[m * (POSITIONS / 2) + at].cast_signed());
                    sums[m] = s.dot2(sums[m], value, weight);
                }
            }
        }
        sums
    }

    /// Takes off what lies after each row, and what the last tile has after the stretch.
    #[inline(always)]
    fn mask<const M: usize>(&mut self, rows: &Range<usize>, stretch: Range<usize>) {
        let computed = stretch.len().next_multiple_of(SLOTS);
        for (m, row) in (rows.start..rows.start + M).enumerate() {
            let limit = self.limit(row.min(rows.end - 1)).min(stretch.end);
            let seen = limit.saturating_sub(stretch.start);
            let scores = &mut self.scratch.scores[m * POSITIONS..][..computed];
            if seen < computed {
                scores[seen..].fill(f32::NEG_INFINITY);
            }
        }
    }

    /// Scores become weights relative to the greatest so far. Returns what older outputs are multiplied with.
    #[inline(always)]
    fn softmax<S: Simd, const M: usize>(
        &mut self,
        s: S,
        n: usize,
        peaks: &mut [f32; M],
        sums: &mut [f32; M],
    ) -> [f32; M] {
        let mut scales = [1.0; M];
        let is_bf16 = matches!(self.cache.pool, Pool::Bf16(_));
        for m in 0..M {
            let tiles = &mut self.scratch.scores[m * POSITIONS..][..n * SLOTS];
            let tiles = tiles.as_chunks_mut::<SLOTS>().0;
            let mut greatest = s.splat(peaks[m]);
            for tile in &*tiles {
                greatest = s.max(greatest, s.load(tile));
            }
            let peak = s.greatest(greatest);
            // What is masked weighs 2^-126. That counts only in a row that has seen nothing yet, whose outputs are
            // multiplied with zero as soon as it sees something.
            let base = s.splat(if peak == f32::NEG_INFINITY { 0.0 } else { peak });
            let mut sum = s.zero();
            for tile in tiles {
                let weight = s.exp2(s.sub(s.load(tile), base));
                sum = s.add(sum, weight);
                s.store(weight, tile);
            }
            scales[m] = if peaks[m] == f32::NEG_INFINITY {
                0.0
            } else {
                (peaks[m] - peak).exp2()
            };
            sums[m] = sums[m] * scales[m] + s.sum(sum);
            peaks[m] = peak;
            if is_bf16 {
                let range = m * POSITIONS..m * POSITIONS + n * SLOTS;
                round_bf16(
                    s,
                    &self.scratch.scores[range.clone()],
                    &mut self.scratch.p_pairs[range],
                );
            }
        }
        scales
    }

    /// Writes the rows' outputs, or their partial results.
    #[inline(always)]
    fn put<const M: usize>(&self, rows: &Range<usize>, peaks: &[f32; M], sums: &[f32; M]) {
        let shape = &self.cache.shape;
        for (m, row) in rows.clone().enumerate() {
            let found = &self.scratch.out[m * shape.padded_dim..][..shape.padded_dim];
            if let (Some(i), Some(partials)) = (self.part.partial, &self.attention.partials) {
                let width = shape.padded_dim + 2;
                let at = i * self.attention.partial_len(shape) + row * width;
                // SAFETY: see above.
                let out = unsafe { partials.get_mut(at..at + width) };
                out[..shape.padded_dim].copy_from_slice(found);
                out[shape.padded_dim] = sums[m];
                out[shape.padded_dim + 1] = peaks[m];
                continue;
            }
            let at = self.place(row, self.heads.out_stride);
            // SAFETY: see above.
            let out = unsafe { self.heads.out.get_mut(at..at + shape.head_dim) };
            let scale = 1.0 / sums[m];
            for (out, found) in out.iter_mut().zip(found) {
                *out = found * scale;
            }
        }
    }
}

/// Where a stretch's tiles of keys and values lie in a layer's buffer.
struct Tiles {
    keys: [usize; STRETCH],
    values: [usize; STRETCH],
    /// Positions of the stretch; what the last tile has after them is not looked at.
    n_slots: usize,
}

impl Tiles {
    #[inline(always)]
    const fn len(&self) -> usize {
        self.n_slots.div_ceil(SLOTS)
    }
}

/// Pairs of bf16 as they lie.
#[inline(always)]
fn pairs(halves: &[u16]) -> &[u32] {
    bytemuck::cast_slice(halves)
}

#[cfg(test)]
mod tests;
