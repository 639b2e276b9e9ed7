//! `baton compile`: every program of a model, compiled for a device that is not here.

use crate::cli::{Compile, Device};
use crate::{Failure, model};
use anyhow::{Context as _, anyhow};
use baton_checkpoint::Checkpoint;
use baton_kv::DType;
use baton_pjrt::{CompileOptions, Plugin, Topology};
use baton_runner::{KvSize, Role, Shapes, ladder};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// libtpu reads this before anything else, and asks a metadata server that is not there without it.
const NO_METADATA: &str = "TPU_SKIP_MDS_QUERY";

/// Compiles and prints a table.
pub(crate) fn command(args: &Compile) -> Result<(), Failure> {
    if std::env::var_os(NO_METADATA).is_none() {
        return again_without_metadata();
    }
    let path = model::find(&args.model)?;
    let checkpoint = Checkpoint::open(&path).map_err(|e| Failure::Usage(e.into()))?;
    let max_model_len = args
        .max_model_len
        .unwrap_or(checkpoint.config().max_position_embeddings);
    let shapes = Shapes {
        dtype: DType::BF16,
        block_size: args.block_size,
        kv: KvSize::Bytes(usize::try_from(args.kv_cache_memory_bytes).unwrap_or(usize::MAX)),
        max_batch: args.max_num_seqs,
        max_chunk: args.max_num_batched_tokens,
        max_model_len,
        role: Role::Decode,
    };
    let programs = ladder(checkpoint.config(), &shapes).map_err(|e| Failure::Usage(e.into()))?;
    let plugin = model::plugin(Device::Tpu, args.plugin.as_deref())?;
    compile_all(&plugin, &args.topology, &programs).map_err(Failure::Unavailable)
}

/// Runs this program once more with the variable set: a process cannot safely set its own.
fn again_without_metadata() -> Result<(), Failure> {
    let run = || -> anyhow::Result<()> {
        let mut child = Command::new(std::env::current_exe()?);
        let status = child
            .args(std::env::args_os().skip(1))
            .env(NO_METADATA, "1")
            .status()?;
        status
            .success()
            .then_some(())
            .with_context(|| format!("compiling ended with {status}"))
    };
    run().map_err(Failure::Unavailable)
}

#[expect(clippy::print_stdout, reason = "the table is the command's result")]
fn compile_all(plugin: &Path, topology: &str, programs: &[(String, String)]) -> anyhow::Result<()> {
    let plugin = Plugin::load(plugin)?;
    let target = Topology::create(&plugin, topology, &[])
        .with_context(|| format!("no topology {topology}"))?;
    let devices = target.devices()?;
    let first = devices
        .first()
        .ok_or_else(|| anyhow!("topology {topology} has no devices"))?;
    println!("{topology}: {} x {}", devices.len(), first.kind()?);
    println!(
        "{:<14} {:>9} {:>12} {:>10} {:>10} {:>12}",
        "program", "compile s", "arguments MB", "temp MB", "code MB", "GFLOP"
    );
    for (name, text) in programs {
        let start = Instant::now();
        let program = target
            .compile(text, &CompileOptions::default())
            .with_context(|| format!("program {name}"))?;
        let seconds = start.elapsed().as_secs_f64();
        let memory = program.memory()?;
        let flops = program
            .cost()
            .ok()
            .and_then(|cost| cost.flops)
            .unwrap_or(f64::NAN);
        let mb = |bytes: i64| bytes as f64 / 1e6;
        println!(
            "{name:<14} {seconds:>9.1} {:>12.1} {:>10.1} {:>10.1} {:>12.2}",
            mb(memory.arguments),
            mb(memory.temporaries),
            mb(memory.code),
            flops / 1e9
        );
    }
    Ok(())
}
