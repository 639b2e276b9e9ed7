//! One producer as the consumer sees it: the leases held there, and the thread that keeps them alive.
//!
//! The thread connects when there is something to say, sends heartbeats and releases, reconnects after a pause,
//! and ends when it has had nothing to do for a while. Holders and droppers only touch a short list.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use baton_kv::{KvTransferParams, Kvx};
use parking_lot::{Condvar, Mutex};

use super::Shared;
use super::session::Session;
use crate::TransferError;
use crate::net::hang_up;
use crate::server::spawn;
use crate::wire::Message;

/// Between two attempts to reach a producer.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// Longest time between heartbeats.
const MAX_INTERVAL: Duration = Duration::from_secs(3);
/// Shortest time between heartbeats.
const MIN_INTERVAL: Duration = Duration::from_millis(10);
/// Leases in one heartbeat.
const MAX_HEARTBEAT: usize = 1 << 14;
/// Intervals without an answer after which a connection counts as dead.
const MAX_SILENCE: u32 = 3;

/// A lease that is kept alive as long as this value is.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) id: u64,
    pub(super) token: [u8; 32],
    pub(super) n_tokens: u32,
    pub(super) n_blocks: u32,
    pub(super) peer: Arc<Peer>,
    shared: Arc<Shared>,
    is_consumed: AtomicBool,
}

impl Lease {
    /// The producer has freed it: nothing is left to release.
    pub(super) fn consumed(&self) {
        self.is_consumed.store(true, Ordering::SeqCst);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.shared.n_held.fetch_sub(1, Ordering::Relaxed);
        self.peer
            .let_go(self.id, self.is_consumed.load(Ordering::SeqCst));
    }
}

/// A producer.
#[derive(Debug)]
pub(super) struct Peer {
    host: String,
    port: u16,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Holders of each lease.
    held: BTreeMap<u64, usize>,
    /// Held since the last heartbeat: they may be old, and cannot wait for the next.
    fresh: Vec<u64>,
    /// Bounded by the leases held: each holder leaves at most one.
    to_release: Vec<u64>,
    interval: Option<Duration>,
    link: Link,
    is_over: bool,
}

/// What a link's thread has to say.
struct News {
    to_beat: Vec<u64>,
    released: Vec<u64>,
    is_idle: bool,
    is_over: bool,
}

#[derive(Clone, Debug, Default)]
enum Link {
    #[default]
    Connecting,
    Up(Arc<Session>),
    Failed(TransferError),
}

/// Takes hold of a lease, and starts its producer's thread if it does not run yet.
pub(super) fn hold(
    shared: &Arc<Shared>,
    params: &KvTransferParams,
    kvx: &Kvx,
    n_blocks: u32,
) -> Result<Lease, TransferError> {
    let held = shared.n_held.fetch_add(1, Ordering::Relaxed);
    let counted = || {
        if held >= shared.cfg.max_held as u64 {
            return Err(TransferError::Busy { what: "leases" });
        }
        let ttl = Duration::from_millis(kvx.ttl_ms.into());
        Peer::hold(shared, params, (ttl / 5).clamp(MIN_INTERVAL, MAX_INTERVAL))
    };
    let peer = counted().inspect_err(|_| {
        shared.n_held.fetch_sub(1, Ordering::Relaxed);
    })?;
    Ok(Lease {
        id: params.uuid,
        token: kvx.tok.0,
        n_tokens: kvx.n,
        n_blocks,
        peer,
        shared: Arc::clone(shared),
        is_consumed: AtomicBool::new(false),
    })
}

impl Peer {
    fn hold(
        shared: &Arc<Shared>,
        params: &KvTransferParams,
        interval: Duration,
    ) -> Result<Arc<Self>, TransferError> {
        let mut peers = shared.peers.lock();
        if shared.is_stopping() {
            return Err(TransferError::Closed);
        }
        let key = (params.remote_host.clone(), params.remote_port);
        if let Some(peer) = peers.get(&key) {
            peer.add(params.uuid, interval);
            return Ok(Arc::clone(peer));
        }
        if peers.len() >= shared.cfg.max_peers {
            return Err(TransferError::Busy { what: "producers" });
        }
        let peer = Arc::new(Self {
            host: key.0.clone(),
            port: key.1,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        peer.add(params.uuid, interval);
        let (for_thread, with) = (Arc::clone(&peer), Arc::clone(shared));
        let thread = spawn("kvx-link", move || for_thread.run(&with))
            .map_err(|_| TransferError::Busy { what: "threads" })?;
        let mut links = shared.links.lock();
        links.retain(|link| !link.is_finished());
        links.push(thread);
        peers.insert(key, Arc::clone(&peer));
        Ok(peer)
    }

    fn add(&self, lease: u64, interval: Duration) {
        let mut state = self.state.lock();
        let shortest = if state.held.is_empty() {
            None
        } else {
            state.interval
        };
        state.interval = Some(shortest.map_or(interval, |known| known.min(interval)));
        *state.held.entry(lease).or_insert(0) += 1;
        state.fresh.push(lease);
        self.changed.notify_all();
    }

    /// One holder less; the last one has the lease released, unless it is gone already.
    fn let_go(&self, lease: u64, is_consumed: bool) {
        let mut state = self.state.lock();
        let Some(holders) = state.held.get_mut(&lease) else {
            return;
        };
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        state.held.remove(&lease);
        state.fresh.retain(|fresh| *fresh != lease);
        if !is_consumed && !state.is_over {
            state.to_release.push(lease);
        }
        self.changed.notify_all();
    }

    /// Says what is left to say, and ends the thread.
    pub(super) fn stop(&self) {
        let mut state = self.state.lock();
        state.is_over = true;
        self.changed.notify_all();
    }

    /// The connection, as soon as there is one. A producer that cannot be reached is an error at once, not at
    /// the deadline.
    pub(super) fn session(
        &self,
        deadline: Instant,
        stop: impl Fn() -> Option<TransferError>,
    ) -> Result<Arc<Session>, TransferError> {
        let begun = Instant::now();
        let mut state = self.state.lock();
        loop {
            if let Some(why) = stop() {
                return Err(why);
            }
            match &state.link {
                Link::Up(session) if session.ended().is_none() => return Ok(Arc::clone(session)),
                Link::Failed(error) => return Err(error.clone()),
                Link::Up(_) | Link::Connecting => {}
            }
            if state.is_over {
                return Err(TransferError::Closed);
            }
            if Instant::now() >= deadline {
                let after = begun.elapsed();
                return Err(TransferError::TimedOut {
                    what: "connecting",
                    after,
                });
            }
            self.changed.wait_for(&mut state, super::pull::CANCEL_CHECK);
        }
    }

    fn run(self: &Arc<Self>, shared: &Arc<Shared>) {
        while self.await_use(shared) {
            let link = Session::connect(shared, &self.host, self.port);
            match link {
                Ok(session) => self.converse(shared, &Arc::new(session)),
                Err(error) => self.fail(error),
            }
        }
        self.state.lock().link = Link::Failed(TransferError::Closed);
        self.changed.notify_all();
    }

    /// Waits until a connection is needed. Returns false when the thread has nothing to live for.
    fn await_use(&self, shared: &Shared) -> bool {
        let deadline = Instant::now() + shared.cfg.linger;
        loop {
            let mut state = self.state.lock();
            // An old failure says nothing about the next attempt.
            state.link = Link::Connecting;
            // Releases alone are no reason to connect: those leases end by themselves.
            if !state.is_over && !state.held.is_empty() {
                return true;
            }
            let is_late = Instant::now() >= deadline;
            if !state.is_over && !is_late {
                self.changed.wait_until(&mut state, deadline);
                continue;
            }
            drop(state);
            if self.retire(shared) {
                return false;
            }
        }
    }

    /// Leaves the list of peers, unless somebody has come meanwhile.
    fn retire(&self, shared: &Shared) -> bool {
        let mut peers = shared.peers.lock();
        let mut state = self.state.lock();
        if !state.is_over && !state.held.is_empty() {
            return false;
        }
        state.is_over = true;
        peers.remove(&(self.host.clone(), self.port));
        true
    }

    /// Lets waiting transfers know, and pauses.
    fn fail(&self, error: TransferError) {
        tracing::debug!(host = self.host, port = self.port, %error, "cannot reach a producer");
        let until = Instant::now() + RETRY_PAUSE;
        let mut state = self.state.lock();
        state.link = Link::Failed(error);
        state.to_release.clear();
        self.changed.notify_all();
        while !state.is_over && !self.changed.wait_until(&mut state, until).timed_out() {}
    }

    /// Sends heartbeats and releases for as long as the connection lives and is needed.
    fn converse(self: &Arc<Self>, shared: &Arc<Shared>, session: &Arc<Session>) {
        let (peer, for_reader) = (Arc::clone(self), Arc::clone(session));
        let Ok(reader) = spawn("kvx-listen", move || peer.listen(&for_reader)) else {
            return self.fail(TransferError::Busy { what: "threads" });
        };
        {
            let mut state = self.state.lock();
            state.link = Link::Up(Arc::clone(session));
            self.changed.notify_all();
        }
        let why = self
            .keep_alive(shared, session)
            .err()
            .unwrap_or(TransferError::Closed);
        session.end(why);
        hang_up(&session.control);
        // It ends because the connection has.
        let _ = reader.join();
    }

    fn keep_alive(&self, shared: &Shared, session: &Session) -> Result<(), TransferError> {
        let mut last_use = Instant::now();
        let mut next_beat = Instant::now();
        loop {
            let news = self.news(next_beat, session);
            if let Some(why) = session.ended() {
                return Err(why);
            }
            for lease in news.released {
                session.say(0, &Message::Release { lease })?;
            }
            let now = Instant::now();
            if !news.is_idle {
                last_use = now;
            }
            if news.is_over || now.saturating_duration_since(last_use) >= shared.cfg.linger {
                return Ok(());
            }
            beat(session, &news.to_beat)?;
            if now >= next_beat {
                next_beat = now + self.interval();
                if news.is_idle {
                    session.say(0, &Message::Ping { id: 0 })?;
                }
            }
        }
    }

    /// Waits until a heartbeat is due, a lease is new or to be released, or the end has come.
    fn news(&self, next_beat: Instant, session: &Session) -> News {
        let mut state = self.state.lock();
        while !state.is_over
            && state.to_release.is_empty()
            && state.fresh.is_empty()
            && Instant::now() < next_beat
            && session.ended().is_none()
        {
            self.changed.wait_until(&mut state, next_beat);
        }
        let fresh = std::mem::take(&mut state.fresh);
        let is_due = Instant::now() >= next_beat;
        News {
            to_beat: if is_due {
                state.held.keys().copied().collect()
            } else {
                fresh
            },
            released: std::mem::take(&mut state.to_release),
            is_idle: state.held.is_empty(),
            is_over: state.is_over,
        }
    }

    fn interval(&self) -> Duration {
        self.state.lock().interval.unwrap_or(MAX_INTERVAL)
    }

    /// Reads what the producer says until the connection ends.
    fn listen(&self, session: &Session) {
        let why = loop {
            let silence = (self.interval() * MAX_SILENCE).max(MAX_INTERVAL * 2);
            match session.listen(Instant::now() + silence) {
                Ok(Some(Message::Ping { id })) => {
                    if let Err(error) = session.say(0, &Message::Pong { id }) {
                        break error;
                    }
                }
                Ok(Some(Message::HeartbeatAck { remaining_ms })) => self.forget_gone(&remaining_ms),
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        session.end(why);
        // Under the lock, so that a waiter is either before its check or in its wait.
        drop(self.state.lock());
        self.changed.notify_all();
    }

    /// No further heartbeats, and no release, for leases that the producer does not have.
    fn forget_gone(&self, remaining_ms: &[(u64, u32)]) {
        let mut state = self.state.lock();
        for (lease, _) in remaining_ms.iter().filter(|(_, ms)| *ms == 0) {
            state.held.remove(lease);
        }
    }
}

/// Tells the producer which leases are still wanted.
fn beat(session: &Session, leases: &[u64]) -> Result<(), TransferError> {
    leases.chunks(MAX_HEARTBEAT).try_for_each(|leases| {
        session.say(
            0,
            &Message::Heartbeat {
                leases: leases.to_vec(),
            },
        )
    })
}
