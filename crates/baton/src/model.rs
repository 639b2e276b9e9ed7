//! From a MODEL argument and flags to a model on a device.

mod native;

use crate::Failure;
use crate::cli::{Device, Dtype, KvDtype, Role, Serve};
use crate::fetch::{self, Artifact, data_dir};
use anyhow::{Context as _, anyhow, bail};
use baton_checkpoint::{Checkpoint, ModelPath};
use baton_engine::Runner;
use baton_runner::{KvSize, Loading, Model, Options, PjrtRunner, Shapes};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Finds the model's files, fetching those that `baton fetch` knows.
pub(crate) fn find(model: &str) -> Result<PathBuf, Failure> {
    match baton_checkpoint::resolve(model, hub_cache().as_deref())
        .map_err(|e| Failure::Usage(e.into()))?
    {
        ModelPath::Here(path) => Ok(path),
        // smollm2 is the one model that can be fetched.
        ModelPath::Fetched(_) => bring(&fetch::SMOLLM2),
    }
}

/// Fetches an artifact into the data folder.
pub(crate) fn bring(artifact: &Artifact) -> Result<PathBuf, Failure> {
    let home = data_dir().map_err(Failure::Usage)?;
    fetch::fetch(artifact, &home).map_err(Failure::Unavailable)
}

/// Where Hugging Face's tools keep what they downloaded.
fn hub_cache() -> Option<PathBuf> {
    let var = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    var("HF_HUB_CACHE")
        .or_else(|| Some(var("HF_HOME")?.join("hub")))
        .or_else(|| Some(var("HOME")?.join(".cache/huggingface/hub")))
}

/// The plugin for a device: the one given, else the fetched one.
pub(crate) fn plugin(device: Device, given: Option<&Path>) -> Result<PathBuf, Failure> {
    match (given, device) {
        (Some(path), _) => Ok(path.to_owned()),
        (None, Device::XlaCpu) => bring(&fetch::CPU),
        (None, Device::Tpu) => bring(&fetch::TPU),
        (None, Device::Cuda) => Err(Failure::Usage(anyhow!(
            "--device cuda needs --plugin FILE: xla_cuda_plugin.so out of the Python package jax-cuda13-pjrt"
        ))),
        (None, Device::Cpu | Device::Sim) => Err(Failure::Usage(anyhow!(
            "this --device has no plugin; xla-cpu, cuda and tpu have"
        ))),
    }
}

/// The KV element type that the flags ask for.
fn kv_dtype(args: &Serve) -> anyhow::Result<baton_kv::DType> {
    let auto = dtype(args.dtype, args.device);
    let asked = match args.kv_cache_dtype {
        KvDtype::Auto => auto,
        KvDtype::Float32 => baton_kv::DType::F32,
        KvDtype::Bfloat16 => baton_kv::DType::BF16,
        KvDtype::Fp8 => baton_kv::DType::Fp8E4M3,
    };
    // Compiled programs have one type for everything.
    if asked != auto && args.device != Device::Cpu {
        bail!(
            "--kv-cache-dtype is {asked}: KV is as --dtype says, {auto}, on all but --device cpu"
        );
    }
    Ok(asked)
}

/// The element type of activations, and of KV unless something else is asked for.
fn dtype(dtype: Dtype, device: Device) -> baton_kv::DType {
    match (dtype, device) {
        (Dtype::Float32, _) | (Dtype::Auto, Device::XlaCpu | Device::Sim) => baton_kv::DType::F32,
        (Dtype::Bfloat16, _) | (Dtype::Auto, Device::Cpu | Device::Cuda | Device::Tpu) => {
            baton_kv::DType::BF16
        }
    }
}

/// What the flags ask of the programs.
pub(crate) fn shapes(args: &Serve, checkpoint: &Checkpoint) -> anyhow::Result<Shapes> {
    let limit = checkpoint.config().max_position_embeddings;
    let max_model_len = args.max_model_len.unwrap_or(limit);
    if max_model_len > limit {
        bail!(
            "--max-model-len {max_model_len} is more than the {limit} positions that the model was made for"
        );
    }
    let shapes = Shapes {
        dtype: kv_dtype(args)?,
        block_size: args.block_size,
        kv: KvSize::Bytes(usize::try_from(args.kv_cache_memory_bytes)?),
        max_batch: args.max_num_seqs,
        max_chunk: args.max_num_batched_tokens,
        max_model_len,
        role: runner_role(args),
    };
    shapes.pool(checkpoint.config()).context(
        "the flags do not fit together; raise --kv-cache-memory-bytes or lower --max-model-len",
    )?;
    Ok(shapes)
}

fn runner_role(args: &Serve) -> baton_runner::Role {
    match (args.role, args.kv_secret.is_some()) {
        (Role::Prefill, _) => baton_runner::Role::Prefill,
        (_, true) => baton_runner::Role::Decode,
        (_, false) => baton_runner::Role::Standalone,
    }
}

/// Loads a model onto its device, saying on standard error how far it has come.
pub(crate) fn load(
    args: &Serve,
    checkpoint: &Checkpoint,
    shapes: Shapes,
) -> Result<Box<dyn Runner>, Failure> {
    let fingerprint = checkpoint
        .fingerprint()
        .map_err(|e| Failure::Usage(e.into()))?;
    match args.device {
        Device::Cpu => native::load(args, checkpoint, fingerprint, shapes),
        _ => through_pjrt(args, checkpoint, fingerprint, shapes),
    }
}

fn through_pjrt(
    args: &Serve,
    checkpoint: &Checkpoint,
    fingerprint: u64,
    shapes: Shapes,
) -> Result<Box<dyn Runner>, Failure> {
    let options = Options {
        plugin: plugin(args.device, args.plugin.as_deref())?,
        client: match args.device {
            Device::XlaCpu => vec![("cpu_device_count".to_owned(), baton_pjrt::Value::Int64(1))],
            _ => Vec::new(),
        },
        compiler: Vec::new(),
        shapes,
        cache_dir: Some(compile_cache().map_err(Failure::Usage)?),
    };
    let weights =
        |name: &str, dtype, out: &mut [u8]| checkpoint.load(name, dtype, out).map_err(Into::into);
    let model = Model {
        config: checkpoint.config(),
        fingerprint,
        weights: &weights,
    };
    let progress = LoadProgress::new();
    let runner = PjrtRunner::open(model, &options, &|loading| progress.show(loading));
    let runner = runner
        .context("cannot load the model")
        .map_err(Failure::Unavailable)?;
    Ok(Box::new(runner))
}

/// Compiled programs, kept from start to start: `$BATON_COMPILE_CACHE`, else below the data folder.
fn compile_cache() -> anyhow::Result<PathBuf> {
    match std::env::var_os("BATON_COMPILE_CACHE").filter(|value| !value.is_empty()) {
        Some(path) => Ok(path.into()),
        None => Ok(data_dir()?.join("compiled")),
    }
}

/// Weights packed for the CPU's kernels, kept from start to start: `$BATON_WEIGHT_CACHE`, else below the data folder.
fn weight_cache() -> anyhow::Result<PathBuf> {
    match std::env::var_os("BATON_WEIGHT_CACHE").filter(|value| !value.is_empty()) {
        Some(path) => Ok(path.into()),
        None => Ok(data_dir()?.join("packed")),
    }
}

/// A line now and then; loading is done from several threads.
struct LoadProgress {
    start: Instant,
    /// Milliseconds from the start to the last line.
    said: AtomicU64,
}

impl LoadProgress {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            said: AtomicU64::new(0),
        }
    }

    fn show(&self, loading: Loading<'_>) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let before = self.said.load(Ordering::Relaxed);
        let done = matches!(loading, Loading::Weights { loaded, total } | Loading::Program { loaded, total, .. } if loaded == total);
        let due = done || now >= before.saturating_add(1000);
        if !due
            || self
                .said
                .compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_err()
        {
            return;
        }
        match loading {
            Loading::Weights { loaded, total } => {
                tracing::info!("weights {} of {} MB", loaded / 1_000_000, total / 1_000_000);
            }
            Loading::Program {
                name,
                cached,
                loaded,
                total,
            } => {
                let how = if cached { "loaded" } else { "compiled" };
                tracing::info!("program {loaded} of {total}: {how} {name}");
            }
        }
    }
}
