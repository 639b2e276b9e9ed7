//! Packing and every kernel against what the file format says.

use super::*;
use half::{bf16, f16};

const ALL: [Storage; 11] = [
    Storage::F32,
    Storage::F16,
    Storage::BF16,
    Storage::Q4_0,
    Storage::Q4_1,
    Storage::Q5_0,
    Storage::Q5_1,
    Storage::Q8_0,
    Storage::Q4_K,
    Storage::Q5_K,
    Storage::Q6_K,
];

/// A small generator with a fixed seed (SplitMix64).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// From -1 to 1.
    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
}

struct Memory(Shared<u8>);

impl Bytes for Memory {
    fn bytes(&self) -> &[u8] {
        // SAFETY: nobody writes any more.
        #[expect(unsafe_code, reason = "tests keep weights in a shared buffer")]
        unsafe {
            self.0.get(0..self.0.len())
        }
    }
}

/// A row of a file: any codes, sensible scales.
fn file_row(storage: Storage, n_in: usize, random: &mut Random) -> Vec<u8> {
    let n_units = n_in.div_ceil(storage.block_elements());
    let mut row = Vec::new();
    for _ in 0..n_units {
        let mut unit: Vec<u8> = (0..storage.block_bytes())
            .map(|_| random.bits() as u8)
            .collect();
        let half = f16::from_f32(random.unit() * 0.1).to_le_bytes();
        let other = f16::from_f32(random.unit() * 0.1).to_le_bytes();
        match storage {
            Storage::F32 => unit.copy_from_slice(&random.unit().to_le_bytes()),
            Storage::F16 => unit.copy_from_slice(&f16::from_f32(random.unit()).to_le_bytes()),
            Storage::BF16 => unit.copy_from_slice(&bf16::from_f32(random.unit()).to_le_bytes()),
            Storage::Q4_0 | Storage::Q5_0 | Storage::Q8_0 => unit[..2].copy_from_slice(&half),
            Storage::Q6_K => unit[208..].copy_from_slice(&half),
            _ => {
                unit[..2].copy_from_slice(&half);
                unit[2..4].copy_from_slice(&other);
            }
        }
        row.extend(unit);
    }
    row
}

/// A matrix, and its elements by the file format's own rule.
fn matrix(storage: Storage, [n_out, n_in]: [usize; 2], random: &mut Random) -> (Matrix, Vec<f32>) {
    let rows: Vec<Vec<u8>> = (0..n_out)
        .map(|_| file_row(storage, n_in, random))
        .collect();
    let mut elements = vec![0.0; n_out * n_in];
    for (row, out) in rows.iter().zip(elements.chunks_exact_mut(n_in)) {
        storage.dequantize(row, out);
    }
    let each = tile_bytes(storage, n_in);
    let mut memory = Shared::zeroed(n_out.div_ceil(ROWS) * each);
    for (rows, tile) in rows.chunks(ROWS).zip(memory.all().chunks_exact_mut(each)) {
        let rows: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
        pack_tile(storage, &rows, tile);
    }
    let place = 0..memory.len();
    let home = Arc::new(Memory(memory));
    (Matrix::new(storage, [n_out, n_in], home, place), elements)
}

/// Activations in every form; the padding is zero.
struct Activations {
    f32: Vec<f32>,
    bf16: Vec<u32>,
    q8: Vec<QBlock>,
}

struct Convert<'a>(&'a [f32]);

impl Task for Convert<'_> {
    type Output = (Vec<u32>, Vec<QBlock>);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let mut halves = vec![0u16; self.0.len()];
        crate::rows::round_bf16(s, self.0, &mut halves);
        let (blocks, _) = self.0.as_chunks();
        let blocks = blocks.iter().map(|x| QBlock::quantize(s, x)).collect();
        (bytemuck::cast_slice(&halves).to_vec(), blocks)
    }
}

impl Activations {
    fn new(isa: Isa, n_rows: usize, n_in: usize, random: &mut Random) -> Self {
        let stride = padded(n_in);
        let mut f32 = vec![0.0; n_rows * stride];
        for row in f32.chunks_exact_mut(stride) {
            row[..n_in].iter_mut().for_each(|x| *x = random.unit());
        }
        let (bf16, q8) = isa.run(Convert(&f32));
        Self { f32, bf16, q8 }
    }

    fn input(&self, form: Form) -> Input<'_> {
        match form {
            Form::F32 => Input::F32(&self.f32),
            Form::Bf16 => Input::Bf16(&self.bf16),
            Form::Q8 => Input::Q8(&self.q8),
        }
    }
}

/// The forms that a storage can be multiplied with, and the error that each may have, as a share of the sum of all
/// products' sizes.
fn forms(storage: Storage) -> Vec<(Form, f64)> {
    let mut forms = vec![(Form::F32, 1e-6)];
    match storage {
        Storage::F32 | Storage::F16 => {}
        Storage::BF16 => forms.push((Form::Bf16, 4e-3)),
        _ => forms.push((Form::Q8, 8e-3)),
    }
    forms
}

fn check(isa: Isa, storage: Storage, form: Form, bound: f64, random: &mut Random) {
    let unit = storage.block_elements().max(1);
    let n_in = unit * (1 + random.below(if unit > 32 { 2 } else { 70 / unit.min(35) }));
    let (n_out, n_rows) = (1 + random.below(50), 1 + random.below(37));
    let (matrix, weights) = matrix(storage, [n_out, n_in], random);
    let x = Activations::new(isa, n_rows, n_in, random);
    let (column, stride) = (16, 16 + matrix.n_tiles() * ROWS + 16);
    let mut out = Shared::zeroed(n_rows * stride);
    out.all().fill(f32::NAN);
    let split = random.below(matrix.n_tiles() + 1);
    for tiles in [0..split, split..matrix.n_tiles()] {
        Product {
            matrix: &matrix,
            tiles,
            input: x.input(form),
            n_rows,
            out: &out,
            stride,
            column,
            bias: None,
            then: Then::Set,
        }
        .run(isa);
    }
    for (row, out) in out.all().chunks_exact(stride).enumerate() {
        assert!(
            out[..16]
                .iter()
                .chain(&out[stride - 16..])
                .all(|x| x.is_nan())
        );
        for (o, found) in out[column..][..n_out].iter().enumerate() {
            let products = || {
                let x = &x.f32[row * padded(n_in)..][..n_in];
                let w = &weights[o * n_in..][..n_in];
                x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w))
            };
            let (sum, size) = (
                products().sum::<f64>(),
                products().map(f64::abs).sum::<f64>(),
            );
            let error = (f64::from(*found) - sum).abs();
            assert!(
                error <= bound * size + 1e-6,
                "{isa:?} {storage:?} {form:?} {n_out}x{n_in} row {row} output {o}: {found} for {sum} of {size}"
            );
        }
    }
}

#[test]
fn every_kernel_multiplies_what_the_file_says() {
    let mut random = Random(7);
    for isa in Isa::all() {
        for storage in ALL {
            for (form, bound) in forms(storage) {
                for _ in 0..12 {
                    check(isa, storage, form, bound, &mut random);
                }
            }
        }
    }
}

#[test]
fn rows_come_back_as_the_file_has_them() {
    let mut random = Random(8);
    for isa in Isa::all() {
        for storage in ALL {
            let n_in = storage.block_elements().max(3);
            let (matrix, elements) = matrix(storage, [21, n_in], &mut random);
            let mut scratch = Vec::new();
            for (i, expected) in elements.chunks_exact(n_in).enumerate() {
                let mut row = vec![f32::NAN; n_in];
                matrix.row(isa, i, &mut scratch, &mut row);
                for (found, expected) in row.iter().zip(expected) {
                    assert!(
                        (found - expected).abs() <= 1e-6 * expected.abs() + 1e-7,
                        "{storage:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_row() {
    let mut random = Random(9);
    for isa in Isa::all() {
        let (matrix, _) = matrix(Storage::Q4_1, [16, 64], &mut random);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![0.5; 128];
            x[70] = bad;
            let (_, q8) = isa.run(Convert(&x));
            let mut out = Shared::zeroed(32);
            Product {
                matrix: &matrix,
                tiles: 0..1,
                input: Input::Q8(&q8),
                n_rows: 2,
                out: &out,
                stride: 16,
                column: 0,
                bias: None,
                then: Then::Set,
            }
            .run(isa);
            let out = out.all();
            assert!(
                out[..16].iter().all(|x| x.is_finite()) && out[16..].iter().all(|x| x.is_nan())
            );
        }
    }
}

#[test]
fn a_row_gives_the_same_bits_alone_and_among_others() {
    let mut random = Random(12);
    for isa in Isa::all() {
        for storage in ALL {
            let n_in = 256;
            let (matrix, _) = matrix(storage, [32, n_in], &mut random);
            for (form, _) in forms(storage) {
                let x = Activations::new(isa, 37, n_in, &mut random);
                let run = |input, n_rows| {
                    let mut out = Shared::zeroed(n_rows * 32);
                    Product {
                        matrix: &matrix,
                        tiles: 0..2,
                        input,
                        n_rows,
                        out: &out,
                        stride: 32,
                        column: 0,
                        bias: None,
                        then: Then::Set,
                    }
                    .run(isa);
                    out.all().to_vec()
                };
                let all = run(x.input(form), 37);
                for row in 0..37 {
                    let alone = match form {
                        Form::F32 => Input::F32(&x.f32[row * n_in..][..n_in]),
                        Form::Bf16 => Input::Bf16(&x.bf16[row * n_in / 2..][..n_in / 2]),
                        Form::Q8 => Input::Q8(&x.q8[row * n_in / 32..][..n_in / 32]),
                    };
                    assert_eq!(
                        run(alone, 1),
                        all[row * 32..][..32],
                        "{storage:?} {form:?} {row}"
                    );
                }
            }
        }
    }
}

#[test]
fn products_are_added_biased_and_gated() {
    let mut random = Random(10);
    for isa in Isa::all() {
        let (matrix, weights) = matrix(Storage::F32, [16, 1], &mut random);
        let mut x = vec![0.0; padded(1)];
        x[0] = 1.0;
        let bias = [0.25; 16];
        for then in [Then::Set, Then::Add, Then::Gate] {
            let mut out = Shared::zeroed(16);
            out.all().fill(-1.5);
            Product {
                matrix: &matrix,
                tiles: 0..1,
                input: Input::F32(&x),
                n_rows: 1,
                out: &out,
                stride: 16,
                column: 0,
                bias: Some(&bias),
                then,
            }
            .run(isa);
            for (found, weight) in out.all().iter().zip(&weights) {
                let product = weight + 0.25;
                let expected = match then {
                    Then::Set => product,
                    Then::Add => product - 1.5,
                    Then::Gate => -1.5 / (1.0 + 1.5_f32.exp()) * product,
                };
                assert!((found - expected).abs() < 1e-6);
            }
        }
    }
}

/// Prints each kernel's speed on one thread, beside the machine's own reading: `cargo test --release -p baton-cpu --lib
/// speed -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a test"]
#[expect(clippy::print_stdout, reason = "it prints what it measured")]
fn speed() {
    let mut random = Random(11);
    let isa = Isa::detect();
    let [n_out, n_in] = [1536, 576_usize];
    let time = |work: &mut dyn FnMut()| {
        work();
        let best = (0..15).map(|_| {
            let start = std::time::Instant::now();
            work();
            start.elapsed().as_secs_f64()
        });
        best.fold(f64::INFINITY, f64::min)
    };
    for storage in ALL {
        let n_in = n_in.next_multiple_of(storage.block_elements());
        let matrices: Vec<Matrix> = (0..40)
            .map(|_| matrix(storage, [n_out, n_in], &mut random).0)
            .collect();
        for (form, _) in forms(storage) {
            for n_rows in [1, 4, 16, 512] {
                let x = Activations::new(isa, n_rows, n_in, &mut random);
                let out = Shared::zeroed(n_rows * n_out);
                let used = if n_rows > 16 { 4 } else { 40 };
                let seconds = time(&mut || {
                    for matrix in &matrices[..used] {
                        Product {
                            matrix,
                            tiles: 0..matrix.n_tiles(),
                            input: x.input(form),
                            n_rows,
                            out: &out,
                            stride: n_out,
                            column: 0,
                            bias: None,
                            then: Then::Set,
                        }
                        .run(isa);
                    }
                });
                let bytes = (used * matrices[0].place.len()) as f64;
                let ops = (2 * used * n_rows * n_out * n_in) as f64;
                println!(
                    "{storage:?} {form:?} rows {n_rows}: {:.1} GB/s {:.0} Gop/s",
                    bytes / seconds / 1e9,
                    ops / seconds / 1e9
                );
            }
        }
    }
}
