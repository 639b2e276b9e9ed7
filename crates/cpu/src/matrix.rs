//! Weight matrices, packed for the kernels, and their products with rows of activations.

mod codec;
pub(crate) mod kernel;
mod pack;

use crate::rows::QBlock;
use crate::shared::Shared;
use crate::simd::{Isa, Simd, Task, fetch};
use baton_model::Storage;
use codec::{Bf16, F16, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
pub(crate) use codec::{F32, ROWS};
use kernel::{Dequantized, Float, Integer, Kernel, Pairs, Rows, expand_codes, expand_floats};
pub(crate) use pack::{pack_tile, padded, tile_bytes};
use std::ops::Range;
use std::sync::Arc;

/// Where packed weights lie.
pub(crate) trait Bytes: Send + Sync {
    /// All of them, aligned to 64.
    fn bytes(&self) -> &[u8];
}

/// A matrix `[n_out, n_in]` in tiles of sixteen outputs.
#[derive(Clone)]
pub(crate) struct Matrix {
    pub(crate) storage: Storage,
    pub(crate) n_out: usize,
    pub(crate) n_in: usize,
    home: Arc<dyn Bytes>,
    place: Range<usize>,
}

/// Rows of activations, in the form that a product wants; each row has [`padded`] elements.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    /// As they are.
    F32(&'a [f32]),
    /// In pairs of bf16.
    Bf16(&'a [u32]),
    /// In bytes.
    Q8(&'a [QBlock]),
}

/// The forms of [`Input`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    F32,
    Bf16,
    Q8,
}

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// It replaces what was there.
    Set,
    /// It is added.
    Add,
    /// `g` becomes `silu(g) * product`.
    Gate,
}

/// A part of a product: some tiles with some rows.
pub(crate) struct Product<'a> {
    pub(crate) matrix: &'a Matrix,
    pub(crate) tiles: Range<usize>,
    pub(crate) input: Input<'a>,
    pub(crate) n_rows: usize,
    /// `[row][stride]`: outputs begin at `column`.
    pub(crate) out: &'a Shared<f32>,
    pub(crate) stride: usize,
    pub(crate) column: usize,
    /// Added to every row; whole tiles long.
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) then: Then,
}

impl Matrix {
    /// A matrix whose tiles lie at `place`.
    ///
    /// # Panics
    /// If they do not.
    pub(crate) fn new(
        storage: Storage,
        [n_out, n_in]: [usize; 2],
        home: Arc<dyn Bytes>,
        place: Range<usize>,
    ) -> Self {
        assert_eq!(
            place.len(),
            n_out.div_ceil(ROWS) * tile_bytes(storage, n_in)
        );
        assert!(place.end <= home.bytes().len());
        Self {
            storage,
            n_out,
            n_in,
            home,
            place,
        }
    }

    /// Number of tiles.
    pub(crate) fn n_tiles(&self) -> usize {
        self.n_out.div_ceil(ROWS)
    }

    #[inline(always)]
    fn tile(&self, i: usize) -> &[u8] {
        let bytes = tile_bytes(self.storage, self.n_in);
        &self.home.bytes()[self.place.clone()][i * bytes..][..bytes]
    }

    /// Asks memory for the beginning of a tile. Where a processor reads on by itself, that is enough.
    pub(crate) fn fetch(&self, i: usize) {
        const LINES: usize = 24;
        self.tile(i).chunks(64).take(LINES).for_each(fetch);
    }

    /// One row as f32; `scratch` is room for the tile it lies in.
    pub(crate) fn row(&self, isa: Isa, i: usize, scratch: &mut Vec<[f32; ROWS]>, out: &mut [f32]) {
        scratch.resize(padded(self.n_in), [0.0; ROWS]);
        isa.run(Expand {
            storage: self.storage,
            tile: self.tile(i / ROWS),
            out: scratch,
        });
        for (out, lanes) in out.iter_mut().zip(&*scratch).take(self.n_in) {
            *out = lanes[i % ROWS];
        }
    }
}

struct Expand<'a> {
    storage: Storage,
    tile: &'a [u8],
    out: &'a mut [[f32; ROWS]],
}

impl Task for Expand<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { storage, tile, out } = self;
        match storage {
            Storage::F32 => expand_floats::<S, F32>(s, tile, out),
            Storage::F16 => expand_floats::<S, F16>(s, tile, out),
            Storage::BF16 => expand_floats::<S, Bf16>(s, tile, out),
            Storage::Q4_0 => expand_codes::<S, Q4_0>(s, tile, out),
            Storage::Q4_1 => expand_codes::<S, Q4_1>(s, tile, out),
            Storage::Q5_0 => expand_codes::<S, Q5_0>(s, tile, out),
            Storage::Q5_1 => expand_codes::<S, Q5_1>(s, tile, out),
            Storage::Q8_0 => expand_codes::<S, Q8_0>(s, tile, out),
            Storage::Q4_K => expand_codes::<S, Q4K>(s, tile, out),
            Storage::Q5_K => expand_codes::<S, Q5K>(s, tile, out),
            Storage::Q6_K => expand_codes::<S, Q6K>(s, tile, out),
        }
    }
}

/// A product by one kernel: one function of machine code for each.
struct Tiles<'a, K> {
    product: &'a Product<'a>,
    kernel: K,
}

impl<K: Kernel> Task for Tiles<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { product, kernel } = self;
        for tile in product.tiles.clone() {
            let bytes = product.matrix.tile(tile);
            let mut row = 0;
            while row < product.n_rows {
                row += match product.n_rows - row {
                    16.. => product.rows::<S, K, 16>(s, kernel, bytes, tile, row),
                    8.. => product.rows::<S, K, 8>(s, kernel, bytes, tile, row),
                    4.. => product.rows::<S, K, 4>(s, kernel, bytes, tile, row),
                    _ => product.rows::<S, K, 1>(s, kernel, bytes, tile, row),
                };
            }
        }
    }
}

impl Product<'_> {
    /// Computes it.
    pub(crate) fn run(&self, isa: Isa) {
        let stride = padded(self.matrix.n_in);
        match self.input {
            Input::F32(data) => self.exact(isa, Rows { data, stride }),
            Input::Bf16(data) => {
                let stride = stride / 2;
                self.with(isa, Pairs(Rows { data, stride }));
            }
            Input::Q8(data) => {
                let stride = stride / codec::BLOCK;
                self.integer(isa, Rows { data, stride });
            }
        }
    }

    fn exact(&self, isa: Isa, x: Rows<'_, f32>) {
        match self.matrix.storage {
            Storage::F32 => self.with(isa, Float::<F32>::new(x)),
            Storage::F16 => self.with(isa, Float::<F16>::new(x)),
            Storage::BF16 => self.with(isa, Float::<Bf16>::new(x)),
            Storage::Q4_0 => self.with(isa, Dequantized::<Q4_0>::new(x)),
            Storage::Q4_1 => self.with(isa, Dequantized::<Q4_1>::new(x)),
            Storage::Q5_0 => self.with(isa, Dequantized::<Q5_0>::new(x)),
            Storage::Q5_1 => self.with(isa, Dequantized::<Q5_1>::new(x)),
            Storage::Q8_0 => self.with(isa, Dequantized::<Q8_0>::new(x)),
            Storage::Q4_K => self.with(isa, Dequantized::<Q4K>::new(x)),
            Storage::Q5_K => self.with(isa, Dequantized::<Q5K>::new(x)),
            Storage::Q6_K => self.with(isa, Dequantized::<Q6K>::new(x)),
        }
    }

    fn integer(&self, isa: Isa, x: Rows<'_, QBlock>) {
        match self.matrix.storage {
            Storage::Q4_0 => self.with(isa, Integer::<Q4_0>::new(x)),
            Storage::Q4_1 => self.with(isa, Integer::<Q4_1>::new(x)),
            Storage::Q5_0 => self.with(isa, Integer::<Q5_0>::new(x)),
            Storage::Q5_1 => self.with(isa, Integer::<Q5_1>::new(x)),
            Storage::Q8_0 => self.with(isa, Integer::<Q8_0>::new(x)),
            Storage::Q4_K => self.with(isa, Integer::<Q4K>::new(x)),
            Storage::Q5_K => self.with(isa, Integer::<Q5K>::new(x)),
            Storage::Q6_K => self.with(isa, Integer::<Q6K>::new(x)),
            Storage::F32 | Storage::F16 | Storage::BF16 => {
                unreachable!("floats are not multiplied with bytes")
            }
        }
    }

    fn with<K: Kernel>(&self, isa: Isa, kernel: K) {
        isa.run(Tiles {
            product: self,
            kernel,
        });
    }

    /// One tile with `M` rows.
    #[inline(always)]
    fn rows<S: Simd, K: Kernel, const M: usize>(
        &self,
        s: S,
        kernel: K,
        bytes: &[u8],
        tile: usize,
        first: usize,
    ) -> usize {
        let sums = kernel.sums::<S, M>(s, bytes, first);
        for (m, &sum) in sums.iter().enumerate() {
            self.put(s, sum, first + m, tile);
        }
        M
    }

    #[inline(always)]
    fn put<S: Simd>(&self, s: S, sum: S::F, row: usize, tile: usize) {
        let at = row * self.stride + self.column + tile * ROWS;
        // SAFETY: parts of one product differ in their tiles, so no other thread has these columns.
        #[expect(unsafe_code, reason = "columns of one row go to different threads")]
        let out = unsafe { self.out.get_mut(at..at + ROWS) };
        let (out, _) = out.as_chunks_mut::<ROWS>();
        let sum = match self.bias {
            Some(bias) => s.add(sum, s.load(&bias.as_chunks().0[tile])),
            None => sum,
        };
        let new = match self.then {
            Then::Set => sum,
            Then::Add => s.add(s.load(&out[0]), sum),
            Then::Gate => s.mul(silu(s, s.load(&out[0])), sum),
        };
        s.store(new, &mut out[0]);
    }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    let power = s.exp2(s.mul(x, s.splat(-std::f32::consts::LOG2_E)));
    s.div(x, s.add(s.splat(1.0), power))
}

#[cfg(test)]
mod tests;
