//! The consumer: keeps leases of producers alive, and pulls their blocks into host memory.
//!
//! A producer gets one control connection, kept by a thread of its own that also sends the heartbeats; a fixed
//! number of workers run the transfers, a long one on several data connections, each of which it has to itself meanwhile.
//! Dropping the [`KvClient`] cancels what runs and joins all threads.
//! Not here: what a failed transfer means for its request.

mod job;
mod link;
mod memory;
mod pull;
mod queue;
mod session;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use baton_kv::{KvLayout, KvTransferParams, Kvx};
use parking_lot::Mutex;
use rustls::ClientConfig;

use crate::TransferError;
use crate::geometry::Shard;
use crate::secret::{Secret, fingerprint};
use crate::server::spawn;
use crate::tls;
use job::{Completion, Job};
use link::{Lease, Peer, Terms};
use memory::Memory;
use queue::Queue;

pub use job::{PullGuard, Pulled, PulledCallback};

/// Version of the `kvx` object that is understood.
const KVX_VERSION: u32 = 1;

/// Decides on a host, as the request names it, and a port.
type HostCheck = Arc<dyn Fn(&str, u16) -> bool + Send + Sync>;

/// Which addresses a request may make this server connect to.
#[derive(Clone, Default)]
pub enum PeerPolicy {
    /// Only this machine, also after the name was resolved.
    #[default]
    Loopback,
    /// What the function says yes to. It sees the host as the request names it.
    Allow(HostCheck),
}

impl fmt::Debug for PeerPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "Loopback",
            Self::Allow(_) => "Allow(..)",
        })
    }
}

impl PeerPolicy {
    fn allows_name(&self, host: &str, port: u16) -> bool {
        match self {
            Self::Loopback => {
                let is_loopback = |ip: IpAddr| ip.is_loopback();
                host == "localhost" || host.parse().is_ok_and(is_loopback)
            }
            Self::Allow(check) => check(host, port),
        }
    }

    fn allows_address(&self, addr: &SocketAddr) -> bool {
        matches!(self, Self::Allow(_)) || addr.ip().is_loopback()
    }
}

/// How a consumer runs. [`KvClientConfig::new`] fills in the defaults.
#[derive(Clone, Debug)]
pub struct KvClientConfig {
    /// The pool's secret.
    pub secret: Secret,
    /// Layout of the KV that is wanted, of the whole model. The producer's blocks may be of another size.
    pub layout: KvLayout,
    /// The KV heads that are wanted, as far as the producer has them.
    pub heads: Range<u32>,
    /// Host memory for transfers, from their start until the caller drops what was pulled. In bytes.
    pub budget_bytes: u64,
    /// Producers that may be connected to.
    pub peers: PeerPolicy,
    /// Whether to read the memory of a producer on this machine in place of a socket.
    pub shares_memory: bool,
    /// Whether connections are encrypted. Producers that do otherwise are not spoken with.
    pub tls: bool,
    /// Data connections to one producer.
    pub n_streams: usize,
    /// A transfer takes another data connection for every so many bytes.
    pub stripe_bytes: usize,
    /// Transfers at the same time.
    pub n_workers: usize,
    /// Transfers that may wait for a worker.
    pub max_queued: usize,
    /// Leases held at the same time.
    pub max_held: usize,
    /// Producers at the same time.
    pub max_peers: usize,
    /// Bytes in flight on one data connection; at least two chunks.
    pub window_bytes: u64,
    /// To connect.
    pub connect_timeout: Duration,
    /// Without a byte or an answer.
    pub idle_timeout: Duration,
    /// For a transfer as a whole, waiting for memory and a connection included.
    pub total_timeout: Duration,
    /// A connection without leases is closed after this long.
    pub linger: Duration,
}

impl KvClientConfig {
    /// The defaults: loopback producers only, four data connections each, four workers.
    #[must_use]
    pub fn new(secret: Secret, layout: KvLayout, budget_bytes: u64) -> Self {
        Self {
            secret,
            heads: 0..layout.n_kv_heads,
            layout,
            budget_bytes,
            peers: PeerPolicy::default(),
            shares_memory: true,
            tls: false,
            n_streams: 4,
            stripe_bytes: 8 << 20,
            n_workers: 4,
            max_queued: 256,
            max_held: 4096,
            max_peers: 256,
            window_bytes: 16 << 20,
            connect_timeout: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(2),
            total_timeout: Duration::from_secs(30),
            linger: Duration::from_secs(30),
        }
    }
}

/// Counters since the start, and gauges of now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientStats {
    /// Leases held.
    pub held: usize,
    /// Bytes of transfers that run, and of results that the caller still has.
    pub budget_used: u64,
    /// Transfers that brought all their blocks.
    pub complete: u64,
    /// Transfers that brought only the first of their blocks.
    pub partial: u64,
    /// Transfers that brought nothing.
    pub failed: u64,
    /// Verified payload that came through sockets.
    pub bytes_received: u64,
    /// Payload that was read out of producers' memory.
    pub bytes_copied: u64,
    /// Damaged chunks.
    pub crc_errors: u64,
}

#[derive(Debug, Default)]
struct Counters {
    complete: AtomicU64,
    partial: AtomicU64,
    failed: AtomicU64,
    bytes_received: AtomicU64,
    bytes_copied: AtomicU64,
    crc_errors: AtomicU64,
}

/// The consumer's end. Dropping it cancels what runs and joins its threads; leases still held then expire.
#[derive(Debug)]
pub struct KvClient {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What all threads of a client share.
#[derive(Debug)]
struct Shared {
    cfg: KvClientConfig,
    tls: Option<Arc<ClientConfig>>,
    fingerprint: u64,
    boot_id: u64,
    memory: Arc<Memory>,
    queue: Queue,
    peers: Mutex<BTreeMap<(String, u16), Arc<Peer>>>,
    links: Mutex<Vec<JoinHandle<()>>>,
    n_held: AtomicU64,
    is_stopping: AtomicBool,
    counters: Counters,
}

/// A lease that is kept alive. Dropping the last trace of it releases the lease, without blocking.
#[derive(Clone, Debug)]
pub struct Held {
    lease: Arc<Lease>,
}

impl Held {
    /// Tokens of the prompt whose KV can be pulled; the last block may be filled in part.
    #[must_use]
    pub fn n_tokens(&self) -> u32 {
        self.lease.n_tokens
    }

    /// Blocks that can be pulled, of the consumer's size.
    #[must_use]
    pub fn n_blocks(&self) -> u32 {
        self.lease.n_blocks
    }

    /// The KV heads that a pull brings: those that are wanted and that the producer has.
    #[must_use]
    pub fn heads(&self) -> Range<u32> {
        self.lease.heads.clone()
    }
}

impl KvClient {
    /// Starts the workers.
    ///
    /// # Errors
    /// When the system has no threads or random numbers left.
    pub fn new(mut cfg: KvClientConfig) -> io::Result<Self> {
        cfg.window_bytes = cfg.window_bytes.max(2 * crate::wire::MAX_CHUNK as u64);
        cfg.n_streams = cfg.n_streams.max(1);
        cfg.stripe_bytes = cfg.stripe_bytes.max(1);
        let n_workers = cfg.n_workers.max(1);
        let shared = Arc::new(Shared {
            fingerprint: fingerprint(&cfg.layout),
            tls: cfg.tls.then(tls::consumer).transpose()?,
            boot_id: getrandom::u64().map_err(io::Error::other)?,
            memory: Arc::new(Memory::new(cfg.budget_bytes)),
            queue: Queue::new(cfg.max_queued, cfg.total_timeout),
            cfg,
            peers: Mutex::default(),
            links: Mutex::default(),
            n_held: AtomicU64::new(0),
            is_stopping: AtomicBool::new(false),
            counters: Counters::default(),
        });
        let mut client = Self {
            shared,
            threads: Vec::new(),
        };
        let sweeper = Arc::clone(&client.shared);
        client
            .threads
            .push(spawn("kvx-sweep", move || sweeper.queue.sweep())?);
        for _ in 0..n_workers {
            let shared = Arc::clone(&client.shared);
            client
                .threads
                .push(spawn("kvx-pull", move || pull::work(&shared))?);
        }
        Ok(client)
    }

    /// Takes hold of a lease: heartbeats begin now. Does not block; whether the producer is there shows later.
    ///
    /// # Errors
    /// When the object is of another kind of producer or contradicts itself, the KV is another model's or of
    /// another shape, the producer is not allowed, or too many leases are held.
    pub fn hold(&self, params: &KvTransferParams) -> Result<Held, TransferError> {
        let kvx = params.kvx.as_ref().ok_or(TransferError::ForeignProducer)?;
        let terms = self.shared.check(params, kvx)?;
        let (host, port) = (params.remote_host.as_str(), params.remote_port);
        if !self.shared.cfg.peers.allows_name(host, port) {
            return Err(TransferError::Forbidden {
                host: host.into(),
                port,
            });
        }
        let lease = link::hold(&self.shared, params, kvx, terms)?;
        Ok(Held {
            lease: Arc::new(lease),
        })
    }

    /// Fetches `n_blocks` blocks from `first_block` on, counted from the first of the lease. `done` is called for each
    /// part that has come, on a thread of this client, or before this returns if nothing can be started; once with the
    /// last. It must not block for long. Of a lease that is still being computed the parts come as they are done. A pull
    /// that brings everything up to the lease's end releases the lease.
    ///
    /// Dropping the guard cancels: `done` is then told so, unless the last result was on its way already.
    pub fn pull(
        &self,
        held: &Held,
        first_block: u32,
        n_blocks: u32,
        done: PulledCallback,
    ) -> PullGuard {
        let done = Completion::new(done);
        let (job, guard) = Job::new(
            Arc::clone(&held.lease),
            first_block..first_block.saturating_add(n_blocks),
            done,
        );
        self.shared.start(job);
        guard
    }

    /// Counters and gauges.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ClientStats {
            held: usize::try_from(read(&self.shared.n_held)).unwrap_or(usize::MAX),
            budget_used: self.shared.memory.used(),
            complete: read(&counters.complete),
            partial: read(&counters.partial),
            failed: read(&counters.failed),
            bytes_received: read(&counters.bytes_received),
            bytes_copied: read(&counters.bytes_copied),
            crc_errors: read(&counters.crc_errors),
        }
    }
}

impl Drop for KvClient {
    fn drop(&mut self) {
        self.shared.stop();
        let links = std::mem::take(&mut *self.shared.links.lock());
        for thread in self.threads.drain(..).chain(links) {
            // A thread that panicked has nothing left to clean up.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::SeqCst)
    }

    /// Queues a transfer; one whose blocks are yet to be computed waits for them first.
    fn start(&self, job: Job) {
        if job.available().is_empty() && job.lease.is_early && !job.blocks.is_empty() {
            let peer = Arc::clone(&job.lease.peer);
            if let Some(job) = peer.wait(job) {
                self.queue.push(job);
            }
        } else {
            self.queue.push(job);
        }
    }

    /// Whether the KV that `params` names can be used here, and what there is of it.
    fn check(&self, params: &KvTransferParams, kvx: &Kvx) -> Result<Terms, TransferError> {
        let layout = &self.cfg.layout;
        let differs = |what, ours: &dyn fmt::Display, theirs: &dyn fmt::Display| {
            Err(TransferError::Mismatch {
                what,
                ours: ours.to_string(),
                theirs: theirs.to_string(),
            })
        };
        if kvx.v != KVX_VERSION {
            return differs("kvx version", &KVX_VERSION, &kvx.v);
        }
        if kvx.dt != layout.dtype.name() {
            return differs("element type", &layout.dtype, &kvx.dt);
        }
        if kvx.fp.0 != self.fingerprint {
            return differs("model", &baton_kv::Fingerprint(self.fingerprint), &kvx.fp);
        }
        if kvx.tls != self.cfg.tls {
            return Err(session::encryption_differs(self.cfg.tls));
        }
        let theirs = Shard {
            layout: KvLayout {
                block_size: kvx.bs,
                ..layout.clone()
            },
            heads: kvx
                .hd
                .map_or(0..layout.n_kv_heads, |(begin, end)| begin..end),
        };
        let wanted = &self.cfg.heads;
        let heads = wanted.start.max(theirs.heads.start)..wanted.end.min(theirs.heads.end);
        if heads.is_empty() {
            let shown = |heads: &Range<u32>| format!("{heads:?}");
            return differs("set of heads", &shown(wanted), &shown(&theirs.heads));
        }
        let n_ids = params.remote_block_ids.len();
        let is_told = || n_ids == theirs.layout.blocks_for(kvx.n as usize);
        if kvx.n == 0 || kvx.bs == 0 || !(kvx.early && n_ids == 0 || is_told()) {
            return Err(TransferError::Range);
        }
        let n_blocks = u32::try_from(layout.blocks_for(kvx.n as usize));
        Ok(Terms {
            n_blocks: n_blocks.map_err(|_| TransferError::Range)?,
            theirs,
            heads,
        })
    }

    fn stop(&self) {
        self.is_stopping.store(true, Ordering::SeqCst);
        self.queue.close();
        let peers: Vec<_> = self.peers.lock().values().cloned().collect();
        peers.iter().for_each(|peer| peer.stop());
    }

    fn count(&self, result: &Result<Pulled, TransferError>) {
        let counters = &self.counters;
        let counter = match result {
            Ok(pulled) if pulled.shortfall.is_none() => &counters.complete,
            Ok(_) => &counters.partial,
            Err(_) => &counters.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
