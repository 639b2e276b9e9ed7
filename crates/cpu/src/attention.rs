//! Causal attention over the paged pool: scores, weights and weighted values of a few rows at a time, stretch of context
//! after stretch, each relative to its own peak, folded one after another.
//!
//! A *row* is one query head of one token; the rows of a part share a KV head. A row's result has the same bits whatever is
//! computed beside it and however contexts are split, since stretches begin at fixed positions and are folded in order.

mod kernel;
mod plan;

use crate::kv_cache::{KvCache, Pool, SLOTS, Shape};
use crate::shared::Shared;
use crate::simd::{Isa, Simd, Task};
use baton_kv::BlockId;
use kernel::{Eighths, NOTHING, Numbers, POSITIONS, Pairs, Running, Singles, Tiles};
pub(crate) use plan::Span;
use plan::{Cut, Merge, Part, cut};
use std::ops::Range;

/// Most rows that are computed together.
const MOST: usize = 16;

/// A step's attention, cut into parts. Reused from step to step.
#[derive(Default)]
pub(crate) struct Attention {
    spans: Vec<Span>,
    tables: Vec<BlockId>,
    parts: Vec<Part>,
    merges: Vec<Merge>,
    /// Query heads of each KV head.
    group: usize,
    /// Partial results, `[padded dim + 2]` each: outputs not yet divided, their sum, their peak. Each is written by one part
    /// and read by one merge.
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
    /// Words of the queries, by row.
    q: Vec<u32>,
    scores: Vec<[f32; POSITIONS]>,
    /// Words of the weights, by row.
    weights: Vec<u32>,
    /// `[row][padded dim]`.
    out: Vec<f32>,
}

/// What a plan depends on besides the sequences.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    /// Query heads of each KV head.
    pub(crate) group: usize,
    /// Parts of equal work that are wanted.
    pub(crate) parts: usize,
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
            group: how.group,
            tokens: (MOST / how.group).max(1),
            parts: how.parts,
        };
        cut(spans, how, &mut self.parts, &mut self.merges);
        let n = self.merges.last().map_or(0, |merge| merge.partials.end);
        let len = n * width(shape);
        if self.partials.as_ref().map_or(0, Shared::len) < len {
            // Twice as much, so that a context that grows rarely needs more; what is not written takes no memory.
            self.partials = Some(Shared::zeroed(2 * len));
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

    /// Makes outputs of partial results.
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
            let partials = merge.partials.clone().skip(row).step_by(n_rows);
            self.merge_row(partials, width(shape), out);
        }
    }

    /// Folds a row's partial results in order.
    fn merge_row(&self, partials: impl Iterator<Item = usize>, width: usize, out: &mut [f32]) {
        out.fill(0.0);
        let mut running = NOTHING;
        for partial in partials {
            let range = partial * width..(partial + 1) * width;
            // SAFETY: parts wrote them before the last meeting; nobody writes them now.
            #[expect(unsafe_code, reason = "partial results are shared between threads")]
            let found = unsafe { self.partials.as_ref().map(|p| p.get(range)) };
            let Some(&[ref values @ .., sum, peak]) = found else {
                continue;
            };
            let scales = running.fold(Running { peak, sum });
            for (out, value) in out.iter_mut().zip(values) {
                *out = *out * scales[0] + value * scales[1];
            }
        }
        let scale = 1.0 / running.sum;
        out.iter_mut().for_each(|x| *x *= scale);
    }
}

/// Numbers of a partial result.
const fn width(shape: &Shape) -> usize {
    shape.padded_dim + 2
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
        let cache = self.cache;
        match &cache.pool {
            Pool::F32(layers) => self.part::<S, Singles>(s, &layers[self.layer]),
            Pool::Bf16(layers) => self.part::<S, Pairs>(s, &layers[self.layer]),
            Pool::Fp8(layers) => self.part::<S, Eighths>(s, &layers[self.layer]),
        }
    }
}

#[expect(
    unsafe_code,
    reason = "rows and the pool are shared between threads: a step's KV is written before the meeting that precedes its \
              attention, each part writes rows of its own, and nobody writes what it reads"
)]
impl PartTask<'_> {
    #[inline(always)]
    fn part<S: Simd, N: Numbers>(&mut self, s: S, pool: &Shared<N::Stored>) {
        let n_rows = self.part.tokens.len() * self.attention.group;
        // Only the group of a single token may have more rows than are computed together: all look equally far.
        for first in (0..n_rows).step_by(MOST) {
            self.rows::<S, N>(s, pool, first..n_rows.min(first + MOST));
        }
    }

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

    #[inline(always)]
    fn rows<S: Simd, N: Numbers>(&mut self, s: S, pool: &Shared<N::Stored>, rows: Range<usize>) {
        let dim = self.cache.shape.padded_dim;
        let n_words = dim / N::PAIR;
        self.scratch.q.resize(rows.len() * n_words, 0);
        self.load_queries::<S, N>(s, &rows);
        let per_row = POSITIONS / N::PAIR;
        self.scratch.weights.resize(MOST * per_row, 0);
        self.scratch.scores.resize(rows.len(), [0.0; POSITIONS]);
        self.scratch.out.clear();
        self.scratch.out.resize(rows.len() * dim, 0.0);
        let mut running = [NOTHING; MOST];
        for at in self.part.context.clone().step_by(POSITIONS) {
            let stretch = at..self.part.context.end.min(at + POSITIONS);
            let tiles = self.tiles::<N>(pool, &stretch);
            kernel::scores(
                s,
                (&self.scratch.q, n_words),
                &tiles,
                &mut self.scratch.scores,
            );
            let mut scales = [[0.0, 1.0]; MOST];
            for (m, row) in rows.clone().enumerate() {
                let seen = self.limit(row).clamp(stretch.start, stretch.end) - stretch.start;
                let scores = &mut self.scratch.scores[m];
                let weights = &mut self.scratch.weights[m * per_row..][..per_row];
                let found = kernel::soften::<S, N>(s, (seen, tiles.len()), scores, weights);
                if self.part.partials.is_some() {
                    running[m] = found;
                } else {
                    scales[m] = running[m].fold(found);
                }
            }
            let out = (&mut self.scratch.out[..], dim);
            kernel::values(s, &self.scratch.weights, &tiles, &scales[..rows.len()], out);
            if let Some(first) = self.part.partials {
                self.put_partials(first, at / POSITIONS, &rows, &running);
            }
        }
        if self.part.partials.is_none() {
            self.put(&rows, &running);
        }
    }

    /// Queries, scaled so that powers of two make weights.
    #[inline(always)]
    fn load_queries<S: Simd, N: Numbers>(&mut self, s: S, rows: &Range<usize>) {
        let (head_dim, dim) = (self.cache.shape.head_dim, self.cache.shape.padded_dim);
        #[expect(clippy::cast_precision_loss, reason = "heads are small")]
        let scale = s.splat(std::f32::consts::LOG2_E / (head_dim as f32).sqrt());
        for (m, row) in rows.clone().enumerate() {
            let at = self.place(row, self.heads.q_stride);
            // SAFETY: see above.
            let q = unsafe { self.heads.q.get(at..at + head_dim) };
            let words = &mut self.scratch.q[m * (dim / N::PAIR)..][..dim / N::PAIR];
            for (q, words) in q.chunks(16).zip(words.chunks_exact_mut(16 / N::PAIR)) {
                let mut lanes = [0.0; 16];
                lanes[..q.len()].copy_from_slice(q);
                N::put(s, s.mul(s.load(&lanes), scale), words);
            }
        }
    }

    /// The tiles of a stretch.
    #[inline(always)]
    fn tiles<'p, N: Numbers>(
        &self,
        pool: &'p Shared<N::Stored>,
        stretch: &Range<usize>,
    ) -> Tiles<'p, N> {
        let shape = &self.cache.shape;
        let table = &self.attention.spans[self.part.span].blocks;
        let mut tiles = Tiles::new(stretch.len());
        for (t, position) in stretch.clone().step_by(SLOTS).enumerate() {
            let block = self.attention.tables[table.start + position / shape.block_size];
            let home = shape.home(block.0, self.part.head).start;
            let keys = home + position % shape.block_size * shape.padded_dim;
            let values = keys + shape.values_at();
            let len = SLOTS * shape.padded_dim;
            // SAFETY: see above.
            let found = unsafe { [pool.get(keys..keys + len), pool.get(values..values + len)] };
            [tiles.keys[t], tiles.values[t]] = found.map(N::units);
        }
        tiles
    }

    /// Writes the rows' results of one stretch.
    #[inline(always)]
    fn put_partials(
        &self,
        first: usize,
        stretch: usize,
        rows: &Range<usize>,
        found: &[Running; MOST],
    ) {
        let (dim, width) = (self.cache.shape.padded_dim, width(&self.cache.shape));
        let n_rows = self.part.tokens.len() * self.attention.group;
        let Some(partials) = &self.attention.partials else {
            return;
        };
        let outs = self.scratch.out.chunks_exact(dim).zip(found);
        for (row, (out, found)) in rows.clone().zip(outs) {
            let at = (first + stretch * n_rows + row) * width;
            // SAFETY: see above; each stretch's rows are one part's.
            let to = unsafe { partials.get_mut(at..at + width) };
            to[..dim].copy_from_slice(out);
            to[dim..].copy_from_slice(&[found.sum, found.peak]);
        }
    }

    /// Writes the rows' outputs.
    #[inline(always)]
    fn put(&self, rows: &Range<usize>, running: &[Running; MOST]) {
        let shape = &self.cache.shape;
        let outs = self.scratch.out.chunks_exact(shape.padded_dim).zip(running);
        for (row, (found, running)) in rows.clone().zip(outs) {
            let at = self.place(row, self.heads.out_stride);
            // SAFETY: see above.
            let out = unsafe { self.heads.out.get_mut(at..at + shape.head_dim) };
            let scale = 1.0 / running.sum;
            for (out, found) in out.iter_mut().zip(found) {
                *out = found * scale;
            }
        }
    }
}

#[cfg(test)]
mod tests;
