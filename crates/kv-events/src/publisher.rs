//! Publishes an engine's cache: a PUB socket for what happens, a ROUTER socket for what happened.
//!
//! One task numbers and writes batches into the log; every peer is a task of its own that reads from the log at its own
//! pace. Who is too slow skips batches and sees it by their numbers.

mod feed;
mod live;
mod log;
mod replay;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::config::PublisherConfig;
use crate::encode::encode;
use crate::endpoint::Endpoint;

pub use feed::Feed;
use feed::Step;
use log::Log;

/// Batches published between two looks at the clock of who waits for them.
const AT_ONCE: usize = 256;

/// What publishing has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublisherStats {
    /// Batches published.
    pub batches: u64,
    /// Events in these.
    pub events: u64,
    /// Times that more waited than may, and that followers were told instead that nothing is cached.
    pub overflows: u64,
    /// Batches that subscribers missed because they were too slow.
    pub skipped: u64,
    /// Replays answered.
    pub replays: u64,
    /// Peers that are subscribed now.
    pub subscribers: u64,
}

#[derive(Debug, Default)]
struct Counters {
    batches: AtomicU64,
    events: AtomicU64,
    overflows: AtomicU64,
    skipped: AtomicU64,
    replays: AtomicU64,
    subscribers: AtomicU64,
}

/// What the tasks share.
#[derive(Debug)]
struct Shared {
    log: Mutex<Log>,
    /// The number of the next batch, for those who wait for it.
    next: watch::Sender<u64>,
    counters: Arc<Counters>,
    config: PublisherConfig,
}

/// A publisher at work; ends when dropped.
#[derive(Debug)]
pub struct Publisher {
    shared: Arc<Shared>,
    /// Where it listens; `None` if it connects to who subscribes.
    pub local: Option<SocketAddr>,
    /// Where it answers replays.
    pub replay: Option<SocketAddr>,
    _tasks: JoinSet<()>,
}

impl Publisher {
    /// Starts to listen, and gives back where the changes go. Blocks have `block_size` tokens.
    ///
    /// # Errors
    /// When an address is not to be had.
    pub async fn start(config: PublisherConfig, block_size: u32) -> io::Result<(Self, Feed)> {
        let listener = match &config.endpoint {
            Endpoint::Bind(address) => Some(TcpListener::bind(address).await?),
            Endpoint::Connect(_) => None,
        };
        let replays = match config.replay {
            Some(address) => Some(TcpListener::bind(address).await?),
            None => None,
        };
        let address_of =
            |l: &Option<TcpListener>| l.as_ref().map(TcpListener::local_addr).transpose();
        let (local, replay) = (address_of(&listener)?, address_of(&replays)?);
        let counters = Arc::<Counters>::default();
        let (queue, steps) = mpsc::channel(config.max_queue_size);
        let feed = Feed::new(queue, Arc::clone(&counters));
        let shared = Arc::new(Shared {
            log: Mutex::new(Log::new(config.hwm.max(config.buffer_steps))),
            next: watch::Sender::new(0),
            counters,
            config,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(publish(Arc::clone(&shared), steps, block_size));
        match (listener, &shared.config.endpoint) {
            (Some(listener), _) => tasks.spawn(live::listen(Arc::clone(&shared), listener)),
            (None, Endpoint::Connect(peer)) => {
                tasks.spawn(live::connect(Arc::clone(&shared), peer.clone()))
            }
            (None, Endpoint::Bind(_)) => unreachable!("what is bound has a listener"),
        };
        if let Some(replays) = replays {
            tasks.spawn(replay::listen(Arc::clone(&shared), replays));
        }
        let publisher = Self {
            shared,
            local,
            replay,
            _tasks: tasks,
        };
        Ok((publisher, feed))
    }

    /// The counters as they are.
    #[must_use]
    pub fn stats(&self) -> PublisherStats {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PublisherStats {
            batches: read(&counters.batches),
            events: read(&counters.events),
            overflows: read(&counters.overflows),
            skipped: read(&counters.skipped),
            replays: read(&counters.replays),
            subscribers: read(&counters.subscribers),
        }
    }
}

/// Numbers and writes batches as they come, one a step.
async fn publish(shared: Arc<Shared>, mut steps: mpsc::Receiver<Step>, block_size: u32) {
    let mut at_once = Vec::with_capacity(AT_ONCE);
    while steps.recv_many(&mut at_once, AT_ONCE).await > 0 {
        for step in at_once.drain(..) {
            let mut batch = Vec::new();
            encode(
                step.ts,
                &step.changes,
                block_size,
                shared.config.form,
                &mut batch,
            );
            let counters = &shared.counters;
            counters.batches.fetch_add(1, Ordering::Relaxed);
            let n_events = step.changes.len() as u64;
            counters.events.fetch_add(n_events, Ordering::Relaxed);
            shared.log.lock().push(Bytes::from(batch));
        }
        shared.next.send_replace(shared.log.lock().next());
    }
}
