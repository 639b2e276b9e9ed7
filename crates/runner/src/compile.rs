//! From lowered programs to loaded ones, from the disk where possible.

use crate::OpenError;
use crate::options::Options;
use crate::program_cache::{Claim, ProgramCache, file_identity, processor};
use crate::runner::Loading;
use baton_graph::hlo::{Element, Module, Type};
use baton_graph::{Arg, Lowered, Packing};
use baton_kv::DType;
use baton_model::Program;
use baton_pjrt::{Client, CompileOptions, Device, LoadedExecutable};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A program on the device, and where its small inputs lie.
pub(crate) struct Loaded {
    pub(crate) executable: LoadedExecutable,
    pub(crate) packing: Packing,
}

/// Loads or compiles all programs, several at a time.
pub(crate) fn compile_all(
    programs: Vec<(Program, Lowered)>,
    (client, device): (&Client, &Device),
    options: &Options,
    progress: &(dyn Fn(Loading<'_>) + Sync),
) -> Result<BTreeMap<Program, Loaded>, OpenError> {
    let cache = open_cache(options, client, device)?;
    let compiler = CompileOptions {
        overrides: options.compiler.clone(),
        ..CompileOptions::default()
    };
    let (total, done) = (programs.len(), AtomicUsize::new(0));
    let load = |(program, lowered): (Program, Lowered)| {
        let name = program.to_string();
        let (executable, cached) =
            load_or_compile(client, &lowered.text, &compiler, cache.as_ref()).map_err(
                |source| OpenError::Compile {
                    name: name.clone(),
                    source,
                },
            )?;
        let loaded = done.fetch_add(1, Ordering::Relaxed) + 1;
        progress(Loading::Program {
            name: &name,
            cached,
            loaded,
            total,
        });
        Ok((
            program,
            Loaded {
                executable,
                packing: packing(lowered),
            },
        ))
    };
    let loaded = programs.into_par_iter().with_max_len(1).map(load).collect();
    if let Some(cache) = cache {
        cache.prune();
    }
    loaded
}

fn packing(lowered: Lowered) -> Packing {
    let step = |arg| {
        if let Arg::Step(packing) = arg {
            Some(packing)
        } else {
            None
        }
    };
    lowered.args.into_iter().find_map(step).unwrap_or_default()
}

fn open_cache(
    options: &Options,
    client: &Client,
    device: &Device,
) -> Result<Option<ProgramCache>, OpenError> {
    let Some(dir) = &options.cache_dir else {
        return Ok(None);
    };
    let platform = client.platform_name()?;
    let host = if platform == "cpu" {
        processor()
    } else {
        Vec::new()
    };
    let environment = [
        platform.as_bytes(),
        client.platform_version()?.as_bytes(),
        device.description()?.kind()?.as_bytes(),
        &file_identity(&options.plugin),
        &host,
    ]
    .map(<[u8]>::to_vec);
    let parts: Vec<&[u8]> = environment.iter().map(Vec::as_slice).collect();
    match ProgramCache::open(dir, &parts) {
        Ok(cache) => Ok(Some(cache)),
        Err(error) => {
            tracing::warn!(dir = %dir.display(), %error, "compiled programs cannot be kept");
            Ok(None)
        }
    }
}

fn load_or_compile(
    client: &Client,
    text: &str,
    options: &CompileOptions,
    cache: Option<&ProgramCache>,
) -> Result<(LoadedExecutable, bool), baton_pjrt::Error> {
    let Some(cache) = cache else {
        return Ok((client.compile(text, options)?, false));
    };
    let claim = cache.claim(text, &options.to_proto());
    if let Some(executable) = kept(client, &claim) {
        return Ok((executable, true));
    }
    let executable = client.compile(text, options)?;
    keep(&claim, &executable);
    Ok((executable, false))
}

/// The program that was kept, if there is one that still loads.
fn kept(client: &Client, claim: &Claim) -> Option<LoadedExecutable> {
    let loaded = client.deserialize(&claim.read()?);
    if let Err(error) = &loaded {
        tracing::warn!(%error, "a kept program does not load and is compiled again");
    }
    loaded.ok()
}

/// Keeps a program, where that is possible.
fn keep(claim: &Claim, executable: &LoadedExecutable) {
    match executable.executable().serialize() {
        Ok(bytes) => {
            if let Err(error) = claim.write(&bytes) {
                tracing::warn!(%error, "a compiled program cannot be kept");
            }
        }
        Err(error) => tracing::debug!(%error, "the device's programs cannot be kept"),
    }
}

/// A program that returns a zeroed array: KV pools are made on the device, not uploaded.
pub(crate) fn zeros(
    client: &Client,
    element: Element,
    dims: &[usize],
) -> Result<LoadedExecutable, OpenError> {
    let mut module = Module::new("zeros");
    let body = module.body();
    let zero = body.float(0.0, &Type::new(element, &[]));
    let all = body.broadcast(&zero, dims, &[]);
    Ok(client.compile(module.finish(&[all])?, &CompileOptions::default())?)
}

pub(crate) const fn pjrt_dtype(dtype: DType) -> baton_pjrt::DType {
    match dtype {
        DType::F32 => baton_pjrt::DType::F32,
        DType::BF16 => baton_pjrt::DType::BF16,
        DType::F16 => baton_pjrt::DType::F16,
        DType::Fp8E4M3 => baton_pjrt::DType::F8E4M3FN,
    }
}
