//! One tensor in a file, read a stretch of rows at a time.

use crate::error::TensorError;
use baton_kv::{DType, fp8};
use baton_model::{RowOrder, Storage};
use half::{bf16, f16};
use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// Bytes read at once; large enough for the disk, small enough for the cache.
const STRETCH: usize = 1 << 18;

#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    /// Index into the checkpoint's files.
    pub(crate) file: usize,
    pub(crate) shape: Vec<usize>,
    pub(crate) storage: Storage,
    pub(crate) offset: u64,
    pub(crate) n_bytes: usize,
    pub(crate) order: RowOrder,
}

impl Tensor {
    /// Reads bytes as they lie, from `at` within the tensor.
    pub(crate) fn read(&self, file: &File, at: usize, out: &mut [u8]) -> Result<(), TensorError> {
        file.read_exact_at(out, self.offset + at as u64)
            .map_err(TensorError::Read)
    }

    /// All rows as they are stored, in Hugging Face's order.
    pub(crate) fn rows(&self, file: &File) -> Result<Vec<u8>, TensorError> {
        let mut bytes = vec![0; self.n_bytes];
        self.read(file, 0, &mut bytes)?;
        let n_rows = self.shape.first().copied().unwrap_or(1).max(1);
        let row_bytes = self.n_bytes / n_rows;
        if self.order == RowOrder::Same || row_bytes == 0 {
            return Ok(bytes);
        }
        let mut ordered = vec![0; bytes.len()];
        for (row, from) in bytes.chunks_exact(row_bytes).enumerate() {
            let place = self.order.place(row) * row_bytes;
            ordered[place..place + row_bytes].copy_from_slice(from);
        }
        Ok(ordered)
    }

    /// Reads all elements into `out` as `dtype`, rows in Hugging Face's order.
    pub(crate) fn load(
        &self,
        file: &File,
        dtype: DType,
        out: &mut [u8],
    ) -> Result<(), TensorError> {
        let elements: usize = self.shape.iter().product();
        if elements * dtype.bytes() != out.len() {
            return Err(TensorError::Size {
                elements,
                bytes: out.len(),
            });
        }
        // A bias is a matrix of rows of one element, so that one order serves both.
        let n_rows = self.shape.first().copied().unwrap_or(1).max(1);
        let row_elements = elements / n_rows;
        let row_bytes = self.n_bytes / n_rows;
        if row_bytes == 0 {
            return Ok(());
        }
        let rows_at_once = (STRETCH / row_bytes).clamp(1, n_rows);
        let mut stretch = vec![0; rows_at_once * row_bytes];
        let mut row = vec![0.0; row_elements];
        for first in (0..n_rows).step_by(rows_at_once) {
            let n = rows_at_once.min(n_rows - first);
            self.read(file, first * row_bytes, &mut stretch[..n * row_bytes])?;
            for (i, bytes) in stretch[..n * row_bytes].chunks_exact(row_bytes).enumerate() {
                self.storage.dequantize(bytes, &mut row);
                let place = self.order.place(first + i) * row_elements * dtype.bytes();
                store(
                    &row,
                    dtype,
                    &mut out[place..place + row_elements * dtype.bytes()],
                );
            }
        }
        Ok(())
    }
}

fn store(row: &[f32], dtype: DType, out: &mut [u8]) {
    match dtype {
        DType::F32 => each(row, out, f32::to_le_bytes),
        DType::BF16 => each(row, out, |x| bf16::from_f32(x).to_le_bytes()),
        DType::Fp8E4M3 => each(row, out, |x| [fp8::code(x)]),
        DType::F16 => each(row, out, |x| f16::from_f32(x).to_le_bytes()),
    }
}

fn each<const N: usize>(row: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; N]) {
    for (&x, out) in row.iter().zip(out.chunks_exact_mut(N)) {
        out.copy_from_slice(&bytes(x));
    }
}
