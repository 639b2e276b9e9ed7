//! The producer: keeps finished KV in host memory under leases, and sends it to consumers that prove their right.
//!
//! Threads around the pure parts: one accepts, one reaps expired leases, one serves each connection. Dropping the
//! [`KvServer`] hangs up on everybody and joins them all. Not here: when to export, and device memory; blocks
//! are host copies from the start, so a lease never keeps a device block.

mod building;
mod connection;
mod stats;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use baton_kv::{BlockId, Fingerprint, KvLayout, KvTransferParams, Kvx, LeaseToken, UUID_LIMIT};
use baton_shm::{Arena, Door, Room};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustls::ServerConfig;

use crate::RejectCode;
use crate::control::Terms;
use crate::geometry::Shard;
use crate::lease::{LeaseTable, LeaseTerms};
use crate::memory::door_name;
use crate::secret::{Secret, fingerprint};
use crate::tls;
use crate::wire::MAX_CHUNK;
use connection::Session;
use stats::Counters;

pub use building::Building;
pub use stats::ServerStats;

/// Connections that have not proved themselves yet.
const MAX_PENDING: usize = 256;
/// A chunk's bytes are summed and then sent: what a core's own cache holds is read from memory once.
const CHUNK_BYTES: usize = 256 << 10;
/// Stacks of our threads are small: they hold no buffers.
pub(crate) const STACK_BYTES: usize = 256 << 10;

/// How a producer runs. [`KvServerConfig::new`] fills in the defaults.
#[derive(Clone, Debug)]
pub struct KvServerConfig {
    /// Address to listen on; port 0 lets the system choose.
    pub bind: SocketAddr,
    /// Host name or address that consumers connect to.
    pub advertise_host: String,
    /// The pool's secret.
    pub secret: Secret,
    /// Layout of the KV that is published, of the whole model.
    pub layout: KvLayout,
    /// The KV heads that this server has.
    pub heads: Range<u32>,
    /// Tensor-parallel size, told to consumers; the bytes do not depend on it.
    pub tensor_parallel: u32,
    /// Host memory that leases may hold, in bytes.
    pub pool_bytes: u64,
    /// Whether consumers on this machine may read that memory in place of a socket.
    pub shares_memory: bool,
    /// Whether connections are encrypted. Consumers that do otherwise are refused.
    pub tls: bool,
    /// Life of a lease without heartbeats.
    pub lease_ttl: Duration,
    /// Life of a lease whatever heartbeats come.
    pub lease_cap: Duration,
    /// Connections at the same time, data connections included.
    pub max_connections: usize,
    /// Data connections of one consumer.
    pub max_streams: usize,
    /// Bytes of a chunk, at most 1 MiB.
    pub chunk_bytes: usize,
    /// How long a consumer may take to prove itself.
    pub auth_timeout: Duration,
    /// How long a transfer may make no progress.
    pub progress_timeout: Duration,
    /// How long a control connection may be silent.
    pub idle_timeout: Duration,
}

impl KvServerConfig {
    /// The defaults: 1 GiB of leases that live 15 s, 600 s at most, 1024 connections.
    #[must_use]
    pub fn new(bind: SocketAddr, secret: Secret, layout: KvLayout) -> Self {
        Self {
            bind,
            advertise_host: bind.ip().to_string(),
            secret,
            heads: 0..layout.n_kv_heads,
            layout,
            tensor_parallel: 1,
            pool_bytes: 1 << 30,
            shares_memory: true,
            tls: false,
            lease_ttl: Duration::from_secs(15),
            lease_cap: Duration::from_secs(600),
            max_connections: 1024,
            max_streams: 16,
            chunk_bytes: CHUNK_BYTES,
            auth_timeout: Duration::from_secs(2),
            progress_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(30),
        }
    }
}

/// Finished blocks, as the engine exports them.
#[derive(Debug)]
pub struct Export {
    /// Their ids in the pool of this server, in the order of the prompt.
    pub blocks: Vec<BlockId>,
    /// Tokens whose KV is valid; the last block may be filled in part.
    pub n_tokens: u32,
    /// Their bytes in the canonical order of [`KvLayout`].
    pub data: Vec<u8>,
}

/// Why nothing was published.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Leases hold too much memory already.
    #[error("pool of {limit} bytes has no room for {bytes} more than the {used} in use")]
    PoolFull {
        /// Bytes of the export.
        bytes: u64,
        /// Bytes in use.
        used: u64,
        /// Bytes of the pool.
        limit: u64,
    },
    /// The server is about to stop.
    #[error("the server is draining")]
    Draining,
    /// Blocks, tokens and bytes do not go together.
    #[error("{blocks} blocks, {tokens} tokens and {bytes} bytes do not go together")]
    Shape {
        /// Blocks of the export.
        blocks: usize,
        /// Tokens of the export.
        tokens: u32,
        /// Bytes of the export.
        bytes: usize,
    },
    /// The lease ended before its last block came.
    #[error("the lease is gone")]
    Gone,
    /// The system has no random numbers.
    #[error("no random numbers: {0}")]
    Random(getrandom::Error),
}

/// The producer's end. Dropping it ends every connection and joins its threads.
#[derive(Debug)]
pub struct KvServer {
    shared: Arc<Shared>,
    door: Option<Arc<Door>>,
    threads: Vec<JoinHandle<()>>,
}

/// What all threads of a server share.
#[derive(Debug)]
struct Shared {
    cfg: KvServerConfig,
    tls: Option<Arc<ServerConfig>>,
    terms: Arc<Terms>,
    addr: SocketAddr,
    arena: Arc<Arena>,
    leases: Mutex<LeaseTable<Room>>,
    leases_changed: Condvar,
    /// Sessions by name.
    sessions: Mutex<BTreeMap<u64, Arc<Session>>>,
    /// All sockets, to hang up on at the end.
    sockets: Mutex<BTreeMap<u64, TcpStream>>,
    pending: AtomicUsize,
    is_draining: AtomicBool,
    is_stopping: AtomicBool,
    counters: Counters,
}

impl KvServer {
    /// Binds, and serves from now on.
    ///
    /// # Errors
    /// When the address cannot be bound, the system has no random numbers or threads left, the chunk length is not from
    /// 1 byte to 1 MiB, or the model has no such heads.
    pub fn start(cfg: KvServerConfig) -> io::Result<Self> {
        let wrong = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        if !(1..=MAX_CHUNK).contains(&cfg.chunk_bytes) {
            return wrong("chunk_bytes out of range");
        }
        if cfg.heads.is_empty() || cfg.heads.end > cfg.layout.n_kv_heads {
            return wrong("heads out of range");
        }
        let listener = TcpListener::bind(cfg.bind)?;
        let shared = Arc::new(Shared::new(cfg, listener.local_addr()?)?);
        let mut server = Self {
            shared: Arc::clone(&shared),
            door: shared.open_door().map(Arc::new),
            threads: Vec::new(),
        };
        let reaper = Arc::clone(&shared);
        server.run("kvx-reaper", move || reaper.reap())?;
        if let Some(door) = server.door.clone() {
            let porter = Arc::clone(&shared);
            server.run("kvx-door", move || porter.answer(&door))?;
        }
        server.run("kvx-accept", move || accept(&shared, &listener))?;
        Ok(server)
    }

    fn run(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(spawn(name, body)?);
        Ok(())
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.addr
    }

    /// Keeps `export` under a new lease and says how to fetch it.
    ///
    /// # Errors
    /// When there is no room, the server drains, or the export contradicts itself.
    pub fn publish(&self, export: &Export) -> Result<KvTransferParams, PublishError> {
        let shape = PublishError::Shape {
            blocks: export.blocks.len(),
            tokens: export.n_tokens,
            bytes: export.data.len(),
        };
        let (_, mut building) = self.begin(export.n_tokens)?;
        let mut room = building.room(export.blocks.len())?;
        if room.len() != export.data.len() {
            return Err(shape);
        }
        room.copy_from_slice(&export.data);
        building.append(&export.blocks, room)?;
        building.finish().ok_or(shape)
    }

    /// Announces a lease of the KV of `n_tokens` tokens, which is yet to be computed. What is said of it lets a consumer
    /// fetch while it grows; its block ids are not known yet.
    ///
    /// # Errors
    /// When the server drains, or there are no tokens.
    pub fn begin(&self, n_tokens: u32) -> Result<(KvTransferParams, Building), PublishError> {
        self.shared.check_open()?;
        let n_blocks = self.shared.cfg.layout.blocks_for(n_tokens as usize);
        let n_blocks = u32::try_from(n_blocks).ok().filter(|&n| n > 0);
        let n_blocks = n_blocks.ok_or(PublishError::Shape {
            blocks: 0,
            tokens: n_tokens,
            bytes: 0,
        })?;
        let params = self.shared.announce(n_tokens, n_blocks)?;
        let shared = Arc::clone(&self.shared);
        let building = Building::new(shared, params.clone(), n_tokens, n_blocks);
        Ok((params, building))
    }

    /// Ends a lease that nobody will fetch; returns whether it was there.
    pub fn release(&self, uuid: u64) -> bool {
        let ended = self.shared.leases.lock().consume(uuid);
        self.shared.leases_changed.notify_all();
        self.shared.wake_sessions();
        ended
    }

    /// Ends a lease for whoever has the right to it.
    ///
    /// # Errors
    /// [`RejectCode::BadToken`] for a token that is not the lease's, [`RejectCode::UnknownLease`] if it is gone.
    pub fn revoke(&self, uuid: u64, token: &LeaseToken) -> Result<(), RejectCode> {
        let terms = &self.shared.terms;
        if !terms.secret.grants(&terms.claim(uuid), token) {
            return Err(RejectCode::BadToken);
        }
        let was_there = self.release(uuid);
        was_there.then_some(()).ok_or(RejectCode::UnknownLease)
    }

    /// Publishes nothing more from now on; leases that exist are still served.
    pub fn drain(&self) {
        self.shared.is_draining.store(true, Ordering::SeqCst);
        self.shared.announce_drain();
    }

    /// Waits until no lease is left, at most `timeout`. Returns whether none is.
    #[must_use]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut leases = self.shared.leases.lock();
        while leases.len() > 0 {
            if self
                .shared
                .leases_changed
                .wait_until(&mut leases, deadline)
                .timed_out()
            {
                return leases.len() == 0;
            }
        }
        true
    }

    /// Counters and gauges.
    #[must_use]
    pub fn stats(&self) -> ServerStats {
        self.shared.stats()
    }
}

impl Drop for KvServer {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(door) = &self.door {
            door.wake();
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to clean up.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn new(cfg: KvServerConfig, addr: SocketAddr) -> io::Result<Self> {
        let fingerprint = fingerprint(&cfg.layout);
        let terms = Terms {
            secret: cfg.secret.clone(),
            ours: Shard {
                layout: cfg.layout.clone(),
                heads: cfg.heads.clone(),
            },
            boot_id: getrandom::u64().map_err(io::Error::other)?,
            fingerprint,
            chunk_bytes: cfg.chunk_bytes,
            max_streams: cfg.max_streams,
            starvation: cfg.progress_timeout,
        };
        let lease_terms = LeaseTerms {
            ttl: cfg.lease_ttl,
            cap: cfg.lease_cap,
        };
        Ok(Self {
            arena: Arena::new(usize::try_from(cfg.pool_bytes).unwrap_or(usize::MAX))?,
            tls: cfg.tls.then(tls::producer).transpose()?,
            cfg,
            terms: Arc::new(terms),
            addr,
            leases: Mutex::new(LeaseTable::new(lease_terms)),
            leases_changed: Condvar::new(),
            sessions: Mutex::default(),
            sockets: Mutex::default(),
            pending: AtomicUsize::new(0),
            is_draining: AtomicBool::new(false),
            is_stopping: AtomicBool::new(false),
            counters: Counters::default(),
        })
    }

    fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::SeqCst)
    }

    fn check_open(&self) -> Result<(), PublishError> {
        if self.is_draining.load(Ordering::SeqCst) {
            return Err(PublishError::Draining);
        }
        Ok(())
    }

    /// A lease without blocks yet.
    fn announce(&self, n_tokens: u32, n_blocks: u32) -> Result<KvTransferParams, PublishError> {
        let nonce: [u8; 16] = random().map_err(PublishError::Random)?;
        let uuid = self.begin(n_blocks)?;
        let (layout, heads) = (&self.cfg.layout, &self.cfg.heads);
        let has_all = heads.len() == layout.n_kv_heads as usize;
        Ok(KvTransferParams {
            remote_block_ids: Vec::new(),
            remote_host: self.cfg.advertise_host.clone(),
            remote_port: self.addr.port(),
            uuid,
            kvx: Some(Kvx {
                v: 1,
                tok: self
                    .terms
                    .secret
                    .lease_token(&self.terms.claim(uuid), nonce),
                n: n_tokens,
                bs: layout.block_size,
                tp: self.cfg.tensor_parallel,
                hd: (!has_all).then_some((heads.start, heads.end)),
                dt: layout.dtype.name().into(),
                fp: Fingerprint(self.terms.fingerprint),
                ttl_ms: u32::try_from(self.cfg.lease_ttl.as_millis()).unwrap_or(u32::MAX),
                // Whoever publishes knows the prompt.
                ph: None,
                early: true,
                tls: self.cfg.tls,
            }),
        })
    }

    /// A lease under a fresh random id: one that cannot be guessed, and that no earlier lease had.
    fn begin(&self, n_blocks: u32) -> Result<u64, PublishError> {
        let mut leases = self.leases.lock();
        loop {
            let id = getrandom::u64().map_err(PublishError::Random)? % UUID_LIMIT;
            if id != 0 && !leases.knows(id) {
                leases.begin(id, n_blocks, Instant::now());
                self.leases_changed.notify_all();
                return Ok(id);
            }
        }
    }

    fn room(&self, n_blocks: usize) -> Result<Room, PublishError> {
        let bytes = self.terms.ours.block_bytes().saturating_mul(n_blocks);
        let arena = &self.arena;
        arena.room(bytes).ok_or_else(|| PublishError::PoolFull {
            bytes: bytes as u64,
            used: arena.used() as u64,
            limit: arena.limit() as u64,
        })
    }

    /// Where consumers of this machine get at the memory, if they can.
    fn open_door(&self) -> Option<Door> {
        let is_shared = self.cfg.shares_memory && self.arena.file().is_some();
        is_shared
            .then(|| Door::new(&door_name(self.terms.boot_id)))?
            .ok()
    }

    /// Lets consumers see the memory who have proved themselves on a control connection.
    fn answer(&self, door: &Door) {
        let Some(file) = self.arena.file() else {
            return;
        };
        while !self.is_stopping() {
            let answered = door.answer(file, |password| {
                let sessions: Vec<_> = self.sessions.lock().values().cloned().collect();
                let session = sessions.iter().find(|session| session.opens_to(password));
                session.is_some_and(|session| session.show_memory())
            });
            if let Err(error) = answered {
                tracing::debug!(%error, "shared memory was asked for in vain");
                // Should nobody ever be heard again, this must not spin.
                thread::park_timeout(Duration::from_millis(1));
            }
        }
    }

    fn append(&self, id: u64, data: Room, n_blocks: u32) -> Result<(), PublishError> {
        let is_there = self
            .leases
            .lock()
            .append(id, data, n_blocks, Instant::now());
        self.leases_changed.notify_all();
        self.wake_sessions();
        is_there.then_some(()).ok_or(PublishError::Gone)
    }

    /// The rest of a lease will not come.
    fn abort(&self, id: u64) {
        self.leases.lock().abort(id);
        self.leases_changed.notify_all();
        self.wake_sessions();
    }

    fn wake_sessions(&self) {
        let sessions: Vec<_> = self.sessions.lock().values().cloned().collect();
        sessions.iter().for_each(|session| session.wake());
    }

    /// Ends leases as their time comes.
    fn reap(&self) {
        let mut leases = self.leases.lock();
        while !self.is_stopping() {
            let n_expired = leases.expire(Instant::now());
            if n_expired > 0 {
                self.counters.expired(n_expired);
                self.leases_changed.notify_all();
                // A session holds its own lock when it asks for ours.
                MutexGuard::unlocked(&mut leases, || self.wake_sessions());
                continue;
            }
            match leases.next_expiry() {
                Some(at) => drop(self.leases_changed.wait_until(&mut leases, at)),
                None => self.leases_changed.wait(&mut leases),
            }
        }
    }

    fn announce_drain(&self) {
        let sessions: Vec<_> = self.sessions.lock().values().cloned().collect();
        sessions.iter().for_each(|session| session.announce_drain());
    }

    fn stop(&self) {
        self.is_stopping.store(true, Ordering::SeqCst);
        self.sockets.lock().values().for_each(crate::net::hang_up);
        self.wake_sessions();
        // Under the lock, so that the reaper is either before its check or in its wait.
        drop(self.leases.lock());
        self.leases_changed.notify_all();
        // The acceptor sits in `accept`; a connection is what wakes it.
        let _ = TcpStream::connect_timeout(&reachable(self.addr), Duration::from_secs(1));
    }

    fn stats(&self) -> ServerStats {
        let mut stats = self.counters.snapshot();
        let leases = self.leases.lock();
        stats.leases = leases.len();
        stats.building = leases.n_building();
        stats.transfers = leases.n_fetched();
        drop(leases);
        stats.lease_bytes = self.arena.used() as u64;
        stats.connections = self.sockets.lock().len();
        stats
    }
}

/// The address under which a listener on `addr` is reached from this machine.
fn reachable(mut addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => addr.set_ip(Ipv4Addr::LOCALHOST.into()),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => addr.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    addr
}

/// Accepts until the server stops, then waits for all connections to end.
fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    for id in 0.. {
        let accepted = listener.accept();
        if shared.is_stopping() {
            break;
        }
        threads.retain(|thread| !thread.is_finished());
        match accepted {
            Ok((stream, _)) => threads.extend(connection::admit(shared, id, stream)),
            Err(error) => {
                // Out of descriptors, most likely; without a pause this would spin.
                tracing::warn!(%error, "cannot accept a connection");
                thread::park_timeout(Duration::from_millis(50));
            }
        }
    }
    for thread in threads {
        // A connection that panicked has taken nobody with it.
        let _ = thread.join();
    }
}

pub(crate) fn spawn(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(name.into())
        .stack_size(STACK_BYTES)
        .spawn(body)
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}
