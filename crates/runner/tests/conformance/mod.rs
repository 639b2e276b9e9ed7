//! What every runner must do, whatever it runs on: scenarios over tiny models, against what Hugging Face transformers
//! computed for them.

#![allow(
    dead_code,
    reason = "not every crate that includes this uses all of it"
)]

pub(crate) mod fixture;

use baton_engine::{Batch, Row, Runner, Sampling, StepOutput};
use baton_kv::BlockId;
use fixture::{Expected, Fixture, NAMES};

/// Opens a runner of a model.
pub(crate) type Open<'a> = &'a dyn Fn(&Fixture) -> Box<dyn Runner>;

/// A sequence with blocks of its own.
#[derive(Clone)]
pub(crate) struct Sequence {
    tokens: Vec<u32>,
    done: usize,
    blocks: Vec<BlockId>,
}

impl Sequence {
    /// One that owns `n` blocks from `first` on, every second one, so that tables are no ranges.
    pub(crate) fn new(tokens: &[u32], first: u32, n: u32) -> Self {
        let blocks = (0..n).map(|i| BlockId(first + 2 * i)).collect();
        Self {
            tokens: tokens.to_vec(),
            done: 0,
            blocks,
        }
    }
}

fn greedy_with_logprobs() -> Sampling {
    Sampling {
        logprobs: Some(96),
        ..Sampling::GREEDY
    }
}

/// Runs the next `n` tokens of each sequence in one step; appends sampled tokens where a sequence came to its end.
fn step(
    runner: &mut dyn Runner,
    work: &mut [(&mut Sequence, usize)],
    sampling: &Sampling,
) -> StepOutput {
    let mut batch = Batch::default();
    for (seq, n) in work.iter() {
        let (t, b) = (batch.tokens.len(), batch.blocks.len());
        batch.tokens.extend(&seq.tokens[seq.done..seq.done + n]);
        batch.blocks.extend(&seq.blocks);
        let ends = seq.done + n == seq.tokens.len();
        batch.rows.push(Row {
            tokens: t..batch.tokens.len(),
            blocks: b..batch.blocks.len(),
            start: seq.done,
            sampling: ends.then(|| sampling.clone()),
        });
    }
    let mut out = StepOutput::default();
    runner.execute(&batch, &mut out).unwrap();
    for ((seq, n), row) in work.iter_mut().zip(&out.rows) {
        seq.done += *n;
        if let Some(sampled) = row {
            seq.tokens.push(sampled.token);
        }
    }
    out
}

/// Prefills a whole prompt in chunks of at most `chunk`; the last step's output.
pub(crate) fn prefill(runner: &mut dyn Runner, seq: &mut Sequence, chunk: usize) -> StepOutput {
    let end = seq.tokens.len();
    let mut out = StepOutput::default();
    while seq.done < end {
        let n = chunk.min(end - seq.done);
        out = step(runner, &mut [(&mut *seq, n)], &greedy_with_logprobs());
    }
    out
}

pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let peak = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f32 = logits.iter().map(|x| (x - peak).exp()).sum();
    logits.iter().map(|x| x - peak - sum.ln()).collect()
}

pub(crate) fn assert_logits(out: &StepOutput, expected: &Expected, what: &str) {
    let sampled = out.rows[0].as_ref().unwrap();
    let reference = log_softmax(&expected.logits);
    for &(id, found) in &sampled.logprobs.as_ref().unwrap().top {
        let difference = (found - reference[id as usize]).abs();
        assert!(
            difference < 2e-4,
            "{what}: token {id}: {found} instead of {}",
            reference[id as usize]
        );
    }
}

/// Generates until `n` tokens are there or a choice is so close that rounding decides.
fn assert_greedy(runner: &mut dyn Runner, mut seq: Sequence, expected: &Expected, what: &str) {
    let start = expected.prompt.len();
    for (i, (&token, &margin)) in expected.greedy.iter().zip(&expected.margins).enumerate() {
        if margin < 1e-3 {
            break;
        }
        assert_eq!(seq.tokens[start + i], token, "{what}: token {i}");
        step(runner, &mut [(&mut seq, 1)], &Sampling::GREEDY);
    }
}

pub(crate) fn logits_and_greedy_tokens_are_those_of_transformers_however_the_prompt_is_cut(
    open: Open<'_>,
) {
    for name in NAMES {
        let fixture = Fixture::open(name);
        let runner = &mut *open(&fixture);
        for expected in &fixture.expected {
            for chunk in [64, 16, 7, 1] {
                let what = format!(
                    "{name}, prompt of {}, chunks of {chunk}",
                    expected.prompt.len()
                );
                let mut seq = Sequence::new(&expected.prompt, 1, 30);
                let out = prefill(runner, &mut seq, chunk);
                assert_logits(&out, expected, &what);
                if chunk == 16 {
                    assert_greedy(runner, seq, expected, &what);
                }
            }
        }
    }
}

pub(crate) fn a_row_does_not_depend_on_the_rest_of_its_batch(open: Open<'_>) {
    let fixture = Fixture::open("tiny-gqa8-tied");
    let runner = &mut *open(&fixture);
    let prompts: Vec<_> = fixture
        .expected
        .iter()
        .filter(|e| e.prompt.len() <= 40)
        .collect();
    let mut seqs: Vec<Sequence> = prompts
        .iter()
        .zip(0..)
        .map(|(e, i)| Sequence::new(&e.prompt, 1 + i % 2 + 30 * (i / 2), 15))
        .collect();
    // All prompts in one step, and then all decodes in one step each; five rows take more than one launch.
    let mut work: Vec<_> = seqs
        .iter_mut()
        .map(|s| {
            let n = s.tokens.len();
            (s, n)
        })
        .collect();
    step(runner, &mut work, &Sampling::GREEDY);
    for _ in 1..8 {
        let mut work: Vec<_> = seqs.iter_mut().map(|s| (s, 1)).collect();
        step(runner, &mut work, &Sampling::GREEDY);
    }
    for (seq, expected) in seqs.iter().zip(prompts) {
        let n = expected
            .margins
            .iter()
            .take_while(|&&m| m > 1e-3)
            .count()
            .min(8);
        assert_eq!(
            seq.tokens[expected.prompt.len()..][..n],
            expected.greedy[..n]
        );
    }
}

pub(crate) fn kv_that_moved_to_other_blocks_of_another_server_continues_the_sequence(
    open_producer: Open<'_>,
    open_consumer: Open<'_>,
) {
    let fixture = Fixture::open("tiny-llama3-rope");
    let producer = &mut *open_producer(&fixture);
    let consumer = &mut *open_consumer(&fixture);
    let expected = fixture.expected.last().unwrap();
    let (_, there) = hand_over(producer, consumer, expected);
    assert_greedy(consumer, there, expected, "after the move");
}

/// For KV too coarse for the reference's tokens.
#[allow(dead_code, reason = "not every runner has such KV")]
pub(crate) fn kv_that_moved_continues_the_sequence_as_where_it_came_from(open: Open<'_>) {
    let fixture = Fixture::open("tiny-llama3-rope");
    let producer = &mut *open(&fixture);
    let consumer = &mut *open(&fixture);
    let (mut here, mut there) = hand_over(producer, consumer, fixture.expected.last().unwrap());
    for _ in 0..8 {
        step(producer, &mut [(&mut here, 1)], &Sampling::GREEDY);
        step(consumer, &mut [(&mut there, 1)], &Sampling::GREEDY);
    }
    assert_eq!(here.tokens, there.tokens);
}

/// Prefills at the producer and moves the KV to other blocks of the consumer: the sequence on both.
fn hand_over(
    producer: &mut dyn Runner,
    consumer: &mut dyn Runner,
    expected: &Expected,
) -> (Sequence, Sequence) {
    let mut here = Sequence::new(&expected.prompt, 1, 30);
    prefill(producer, &mut here, 64);

    let layout = producer.spec().layout.clone();
    let n_blocks = layout.blocks_for(expected.prompt.len());
    let mut data = vec![0; n_blocks * layout.block_bytes()];
    producer
        .export(&here.blocks[..n_blocks], &mut data)
        .unwrap();

    let mut there = Sequence {
        done: here.done,
        ..Sequence::new(&here.tokens, 2, 30)
    };
    there.blocks.reverse();
    consumer.import(&there.blocks[..n_blocks], &data).unwrap();
    let mut back = vec![0; data.len()];
    consumer
        .export(&there.blocks[..n_blocks], &mut back)
        .unwrap();
    assert!(back == data, "what was imported is what is exported");
    (here, there)
}

pub(crate) fn the_canonical_order_is_layer_head_block_kv_token_dim(open: Open<'_>) {
    let fixture = Fixture::open("tiny-mha-untied");
    let runner = &mut *open(&fixture);
    let layout = runner.spec().layout.clone();
    // More blocks than one launch moves, each element marked with its place.
    let blocks: Vec<BlockId> = (0..40).map(|i| BlockId(140 - 3 * i)).collect();
    let n = blocks.len();
    let mark: Vec<u8> = (0..n * layout.block_bytes() / 4)
        .flat_map(|i| f32::from(u16::try_from(i % 60_000).unwrap()).to_le_bytes())
        .collect();
    runner.import(&blocks, &mark).unwrap();
    let size = layout.head_block_bytes();
    for place in [0, 7, 31, 32, 39] {
        let mut alone = vec![0; layout.block_bytes()];
        runner.export(&blocks[place..=place], &mut alone).unwrap();
        for (row, found) in alone.chunks_exact(size).enumerate() {
            assert!(
                found == &mark[(n * row + place) * size..][..size],
                "block {place}, layer and head {row}"
            );
        }
    }
    let mut all = vec![0; mark.len()];
    runner.export(&blocks, &mut all).unwrap();
    assert!(all == mark, "what was imported is what is exported");
}

pub(crate) fn what_lies_in_unused_slots_of_a_block_changes_nothing(open: Open<'_>) {
    let fixture = Fixture::open("tiny-bias");
    let runner = &mut *open(&fixture);
    let poison = f32::NAN
        .to_le_bytes()
        .repeat(runner.spec().layout.block_bytes() / 4);
    let expected = &fixture.expected[1];
    let mut seq = Sequence::new(&expected.prompt, 1, 30);
    for block in seq.blocks.iter().chain(&[BlockId(0)]) {
        runner.import(&[*block], &poison).unwrap();
    }
    let out = prefill(runner, &mut seq, 64);
    assert_logits(&out, expected, "among poisoned blocks");
    assert_greedy(runner, seq, expected, "among poisoned blocks");
}

pub(crate) fn rows_that_do_not_fit_are_refused_and_the_runner_goes_on(open: Open<'_>) {
    let fixture = Fixture::open("tiny-mha-untied");
    let runner = &mut *open(&fixture);
    let row = Row {
        tokens: 0..1,
        blocks: 0..1,
        start: runner.spec().layout.block_size as usize,
        sampling: None,
    };
    let batch = Batch {
        rows: vec![row],
        tokens: vec![1],
        blocks: vec![BlockId(1)],
    };
    assert!(runner.execute(&batch, &mut StepOutput::default()).is_err());
    assert!(runner.export(&[BlockId(1)], &mut [0; 3]).is_err());
    let expected = &fixture.expected[1];
    let out = prefill(runner, &mut Sequence::new(&expected.prompt, 1, 30), 64);
    assert_logits(&out, expected, "after a refusal");
}
