//! `baton serve`: one model server, put together from its flags.

use crate::cli::{Device, Role, Serve};
use crate::lifetime::{ParentWatch, shutdown_token};
use crate::{Failure, model, say_ready};
use anyhow::{Context as _, anyhow};
use baton_checkpoint::Checkpoint;
use baton_engine::{EngineConfig, PrefixCaching, Runner};
use baton_kv::KvLayout;
use baton_kv_events::{Feed, HashForm, Publisher, PublisherConfig};
use baton_kv_transfer::{KvClient, KvClientConfig, KvServer, KvServerConfig, PeerPolicy, Secret};
use baton_runner::Shapes;
use baton_server::{
    ApiKey, GenerationDefaults, ModelCard, Parts, PrefillerPolicy, ServerConfig, ServerError,
};
use baton_sim::{SimConfig, SimRunner};
use baton_text::{ChatTemplate, Tokenizer};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpSocket;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Runs until it is told to stop.
pub(crate) fn command(args: Serve) -> Result<(), Failure> {
    let secret = secret(&args)?;
    if args.tensor_parallel_size != 1 {
        return Err(Failure::Usage(anyhow!(
            "--tensor-parallel-size: only 1 works for now"
        )));
    }
    let events = events_config(&args)?;
    let runtime = tokio::runtime::Runtime::new().map_err(|e| Failure::Unavailable(e.into()))?;
    let done = runtime.block_on(serve(args, secret, events));
    // A model that is still loading when the end is asked for is not waited for.
    runtime.shutdown_background();
    done
}

async fn serve(
    args: Serve,
    secret: Option<Secret>,
    events: Option<PublisherConfig>,
) -> Result<(), Failure> {
    let watch = ParentWatch::from(args.exit_with_parent);
    let shutdown = shutdown_token(watch).map_err(|e| Failure::Unavailable(e.into()))?;
    let args = Arc::new(args);
    let prepared = {
        let args = args.clone();
        blocking(move || Prepared::new(&args), &shutdown).await?
    };
    let Some(prepared) = prepared else {
        return Ok(());
    };
    // The port is taken before the long part, so that a conflict shows at once, but nobody is let in yet.
    let socket = bind(SocketAddr::new(args.host, args.port))?;
    let kv_events = match events {
        Some(config) => Some(publisher(config, args.block_size).await?),
        None => None,
    };
    let loaded = {
        let args = args.clone();
        blocking(move || prepared.load(&args), &shutdown).await?
    };
    let Some(loaded) = loaded else { return Ok(()) };
    let mut parts = loaded.into_parts(&args, secret)?;
    parts.kv_events = kv_events;
    let listener = socket
        .listen(BACKLOG)
        .map_err(|e| Failure::Unavailable(e.into()))?;
    let bound = listener
        .local_addr()
        .map_err(|e| Failure::Unavailable(e.into()))?;
    say_ready(role_name(args.role), bound);
    match baton_server::run(listener, server_config(&args), parts, shutdown).await {
        Ok(()) => Ok(()),
        Err(error @ ServerError::Failed(_)) => Err(Failure::Broken(error.into())),
        Err(error) => Err(Failure::Usage(error.into())),
    }
}

/// What `--kv-events-config` asks for.
fn events_config(args: &Serve) -> Result<Option<PublisherConfig>, Failure> {
    let Some(json) = &args.kv_events_config else {
        return Ok(None);
    };
    let hashes = if args.kv_events_use_int_block_hashes == 0 {
        HashForm::Bytes
    } else {
        HashForm::Int
    };
    PublisherConfig::from_json(json, args.host, hashes)
        .context("--kv-events-config")
        .map_err(Failure::Usage)
}

async fn publisher(config: PublisherConfig, block_size: u32) -> Result<(Publisher, Feed), Failure> {
    let asked = (config.endpoint.clone(), config.replay);
    let started = Publisher::start(config, block_size).await;
    let (publisher, feed) = started
        .with_context(|| format!("--kv-events-config: cannot listen on {asked:?}"))
        .map_err(Failure::Unavailable)?;
    info!(endpoint = ?publisher.local, replay = ?publisher.replay, "KV events are published");
    Ok((publisher, feed))
}

/// Connections that the kernel keeps for us while we are busy.
const BACKLOG: u32 = 1024;

fn bind(address: SocketAddr) -> Result<TcpSocket, Failure> {
    let bind = || -> std::io::Result<TcpSocket> {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        // A server that comes back finds its port even when old connections linger.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok(socket)
    };
    bind()
        .with_context(|| format!("cannot listen on {address}; choose another --port"))
        .map_err(Failure::Unavailable)
}

/// Runs something long aside; `None` if the end was asked for first.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    shutdown: &CancellationToken,
) -> Result<Option<T>, Failure> {
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => {
            done.map_err(|e| Failure::Broken(anyhow!("loading the model failed: {e}")))?.map(Some)
        }
        () = shutdown.cancelled() => Ok(None),
    }
}

/// A model's files, opened and found to fit the flags.
struct Prepared {
    checkpoint: Checkpoint,
    shapes: Shapes,
    chat_template: Option<ChatTemplate>,
}

/// A model on its device.
struct Loaded {
    runner: Box<dyn Runner>,
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    eos: Vec<u32>,
    defaults: GenerationDefaults,
}

impl Prepared {
    fn new(args: &Serve) -> Result<Self, Failure> {
        let path = model::find(&args.model)?;
        let usage = |e: baton_checkpoint::CheckpointError| Failure::Usage(e.into());
        let checkpoint = Checkpoint::open(&path).map_err(usage)?;
        let shapes = model::shapes(args, &checkpoint).map_err(Failure::Usage)?;
        let chat_template = match &args.chat_template {
            None => checkpoint.chat_template().map_err(usage)?,
            Some(file) => {
                let source =
                    std::fs::read_to_string(file).with_context(|| file.display().to_string());
                Some(
                    checkpoint
                        .chat_template_from(&source.map_err(Failure::Usage)?)
                        .map_err(usage)?,
                )
            }
        };
        Ok(Self {
            checkpoint,
            shapes,
            chat_template,
        })
    }

    fn load(self, args: &Serve) -> Result<Loaded, Failure> {
        let Self {
            checkpoint,
            shapes,
            chat_template,
        } = self;
        let tokenizer = checkpoint
            .tokenizer()
            .map_err(|e| Failure::Usage(e.into()))?;
        let runner = match args.device {
            Device::Sim => simulated(args, &checkpoint, tokenizer.vocab_size()),
            _ => model::load(args, &checkpoint, shapes)?,
        };
        let given = checkpoint.generation_defaults();
        Ok(Loaded {
            runner,
            tokenizer,
            chat_template,
            eos: checkpoint.eos_token_ids().to_vec(),
            defaults: GenerationDefaults {
                temperature: given.temperature,
                top_p: given.top_p,
                top_k: given.top_k,
                min_p: given.min_p,
                max_tokens: None,
            },
        })
    }
}

impl Loaded {
    fn into_parts(self, args: &Serve, secret: Option<Secret>) -> Result<Parts, Failure> {
        let spec = self.runner.spec().clone();
        let unavailable = |e: std::io::Error| {
            Failure::Unavailable(anyhow!(e).context("cannot start the KV transfer"))
        };
        let kv_server = match &secret {
            Some(secret) if args.role != Role::Decode => {
                Some(kv_server(args, secret.clone(), spec.layout.clone()).map_err(unavailable)?)
            }
            _ => None,
        };
        let kv_client = match secret {
            Some(secret) if args.role != Role::Prefill => {
                Some(kv_client(args, secret, spec.layout.clone()).map_err(unavailable)?)
            }
            _ => None,
        };
        let names = if args.served_model_name.is_empty() {
            vec![args.model.clone()]
        } else {
            args.served_model_name.clone()
        };
        Ok(Parts {
            engine: engine_config(args),
            tokenizer: Arc::new(self.tokenizer),
            chat_template: self.chat_template,
            card: ModelCard {
                served_names: names,
                root: args.model.clone(),
                max_model_len: u32::try_from(spec.max_model_len).unwrap_or(u32::MAX),
                eos: self.eos.into(),
                defaults: self.defaults,
            },
            runner: self.runner,
            kv_server,
            kv_client,
            kv_events: None,
        })
    }
}

/// A device that makes tokens up, with the model's own vocabulary and KV shape of two small layers.
fn simulated(args: &Serve, checkpoint: &Checkpoint, vocab_size: usize) -> Box<dyn Runner> {
    let mut config = SimConfig::default();
    config.spec.layout.block_size = args.block_size;
    config.spec.max_batch = args.max_num_seqs;
    config.spec.max_chunk = args.max_num_batched_tokens;
    config.spec.max_model_len = args
        .max_model_len
        .unwrap_or(checkpoint.config().max_position_embeddings);
    config.spec.vocab_size = u32::try_from(vocab_size).unwrap_or(u32::MAX);
    let bytes = args.kv_cache_memory_bytes.min(1 << 30) as usize;
    config.spec.n_blocks =
        u32::try_from(bytes / config.spec.layout.block_bytes()).unwrap_or(u32::MAX);
    Box::new(SimRunner::new(config))
}

fn engine_config(args: &Serve) -> EngineConfig {
    EngineConfig {
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        prefill_beside_decode: args.prefill_beside_decode(),
        export_tail: args.export_tail(),
        max_waiting: args.max_num_queued_reqs,
        prefix_caching: PrefixCaching::On,
        hash_seed: "0".to_owned(),
        log_cache_changes: false,
    }
}

fn kv_server(args: &Serve, secret: Secret, layout: KvLayout) -> std::io::Result<KvServer> {
    let mut config = KvServerConfig::new(SocketAddr::new(args.host, args.kv_port), secret, layout);
    config.tls = args.kv_tls;
    config.lease_ttl = args.kv_lease_ttl;
    config.pool_bytes = args.kv_host_pool;
    if let Some(host) = &args.kv_advertise_host {
        config.advertise_host.clone_from(host);
    }
    KvServer::start(config)
}

fn kv_client(args: &Serve, secret: Secret, layout: KvLayout) -> std::io::Result<KvClient> {
    let mut config = KvClientConfig::new(secret, layout, args.kv_host_pool);
    config.tls = args.kv_tls;
    if !args.kv_allow_host.is_empty() {
        let allowed = args.kv_allow_host.clone();
        config.peers = PeerPolicy::Allow(Arc::new(move |host: &str, _| allows(&allowed, host)));
    }
    KvClient::new(config)
}

/// Loopback, a listed host, or any after `*`.
fn allows(allowed: &[String], host: &str) -> bool {
    let loopback = host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    loopback || allowed.iter().any(|entry| entry == "*" || entry == host)
}

fn server_config(args: &Serve) -> ServerConfig {
    let mut config = ServerConfig {
        role: match args.role {
            Role::Prefill => baton_server::Role::Prefill,
            Role::Decode => baton_server::Role::Decode,
            Role::Both => baton_server::Role::Both,
        },
        api_keys: args
            .api_key
            .iter()
            .map(|key| ApiKey::new(key.as_str()))
            .collect(),
        prompt_tokens_details: args.enable_prompt_tokens_details,
        recompute_max: args.kv_recompute_max,
        kv_host_pool: args.kv_host_pool,
        ..ServerConfig::default()
    };
    config.http.grace = args.shutdown_timeout;
    if !args.kv_allow_host.is_empty() {
        let allowed = args.kv_allow_host.clone();
        config.prefillers = PrefillerPolicy::new(move |host, _| allows(&allowed, host));
    }
    config
}

fn secret(args: &Serve) -> Result<Option<Secret>, Failure> {
    let Some(hex) = &args.kv_secret else {
        if args.role != Role::Both {
            warn!(
                "without --kv-secret no KV is handed over: give all servers of the pool the same"
            );
        }
        return Ok(None);
    };
    let wrong = || {
        Failure::Usage(anyhow!(
            "--kv-secret (BATON_KV_SECRET) must be at least 32 hex digits"
        ))
    };
    let digits: Option<Vec<u8>> = (0..hex.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(hex.get(i..i + 2)?, 16).ok())
        .collect();
    let secret = Secret::new(&digits.ok_or_else(wrong)?).map_err(|_| wrong())?;
    Ok(Some(secret))
}

const fn role_name(role: Role) -> &'static str {
    match role {
        Role::Prefill => "prefill server",
        Role::Decode => "decode server",
        Role::Both => "server",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_and_listed_hosts_are_allowed() {
        let listed = ["10.0.0.7".to_owned()];
        assert!(
            allows(&listed, "127.0.0.1")
                && allows(&listed, "10.0.0.7")
                && !allows(&listed, "10.0.0.8")
        );
        assert!(allows(&["*".to_owned()], "anything") && !allows(&[], "localhost.evil"));
    }
}
