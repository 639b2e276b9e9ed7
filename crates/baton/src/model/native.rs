//! The cpu device: our own kernels on the weights as they lie in the model's files.

use super::{LoadProgress, weight_cache};
use crate::Failure;
use crate::cli::{Dtype, Role, Serve};
use anyhow::Context as _;
use baton_checkpoint::Checkpoint;
use baton_cpu::{Arithmetic, CpuRunner, Model, Options, Side, Turns, WeightCache, Weights};
use baton_engine::Runner;
use baton_model::Storage;
use baton_runner::{Loading, Shapes};
use std::error::Error;
use std::num::NonZero;

/// A checkpoint's weights.
struct Files<'a>(&'a Checkpoint);

impl Weights for Files<'_> {
    fn storage(&self, name: &str) -> Result<Storage, Box<dyn Error + Send + Sync>> {
        Ok(self.0.storage(name)?)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
        Ok(self.0.read(name)?)
    }
}

/// Maps the packed weights, packing them first if nobody has.
pub(super) fn load(
    args: &Serve,
    checkpoint: &Checkpoint,
    fingerprint: u64,
    shapes: Shapes,
) -> Result<Box<dyn Runner>, Failure> {
    let config = checkpoint.config();
    let stamp = checkpoint
        .stamp()
        .context("cannot look at the model's files");
    let stamp = stamp.map_err(Failure::Usage)?;
    let pool = shapes.pool(config).map_err(|e| Failure::Usage(e.into()))?;
    let options = Options {
        pool,
        layout: shapes.layout(config, fingerprint),
        max_batch: shapes.max_batch,
        max_chunk: shapes.max_chunk.min(shapes.max_model_len),
        arithmetic: match args.dtype {
            Dtype::Float32 => Arithmetic::Exact,
            Dtype::Auto | Dtype::Bfloat16 => Arithmetic::Quantized,
        },
        threads: threads(args),
        weight_cache: Some(WeightCache {
            folder: weight_cache().map_err(Failure::Usage)?,
            key: format!("{fingerprint:016x}-{stamp:016x}"),
        }),
    };
    let model = Model {
        config,
        fingerprint,
        weights: &Files(checkpoint),
    };
    let progress = LoadProgress::new();
    let turns = turns(args).map_err(Failure::Unavailable)?;
    let runner = CpuRunner::open(model, &options, turns, &|loaded, total| {
        progress.show(Loading::Weights { loaded, total });
    });
    let runner = runner
        .context("cannot load the model")
        .map_err(Failure::Unavailable)?;
    Ok(Box::new(runner))
}

/// Decode servers come first: others wait for every token, and for a prompt once.
fn turns(args: &Serve) -> anyhow::Result<Option<Turns>> {
    let Some(path) = &args.turns else {
        return Ok(None);
    };
    let side = match args.role {
        Role::Prefill => Side::GivesWay,
        Role::Decode | Role::Both => Side::First,
    };
    let turns = Turns::open(path, side).with_context(|| path.display().to_string())?;
    Ok(Some(turns))
}

/// What affinity and control groups leave of the machine.
fn threads(args: &Serve) -> usize {
    match args.threads {
        Some(n) => usize::from(n),
        None => std::thread::available_parallelism().map_or(1, NonZero::get),
    }
}
