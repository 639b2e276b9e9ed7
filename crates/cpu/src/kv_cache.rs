//! The KV pool, laid out for the kernels.
//!
//! A *home* is what one block holds of one layer and one KV head: its keys, then its values. Keys lie in tiles of sixteen
//! slots, so that scores have slots as lanes; values lie slot by slot, so that outputs have dimensions as lanes. Bf16 goes
//! in pairs, of dimensions in keys and of slots in values, as [`crate::simd::Simd::dot2`] eats them. The canonical order
//! of the wire is made and undone here only.
#![expect(
    unsafe_code,
    reason = "tokens of one step are written by several threads, each its own"
)]

use crate::matrix::ROWS;
use crate::shared::{Plain, Shared};
use crate::simd::{Isa, Simd, Task};
use crate::team::Team;
use baton_kv::{BlockId, DType, KvLayout, fp8};
use half::bf16;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Slots of a tile of keys.
pub(crate) const SLOTS: usize = ROWS;

// The canonical order is little-endian, and elements are moved as they lie.
const _: () = assert!(cfg!(target_endian = "little"));

/// The pool of all layers.
pub(crate) struct KvCache {
    /// For what copies blocks.
    isa: Isa,
    pub(crate) shape: Shape,
    pub(crate) pool: Pool,
}

/// Sizes of a home.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    n_layers: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    /// `head_dim` up to whole lanes; the rest is zero.
    pub(crate) padded_dim: usize,
    pub(crate) block_size: usize,
    n_blocks: usize,
}

/// One buffer a layer.
pub(crate) enum Pool {
    F32(Vec<Shared<f32>>),
    Bf16(Vec<Shared<u16>>),
    Fp8(Vec<Shared<u8>>),
}

/// An element of the pool.
pub(crate) trait Element: Plain + bytemuck::Pod {
    /// How many lie together.
    const PAIR: usize;
    fn of(x: f32) -> Self;

    /// [`gather`]s the rows of a tile of keys.
    fn gather(tile: &[u8], rows: &mut [u8], row: usize);
    /// [`scatter`]s them.
    fn scatter(rows: &[u8], row: usize, tile: &mut [u8]);

    /// Takes the rows of `PAIR` slots' values, which lie together, apart.
    #[inline(always)]
    fn part(group: &[u8], rows: &mut [u8]) {
        rows.copy_from_slice(&group[..rows.len()]);
    }

    /// As [`part`](Self::part), back.
    #[inline(always)]
    fn join(rows: &[u8], group: &mut [u8]) {
        group[..rows.len()].copy_from_slice(rows);
    }
}

impl Element for f32 {
    const PAIR: usize = 1;

    fn of(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn gather(tile: &[u8], rows: &mut [u8], row: usize) {
        gather::<4>(tile, rows, row);
    }

    #[inline(always)]
    fn scatter(rows: &[u8], row: usize, tile: &mut [u8]) {
        scatter::<4>(rows, row, tile);
    }
}

/// Bits of a bf16.
impl Element for u16 {
    const PAIR: usize = 2;

    fn of(x: f32) -> Self {
        bf16::from_f32(x).to_bits()
    }

    #[inline(always)]
    fn gather(tile: &[u8], rows: &mut [u8], row: usize) {
        gather::<4>(tile, rows, row);
    }

    #[inline(always)]
    fn scatter(rows: &[u8], row: usize, tile: &mut [u8]) {
        scatter::<4>(rows, row, tile);
    }

    #[inline(always)]
    fn part(group: &[u8], rows: &mut [u8]) {
        let (even, odd) = rows.split_at_mut(rows.len() / 2);
        let rows = even.as_chunks_mut().0.iter_mut().zip(odd.as_chunks_mut().0);
        for ((even, odd), &[a, b, c, d]) in rows.zip(group.as_chunks().0) {
            (*even, *odd) = ([a, b], [c, d]);
        }
    }

    #[inline(always)]
    fn join(rows: &[u8], group: &mut [u8]) {
        let (even, odd) = rows.split_at(rows.len() / 2);
        let rows = even.as_chunks().0.iter().zip(odd.as_chunks().0);
        for ((&[a, b], &[c, d]), pair) in rows.zip(group.as_chunks_mut().0) {
            *pair = [a, b, c, d];
        }
    }
}

/// Bits of an e4m3.
impl Element for u8 {
    const PAIR: usize = 1;

    fn of(x: f32) -> Self {
        fp8::code(x)
    }

    #[inline(always)]
    fn gather(tile: &[u8], rows: &mut [u8], row: usize) {
        gather::<1>(tile, rows, row);
    }

    #[inline(always)]
    fn scatter(rows: &[u8], row: usize, tile: &mut [u8]) {
        scatter::<1>(rows, row, tile);
    }
}

impl Shape {
    /// Elements of a home.
    const fn home_len(&self) -> usize {
        2 * self.values_at()
    }

    /// Where a home's values begin.
    pub(crate) const fn values_at(&self) -> usize {
        self.block_size * self.padded_dim
    }

    /// A home's place in its layer's buffer.
    pub(crate) fn home(&self, block: u32, head: usize) -> Range<usize> {
        let at = (block as usize * self.n_kv_heads + head) * self.home_len();
        at..at + self.home_len()
    }

    /// Place of a key's element in its home.
    const fn key(&self, pair: usize, slot: usize, d: usize) -> usize {
        slot / SLOTS * SLOTS * self.padded_dim + (d / pair * SLOTS + slot % SLOTS) * pair + d % pair
    }

    /// Place of a value's element in its home.
    const fn value(&self, pair: usize, slot: usize, d: usize) -> usize {
        self.values_at() + (slot / pair * self.padded_dim + d) * pair + slot % pair
    }
}

impl KvCache {
    /// An empty pool. It takes memory as it is written.
    ///
    /// # Errors
    /// In words, a layout that the kernels have no tiles for.
    pub(crate) fn new(layout: &KvLayout, n_blocks: u32) -> Result<Self, String> {
        let block_size = layout.block_size as usize;
        if block_size == 0 || !block_size.is_multiple_of(SLOTS) {
            return Err(format!(
                "--block-size {block_size}: the cpu device takes multiples of {SLOTS}"
            ));
        }
        let head_dim = layout.head_dim as usize;
        let shape = Shape {
            n_layers: layout.n_layers as usize,
            n_kv_heads: layout.n_kv_heads as usize,
            head_dim,
            padded_dim: head_dim.next_multiple_of(ROWS),
            block_size,
            n_blocks: n_blocks as usize,
        };
        let len = shape.n_blocks * shape.n_kv_heads * shape.home_len();
        let pool = match layout.dtype {
            DType::F32 => Pool::F32((0..shape.n_layers).map(|_| Shared::zeroed(len)).collect()),
            DType::BF16 => Pool::Bf16((0..shape.n_layers).map(|_| Shared::zeroed(len)).collect()),
            DType::Fp8E4M3 => Pool::Fp8((0..shape.n_layers).map(|_| Shared::zeroed(len)).collect()),
            DType::F16 => {
                return Err("the cpu device keeps KV in float32, bfloat16 or fp8".to_owned());
            }
        };
        let isa = Isa::detect();
        Ok(Self { isa, shape, pool })
    }

    /// Writes one token's keys and values of all heads: each `[kv head][head_dim]`, perhaps with padding at the end.
    ///
    /// # Safety
    /// Nobody else reads or writes this slot meanwhile.
    pub(crate) unsafe fn write(&self, layer: usize, [block, slot]: [u32; 2], k: &[f32], v: &[f32]) {
        let (shape, slot) = (&self.shape, slot as usize);
        // SAFETY: the caller's promise.
        unsafe {
            match &self.pool {
                Pool::F32(layers) => write(shape, &layers[layer], block, slot, k, v),
                Pool::Bf16(layers) => write(shape, &layers[layer], block, slot, k, v),
                Pool::Fp8(layers) => write(shape, &layers[layer], block, slot, k, v),
            }
        }
    }

    /// Blocks in canonical order, see [`KvLayout`]; `out` has exactly their bytes.
    pub(crate) fn export(&mut self, team: &mut Team, blocks: &[BlockId], out: &mut [u8]) {
        let (isa, shape) = (self.isa, &self.shape);
        match &mut self.pool {
            Pool::F32(layers) => export(team, isa, (shape, layers, blocks), out),
            Pool::Bf16(layers) => export(team, isa, (shape, layers, blocks), out),
            Pool::Fp8(layers) => export(team, isa, (shape, layers, blocks), out),
        }
    }

    /// Overwrites blocks from canonical order.
    pub(crate) fn import(&mut self, blocks: &[BlockId], data: &[u8]) {
        let (isa, shape, way) = (self.isa, &self.shape, Come(data));
        match &mut self.pool {
            Pool::F32(layers) => isa.run(Move {
                shape,
                layers,
                blocks,
                way,
            }),
            Pool::Bf16(layers) => isa.run(Move {
                shape,
                layers,
                blocks,
                way,
            }),
            Pool::Fp8(layers) => isa.run(Move {
                shape,
                layers,
                blocks,
                way,
            }),
        }
    }
}

/// # Safety
/// See [`KvCache::write`].
unsafe fn write<E: Element>(
    shape: &Shape,
    layer: &Shared<E>,
    block: u32,
    slot: usize,
    k: &[f32],
    v: &[f32],
) {
    let dim = shape.head_dim;
    let heads = k.chunks_exact(dim).zip(v.chunks_exact(dim));
    for (head, (k, v)) in heads.take(shape.n_kv_heads).enumerate() {
        let home = shape.home(block, head).start;
        let put = |at: usize, x: f32| {
            // SAFETY: elements of different slots are different elements; the slot is the caller's alone.
            let place = unsafe { layer.get_mut(home + at..home + at + 1) };
            place[0] = E::of(x);
        };
        for (&k, at) in k.iter().zip(Places::of_key::<E>(shape, slot).of::<E>()) {
            put(at, k);
        }
        for (&v, at) in v.iter().zip(Places::of_value::<E>(shape, slot).of::<E>()) {
            put(at, v);
        }
    }
}

/// Each member of the team takes the next layer until none is left.
fn export<E: Element>(
    team: &mut Team,
    isa: Isa,
    (shape, layers, blocks): (&Shape, &mut [Shared<E>], &[BlockId]),
    out: &mut [u8],
) {
    let of_layer = out.len() / layers.len().max(1);
    if of_layer == 0 {
        return;
    }
    let parts = layers.chunks_mut(1).zip(out.chunks_exact_mut(of_layer));
    let parts = Mutex::new(parts);
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    team.run(&|_| {
        while let Some((layers, out)) = next() {
            isa.run(Move {
                shape,
                layers,
                blocks,
                way: Leave(out),
            });
        }
    });
}

/// Blocks on their way between their homes and the canonical order, in which a home's keys, then its values, lie slot by slot.
struct Move<'a, E, W> {
    shape: &'a Shape,
    layers: &'a mut [Shared<E>],
    blocks: &'a [BlockId],
    way: W,
}

/// The canonical order, to be written or to be read.
struct Leave<'a>(&'a mut [u8]);
struct Come<'a>(&'a [u8]);

impl<E: Element> Task for Move<'_, E, Leave<'_>> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let shape = self.shape;
        let row = shape.head_dim * size_of::<E>();
        let mut halves = self.way.0.chunks_exact_mut(shape.block_size * row);
        for_each_home(shape, self.layers, self.blocks, |keys, values| {
            let (Some(key_rows), Some(value_rows)) = (halves.next(), halves.next()) else {
                return;
            };
            let tiles = keys.chunks_exact(SLOTS * shape.padded_dim);
            for (tile, rows) in tiles.zip(key_rows.chunks_exact_mut(SLOTS * row)) {
                E::gather(bytemuck::cast_slice(tile), rows, row);
            }
            let groups = values.chunks_exact(E::PAIR * shape.padded_dim);
            for (group, rows) in groups.zip(value_rows.chunks_exact_mut(E::PAIR * row)) {
                E::part(bytemuck::cast_slice(group), rows);
            }
        });
    }
}

impl<E: Element> Task for Move<'_, E, Come<'_>> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let shape = self.shape;
        let row = shape.head_dim * size_of::<E>();
        let mut halves = self.way.0.chunks_exact(shape.block_size * row);
        for_each_home(shape, self.layers, self.blocks, |keys, values| {
            let (Some(key_rows), Some(value_rows)) = (halves.next(), halves.next()) else {
                return;
            };
            let tiles = keys.chunks_exact_mut(SLOTS * shape.padded_dim);
            for (tile, rows) in tiles.zip(key_rows.chunks_exact(SLOTS * row)) {
                E::scatter(rows, row, bytemuck::cast_slice_mut(tile));
            }
            let groups = values.chunks_exact_mut(E::PAIR * shape.padded_dim);
            for (group, rows) in groups.zip(value_rows.chunks_exact(E::PAIR * row)) {
                E::join(rows, bytemuck::cast_slice_mut(group));
            }
        });
    }
}

/// The keys and the values of every home of these blocks, in canonical order.
#[inline(always)]
fn for_each_home<E: Element>(
    shape: &Shape,
    layers: &mut [Shared<E>],
    blocks: &[BlockId],
    mut visit: impl FnMut(&mut [E], &mut [E]),
) {
    for layer in layers {
        for head in 0..shape.n_kv_heads {
            for block in blocks {
                let home = &mut layer.all()[shape.home(block.0, head)];
                let (keys, values) = home.split_at_mut(shape.values_at());
                visit(keys, values);
            }
        }
    }
}

/// Takes the rows of sixteen slots out of a tile, in which they lie unit by unit. Units whose size the compiler knows are what
/// makes this quick.
#[inline(always)]
fn gather<const UNIT: usize>(tile: &[u8], rows: &mut [u8], row: usize) {
    let (tile, _) = tile.as_chunks::<UNIT>();
    for (slot, row) in rows.chunks_exact_mut(row).enumerate() {
        let (row, _) = row.as_chunks_mut::<UNIT>();
        for (out, units) in row.iter_mut().zip(tile.as_chunks::<SLOTS>().0) {
            *out = units[slot];
        }
    }
}

/// As [`gather`], back.
#[inline(always)]
fn scatter<const UNIT: usize>(rows: &[u8], row: usize, tile: &mut [u8]) {
    let (tile, _) = tile.as_chunks_mut::<UNIT>();
    for (slot, row) in rows.chunks_exact(row).enumerate() {
        let (row, _) = row.as_chunks::<UNIT>();
        for (data, units) in row.iter().zip(tile.as_chunks_mut::<SLOTS>().0) {
            units[slot] = *data;
        }
    }
}

/// Where the elements of one slot's key or value lie in their home.
#[derive(Clone, Copy)]
struct Places {
    /// Of the first element.
    first: usize,
    /// From an element to the one `PAIR` dimensions on.
    step: usize,
    /// From an element with an even dimension to the next one, if there are pairs.
    second: usize,
}

impl Places {
    fn of_key<E: Element>(shape: &Shape, slot: usize) -> Self {
        Self {
            first: shape.key(E::PAIR, slot, 0),
            step: SLOTS * E::PAIR,
            second: 1,
        }
    }

    /// Pairs are of slots here: elements of one slot lie `PAIR` apart.
    fn of_value<E: Element>(shape: &Shape, slot: usize) -> Self {
        Self {
            first: shape.value(E::PAIR, slot, 0),
            step: E::PAIR * E::PAIR,
            second: E::PAIR,
        }
    }

    /// By dimension, without end.
    #[inline(always)]
    fn of<E: Element>(self) -> impl Iterator<Item = usize> {
        (0..).map(move |d| self.first + d / E::PAIR * self.step + d % E::PAIR * self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(dtype: DType) -> KvLayout {
        KvLayout {
            n_layers: 2,
            n_kv_heads: 3,
            head_dim: 20,
            block_size: 32,
            dtype,
            model_fingerprint: 0,
        }
    }

    /// A number that names its place and that bf16 holds.
    fn mark(layer: usize, head: usize, block: usize, kv: usize, slot: usize, d: usize) -> f32 {
        ((layer * 31 + head * 17 + block * 7 + kv * 3 + slot * 5 + d) % 251) as f32
    }

    fn filled(dtype: DType) -> KvCache {
        let layout = layout(dtype);
        let cache = KvCache::new(&layout, 4).unwrap();
        for layer in 0..2 {
            for block in 0..4 {
                for slot in 0..32 {
                    let row = |kv| -> Vec<f32> {
                        (0..3 * 20)
                            .map(|i| mark(layer, i / 20, block, kv, slot, i % 20))
                            .collect()
                    };
                    let place = [block as u32, slot as u32];
                    // SAFETY: the test is alone.
                    unsafe { cache.write(layer, place, &row(0), &row(1)) };
                }
            }
        }
        cache
    }

    #[test]
    fn blocks_leave_in_canonical_order_and_come_back_elsewhere() {
        for dtype in [DType::F32, DType::BF16, DType::Fp8E4M3] {
            let (mut cache, mut team) = (filled(dtype), Team::new(2, None).unwrap());
            let layout = layout(dtype);
            let mut bytes = vec![0xaa; 2 * layout.block_bytes()];
            cache.export(&mut team, &[BlockId(3), BlockId(1)], &mut bytes);
            let mut elements = bytes.chunks_exact(dtype.bytes());
            for layer in 0..2 {
                for head in 0..3 {
                    for block in [3, 1] {
                        for kv in 0..2 {
                            for i in 0..32 * 20 {
                                let found = elements.next().unwrap();
                                let found = match dtype {
                                    DType::F32 => f32::from_le_bytes(found.try_into().unwrap()),
                                    DType::Fp8E4M3 => fp8::value(found[0]),
                                    _ => bf16::from_le_bytes(found.try_into().unwrap()).to_f32(),
                                };
                                let mark = mark(layer, head, block, kv, i / 20, i % 20);
                                let kept = match dtype {
                                    DType::Fp8E4M3 => fp8::value(fp8::code(mark)),
                                    _ => mark,
                                };
                                assert_eq!(found, kept);
                            }
                        }
                    }
                }
            }
            cache.import(&[BlockId(0), BlockId(2)], &bytes);
            let mut again = vec![0; bytes.len()];
            cache.export(&mut team, &[BlockId(0), BlockId(2)], &mut again);
            assert!(again == bytes);
            cache.export(&mut team, &[BlockId(3), BlockId(1)], &mut again);
            assert!(again == bytes);
        }
    }

    #[test]
    fn blocks_that_are_no_whole_tiles_are_refused() {
        let layout = KvLayout {
            block_size: 24,
            ..layout(DType::F32)
        };
        assert!(KvCache::new(&layout, 2).is_err());
    }

    #[test]
    #[ignore = "it measures"]
    #[expect(clippy::print_stdout, reason = "figures are what it is for")]
    fn figures() {
        for dtype in [DType::F32, DType::BF16, DType::Fp8E4M3] {
            let layout = KvLayout {
                n_layers: 4,
                n_kv_heads: 4,
                head_dim: 64,
                ..layout(dtype)
            };
            let mut cache = KvCache::new(&layout, 32).unwrap();
            let mut team = Team::new(1, None).unwrap();
            let blocks: Vec<BlockId> = (0..32).map(BlockId).collect();
            let mut bytes = vec![0; 32 * layout.block_bytes()];
            let row = vec![0.5; 4 * 64];
            let all = bytes.len() as f64;
            let mut best = [f64::INFINITY; 3];
            let mut time = |i: usize, start: std::time::Instant| {
                best[i] = best[i].min(start.elapsed().as_secs_f64());
            };
            for _ in 0..10 {
                let start = std::time::Instant::now();
                cache.import(&blocks, &bytes);
                time(0, start);
                let start = std::time::Instant::now();
                cache.export(&mut team, &blocks, &mut bytes);
                time(1, start);
                let start = std::time::Instant::now();
                for i in 0..4 * 32 * 32_u32 {
                    let (layer, place) = ((i / 1024) as usize, [i / 32 % 32, i % 32]);
                    // SAFETY: the test is alone.
                    unsafe { cache.write(layer, place, &row, &row) };
                }
                time(2, start);
            }
            let [import, export, write] = best.map(|seconds| all / seconds / 1e6);
            println!(
                "{}: import {import:.0}, export {export:.0}, write {write:.0} MB/s",
                dtype.name()
            );
        }
    }
}
