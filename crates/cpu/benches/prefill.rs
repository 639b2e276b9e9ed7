//! Tokens a second of a prompt, for the file's own weights and for bf16 in their place (of a fixed pattern: what they are
//! does not matter here), by turns.
//!
//! `BATON_SMOLLM2=FILE cargo bench -p baton-cpu --bench prefill [-- THREADS...]`
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program whose purpose is to print a measurement"
)]

mod common;

use baton_checkpoint::Checkpoint;
use baton_cpu::{CpuRunner, Weights};
use baton_engine::{Runner, StepOutput};
use baton_model::Storage;
use common::{Failure, Files, file, runner, step};
use std::thread;
use std::time::Instant;

const ROUNDS: usize = 9;
/// Lengths of prompts.
const PROMPTS: [usize; 3] = [128, 1000, 4000];
/// As `baton serve` computes them.
const CHUNK: usize = 512;

/// The same model with matrices in bf16.
struct InBf16<'a>(&'a Files);

impl Weights for InBf16<'_> {
    fn storage(&self, name: &str) -> Result<Storage, Failure> {
        Ok(match self.0.storage(name)? {
            Storage::F32 => Storage::F32,
            _ => Storage::BF16,
        })
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Failure> {
        let (storage, bytes) = (self.0.storage(name)?, self.0.read(name)?);
        if storage == Storage::F32 {
            return Ok(bytes);
        }
        let n = bytes.len() / storage.block_bytes() * storage.block_elements();
        // Small and of both signs.
        let weight = |i: usize| 0x3c00_u16 | (i * 40503 % 128) as u16 | ((i as u16 & 1) << 15);
        Ok((0..n).flat_map(|i| weight(i).to_le_bytes()).collect())
    }
}

/// Tokens a second of a prompt.
fn prefill(runner: &mut CpuRunner, n_tokens: usize) -> f64 {
    let mut out = StepOutput::default();
    let start = Instant::now();
    for first in (0..n_tokens).step_by(CHUNK) {
        let places = first..n_tokens.min(first + CHUNK);
        let tokens = places.clone().map(|i| i as u32 % 1000).collect();
        runner.execute(&step(tokens, places), &mut out).unwrap();
    }
    n_tokens as f64 / start.elapsed().as_secs_f64()
}

fn main() {
    let files = Files(Checkpoint::open(&file()).unwrap());
    let in_bf16 = InBf16(&files);
    let mut asked: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    if asked.is_empty() {
        asked = (1..=thread::available_parallelism().unwrap().get()).collect();
    }
    for threads in asked {
        let open =
            |weights: &dyn Weights, key| runner(&files, weights, [4096, CHUNK], threads, key);
        let mut runners = [
            ("as in the file", open(&files, "prefill-bench")),
            ("bf16", open(&in_bf16, "prefill-bench-bf16")),
        ];
        for n_tokens in PROMPTS {
            let mut rates = [Vec::new(), Vec::new()];
            for _ in 0..ROUNDS {
                for ((_, runner), rates) in runners.iter_mut().zip(&mut rates) {
                    rates.push(prefill(runner, n_tokens));
                }
            }
            for ((name, _), rates) in runners.iter().zip(&mut rates) {
                rates.sort_by(f64::total_cmp);
                let (usual, best) = (rates[ROUNDS / 2], rates[ROUNDS - 1]);
                println!(
                    "{threads} threads, {n_tokens} tokens, {name}: best {best:.0}, median {usual:.0} tokens/s"
                );
            }
        }
    }
}
