//! What rounding activations costs: perplexity of a real model over a public text, exact and quantized.
//!
//! `BATON_SMOLLM2=FILE BATON_TEXT=FILE cargo test --release -p baton-cpu --test perplexity -- --ignored --nocapture`;
//! `make test-slow` runs it on a text out of Python's standard library.
#![expect(clippy::unwrap_used, reason = "a test may fail by panicking")]

use baton_checkpoint::Checkpoint;
use baton_cpu::{Arithmetic, CpuRunner, Model, Options, Weights};
use baton_engine::{Batch, Row, Runner, Sampling, StepOutput};
use baton_graph::hlo::Element;
use baton_kv::{BlockId, DType, KvLayout};
use baton_model::{Pool, Storage};
use std::error::Error;
use std::path::PathBuf;

type Failure = Box<dyn Error + Send + Sync>;

/// Windows that run side by side, and tokens of each.
const WINDOWS: usize = 16;
const LENGTH: usize = 512;

struct Files(Checkpoint);

impl Weights for Files {
    fn storage(&self, name: &str) -> Result<Storage, Failure> {
        Ok(self.0.storage(name)?)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Failure> {
        Ok(self.0.read(name)?)
    }
}

fn file(variable: &str) -> PathBuf {
    std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} must name a file"))
        .into()
}

fn runner(files: &Files, arithmetic: Arithmetic, kv: DType) -> CpuRunner {
    let config = files.0.config();
    let narrow = |n: usize| u32::try_from(n).unwrap();
    let model = Model {
        config,
        fingerprint: 1,
        weights: files,
    };
    let options = Options {
        pool: Pool {
            element: Element::F32,
            n_blocks: WINDOWS * LENGTH / 16 + 1,
            block_size: 16,
            max_model_len: LENGTH,
        },
        layout: KvLayout {
            n_layers: narrow(config.n_layers),
            n_kv_heads: narrow(config.n_kv_heads),
            head_dim: narrow(config.head_dim),
            block_size: 16,
            dtype: kv,
            model_fingerprint: 1,
        },
        max_batch: WINDOWS,
        max_chunk: LENGTH,
        arithmetic,
        threads: std::thread::available_parallelism().unwrap().get(),
        weight_cache: None,
    };
    CpuRunner::open(model, &options, None, &|_, _| ()).unwrap()
}

/// Token `at` of every window in one step.
fn step(windows: &[&[u32]], at: usize) -> Batch {
    let mut batch = Batch::default();
    for (w, window) in windows.iter().enumerate() {
        batch.tokens.push(window[at]);
        let n_blocks = at / 16 + 1;
        let first = w * LENGTH / 16 + 1;
        let blocks = batch.blocks.len();
        batch
            .blocks
            .extend((first..first + n_blocks).map(|b| BlockId(u32::try_from(b).unwrap())));
        batch.rows.push(Row {
            tokens: w..w + 1,
            blocks: blocks..blocks + n_blocks,
            start: at,
            sampling: Some(Sampling::GREEDY),
        });
    }
    batch
}

/// `exp` of the mean negative log-likelihood of each token after those before it in its window.
fn perplexity(runner: &mut CpuRunner, windows: &[&[u32]]) -> f64 {
    let (mut sum, mut n) = (0.0, 0);
    let mut out = StepOutput::default();
    for at in 0..LENGTH - 1 {
        runner.execute(&step(windows, at), &mut out).unwrap();
        for (w, window) in windows.iter().enumerate() {
            let logits = runner.logits(w);
            let peak = logits.iter().copied().fold(f32::MIN, f32::max);
            let total: f64 = logits.iter().map(|x| f64::from(x - peak).exp()).sum();
            sum += total.ln() - f64::from(logits[window[at + 1] as usize] - peak);
            n += 1;
        }
    }
    (sum / f64::from(n)).exp()
}

#[test]
#[ignore = "a minute in release; make test-slow runs it"]
#[expect(clippy::print_stdout, reason = "it prints what it measured")]
fn rounding_activations_costs_less_than_half_a_percent_of_perplexity() {
    let files = Files(Checkpoint::open(&file("BATON_SMOLLM2")).unwrap());
    let text = std::fs::read_to_string(file("BATON_TEXT")).unwrap();
    let tokenizer = files.0.tokenizer().unwrap();
    let start = text.len() / 3;
    let start = (start..).find(|&i| text.is_char_boundary(i)).unwrap();
    let tokens = tokenizer
        .encode(&text[start..], baton_text::AddSpecial::No)
        .unwrap();
    let windows: Vec<&[u32]> = tokens.chunks_exact(LENGTH).take(WINDOWS).collect();
    assert_eq!(windows.len(), WINDOWS, "the text is too short");
    let exact = perplexity(&mut runner(&files, Arithmetic::Exact, DType::F32), &windows);
    let halved = perplexity(
        &mut runner(&files, Arithmetic::Exact, DType::BF16),
        &windows,
    );
    let rounded = perplexity(
        &mut runner(&files, Arithmetic::Quantized, DType::BF16),
        &windows,
    );
    let eighths = perplexity(
        &mut runner(&files, Arithmetic::Quantized, DType::Fp8E4M3),
        &windows,
    );
    let cost = |x: f64| 100.0 * (x / exact - 1.0);
    println!(
        "perplexity over {} tokens: exact {exact:.4}, KV in bf16 {halved:.4} ({:+.3} %), activations in 8 bits too {rounded:.4} ({:+.3} %), KV in fp8 {eighths:.4} ({:+.3} %)",
        WINDOWS * (LENGTH - 1),
        cost(halved),
        cost(rounded),
        cost(eighths)
    );
    assert!(cost(rounded).abs() < 0.5);
    // Three bits of mantissa without a scale are for those who need the room.
    assert!(cost(eighths).abs() < 3.0);
}
