//! Tokens a second of one sequence, beside how fast the same threads read the same bytes and do nothing else.
//!
//! Decoding and reading take turns, so that whatever else the machine does hits them alike; the best and the median of
//! each are shown. `BATON_SMOLLM2=FILE cargo bench -p baton-cpu --bench decode [-- THREADS...]`
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program whose purpose is to print a measurement"
)]

mod common;

use baton_checkpoint::Checkpoint;
use baton_cpu::CpuRunner;
use baton_engine::{Runner, StepOutput};
use common::{Files, file, runner, step};
use memmap2::{Advice, MmapMut};
use std::thread;
use std::time::Instant;

const ROUNDS: usize = 15;
/// Tokens of a round; each round begins a new sequence.
const TOKENS: usize = 128;
/// More than caches hold.
const READ_BYTES: usize = 256 << 20;

/// Tokens a second.
fn decode(runner: &mut CpuRunner) -> f64 {
    let (mut out, mut token) = (StepOutput::default(), 1);
    let start = Instant::now();
    for at in 0..TOKENS {
        runner
            .execute(&step(vec![token], at..at + 1), &mut out)
            .unwrap();
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
    let file = file();
    let bytes = std::fs::metadata(&file).unwrap().len() as f64;
    let files = Files(Checkpoint::open(&file).unwrap());
    let data = large_pages(READ_BYTES);
    let mut asked: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    if asked.is_empty() {
        asked = (1..=thread::available_parallelism().unwrap().get()).collect();
    }
    for threads in asked {
        let mut runner = runner(&files, &files, [TOKENS, 16], threads, "decode-bench");
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
