//! `baton sidecar`: the routing proxy beside a decode server, from flags, YAML and the environment.

use crate::cli::Sidecar;
use crate::lifetime::{ParentWatch, shutdown_token};
use crate::{Failure, say_ready_over};
use anyhow::Context as _;
use baton_sidecar::{Config, ListenError, Resolved, Settings};

/// Runs until it is told to stop.
pub(crate) fn command(args: Sidecar) -> Result<(), Failure> {
    for flag in args.ignored.given() {
        tracing::warn!(flag, "this flag means nothing here");
    }
    let watch = ParentWatch::from(args.exit_with_parent);
    let config = config(args).map_err(Failure::Usage)?;
    let runtime = runtime(config.ranks).map_err(|e| Failure::Unavailable(e.into()))?;
    let done = runtime.block_on(serve(config, watch));
    runtime.shutdown_background();
    done
}

/// A thread for each rank of the decode server, as far as there are cores. Passing a request on costs little but the
/// waking of threads, and threads that share the work wake one another for nothing.
fn runtime(ranks: u16) -> std::io::Result<tokio::runtime::Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(usize::from(ranks).clamp(1, cores))
        .enable_all()
        .build()
}

/// The command line over the file over the environment.
fn config(args: Sidecar) -> anyhow::Result<Config> {
    let yaml = match (args.configuration, args.configuration_file) {
        (Some(yaml), _) => Some(yaml),
        (None, Some(path)) => Some(
            std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?,
        ),
        (None, None) => None,
    };
    let file: Settings = match yaml {
        Some(yaml) => serde_norway::from_str(&yaml).context("the configuration makes no sense")?,
        None => Settings::default(),
    };
    let env = Settings::from_env(|name| std::env::var(name).ok());
    let Resolved { config, warnings } = args
        .settings
        .over(file.without_zeros())
        .over(env)
        .resolve()?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    Ok(config)
}

async fn serve(config: Config, watch: ParentWatch) -> Result<(), Failure> {
    let shutdown = shutdown_token(watch).map_err(|e| Failure::Unavailable(e.into()))?;
    let bound = baton_sidecar::bind(config)
        .await
        .map_err(|error| match error {
            ListenError::Bind { .. } => Failure::Unavailable(error.into()),
            ListenError::Certificate { .. } | ListenError::Start(_) => Failure::Usage(error.into()),
        })?;
    let address = bound
        .address()
        .map_err(|e| Failure::Unavailable(e.into()))?;
    let scheme = if bound.is_tls() { "https" } else { "http" };
    say_ready_over(scheme, "sidecar", address);
    baton_sidecar::run(bound, shutdown).await;
    Ok(())
}
