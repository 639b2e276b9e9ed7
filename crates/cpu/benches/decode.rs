//! Tokens a second of one sequence, beside how fast the same threads read the same bytes and do nothing else.
//!
//! Decoding and reading take turns, so that whatever else the machine does hits them alike; the best and the median of
//! each are shown. `BATON_SMOLLM2=FILE cargo bench -p baton-cpu --bench decode [-- THREADS...]`
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program whose purpose is to print a measurement"
)]

use baton_checkpoint::Checkpoint;
use baton_cpu::{Arithmetic, CpuRunner, Model, Options, WeightCache, Weights};
use baton_engine::{Batch, Row, Runner, Sampling, StepOutput};
use baton_graph::hlo::Element;
use baton_kv::{BlockId, DType, KvLayout};
use baton_model::{Pool, Storage};
use memmap2::{Advice, MmapMut};
use std::error::Error;
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

type Failure = Box<dyn Error + Send + Sync>;

const ROUNDS: usize = 15;
/// Tokens of a round; each round begins a new sequence.
const TOKENS: usize = 128;
const BLOCK: usize = 16;
/// More than caches hold.
const READ_BYTES: usize = 256 << 20;

struct Files(Checkpoint);

impl Weights for Files {
    fn storage(&self, name: &str) -> Result<Storage, Failure> {
        Ok(self.0.storage(name)?)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Failure> {
        Ok(self.0.read(name)?)
    }
}

fn narrow(n: usize) -> u32 {
    u32::try_from(n).unwrap()
}

fn cache() -> WeightCache {
    WeightCache {
        folder: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
        key: "decode-bench".to_owned(),
    }
}

fn runner(files: &Files, threads: usize) -> CpuRunner {
    let config = files.0.config();
    let model = Model {
        config,
        fingerprint: 1,
        weights: files,
    };
    let options = Options {
        pool: Pool {
            element: Element::F32,
            n_blocks: TOKENS / BLOCK + 1,
            block_size: BLOCK,
            max_model_len: TOKENS,
        },
        layout: KvLayout {
            n_layers: narrow(config.n_layers),
            n_kv_heads: narrow(config.n_kv_heads),
            head_dim: narrow(config.head_dim),
            block_size: narrow(BLOCK),
            dtype: DType::BF16,
            model_fingerprint: 1,
        },
        max_batch: 1,
        max_chunk: BLOCK,
        arithmetic: Arithmetic::Quantized,
        threads,
        weight_cache: Some(cache()),
    };
    CpuRunner::open(model, &options, None, &|_, _| ()).unwrap()
}

fn step(token: u32, at: usize) -> Batch {
    let n_blocks = at / BLOCK + 1;
    Batch {
        tokens: vec![token],
        blocks: (1..=n_blocks).map(|b| BlockId(narrow(b))).collect(),
        rows: vec![Row {
            tokens: 0..1,
            blocks: 0..n_blocks,
            start: at,
            sampling: Some(Sampling::GREEDY),
        }],
    }
}

/// Tokens a second.
fn decode(runner: &mut CpuRunner) -> f64 {
    let (mut out, mut token) = (StepOutput::default(), 1);
    let start = Instant::now();
    for at in 0..TOKENS {
        runner.execute(&step(token, at), &mut out).unwrap();
        token = out.rows[0].as_ref().unwrap().token;
    }
    TOKENS as f64 / start.elapsed().as_secs_f64()
}

/// As fast to read as memory is.
fn large_pages(len: usize) -> MmapMut {
    let mut map = MmapMut::map_anon(len).unwrap();
    drop(map.advise(Advice::HugePage));
    map.fill(1);
    map
}

/// Bytes a second that so many threads read, each its own part of `data`.
fn read(data: &[u8], threads: usize) -> f64 {
    let start = Instant::now();
    let words: &[u64] = bytemuck::cast_slice(data);
    thread::scope(|scope| {
        for part in words.chunks(words.len().div_ceil(threads)) {
            scope.spawn(|| std::hint::black_box(part.iter().fold(0, |all, word| all | word)));
        }
    });
    size_of_val(data) as f64 / start.elapsed().as_secs_f64()
}

fn best_and_median(mut values: Vec<f64>) -> [f64; 2] {
    values.sort_by(f64::total_cmp);
    [values[values.len() - 1], values[values.len() / 2]]
}

fn main() {
    let file =
        PathBuf::from(std::env::var_os("BATON_SMOLLM2").expect("BATON_SMOLLM2 names a file"));
    let bytes = std::fs::metadata(&file).unwrap().len() as f64;
    let files = Files(Checkpoint::open(&file).unwrap());
    let data = large_pages(READ_BYTES);
    let mut asked: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    if asked.is_empty() {
        asked = (1..=thread::available_parallelism().unwrap().get()).collect();
    }
    for threads in asked {
        let mut runner = runner(&files, threads);
        decode(&mut runner);
        let (mut rates, mut limits) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            rates.push(decode(&mut runner));
            limits.push(read(&data, threads));
        }
        let ([rate, usual], [limit, _]) = (best_and_median(rates), best_and_median(limits));
        println!(
            "{threads} threads: best {rate:.0}, median {usual:.0} tokens/s; reading {:.1} GB/s of the weights' file, {:.0} % of {:.1}",
            rate * bytes / 1e9,
            100.0 * rate * bytes / limit,
            limit / 1e9,
        );
    }
}
