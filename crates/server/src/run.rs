//! Starts the parts, serves until told to stop or until the engine fails, and takes the parts down in order:
//! not ready → no new connections → requests end within the grace → engine → transfer.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::time::Duration;

use baton_engine::{Engine, EngineConfig, EngineError, RunnerSpec};
use baton_http::{Client, ClientConfig, TowerToHyperService};
use baton_text::Tokenizer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::app::{App, Life};
use crate::body::BodyLimits;
use crate::clock;
use crate::engine_thread::{EngineFailure, EngineThread};
use crate::exports::ExportRoom;
use crate::metrics::{Labels, Metrics};
use crate::prefiller::Prefillers;
use crate::routes;
use crate::{ModelCard, Parts, ServerConfig};

/// How long open requests may take to read that the engine failed.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why a server did not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The model card names no model.
    #[error("no served model name")]
    NoName,
    /// Device and configuration do not go together.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The system has no threads left.
    #[error("the engine thread cannot be started")]
    Thread(#[source] std::io::Error),
    /// The engine failed while serving. The process should exit with 70.
    #[error(transparent)]
    Failed(#[from] EngineFailure),
}

/// Serves on `listener` until `shutdown`, then drains for at most the grace of [`ServerConfig::http`].
///
/// # Errors
/// See [`ServerError`]. After [`ServerError::Failed`] every open request has had its error.
pub async fn run(
    listener: TcpListener,
    config: ServerConfig,
    parts: Parts,
    shutdown: CancellationToken,
) -> Result<(), ServerError> {
    if parts.card.served_names.is_empty() {
        return Err(ServerError::NoName);
    }
    let (publisher, feed) = parts.kv_events.unzip();
    let batching = EngineConfig {
        log_cache_changes: feed.is_some(),
        ..parts.engine
    };
    let engine = Engine::new(parts.runner, batching)?;
    let spec = engine.spec().clone();
    let mut card = parts.card;
    // What the card promises and the pool cannot hold would be refused late.
    card.max_model_len = card
        .max_model_len
        .min(u32::try_from(engine.max_len()).unwrap_or(u32::MAX));
    let metrics = Arc::new(metrics(&card, &spec));
    let thread = EngineThread::start(engine, config.inbox, Arc::clone(&metrics), feed)
        .map_err(ServerError::Thread)?;
    let life = Life {
        engine_ended: thread.ended.clone(),
        shutdown: shutdown.clone(),
    };
    let serving = config.http.clone();
    let app = Arc::new(App {
        max_prompt_chars: max_prompt_chars(&parts.tokenizer, card.max_model_len),
        fingerprint: fingerprint(&card, &spec),
        created: clock::unix_seconds(),
        vocab_size: spec.vocab_size,
        tokenizer: parts.tokenizer,
        chat_template: parts.chat_template,
        inbox: thread.inbox.clone(),
        metrics,
        kv_server: parts.kv_server.map(Arc::new),
        kv_client: parts.kv_client.map(Arc::new),
        publisher,
        exports: ExportRoom::new(config.kv_host_pool, spec.layout.clone()),
        prefillers: prefillers(&config),
        bodies: BodyLimits::new(config.max_body_bytes, config.max_bodies_bytes),
        life: life.clone(),
        load: Arc::default(),
        card,
        config,
    });
    let service = TowerToHyperService::new(routes::router(Arc::clone(&app)));
    let served = baton_http::serve(listener, service, serving, shutdown);
    serve_while_alive(served, &life).await;
    let ended = aside(move || {
        let ended = thread.stop();
        // Joins the threads of the transfer, unless a request outlived its grace.
        drop(app);
        ended
    });
    Ok(ended.await?)
}

/// Ends with the serving, or shortly after the engine.
async fn serve_while_alive(served: impl Future<Output = ()>, life: &Life) {
    let mut served = std::pin::pin!(served);
    tokio::select! {
        () = &mut served => return,
        () = life.engine_ended.cancelled() => {}
    }
    tracing::error!("the engine has ended; going down");
    let _ = tokio::time::timeout(LAST_WORDS, served).await;
}

async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineFailure> + Send + 'static,
) -> Result<T, EngineFailure> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(EngineFailure::Panic))
}

fn metrics(card: &ModelCard, spec: &RunnerSpec) -> Metrics {
    Metrics::new(&Labels {
        model_name: card.served_names.first().map_or("", String::as_str),
        max_model_len: card.max_model_len,
        block_size: spec.layout.block_size,
        // Block 0 is the device's own.
        n_blocks: spec.n_blocks.saturating_sub(1),
        cache_dtype: spec.layout.dtype.name(),
    })
}

fn prefillers(config: &ServerConfig) -> Prefillers {
    Prefillers {
        client: Client::new(&ClientConfig::default()),
        policy: config.prefillers.clone(),
        timeout: config.prefill_timeout,
        max_answer_bytes: config.max_body_bytes,
    }
}

/// No text of more characters can become few enough tokens.
fn max_prompt_chars(tokenizer: &Tokenizer, max_model_len: u32) -> usize {
    let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
    let n_chars = |id| {
        String::from_utf8_lossy(tokenizer.token_bytes(id))
            .chars()
            .count()
    };
    let longest = ids.map(n_chars).max().unwrap_or(1).max(1);
    longest.saturating_mul(max_model_len as usize)
}

/// Tells versions and configurations apart.
fn fingerprint(card: &ModelCard, spec: &RunnerSpec) -> String {
    let hash = BuildHasherDefault::<DefaultHasher>::default();
    let shape = (
        &card.root,
        card.max_model_len,
        spec.vocab_size,
        spec.layout.model_fingerprint,
    );
    format!(
        "baton-{}-{:08x}",
        env!("CARGO_PKG_VERSION"),
        hash.hash_one(shape) >> 32
    )
}
