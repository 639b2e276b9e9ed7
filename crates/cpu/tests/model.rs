//! The CPU runner: what every runner must do, in several shapes, and beside the PJRT runner.
#![expect(clippy::unwrap_used, reason = "a test may fail by panicking")]

#[path = "../../runner/tests/conformance/mod.rs"]
mod conformance;

use baton_cpu::{Arithmetic, CpuRunner, Model, Options, Weights};
use baton_engine::{Runner, Sampling};
use baton_graph::hlo::Element;
use baton_kv::{DType, KvLayout};
use baton_model::{Pool, Storage};
use conformance::fixture::{Fixture, round};
use conformance::{Sequence, log_softmax, prefill};
use std::error::Error;

type Failure = Box<dyn Error + Send + Sync>;

/// A tiny model's weights, perhaps rounded.
struct Rounded<'a>(&'a Fixture, Storage);

impl Weights for Rounded<'_> {
    fn storage(&self, _: &str) -> Result<Storage, Failure> {
        Ok(self.1)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Failure> {
        let weight = self.0.weight(name).ok_or("missing")?;
        match self.1 {
            Storage::F32 => Ok(weight.to_vec()),
            _ => {
                let mut half = vec![0; weight.len() / 2];
                round(weight, &mut half);
                Ok(half)
            }
        }
    }
}

/// One way to run a model.
#[derive(Clone, Copy)]
struct How {
    block_size: u32,
    threads: usize,
    kv: DType,
    weights: Storage,
    arithmetic: Arithmetic,
}

const EXACT: How = How {
    block_size: 16,
    threads: 2,
    kv: DType::F32,
    weights: Storage::F32,
    arithmetic: Arithmetic::Exact,
};

fn layout(fixture: &Fixture, how: How) -> KvLayout {
    let narrow = |n: usize| u32::try_from(n).unwrap();
    KvLayout {
        n_layers: narrow(fixture.config.n_layers),
        n_kv_heads: narrow(fixture.config.n_kv_heads),
        head_dim: narrow(fixture.config.head_dim),
        block_size: how.block_size,
        dtype: how.kv,
        model_fingerprint: 7,
    }
}

fn open(fixture: &Fixture, how: How) -> CpuRunner {
    let model = Model {
        config: &fixture.config,
        fingerprint: 7,
        weights: &Rounded(fixture, how.weights),
    };
    let options = Options {
        pool: Pool {
            element: Element::F32,
            n_blocks: 151,
            block_size: how.block_size as usize,
            max_model_len: 300,
        },
        layout: layout(fixture, how),
        max_batch: 4,
        max_chunk: 64,
        arithmetic: how.arithmetic,
        threads: how.threads,
        weight_cache: None,
    };
    CpuRunner::open(model, &options, None, &|_, _| ()).unwrap()
}

fn way(how: How) -> impl Fn(&Fixture) -> Box<dyn Runner> {
    move |fixture| Box::new(open(fixture, how))
}

#[test]
fn logits_and_greedy_tokens_are_those_of_transformers_however_the_prompt_is_cut() {
    for (threads, block_size) in [(1, 16), (2, 32), (3, 16)] {
        let how = How {
            threads,
            block_size,
            ..EXACT
        };
        conformance::logits_and_greedy_tokens_are_those_of_transformers_however_the_prompt_is_cut(
            &way(how),
        );
    }
}

#[test]
fn a_row_does_not_depend_on_the_rest_of_its_batch() {
    conformance::a_row_does_not_depend_on_the_rest_of_its_batch(&way(EXACT));
}

#[test]
fn kv_that_moved_to_other_blocks_of_another_server_continues_the_sequence() {
    let one = How {
        threads: 1,
        ..EXACT
    };
    conformance::kv_that_moved_to_other_blocks_of_another_server_continues_the_sequence(
        &way(EXACT),
        &way(one),
    );
}

#[test]
fn the_canonical_order_is_layer_head_block_kv_token_dim() {
    for block_size in [16, 32] {
        let how = How {
            block_size,
            ..EXACT
        };
        conformance::the_canonical_order_is_layer_head_block_kv_token_dim(&way(how));
    }
}

#[test]
fn what_lies_in_unused_slots_of_a_block_changes_nothing() {
    conformance::what_lies_in_unused_slots_of_a_block_changes_nothing(&way(EXACT));
}

#[test]
fn rows_that_do_not_fit_are_refused_and_the_runner_goes_on() {
    conformance::rows_that_do_not_fit_are_refused_and_the_runner_goes_on(&way(EXACT));
}

/// The greatest difference of a log-probability to the reference.
fn worst(fixture: &Fixture, how: How) -> f32 {
    let mut runner = open(fixture, how);
    let differences = fixture.expected.iter().flat_map(|expected| {
        let out = prefill(&mut runner, &mut Sequence::new(&expected.prompt, 1, 30), 16);
        let reference = log_softmax(&expected.logits);
        let found = &out.rows[0].as_ref().unwrap().logprobs.as_ref().unwrap().top;
        let difference = |&(id, x): &(u32, f32)| (x - reference[id as usize]).abs();
        found.iter().map(difference).collect::<Vec<_>>()
    });
    differences.fold(0.0, f32::max)
}

#[test]
fn half_precision_comes_near() {
    let how = How {
        kv: DType::BF16,
        weights: Storage::BF16,
        arithmetic: Arithmetic::Quantized,
        ..EXACT
    };
    // transformers itself is 0.29 away when it runs in bfloat16.
    let found = worst(&Fixture::open("tiny-llama3-rope"), how);
    assert!(found < 0.3, "{found}");
}

#[test]
fn keys_and_values_of_eight_bits_come_less_near() {
    let how = How {
        kv: DType::Fp8E4M3,
        ..EXACT
    };
    // Nothing evens out in a random model of two small layers; perplexity.rs has a real one.
    let found = worst(&Fixture::open("tiny-llama3-rope"), how);
    assert!((0.01..1.0).contains(&found), "{found}");
}

#[test]
fn keys_and_values_of_eight_bits_move_between_servers() {
    let way = way(How {
        kv: DType::Fp8E4M3,
        ..EXACT
    });
    conformance::kv_that_moved_continues_the_sequence_as_where_it_came_from(&way);
}

#[test]
fn kv_moves_between_this_runner_and_xlas() {
    let xla = |fixture: &Fixture| -> Box<dyn Runner> { Box::new(xla(fixture)) };
    let here = way(EXACT);
    let pairs: [(conformance::Open<'_>, conformance::Open<'_>); 2] = [(&xla, &here), (&here, &xla)];
    for (producer, consumer) in pairs {
        conformance::kv_that_moved_to_other_blocks_of_another_server_continues_the_sequence(
            producer, consumer,
        );
    }
}

/// XLA's CPU plugin with the same layout.
fn xla(fixture: &Fixture) -> baton_runner::PjrtRunner {
    use baton_runner::{KvSize, Model, Options, PjrtRunner, Role, Shapes};
    let load = |name: &str, _: DType, out: &mut [u8]| {
        out.copy_from_slice(fixture.weight(name).ok_or("missing")?);
        Ok(())
    };
    let model = Model {
        config: &fixture.config,
        fingerprint: 7,
        weights: &load,
    };
    let options = Options {
        plugin: std::env::var_os("BATON_PJRT_CPU")
            .expect("BATON_PJRT_CPU must name the CPU plugin's shared library; `make test` sets it")
            .into(),
        client: vec![("cpu_device_count".to_owned(), 1.into())],
        compiler: Vec::new(),
        shapes: Shapes {
            dtype: DType::F32,
            block_size: EXACT.block_size,
            kv: KvSize::Tokens(2400),
            max_batch: 4,
            max_chunk: 64,
            max_model_len: 300,
            role: Role::Decode,
        },
        cache_dir: None,
    };
    PjrtRunner::open(model, &options, &|_| ()).unwrap()
}

#[test]
fn steps_of_many_rows_and_of_none_that_want_a_token_run() {
    let fixture = Fixture::open("tiny-mha-untied");
    let mut runner = open(&fixture, EXACT);
    let batch = baton_engine::Batch::default();
    let mut out = baton_engine::StepOutput::default();
    runner.execute(&batch, &mut out).unwrap();
    assert!(out.rows.is_empty());
    // More rows than a launch takes.
    let mut batch = baton_engine::Batch::default();
    for i in 0..11 {
        batch.tokens.push(1);
        batch.blocks.push(baton_kv::BlockId(i + 1));
        let at = i as usize;
        batch.rows.push(baton_engine::Row {
            tokens: at..at + 1,
            blocks: at..at + 1,
            start: 0,
            sampling: (i % 2 == 0).then_some(Sampling::GREEDY),
        });
    }
    runner.execute(&batch, &mut out).unwrap();
    let tokens: Vec<_> = out.rows.iter().flatten().map(|s| s.token).collect();
    assert_eq!(tokens.len(), 6);
    assert!(tokens.iter().all(|t| *t == tokens[0]));
    assert!(
        out.rows
            .iter()
            .enumerate()
            .all(|(i, row)| row.is_some() == (i % 2 == 0))
    );
}
