//! Packed formats: how sixteen output rows of a matrix lie together, block after block along the input.
//!
//! A *tile* is sixteen rows. A block of a quantized tile covers 32 inputs: group `g` (0 to 7) of its codes is one
//! register whose lane `r` holds row `r`'s codes of inputs `4g..4g+4`, which is what [`Simd::dot4`] eats. The numbers
//! themselves are the file's own: nothing is rounded by packing.

use crate::simd::Simd;

/// Output rows of a tile.
pub(crate) const ROWS: usize = 16;
/// Inputs of a block of codes.
pub(crate) const BLOCK: usize = 32;
/// Bytes of a block's low halves of codes.
const NIBBLES: usize = ROWS * BLOCK / 2;
/// Bytes of one further bit of each code.
const PLANE: usize = ROWS * BLOCK / 8;

/// The codes of a block with their scales: a code `c` of half `h` stands for `(c - OFFSET) * scale[h] + min`.
pub(crate) struct Codes<S: Simd> {
    /// By group of four inputs, all unsigned.
    pub(crate) codes: [S::I; 8],
    /// Of the first and the second sixteen inputs; the same unless [`Codec::HALVES`].
    pub(crate) scale: [S::F; 2],
    /// Nothing unless [`Codec::HAS_MIN`].
    pub(crate) min: S::F,
}

/// A format of codes.
pub(crate) trait Codec: Copy {
    /// One or several blocks that share a header.
    type Unit: 'static;
    /// What the header holds, as lanes.
    type Head<S: Simd>: Copy;
    /// Blocks in a unit.
    const BLOCKS: usize;
    /// The two halves of a block have scales of their own.
    const HALVES: bool;
    /// There is a minimum.
    const HAS_MIN: bool;
    /// What codes are shifted by.
    const OFFSET: i32;

    /// A tile's units.
    fn units(tile: &[u8]) -> &[Self::Unit];
    /// The header of a unit.
    fn head<S: Simd>(s: S, unit: &Self::Unit) -> Self::Head<S>;
    /// Block `j` of a unit.
    fn codes<S: Simd>(s: S, head: Self::Head<S>, unit: &Self::Unit, j: usize) -> Codes<S>;
}

/// A fixed part of a unit; the compiler sees that it fits.
#[inline(always)]
fn part<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..]
        .first_chunk()
        .expect("units are as long as their parts")
}

/// Four loads of low and high halves.
#[inline(always)]
fn nibbles<S: Simd>(s: S, bytes: &[u8], at: usize) -> [S::I; 8] {
    let a = s.load_i(part(bytes, at));
    let b = s.load_i(part(bytes, at + 64));
    let c = s.load_i(part(bytes, at + 128));
    let d = s.load_i(part(bytes, at + 192));
    [
        s.low_nibbles(a),
        s.low_nibbles(b),
        s.low_nibbles(c),
        s.low_nibbles(d),
        s.high_nibbles(a),
        s.high_nibbles(b),
        s.high_nibbles(c),
        s.high_nibbles(d),
    ]
}

/// Adds a further bit to every code.
#[inline(always)]
fn plane<S: Simd>(s: S, codes: [S::I; 8], bytes: &[u8], at: usize, value: u8) -> [S::I; 8] {
    let mut out = codes;
    for (g, code) in out.iter_mut().enumerate() {
        let mask = u64::from_le_bytes(*part(bytes, at + 8 * g));
        *code = s.add_where(*code, mask, value);
    }
    out
}

/// ggml's formats of 32 weights with one scale: `BITS` a code, perhaps a minimum. A unit of `BYTES` is one block with its
/// scales and minima, or two blocks with their scales, as f16 of each row; then each block's low halves of codes and
/// fifth bits. So every register's worth of codes begins at a multiple of 64 bytes, which reading is faster from.
#[derive(Clone, Copy)]
pub(crate) struct Simple<const BITS: u32, const MIN: bool, const BYTES: usize>;

pub(crate) type Q4_0 = Simple<4, false, { 64 + 2 * NIBBLES }>;
pub(crate) type Q4_1 = Simple<4, true, { 64 + NIBBLES }>;
pub(crate) type Q5_0 = Simple<5, false, { 64 + 2 * (NIBBLES + PLANE) }>;
pub(crate) type Q5_1 = Simple<5, true, { 64 + NIBBLES + PLANE }>;
pub(crate) type Q8_0 = Simple<8, false, { 64 + 2 * ROWS * BLOCK }>;

impl<const BITS: u32, const MIN: bool, const BYTES: usize> Codec for Simple<BITS, MIN, BYTES> {
    type Unit = [u8; BYTES];
    type Head<S: Simd> = ();
    const BLOCKS: usize = if MIN { 1 } else { 2 };
    const HALVES: bool = false;
    const HAS_MIN: bool = MIN;
    const OFFSET: i32 = if MIN { 0 } else { 1 << (BITS - 1) };

    #[inline(always)]
    fn units(tile: &[u8]) -> &[Self::Unit] {
        tile.as_chunks().0
    }

    #[inline(always)]
    fn head<S: Simd>(_: S, _: &Self::Unit) {}

    #[inline(always)]
    fn codes<S: Simd>(s: S, (): (), unit: &Self::Unit, j: usize) -> Codes<S> {
        let at = 64 + j * ((BYTES - 64) / Self::BLOCKS);
        let scale = s.load_f16(part(unit, 32 * j));
        let min = if MIN {
            s.load_f16(part(unit, 32))
        } else {
            s.zero()
        };
        let codes = match BITS {
            4 => nibbles(s, unit, at),
            5 => plane(s, nibbles(s, unit, at), unit, at + NIBBLES, 16),
            _ => [
                s.load_i(part(unit, at)),
                s.load_i(part(unit, at + 64)),
                s.load_i(part(unit, at + 128)),
                s.load_i(part(unit, at + 192)),
                s.load_i(part(unit, at + 256)),
                s.load_i(part(unit, at + 320)),
                s.load_i(part(unit, at + 384)),
                s.load_i(part(unit, at + 448)),
            ],
        };
        Codes {
            codes,
            scale: [scale; 2],
            min,
        }
    }
}

/// ggml's `Q4_K` and `Q5_K`: eight blocks share a scale of their scales and one of their minima. The unit: both as f16 of
/// each row; then every block: scales and minima as bytes of each row, low halves of the codes, fifth bits.
#[derive(Clone, Copy)]
pub(crate) struct SuperMin<const BITS: u32, const BYTES: usize>;

pub(crate) type Q4K = SuperMin<4, { 64 + 8 * (32 + NIBBLES) }>;
pub(crate) type Q5K = SuperMin<5, { 64 + 8 * (32 + NIBBLES + PLANE) }>;

impl<const BITS: u32, const BYTES: usize> Codec for SuperMin<BITS, BYTES> {
    type Unit = [u8; BYTES];
    type Head<S: Simd> = [S::F; 2];
    const BLOCKS: usize = 8;
    const HALVES: bool = false;
    const HAS_MIN: bool = true;
    const OFFSET: i32 = 0;

    #[inline(always)]
    fn units(tile: &[u8]) -> &[Self::Unit] {
        tile.as_chunks().0
    }

    #[inline(always)]
    fn head<S: Simd>(s: S, unit: &Self::Unit) -> [S::F; 2] {
        let minus = s.splat(-1.0);
        [
            s.load_f16(part(unit, 0)),
            s.mul(minus, s.load_f16(part(unit, 32))),
        ]
    }

    #[inline(always)]
    fn codes<S: Simd>(s: S, head: [S::F; 2], unit: &Self::Unit, j: usize) -> Codes<S> {
        let at = 64 + j * ((BYTES - 64) / 8);
        let scale = s.mul(head[0], s.load_u8(part(unit, at)));
        let min = s.mul(head[1], s.load_u8(part(unit, at + 16)));
        let low = nibbles(s, unit, at + 32);
        let codes = if BITS == 5 {
            plane(s, low, unit, at + 32 + NIBBLES, 16)
        } else {
            low
        };
        Codes {
            codes,
            scale: [scale; 2],
            min,
        }
    }
}

/// ggml's `Q6_K`: sixteen half blocks share a scale of their scales. The unit: that as f16 of each row; then every block:
/// two scales as signed bytes of each row, low halves of the codes, fifth bits, sixth bits.
#[derive(Clone, Copy)]
pub(crate) struct Q6K;

/// Bytes of one block of [`Q6K`].
const Q6K_BLOCK: usize = 32 + NIBBLES + 2 * PLANE;

impl Codec for Q6K {
    type Unit = [u8; 32 + 8 * Q6K_BLOCK];
    type Head<S: Simd> = S::F;
    const BLOCKS: usize = 8;
    const HALVES: bool = true;
    const HAS_MIN: bool = false;
    const OFFSET: i32 = 32;

    #[inline(always)]
    fn units(tile: &[u8]) -> &[Self::Unit] {
        tile.as_chunks().0
    }

    #[inline(always)]
    fn head<S: Simd>(s: S, unit: &Self::Unit) -> S::F {
        s.load_f16(part(unit, 0))
    }

    #[inline(always)]
    fn codes<S: Simd>(s: S, head: S::F, unit: &Self::Unit, j: usize) -> Codes<S> {
        let at = 32 + j * Q6K_BLOCK;
        let scale = [
            s.mul(head, s.load_i8(part(unit, at))),
            s.mul(head, s.load_i8(part(unit, at + 16))),
        ];
        let codes = nibbles(s, unit, at + 32);
        let codes = plane(s, codes, unit, at + 32 + NIBBLES, 16);
        let codes = plane(s, codes, unit, at + 32 + NIBBLES + PLANE, 32);
        Codes {
            codes,
            scale,
            min: s.zero(),
        }
    }
}

/// A format of floats: a unit holds one input of every row, or two.
pub(crate) trait Floats {
    /// One or two inputs.
    type Unit: 'static;
    /// How many.
    const INPUTS: usize;

    /// A tile's units.
    fn units(tile: &[u8]) -> &[Self::Unit];
    /// The weights of each input; the second counts if there are two.
    fn load<S: Simd>(s: S, unit: &Self::Unit) -> [S::F; 2];
}

/// `[input][row]` f32.
#[derive(Clone, Copy)]
pub(crate) struct F32;
/// `[input][row]` f16.
#[derive(Clone, Copy)]
pub(crate) struct F16;
/// `[input / 2][row][2]` bf16, padded with zero.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

impl Floats for F32 {
    type Unit = [f32; 16];
    const INPUTS: usize = 1;

    #[inline(always)]
    fn units(tile: &[u8]) -> &[Self::Unit] {
        bytemuck::cast_slice::<u8, f32>(tile).as_chunks().0
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, unit: &Self::Unit) -> [S::F; 2] {
        [s.load(unit), s.zero()]
    }
}

impl Floats for F16 {
    type Unit = [u8; 32];
    const INPUTS: usize = 1;

    #[inline(always)]
    fn units(tile: &[u8]) -> &[Self::Unit] {
        tile.as_chunks().0
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, unit: &Self::Unit) -> [S::F; 2] {
        [s.load_f16(unit), s.zero()]
    }
}

impl Floats for Bf16 {
    type Unit = [u8; 64];
    const INPUTS: usize = 2;

    #[inline(always)]
    fn units(tile: &[u8]) -> &[Self::Unit] {
        tile.as_chunks().0
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, unit: &Self::Unit) -> [S::F; 2] {
        let pair = s.load_i(unit);
        [s.low_bf16(pair), s.high_bf16(pair)]
    }
}
