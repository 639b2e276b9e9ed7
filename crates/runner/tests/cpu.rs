//! The runner on XLA's CPU plugin: what every runner must do, and what is its own.
#![expect(clippy::unwrap_used, reason = "a test may fail by panicking")]

mod conformance;
mod sampling;

use baton_engine::Runner;
use baton_kv::DType;
use baton_runner::{KvSize, Loading, Model, Options, PjrtRunner, Role, Shapes};
use conformance::fixture::{Fixture, round};
use conformance::{Sequence, log_softmax, prefill};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

pub(crate) fn runner_of(fixture: &Fixture, role: Role, dtype: DType) -> PjrtRunner {
    // Kept between runs of the tests; the cache itself has a test of its own.
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("programs");
    open_runner(fixture, (role, dtype), &cache, &|_| ())
}

/// A way to open runners of a role, in f32.
fn role(role: Role) -> impl Fn(&Fixture) -> Box<dyn Runner> {
    move |fixture| Box::new(runner_of(fixture, role, DType::F32))
}

/// Opens a runner with a cache and says of each program whether it came from there.
fn programs_cached(fixture: &Fixture, dir: &Path) -> Vec<bool> {
    let seen = Mutex::new(Vec::new());
    let see = |progress: Loading<'_>| {
        if let Loading::Program { cached, .. } = progress {
            seen.lock().unwrap().push(cached);
        }
    };
    open_runner(fixture, (Role::Prefill, DType::F32), dir, &see);
    let seen = seen.into_inner().unwrap();
    assert!(!seen.is_empty());
    seen
}

fn open_runner(
    fixture: &Fixture,
    (role, dtype): (Role, DType),
    cache_dir: &Path,
    progress: &(dyn Fn(Loading<'_>) + Sync),
) -> PjrtRunner {
    let shapes = Shapes {
        dtype,
        block_size: 8,
        kv: KvSize::Tokens(1200),
        max_batch: 4,
        max_chunk: 64,
        max_model_len: 300,
        role,
    };
    let options = Options {
        plugin: plugin(),
        client: vec![("cpu_device_count".to_owned(), 1.into())],
        compiler: Vec::new(),
        shapes,
        cache_dir: Some(cache_dir.to_owned()),
    };
    let load = |name: &str, dtype: DType, out: &mut [u8]| {
        let weight = fixture.weight(name).ok_or("missing")?;
        match dtype {
            DType::F32 => out.copy_from_slice(weight),
            DType::BF16 => round(weight, out),
            DType::F16 | DType::Fp8E4M3 => return Err("not used here".into()),
        }
        Ok(())
    };
    let model = Model {
        config: &fixture.config,
        fingerprint: 7,
        weights: &load,
    };
    PjrtRunner::open(model, &options, progress).unwrap()
}

pub(crate) fn plugin() -> PathBuf {
    std::env::var_os("BATON_PJRT_CPU")
        .expect("BATON_PJRT_CPU must name the CPU plugin's shared library; `baton fetch` brings it, `make test` sets it")
        .into()
}

#[test]
fn logits_and_greedy_tokens_are_those_of_transformers_however_the_prompt_is_cut() {
    conformance::logits_and_greedy_tokens_are_those_of_transformers_however_the_prompt_is_cut(
        &role(Role::Standalone),
    );
}

#[test]
fn a_row_does_not_depend_on_the_rest_of_its_batch() {
    conformance::a_row_does_not_depend_on_the_rest_of_its_batch(&role(Role::Standalone));
}

#[test]
fn kv_that_moved_to_other_blocks_of_another_server_continues_the_sequence() {
    conformance::kv_that_moved_to_other_blocks_of_another_server_continues_the_sequence(
        &role(Role::Prefill),
        &role(Role::Decode),
    );
}

#[test]
fn the_canonical_order_is_layer_head_block_kv_token_dim() {
    conformance::the_canonical_order_is_layer_head_block_kv_token_dim(&role(Role::Decode));
}

#[test]
fn what_lies_in_unused_slots_of_a_block_changes_nothing() {
    conformance::what_lies_in_unused_slots_of_a_block_changes_nothing(&role(Role::Decode));
}

#[test]
fn rows_that_do_not_fit_are_refused_and_the_runner_goes_on() {
    conformance::rows_that_do_not_fit_are_refused_and_the_runner_goes_on(&role(Role::Standalone));
}

#[test]
fn half_precision_comes_near() {
    let fixture = Fixture::open("tiny-llama3-rope");
    let mut runner = runner_of(&fixture, Role::Standalone, DType::BF16);
    for expected in &fixture.expected {
        let out = prefill(&mut runner, &mut Sequence::new(&expected.prompt, 1, 30), 16);
        let reference = log_softmax(&expected.logits);
        let found = &out.rows[0].as_ref().unwrap().logprobs.as_ref().unwrap().top;
        let worst = found
            .iter()
            .map(|&(id, x)| (x - reference[id as usize]).abs())
            .fold(0.0, f32::max);
        // transformers itself is 0.29 away when it runs in bfloat16.
        assert!(worst < 0.3, "prompt of {}: {worst}", expected.prompt.len());
    }
}

#[test]
fn programs_are_compiled_once_and_then_come_from_the_disk() {
    let fixture = Fixture::open("tiny-mha-untied");
    let dir = std::env::temp_dir().join(format!("baton-runner-test-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    assert!(programs_cached(&fixture, &dir).iter().all(|cached| !cached));
    assert!(programs_cached(&fixture, &dir).iter().all(|cached| *cached));
    std::fs::remove_dir_all(&dir).unwrap();
}
