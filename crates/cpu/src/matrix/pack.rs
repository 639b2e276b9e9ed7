//! From a file's rows to tiles.

use super::codec::{BLOCK, ROWS};
use baton_model::Storage;

/// Inputs of a packed row, zeros at its end included: what rows of activations are padded to as well. Two blocks, since
/// some formats pack them in twos.
pub(crate) const fn padded(n_in: usize) -> usize {
    n_in.next_multiple_of(2 * BLOCK)
}

/// Bytes of a tile.
pub(crate) fn tile_bytes(storage: Storage, n_in: usize) -> usize {
    let (header, per_block, blocks) = form(storage);
    let n_blocks = padded(n_in) / BLOCK;
    (header + per_block * blocks) * (n_blocks / blocks)
}

/// Bytes of a unit's header, bytes of a block, blocks in a unit. See [`super::codec`].
const fn form(storage: Storage) -> (usize, usize, usize) {
    const LOW: usize = ROWS * BLOCK / 2;
    const PLANE: usize = ROWS * BLOCK / 8;
    match storage {
        Storage::F32 => (0, 4 * ROWS * BLOCK, 1),
        Storage::F16 | Storage::BF16 => (0, 2 * ROWS * BLOCK, 1),
        Storage::Q4_0 => (64, LOW, 2),
        Storage::Q4_1 => (64, LOW, 1),
        Storage::Q5_0 => (64, LOW + PLANE, 2),
        Storage::Q5_1 => (64, LOW + PLANE, 1),
        Storage::Q8_0 => (64, ROWS * BLOCK, 2),
        Storage::Q4_K => (64, 32 + LOW, 8),
        Storage::Q5_K => (64, 32 + LOW + PLANE, 8),
        Storage::Q6_K => (32, 32 + LOW + 2 * PLANE, 8),
    }
}

/// Packs up to sixteen rows, each as it lies in the file, into a tile that is all zero. Rows that are missing at the end
/// stay zero.
pub(crate) fn pack_tile(storage: Storage, rows: &[&[u8]], tile: &mut [u8]) {
    for (r, row) in rows.iter().enumerate() {
        match storage {
            Storage::F32 | Storage::F16 | Storage::BF16 => pack_floats(storage, r, row, tile),
            _ => pack_codes(storage, r, row, tile),
        }
    }
}

fn pack_floats(storage: Storage, r: usize, row: &[u8], tile: &mut [u8]) {
    let size = storage.block_bytes();
    let together = if storage == Storage::BF16 { 2 } else { 1 };
    for (k, element) in row.chunks_exact(size).enumerate() {
        let at = (k / together * ROWS + r) * together + k % together;
        tile[at * size..][..size].copy_from_slice(element);
    }
}

fn pack_codes(storage: Storage, r: usize, row: &[u8], tile: &mut [u8]) {
    let (header, per_block, blocks) = form(storage);
    let file_blocks = storage.block_elements() / BLOCK;
    for (u, from) in row.chunks_exact(storage.block_bytes()).enumerate() {
        for j in 0..file_blocks {
            let b = u * file_blocks + j;
            let unit = &mut tile[b / blocks * (header + per_block * blocks)..];
            let block_at = header + b % blocks * per_block;
            let (codes, scales) = unpack(storage, from, j);
            let codes_at = block_at + put_scales(storage, [r, b % blocks], from, scales, unit);
            put_codes(storage, r, &codes, &mut unit[codes_at..]);
        }
    }
}

/// Writes row `r`'s scales of block `j` of a unit; returns how far into the block its codes begin.
fn put_scales(
    storage: Storage,
    [r, j]: [usize; 2],
    from: &[u8],
    scales: [u8; 2],
    unit: &mut [u8],
) -> usize {
    let (header, per_block, _) = form(storage);
    let mut half = |at: usize, from: &[u8]| unit[at + 2 * r..][..2].copy_from_slice(from);
    match storage {
        Storage::Q4_K | Storage::Q5_K | Storage::Q4_1 | Storage::Q5_1 => {
            half(0, &from[0..2]);
            half(32, &from[2..4]);
        }
        Storage::Q6_K => half(0, &from[208..210]),
        _ => half(32 * j, &from[0..2]),
    }
    if !matches!(storage, Storage::Q4_K | Storage::Q5_K | Storage::Q6_K) {
        return 0;
    }
    let block = &mut unit[header + j * per_block..];
    block[r] = scales[0];
    block[ROWS + r] = scales[1];
    2 * ROWS
}

/// Writes a row's codes of a block: low halves, then fifth and sixth bits; or whole bytes.
fn put_codes(storage: Storage, r: usize, codes: &[u8; BLOCK], out: &mut [u8]) {
    const LOW: usize = ROWS * BLOCK / 2;
    const PLANE: usize = ROWS * BLOCK / 8;
    for (k, &code) in codes.iter().enumerate() {
        let (g, lane_byte) = (k / 4, 4 * r + k % 4);
        if storage == Storage::Q8_0 {
            out[64 * g + lane_byte] = code;
            continue;
        }
        out[64 * (g % 4) + lane_byte] |= (code & 15) << (4 * (g / 4));
        for plane in 0..2 {
            let at = LOW + plane * PLANE + 8 * g + lane_byte / 8;
            let bit = code >> (4 + plane) & 1;
            if bit == 1 {
                out[at] |= 1 << (lane_byte % 8);
            }
        }
    }
}

/// The codes of block `j` of a file's unit, unsigned, and its two scales of one byte where it has them.
fn unpack(storage: Storage, from: &[u8], j: usize) -> ([u8; BLOCK], [u8; 2]) {
    let bits = |at: usize| u32::from_le_bytes([from[at], from[at + 1], from[at + 2], from[at + 3]]);
    let codes = match storage {
        Storage::Q4_0 => halves(&from[2..], 0),
        Storage::Q4_1 => halves(&from[4..], 0),
        Storage::Q5_0 => halves(&from[6..], bits(2)),
        Storage::Q5_1 => halves(&from[8..], bits(4)),
        Storage::Q8_0 => std::array::from_fn(|k| from[2 + k].wrapping_add(128)),
        Storage::Q4_K | Storage::Q5_K => return k_block(storage, from, j),
        Storage::Q6_K => return q6_block(from, j),
        Storage::F32 | Storage::F16 | Storage::BF16 => unreachable!("floats have no codes"),
    };
    (codes, [0; 2])
}

/// Sixteen bytes whose low halves come first, with fifth bits.
fn halves(bytes: &[u8], fifth: u32) -> [u8; BLOCK] {
    std::array::from_fn(|k| {
        let byte = bytes[k % 16];
        let low = if k < 16 { byte & 15 } else { byte >> 4 };
        low | ((fifth >> k & 1) as u8) << 4
    })
}

/// A block of `Q4_K` or `Q5_K`: two lie in 32 bytes.
fn k_block(storage: Storage, from: &[u8], j: usize) -> ([u8; BLOCK], [u8; 2]) {
    let packed = &from[4..16];
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        )
    };
    let quants_at = if storage == Storage::Q5_K { 48 } else { 16 };
    let quants = &from[quants_at + 32 * (j / 2)..][..32];
    let codes = std::array::from_fn(|k| {
        let low = quants[k] >> (4 * (j % 2)) & 15;
        if storage == Storage::Q5_K {
            low | (from[16 + k] >> j & 1) << 4
        } else {
            low
        }
    });
    (codes, [scale, min])
}

/// A block of `Q6_K`: four lie in 64 and 32 bytes.
fn q6_block(from: &[u8], j: usize) -> ([u8; BLOCK], [u8; 2]) {
    let (half, part) = (j / 4, j % 4);
    let low = &from[64 * half + 32 * (part % 2)..][..32];
    let high = &from[128 + 32 * half..][..32];
    let codes =
        std::array::from_fn(|k| low[k] >> (4 * (part / 2)) & 15 | (high[k] >> (2 * part) & 3) << 4);
    let scales = &from[192 + 8 * half + 2 * part..];
    (codes, [scales[0], scales[1]])
}
