//! GGUF's element types: how many bytes hold how many elements, and what they stand for.
//!
//! The block layouts are ggml's (`ggml-quants.c`). Elements come out as f32, exactly as ggml's own reference computes them.

use half::{bf16, f16};

/// How a tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are ggml's")]
#[expect(non_camel_case_types, reason = "the names are ggml's")]
pub enum Storage {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// Elements of a K-quant's block.
const QK: usize = 256;

impl Storage {
    /// By ggml's number; `None` for those we do not read.
    pub fn from_ggml(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// Elements of a block; rows are whole blocks.
    pub const fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4_K | Self::Q5_K | Self::Q6_K => QK,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bytes of `n` elements; `None` if they are no whole blocks or the number overflows.
    pub fn bytes_of(self, n: usize) -> Option<usize> {
        if !n.is_multiple_of(self.block_elements()) {
            return None;
        }
        (n / self.block_elements()).checked_mul(self.block_bytes())
    }

    /// The elements that whole blocks stand for. What does not fit into both slices is left alone.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes
            .chunks_exact(self.block_bytes())
            .zip(out.chunks_exact_mut(self.block_elements()));
        let each: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => |b, out| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Self::F16 => |b, out| out[0] = half_at(b, 0),
            Self::BF16 => |b, out| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Self::Q4_0 => q4_0,
            Self::Q4_1 => q4_1,
            Self::Q5_0 => q5_0,
            Self::Q5_1 => q5_1,
            Self::Q8_0 => q8_0,
            Self::Q4_K => q4_k,
            Self::Q5_K => q5_k,
            Self::Q6_K => q6_k,
        };
        for (block, out) in blocks {
            each(block, out);
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let (low, high) = out.split_at_mut(16);
    for ((&q, low), high) in block[2..].iter().zip(low).zip(high) {
        *low = (f32::from(q & 15) - 8.0) * d;
        *high = (f32::from(q >> 4) - 8.0) * d;
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let (low, high) = out.split_at_mut(16);
    for ((&q, low), high) in block[4..].iter().zip(low).zip(high) {
        *low = f32::from(q & 15) * d + m;
        *high = f32::from(q >> 4) * d + m;
    }
}

/// The fifth bits of a block's 32 elements.
fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let (d, high_bits) = (half_at(block, 0), fifth_bits(block, 2));
    let (low, high) = out.split_at_mut(16);
    for (j, ((&q, low), high)) in block[6..].iter().zip(low).zip(high).enumerate() {
        *low = (f32::from(q & 15 | bit(high_bits, j)) - 16.0) * d;
        *high = (f32::from(q >> 4 | bit(high_bits, j + 16)) - 16.0) * d;
    }
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m, high_bits) = (half_at(block, 0), half_at(block, 2), fifth_bits(block, 4));
    let (low, high) = out.split_at_mut(16);
    for (j, ((&q, low), high)) in block[8..].iter().zip(low).zip(high).enumerate() {
        *low = f32::from(q & 15 | bit(high_bits, j)) * d + m;
        *high = f32::from(q >> 4 | bit(high_bits, j + 16)) * d + m;
    }
}

/// Bit `j` moved to the place of a fifth bit.
fn bit(bits: u32, j: usize) -> u8 {
    ((bits >> j & 1) << 4) as u8
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (&q, out) in block[2..].iter().zip(out) {
        *out = f32::from(q.cast_signed()) * d;
    }
}

/// Scale and minimum of sub-block `j` of eight, six bits each, packed into twelve bytes.
fn scale_min(j: usize, packed: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, quants) = block[4..].split_at(12);
    for (j, (q, out)) in quants
        .chunks_exact(32)
        .zip(out.chunks_exact_mut(64))
        .enumerate()
    {
        let ((s1, m1), (s2, m2)) = (scale_min(2 * j, scales), scale_min(2 * j + 1, scales));
        let (low, high) = out.split_at_mut(32);
        for ((&q, low), high) in q.iter().zip(low).zip(high) {
            *low = d * s1 * f32::from(q & 15) - dmin * m1;
            *high = d * s2 * f32::from(q >> 4) - dmin * m2;
        }
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, rest) = block[4..].split_at(12);
    let (high_bits, quants) = rest.split_at(32);
    for (j, (q, out)) in quants
        .chunks_exact(32)
        .zip(out.chunks_exact_mut(64))
        .enumerate()
    {
        let ((s1, m1), (s2, m2)) = (scale_min(2 * j, scales), scale_min(2 * j + 1, scales));
        let (low, high) = out.split_at_mut(32);
        for (((&q, &bits), low), high) in q.iter().zip(high_bits).zip(low).zip(high) {
            *low = d * s1 * f32::from(q & 15 | bit(u32::from(bits), 2 * j)) - dmin * m1;
            *high = d * s2 * f32::from(q >> 4 | bit(u32::from(bits), 2 * j + 1)) - dmin * m2;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low_bits, rest) = block.split_at(128);
    let (high_bits, rest) = rest.split_at(64);
    let (scales, d) = (&rest[..16], half_at(rest, 16));
    for (n, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high, scales) = (&low_bits[64 * n..], &high_bits[32 * n..], &scales[8 * n..]);
        for l in 0..32 {
            let quants = [
                low[l] & 15 | (high[l] & 3) << 4,
                low[l + 32] & 15 | (high[l] >> 2 & 3) << 4,
                low[l] >> 4 | (high[l] >> 4 & 3) << 4,
                low[l + 32] >> 4 | (high[l] >> 6) << 4,
            ];
            for (part, q) in quants.into_iter().enumerate() {
                let scale = f32::from(scales[l / 16 + 2 * part].cast_signed());
                out[l + 32 * part] = d * scale * (f32::from(q) - 32.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Storage;
    use std::collections::BTreeMap;

    /// From tests/reference/quant_vectors.py: random blocks and what the Python package gguf makes of them.
    const VECTORS: &str = include_str!("../tests/fixtures/quant_vectors.json");

    #[test]
    fn every_storage_dequantizes_as_the_reference_does() {
        let vectors: BTreeMap<String, (u32, Vec<u8>, Vec<f32>)> =
            serde_json::from_str(VECTORS).unwrap();
        assert_eq!(vectors.len(), 11);
        for (name, (id, bytes, expected)) in vectors {
            let storage = Storage::from_ggml(id).unwrap();
            assert_eq!(format!("{storage:?}"), name);
            assert_eq!(storage.bytes_of(expected.len()), Some(bytes.len()));
            let mut out = vec![f32::NAN; expected.len()];
            storage.dequantize(&bytes, &mut out);
            for (i, (ours, theirs)) in out.iter().zip(&expected).enumerate() {
                assert!(
                    (ours - theirs).abs() <= theirs.abs() * 1e-6 + 1e-9,
                    "{name}[{i}]: {ours} instead of {theirs}"
                );
            }
        }
    }

    #[test]
    fn a_part_of_a_block_is_no_tensor() {
        assert_eq!(Storage::Q4_K.bytes_of(255), None);
        assert_eq!(Storage::F16.bytes_of(usize::MAX), None);
        assert_eq!(Storage::from_ggml(4), None);
    }
}
