//! Attention against its definition in f64, in a pool whose other slots are not numbers.

use super::*;
use baton_kv::{DType, KvLayout, fp8};
use half::bf16;
use std::time::Instant;

/// What no result may depend on and what no part may overwrite.
const POISON: f32 = f32::NAN;
/// In the outputs before: something that nobody computes.
const UNTOUCHED: f32 = 1.0e30;

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

    fn units(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }

    fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
}

/// Sizes of a model.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    dtype: DType,
    head_dim: usize,
    n_kv_heads: usize,
    group: usize,
    block_size: usize,
}

impl Sizes {
    /// Elements of a token's queries.
    fn width(&self) -> usize {
        self.n_kv_heads * self.group * self.head_dim
    }
}

/// A step: sequences in a pool, and queries.
struct Fixture {
    sizes: Sizes,
    cache: KvCache,
    spans: Vec<Span>,
    tables: Vec<BlockId>,
    /// Keys and values of each sequence as the pool keeps them, `[position][kv head][dim]`.
    kv: Vec<[Vec<f32>; 2]>,
    q: Shared<f32>,
    stride: usize,
    n_rows: usize,
}

impl Fixture {
    /// Sequences by tokens and the first one's position.
    fn new(sizes: Sizes, sequences: &[(usize, usize)], random: &mut Random) -> Self {
        let of = |i: usize| sequences[i].0 + sequences[i].1;
        let n_blocks: usize = (0..sequences.len())
            .map(|i| of(i).div_ceil(sizes.block_size))
            .sum::<usize>()
            + 1;
        let mut fixture = Self {
            sizes,
            cache: poisoned(sizes, n_blocks),
            spans: Vec::new(),
            tables: Vec::new(),
            kv: Vec::new(),
            q: Shared::zeroed(0),
            stride: sizes.width() + 16,
            n_rows: 0,
        };
        let mut free: Vec<u32> = (0..n_blocks as u32).collect();
        for (i, &(n_tokens, start)) in sequences.iter().enumerate() {
            let first = fixture.tables.len();
            for _ in 0..of(i).div_ceil(sizes.block_size) {
                let block = free.swap_remove(random.below(free.len()));
                fixture.tables.push(BlockId(block));
            }
            fixture.spans.push(Span {
                first_row: fixture.n_rows,
                n_tokens,
                start,
                blocks: first..fixture.tables.len(),
            });
            fixture.n_rows += n_tokens;
            fixture.write(i, random);
        }
        fixture.q = Shared::zeroed(fixture.n_rows * fixture.stride);
        for row in fixture.q.all().chunks_mut(fixture.stride) {
            let (q, padding) = row.split_at_mut(sizes.width());
            q.iter_mut().for_each(|q| *q = 4.0 * random.unit());
            padding.fill(POISON);
        }
        fixture
    }

    /// Fills a sequence's slots.
    fn write(&mut self, i: usize, random: &mut Random) {
        let span = &self.spans[i];
        let width = self.sizes.n_kv_heads * self.sizes.head_dim;
        let mut kept = [Vec::new(), Vec::new()];
        for position in 0..span.start + span.n_tokens {
            let block = self.tables[span.blocks.start + position / self.sizes.block_size];
            let slot = (position % self.sizes.block_size) as u32;
            let [k, v] = [random.units(width), random.units(width)];
            // SAFETY: the test is alone.
            #[expect(unsafe_code, reason = "slots are shared between threads")]
            unsafe {
                self.cache.write(1, [block.0, slot], &k, &v);
            }
            for (kept, x) in kept.iter_mut().zip([k, v]) {
                kept.extend(x.iter().map(|&x| match self.sizes.dtype {
                    DType::F32 => x,
                    DType::Fp8E4M3 => fp8::value(fp8::code(x)),
                    _ => bf16::from_f32(x).to_f32(),
                }));
            }
        }
        self.kv.push(kept);
    }

    fn plan(&self, parts: usize) -> Attention {
        let mut attention = Attention::default();
        let group = self.sizes.group;
        let how = How { group, parts };
        attention.plan(&self.spans, &self.tables, &self.cache.shape, how);
        attention
    }

    /// All outputs, `[token][width]`. Nothing else may have been written.
    fn outputs(&self, isa: Isa, parts: usize) -> Vec<f32> {
        let attention = self.plan(parts);
        let mut out = Shared::zeroed(self.n_rows * self.stride);
        out.all().fill(UNTOUCHED);
        let heads = Heads {
            q: &self.q,
            q_stride: self.stride,
            out: &out,
            out_stride: self.stride,
        };
        let mut scratch = Scratch::default();
        // Any order will do.
        for i in (0..attention.n_parts()).rev() {
            attention.part(isa, (i, 1), &self.cache, &heads, &mut scratch);
        }
        for i in 0..attention.n_merges() {
            attention.merge(i, &self.cache.shape, &heads);
        }
        let mut all = Vec::new();
        for row in out.all().chunks(self.stride) {
            let (row, padding) = row.split_at(self.sizes.width());
            assert!(padding.iter().all(|&x| x == UNTOUCHED));
            all.extend_from_slice(row);
        }
        all
    }

    /// The same by definition.
    fn expected(&mut self) -> Vec<f64> {
        let Sizes {
            head_dim, group, ..
        } = self.sizes;
        let mut all = Vec::new();
        let width = self.sizes.n_kv_heads * head_dim;
        for (span, [k, v]) in self.spans.iter().zip(&self.kv) {
            for token in 0..span.n_tokens {
                let q = &self.q.all()[(span.first_row + token) * self.stride..];
                let heads = q[..self.sizes.width()].chunks(head_dim).enumerate();
                for (head, q) in heads {
                    let of = |x: &[f32], position: usize| -> Vec<f64> {
                        let at = position * width + head / group * head_dim;
                        x[at..at + head_dim].iter().map(|&x| f64::from(x)).collect()
                    };
                    let positions = 0..=span.start + token;
                    let weights: Vec<f64> = positions
                        .clone()
                        .map(|p| {
                            let dot = q.iter().zip(of(k, p)).map(|(&q, k)| f64::from(q) * k);
                            (dot.sum::<f64>() / (head_dim as f64).sqrt()).exp()
                        })
                        .collect();
                    let mut out = vec![0.0; head_dim];
                    for (p, weight) in positions.zip(&weights) {
                        for (out, v) in out.iter_mut().zip(of(v, p)) {
                            *out += weight * v;
                        }
                    }
                    let sum: f64 = weights.iter().sum();
                    all.extend(out.iter().map(|x| x / sum));
                }
            }
        }
        all
    }
}

/// A pool of nothing but what is no number.
fn poisoned(sizes: Sizes, n_blocks: usize) -> KvCache {
    let layout = KvLayout {
        n_layers: 2,
        n_kv_heads: sizes.n_kv_heads as u32,
        head_dim: sizes.head_dim as u32,
        block_size: sizes.block_size as u32,
        dtype: sizes.dtype,
        model_fingerprint: 0,
    };
    let mut cache = KvCache::new(&layout, n_blocks as u32).unwrap();
    let blocks: Vec<BlockId> = (0..n_blocks as u32).map(BlockId).collect();
    // All bits set are no number, or what no key or value is.
    cache.import(&blocks, &vec![0xff; n_blocks * layout.block_bytes()]);
    cache
}

/// Values lie between -1 and 1; so do outputs, and these are absolute. In bf16, queries and weights are rounded to 2^-9 of
/// themselves: scores of queries up to 4 are off by about 0.002, so weights by under 1 %, and outputs, where such errors
/// mostly cancel, by less.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 | DType::Fp8E4M3 => 1e-5,
        _ => 1e-2,
    }
}

fn check(sizes: Sizes, sequences: &[(usize, usize)], random: &mut Random) {
    let mut fixture = Fixture::new(sizes, sequences, random);
    let expected = fixture.expected();
    for isa in Isa::all() {
        let once = fixture.outputs(isa, 1);
        for (i, (found, expected)) in once.iter().zip(&expected).enumerate() {
            let off = (f64::from(*found) - expected).abs();
            let at = (i / sizes.width(), i % sizes.width());
            assert!(
                off <= bound(sizes.dtype),
                "{found} for {expected} at {at:?} of {sizes:?} {sequences:?} {isa:?}"
            );
        }
        for parts in [5, 64] {
            assert!(
                fixture.outputs(isa, parts) == once,
                "{parts} parts of {sizes:?} {sequences:?} {isa:?}"
            );
        }
    }
}

#[test]
fn ragged_batches_give_what_the_definition_gives() {
    let mut random = Random(1);
    for dtype in [DType::F32, DType::BF16, DType::Fp8E4M3] {
        for head_dim in [8, 16, 40, 64, 80, 128] {
            for group in [1, 3, 4, 8] {
                let sizes = Sizes {
                    dtype,
                    head_dim,
                    n_kv_heads: 1 + random.below(2),
                    group,
                    block_size: [16, 32, 64][random.below(3)],
                };
                let decode = (1, random.below(150));
                let chunk = (1 + random.below(20), random.below(130));
                check(sizes, &[decode, (1, 0), chunk], &mut random);
            }
        }
    }
}

#[test]
fn long_contexts_are_split_and_put_together() {
    let mut random = Random(2);
    for dtype in [DType::F32, DType::BF16, DType::Fp8E4M3] {
        for group in [1, 3, 19] {
            let sizes = Sizes {
                dtype,
                head_dim: 24,
                n_kv_heads: 1,
                group,
                block_size: 16,
            };
            let sequences = [(1, 1000), (9, 509), (1, 3)];
            check(sizes, &sequences, &mut random);
        }
    }
}

#[test]
fn parts_are_split_only_where_there_would_be_too_few() {
    let sizes = Sizes {
        dtype: DType::F32,
        head_dim: 8,
        n_kv_heads: 2,
        group: 1,
        block_size: 16,
    };
    let fixture = Fixture::new(sizes, &[(1, 1500)], &mut Random(3));
    assert_eq!(fixture.plan(1).n_merges(), 0);
    assert_eq!(fixture.plan(1).n_parts(), 2);
    assert_eq!(fixture.plan(8).n_merges(), 2);
    assert!(fixture.plan(8).n_parts() >= 8);
}

#[test]
fn a_token_gives_the_same_bits_alone_and_among_others() {
    let mut random = Random(4);
    for dtype in [DType::F32, DType::BF16, DType::Fp8E4M3] {
        let sizes = Sizes {
            dtype,
            head_dim: 40,
            n_kv_heads: 2,
            group: 3,
            block_size: 32,
        };
        let mut fixture = Fixture::new(sizes, &[(1, 70), (150, 120)], &mut random);
        for isa in Isa::all() {
            let all = fixture.outputs(isa, 1);
            for token in [0, 1, 7, 8, 100, 149] {
                let row = 1 + token;
                let width = sizes.width();
                let whole = (fixture.spans.clone(), fixture.n_rows);
                // The token alone, with queries where they are.
                fixture.spans = vec![Span {
                    first_row: row,
                    n_tokens: 1,
                    start: 120 + token,
                    ..fixture.spans[1].clone()
                }];
                let alone = fixture.outputs(isa, 9);
                (fixture.spans, fixture.n_rows) = whole;
                let range = row * width..(row + 1) * width;
                assert!(alone[range.clone()] == all[range], "{token} {isa:?}");
            }
        }
    }
}

#[test]
fn what_is_no_number_spoils_only_its_sequence() {
    let mut random = Random(5);
    for (dtype, bad) in [
        (DType::F32, f32::NAN),
        (DType::BF16, f32::NAN),
        (DType::F32, f32::INFINITY),
        (DType::BF16, f32::NEG_INFINITY),
        (DType::Fp8E4M3, f32::NAN),
    ] {
        let sizes = Sizes {
            dtype,
            head_dim: 16,
            n_kv_heads: 1,
            group: 4,
            block_size: 16,
        };
        let fixture = Fixture::new(sizes, &[(3, 300), (2, 40)], &mut random);
        for isa in Isa::all() {
            for parts in [1, 16] {
                let before = fixture.outputs(isa, parts);
                for position in [5, 150, 301] {
                    let block = fixture.tables[position / 16].0;
                    let slot = (position % 16) as u32;
                    // SAFETY: the test is alone.
                    #[expect(unsafe_code, reason = "slots are shared between threads")]
                    unsafe {
                        fixture
                            .cache
                            .write(1, [block, slot], &[bad; 16], &[bad; 16]);
                    }
                }
                let after = fixture.outputs(isa, parts);
                let other = 3 * sizes.width();
                assert!(after[other..] == before[other..], "{isa:?}");
            }
        }
    }
}

/// Times a closure: the best of some rounds, in seconds.
fn best(mut run: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..20 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// Operations in a second of nothing but `dot2` or `fma`, sixteen at a time.
fn peak(isa: Isa, dtype: DType) -> f64 {
    struct Peak(DType, [f32; 16]);
    impl Task for Peak {
        type Output = f32;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            let x = s.load(&self.1);
            let bytes: [u8; 64] = bytemuck::cast(self.1);
            let i = s.load_i(std::hint::black_box(&bytes));
            let mut sums = [s.zero(); 16];
            for _ in 0..100_000 {
                for sum in &mut sums {
                    *sum = match self.0 {
                        DType::BF16 => s.dot2(*sum, i, i),
                        _ => s.fma(x, x, *sum),
                    };
                }
            }
            sums.into_iter().fold(0.0, |all, sum| all + s.sum(sum))
        }
    }
    let seconds = best(|| {
        std::hint::black_box(isa.run(Peak(dtype, std::hint::black_box([0.5; 16]))));
    });
    let each = if dtype == DType::BF16 { 4.0 } else { 2.0 };
    100_000.0 * 16.0 * 16.0 * each / seconds
}

/// Run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "it measures"]
#[expect(clippy::print_stdout, reason = "figures are what it is for")]
fn figures() {
    for (dtype, isa) in [DType::BF16, DType::F32, DType::Fp8E4M3]
        .into_iter()
        .flat_map(|dtype| Isa::all().into_iter().skip(1).map(move |isa| (dtype, isa)))
    {
        let peak = peak(isa, dtype);
        println!("{} {isa:?}: peak {:.0} Gop/s", dtype.name(), peak / 1e9);
        for (head_dim, n_kv_heads, group) in [(64, 3, 3), (64, 2, 7), (128, 2, 4), (64, 4, 1)] {
            let sizes = Sizes {
                dtype,
                head_dim,
                n_kv_heads,
                group,
                block_size: 16,
            };
            for (n_tokens, start) in [(512, 1000), (512, 0), (1, 1000), (1, 16000)] {
                measure(sizes, isa, (n_tokens, start), peak);
            }
        }
    }
}

#[expect(clippy::print_stdout, reason = "figures are what it is for")]
fn measure(sizes: Sizes, isa: Isa, sequence: (usize, usize), peak: f64) {
    let fixture = Fixture::new(sizes, &[sequence], &mut Random(6));
    let out = Shared::zeroed(fixture.n_rows * fixture.stride);
    let heads = Heads {
        q: &fixture.q,
        q_stride: fixture.stride,
        out: &out,
        out_stride: fixture.stride,
    };
    let (mut attention, mut scratch) = (fixture.plan(1), Scratch::default());
    let how = How {
        group: sizes.group,
        parts: 1,
    };
    let planned = best(|| {
        attention.plan(&fixture.spans, &fixture.tables, &fixture.cache.shape, how);
    });
    let seconds = best(|| {
        for i in 0..attention.n_parts() {
            attention.part(isa, (i, 1), &fixture.cache, &heads, &mut scratch);
        }
        for i in 0..attention.n_merges() {
            attention.merge(i, &fixture.cache.shape, &heads);
        }
    });
    let (n_tokens, start) = sequence;
    let pairs = (0..n_tokens).map(|t| start + t + 1).sum::<usize>() * sizes.width();
    let ops = 4.0 * pairs as f64 / seconds;
    let bytes = (start + n_tokens) * sizes.n_kv_heads * sizes.head_dim * 2 * sizes.dtype.bytes();
    println!(
        "{:3} x {} x {}, {n_tokens:3} at {start:5}: {:9.1} us, {:4.0} Gop/s = {:2.0} %, {:5.1} GB/s, plan {:.1} us",
        sizes.head_dim,
        sizes.n_kv_heads,
        sizes.group,
        seconds * 1e6,
        ops / 1e9,
        100.0 * ops / peak,
        bytes as f64 / seconds / 1e9,
        planned * 1e6
    );
}
