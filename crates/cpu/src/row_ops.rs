//! What is done to one row at a time.

use crate::kv_cache::KvCache;
use crate::matrix::{Form, Matrix};
use crate::plan::{Buffer, RowOp};
use crate::rows::{BLOCK, QBlock, round_bf16};
use crate::shared::{Plain, Shared};
use crate::simd::{Isa, Simd, Task};
use std::ops::Range;

impl Plain for QBlock {}

/// Rows of every buffer, and where prepared rows go.
pub(crate) struct Memory {
    pub(crate) strides: Vec<usize>,
    pub(crate) buffers: Vec<Shared<f32>>,
    pub(crate) bf16: Shared<u16>,
    pub(crate) q8: Shared<QBlock>,
}

impl Memory {
    /// Reads a row.
    ///
    /// # Safety
    /// Nobody writes it meanwhile.
    #[expect(unsafe_code, reason = "rows are shared between threads")]
    #[inline(always)]
    unsafe fn row(&self, buffer: Buffer, row: usize) -> &[f32] {
        let stride = self.strides[buffer.0];
        // SAFETY: the caller's promise.
        unsafe { self.buffers[buffer.0].get(row * stride..(row + 1) * stride) }
    }

    /// Writes a row.
    ///
    /// # Safety
    /// Nobody else reads or writes it meanwhile.
    #[expect(unsafe_code, reason = "rows are shared between threads")]
    #[expect(clippy::mut_from_ref, reason = "the caller promises that rows differ")]
    #[inline(always)]
    unsafe fn row_mut(&self, buffer: Buffer, row: usize) -> &mut [f32] {
        let stride = self.strides[buffer.0];
        // SAFETY: the caller's promise.
        unsafe { self.buffers[buffer.0].get_mut(row * stride..(row + 1) * stride) }
    }
}

/// Where a token of the step belongs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token {
    pub(crate) id: u32,
    pub(crate) position: u32,
    pub(crate) block: u32,
    pub(crate) slot: u32,
}

/// What rows need besides other rows.
pub(crate) struct Surroundings<'a> {
    pub(crate) isa: Isa,
    pub(crate) memory: &'a Memory,
    pub(crate) matrices: &'a [Matrix],
    /// Padded as rows are.
    pub(crate) vectors: &'a [Vec<f32>],
    pub(crate) widths: &'a [usize],
    pub(crate) forms: &'a [FormsOf],
    pub(crate) cache: &'a KvCache,
    pub(crate) tokens: &'a [Token],
    /// For each row of [`crate::plan::Space::Last`], the row of its token.
    pub(crate) last: &'a [usize],
}

/// The forms that products want of a buffer's rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FormsOf {
    pub(crate) bf16: bool,
    pub(crate) q8: bool,
}

impl FormsOf {
    /// One more form.
    pub(crate) fn add(&mut self, form: Form) {
        match form {
            Form::F32 => {}
            Form::Bf16 => self.bf16 = true,
            Form::Q8 => self.q8 = true,
        }
    }
}

/// Some operations on one row after another.
pub(crate) struct RowsTask<'a> {
    pub(crate) ops: &'a [RowOp],
    pub(crate) rows: Range<usize>,
    /// Added to the rows that are written; not zero if a member works for itself.
    pub(crate) shift: usize,
    pub(crate) around: &'a Surroundings<'a>,
    /// Room for a tile's rows of a table.
    pub(crate) scratch: &'a mut Vec<[f32; 16]>,
}

impl Task for RowsTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self {
            ops,
            rows,
            shift,
            around,
            scratch,
        } = self;
        for row in rows {
            // What this run made lies in its own rows, what others made before in the common ones.
            let mut made = None;
            for op in ops {
                let from = |x: Buffer| if made == Some(x) { row + shift } else { row };
                match op {
                    RowOp::Norm {
                        x,
                        weight,
                        eps,
                        out,
                    } => {
                        around.norm(s, [(*x, from(*x)), (*out, row + shift)], weight.0, *eps);
                        made = Some(*out);
                    }
                    RowOp::Prepare { x } => around.prepare(s, (*x, from(*x)), row + shift),
                    other => around.other(other, row, scratch),
                }
            }
        }
    }
}

/// A row of a buffer.
type Place = (Buffer, usize);

#[expect(
    unsafe_code,
    reason = "rows are shared between threads: each section gives a row to one of them, and members that work for \
              themselves write rows of their own"
)]
impl Surroundings<'_> {
    #[inline(always)]
    fn norm<S: Simd>(&self, s: S, [x, out]: [Place; 2], weight: usize, eps: f32) {
        let width = self.widths[x.0.0];
        // SAFETY: see above; a norm's operands differ.
        let (x, out) = unsafe { (self.memory.row(x.0, x.1), self.memory.row_mut(out.0, out.1)) };
        let mut squares = s.zero();
        for x in x.as_chunks::<16>().0 {
            let x = s.load(x);
            squares = s.fma(x, x, squares);
        }
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
        let mean = s.sum(squares) / width as f32;
        let scale = s.splat(1.0 / (mean + eps).sqrt());
        let weights = self.vectors[weight].as_chunks::<16>().0;
        let lanes = x
            .as_chunks::<16>()
            .0
            .iter()
            .zip(out.as_chunks_mut::<16>().0);
        for ((x, out), weight) in lanes.zip(weights) {
            s.store(s.mul(s.mul(s.load(x), scale), s.load(weight)), out);
        }
    }

    #[inline(always)]
    fn prepare<S: Simd>(&self, s: S, x: Place, to: usize) {
        let forms = self.forms[x.0.0];
        let stride = self.memory.strides[x.0.0];
        // SAFETY: see above.
        let x = unsafe { self.memory.row(x.0, x.1) };
        if forms.bf16 {
            // SAFETY: see above.
            let out = unsafe { self.memory.bf16.get_mut(to * stride..(to + 1) * stride) };
            round_bf16(s, x, out);
        }
        if forms.q8 {
            let (n, blocks) = (stride / BLOCK, x.as_chunks::<BLOCK>().0);
            // SAFETY: see above.
            let out = unsafe { self.memory.q8.get_mut(to * n..(to + 1) * n) };
            for (x, out) in blocks.iter().zip(out) {
                *out = QBlock::quantize(s, x);
            }
        }
    }

    /// Operations that the compiler makes vectors of by itself.
    #[inline(always)]
    fn other(&self, op: &RowOp, row: usize, scratch: &mut Vec<[f32; 16]>) {
        // SAFETY: see above; the buffers of one operation differ.
        let read = |x: Buffer, row| unsafe { self.memory.row(x, row) };
        // SAFETY: as above.
        let write = |x: Buffer| unsafe { self.memory.row_mut(x, row) };
        let token = |row: usize| self.tokens[row];
        match op {
            RowOp::Embed { table, out } => {
                let id = token(row).id as usize;
                self.matrices[table.0].row(self.isa, id, scratch, write(*out));
            }
            RowOp::RopeTable { frequencies, out } => {
                rope_table(token(row).position, frequencies, write(*out));
            }
            RowOp::Rope { x, table, head_dim } => {
                let heads = write(*x)[..self.widths[x.0]].chunks_exact_mut(*head_dim);
                let table = &read(*table, row)[..*head_dim];
                heads.for_each(|head| rotate(head, table));
            }
            RowOp::WriteKv { layer, k, v } => {
                let Token { block, slot, .. } = token(row);
                let (k, v) = (read(*k, row), read(*v, row));
                // SAFETY: see above; every token of a step has a slot of its own.
                unsafe { self.cache.write(*layer, [block, slot], k, v) };
            }
            RowOp::Add { a, b } => {
                for (a, b) in write(*a).iter_mut().zip(read(*b, row)) {
                    *a += b;
                }
            }
            RowOp::Last { x, out } => write(*out).copy_from_slice(read(*x, self.last[row])),
            RowOp::Norm { .. } | RowOp::Prepare { .. } => {}
        }
    }
}

/// Cosines, then sines.
#[inline(always)]
#[expect(clippy::cast_precision_loss, reason = "positions are below 2^24")]
fn rope_table(position: u32, frequencies: &[f32], out: &mut [f32]) {
    let (cosines, sines) = out.split_at_mut(frequencies.len());
    for ((frequency, cosine), sine) in frequencies.iter().zip(cosines).zip(sines) {
        (*sine, *cosine) = (position as f32 * frequency).sin_cos();
    }
}

/// Rotates the two halves of a head.
#[inline(always)]
fn rotate(head: &mut [f32], table: &[f32]) {
    let half = head.len() / 2;
    let (low, high) = head.split_at_mut(half);
    let (cosines, sines) = table.split_at(half);
    for (((low, high), cosine), sine) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
        (*low, *high) = (*low * cosine - *high * sine, *high * cosine + *low * sine);
    }
}
