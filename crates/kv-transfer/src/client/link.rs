//! One producer as the consumer sees it: the leases held there, and the thread that keeps them alive.
//!
//! The thread connects when there is something to say, sends heartbeats and releases, reconnects after a pause,
//! and ends when it has had nothing to do for a while. Holders and droppers only touch a short list.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use baton_kv::{KvTransferParams, Kvx, LeaseToken};
use parking_lot::{Condvar, Mutex};

use super::Shared;
use super::job::Job;
use super::session::Session;
use crate::geometry::Shard;
use crate::net::hang_up;
use crate::server::spawn;
use crate::wire::Message;
use crate::{RejectCode, TransferError};

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

/// What there is of a lease, and what of it is wanted.
#[derive(Debug)]
pub(super) struct Terms {
    /// Of the consumer's size.
    pub(super) n_blocks: u32,
    pub(super) theirs: Shard,
    pub(super) heads: Range<u32>,
}

/// A lease that is kept alive as long as this value is.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) id: u64,
    pub(super) token: LeaseToken,
    pub(super) n_tokens: u32,
    /// Of the consumer's size.
    pub(super) n_blocks: u32,
    /// What the producer has.
    pub(super) theirs: Shard,
    /// What we want of it.
    pub(super) heads: Range<u32>,
    /// Whether its blocks are still being computed, or were when it was announced.
    pub(super) is_early: bool,
    pub(super) peer: Arc<Peer>,
    shared: Arc<Shared>,
    is_consumed: AtomicBool,
}

impl Lease {
    /// Tells the producer at once that nothing more will be fetched; when the last holder lets go nothing is left to say.
    pub(super) fn release(&self, session: &Session) {
        let lease = self.id;
        let is_told = session.say(0, &Message::Release { lease }).is_ok();
        self.is_consumed.store(is_told, Ordering::SeqCst);
    }

    /// Blocks that can be fetched once the KV of `n_tokens` tokens is there.
    pub(super) fn blocks_of(&self, n_tokens: u32) -> u32 {
        if n_tokens >= self.n_tokens {
            self.n_blocks
        } else {
            n_tokens / self.shared.cfg.layout.block_size
        }
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
    held: BTreeMap<u64, Holding>,
    /// Held since the last heartbeat: they may be old, and cannot wait for the next.
    fresh: Vec<u64>,
    /// Bounded by the leases held: each holder leaves at most one.
    to_release: Vec<u64>,
    interval: Option<Duration>,
    link: Link,
    is_over: bool,
}

/// A lease that somebody holds.
#[derive(Debug, Default)]
struct Holding {
    holders: usize,
    /// For a lease that grows: the right to be told how.
    token: Option<LeaseToken>,
    /// Tokens whose KV can be fetched, as far as is known.
    n_ready: u32,
    /// Transfers whose blocks are yet to be computed.
    waiting: Vec<Job>,
}

/// What a link's thread has to say.
struct News {
    to_beat: Vec<u64>,
    to_watch: Vec<(u64, LeaseToken)>,
    /// Transfers that nobody waits for any more.
    cancelled: Vec<Job>,
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
    terms: Terms,
) -> Result<Lease, TransferError> {
    let held = shared.n_held.fetch_add(1, Ordering::Relaxed);
    let counted = || {
        if held >= shared.cfg.max_held as u64 {
            return Err(TransferError::Busy { what: "leases" });
        }
        let ttl = Duration::from_millis(kvx.ttl_ms.into());
        let interval = (ttl / 5).clamp(MIN_INTERVAL, MAX_INTERVAL);
        Peer::hold(shared, params, kvx, interval)
    };
    let peer = counted().inspect_err(|_| {
        shared.n_held.fetch_sub(1, Ordering::Relaxed);
    })?;
    Ok(Lease {
        id: params.uuid,
        token: kvx.tok,
        is_early: kvx.early,
        n_tokens: kvx.n,
        n_blocks: terms.n_blocks,
        theirs: terms.theirs,
        heads: terms.heads,
        peer,
        shared: Arc::clone(shared),
        is_consumed: AtomicBool::new(false),
    })
}

impl Peer {
    fn hold(
        shared: &Arc<Shared>,
        params: &KvTransferParams,
        kvx: &Kvx,
        interval: Duration,
    ) -> Result<Arc<Self>, TransferError> {
        let mut peers = shared.peers.lock();
        if shared.is_stopping() {
            return Err(TransferError::Closed);
        }
        let key = (params.remote_host.clone(), params.remote_port);
        if let Some(peer) = peers.get(&key) {
            peer.add((params.uuid, kvx), interval);
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
        peer.add((params.uuid, kvx), interval);
        let (for_thread, with) = (Arc::clone(&peer), Arc::clone(shared));
        let thread = spawn("kvx-link", move || for_thread.run(&with))
            .map_err(|_| TransferError::Busy { what: "threads" })?;
        let mut links = shared.links.lock();
        links.retain(|link| !link.is_finished());
        links.push(thread);
        peers.insert(key, Arc::clone(&peer));
        Ok(peer)
    }

    fn add(&self, (lease, kvx): (u64, &Kvx), interval: Duration) {
        let mut state = self.state.lock();
        let shortest = if state.held.is_empty() {
            None
        } else {
            state.interval
        };
        state.interval = Some(shortest.map_or(interval, |known| known.min(interval)));
        let holding = state.held.entry(lease).or_default();
        holding.holders += 1;
        if kvx.early {
            holding.token = Some(kvx.tok);
        }
        state.fresh.push(lease);
        self.changed.notify_all();
    }

    /// One holder less; the last one has the lease released, unless it is gone already.
    fn let_go(&self, lease: u64, is_consumed: bool) {
        let mut state = self.state.lock();
        let Some(holding) = state.held.get_mut(&lease) else {
            return;
        };
        holding.holders -= 1;
        if holding.holders > 0 {
            return;
        }
        // Nothing waits any more: a transfer that does is a holder itself.
        state.held.remove(&lease);
        state.fresh.retain(|fresh| *fresh != lease);
        if !is_consumed && !state.is_over {
            state.to_release.push(lease);
        }
        self.changed.notify_all();
    }

    /// Keeps a transfer until its first block is there; gives it back if that is so already. One whose lease is gone is
    /// over.
    pub(super) fn wait(&self, mut job: Job) -> Option<Job> {
        let mut state = self.state.lock();
        let is_over = state.is_over;
        let holding = state.held.get_mut(&job.lease.id).filter(|_| !is_over);
        let Some(holding) = holding else {
            drop(state);
            job.finish(Err(gone()));
            return None;
        };
        job.n_ready = job.lease.blocks_of(holding.n_ready);
        if job.available().is_empty() {
            holding.waiting.push(job);
            return None;
        }
        Some(job)
    }

    /// The KV of more tokens of a lease can be fetched.
    fn grown(&self, shared: &Shared, lease: u64, n_ready: u32) {
        let waiting = {
            let mut state = self.state.lock();
            let Some(holding) = state.held.get_mut(&lease) else {
                return;
            };
            holding.n_ready = holding.n_ready.max(n_ready);
            std::mem::take(&mut holding.waiting)
        };
        for mut job in waiting {
            job.asked = Instant::now();
            shared.start(job);
        }
    }

    /// The blocks that transfers wait for will not come.
    fn end_waiting(&self, leases: impl Fn(u64) -> bool, why: &TransferError) {
        let mut state = self.state.lock();
        let holdings = state.held.iter_mut().filter(|(lease, _)| leases(**lease));
        let over: Vec<Job> = holdings
            .flat_map(|(_, holding)| std::mem::take(&mut holding.waiting))
            .collect();
        drop(state);
        over.into_iter()
            .for_each(|job| job.finish(Err(why.clone())));
    }

    /// Says what is left to say, and ends the thread.
    pub(super) fn stop(&self) {
        self.state.lock().is_over = true;
        self.end_waiting(|_| true, &TransferError::Closed);
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
                Err(error) => self.fail(&error),
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
            let is_needed = !state.held.is_empty() || !state.to_release.is_empty();
            if is_needed && !state.is_over {
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
    fn fail(&self, error: &TransferError) {
        tracing::debug!(host = self.host, port = self.port, %error, "cannot reach a producer");
        let until = Instant::now() + RETRY_PAUSE;
        let mut state = self.state.lock();
        state.link = Link::Failed(error.clone());
        state.to_release.clear();
        self.changed.notify_all();
        drop(state);
        self.end_waiting(|_| true, error);
        let mut state = self.state.lock();
        while !state.is_over && !self.changed.wait_until(&mut state, until).timed_out() {}
    }

    /// Sends heartbeats and releases for as long as the connection lives and is needed.
    fn converse(self: &Arc<Self>, shared: &Arc<Shared>, session: &Arc<Session>) {
        let (peer, with, for_reader) = (Arc::clone(self), Arc::clone(shared), Arc::clone(session));
        let listen = move || peer.listen(&with, &for_reader);
        let Ok(reader) = spawn("kvx-listen", listen) else {
            return self.fail(&TransferError::Busy { what: "threads" });
        };
        {
            let mut state = self.state.lock();
            state.link = Link::Up(Arc::clone(session));
            // The producer has forgotten, if it ever knew, who watches.
            state.fresh = state.held.keys().copied().collect();
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
            for (lease, token) in news.to_watch {
                session.say(0, &Message::Watch { lease, token })?;
            }
            for job in news.cancelled {
                job.finish(Err(TransferError::Cancelled));
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
        let token = |lease: &u64| Some((*lease, state.held.get(lease)?.token?));
        let to_watch = fresh.iter().filter_map(token).collect();
        let is_cancelled = |job: &mut Job| job.cancel.is_cancelled();
        let waiting = state.held.values_mut().map(|holding| &mut holding.waiting);
        let cancelled = waiting
            .flat_map(|jobs| jobs.extract_if(.., is_cancelled))
            .collect();
        let is_due = Instant::now() >= next_beat;
        News {
            to_beat: if is_due {
                state.held.keys().copied().collect()
            } else {
                fresh
            },
            to_watch,
            cancelled,
            released: std::mem::take(&mut state.to_release),
            is_idle: state.held.is_empty(),
            is_over: state.is_over,
        }
    }

    fn interval(&self) -> Duration {
        self.state.lock().interval.unwrap_or(MAX_INTERVAL)
    }

    /// Reads what the producer says until the connection ends.
    fn listen(&self, shared: &Shared, session: &Session) {
        let why = loop {
            let silence = (self.interval() * MAX_SILENCE).max(MAX_INTERVAL * 2);
            match session.listen(Instant::now() + silence) {
                Ok(Some(Message::Ping { id })) => {
                    if let Err(error) = session.say(0, &Message::Pong { id }) {
                        break error;
                    }
                }
                Ok(Some(Message::HeartbeatAck { remaining_ms })) => {
                    let gone = remaining_ms.iter().filter(|(_, ms)| *ms == 0);
                    gone.for_each(|(lease, _)| self.forget(*lease));
                }
                Ok(Some(Message::Released { lease })) => self.forget(lease),
                Ok(Some(Message::Ready { lease, n_tokens })) => self.grown(shared, lease, n_tokens),
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        session.end(why);
        // Under the lock, so that a waiter is either before its check or in its wait.
        drop(self.state.lock());
        self.changed.notify_all();
    }

    /// No further heartbeats, and no release, for a lease that the producer does not have.
    fn forget(&self, lease: u64) {
        self.end_waiting(|gone| gone == lease, &gone());
        self.state.lock().held.remove(&lease);
    }
}

/// What a transfer ends with whose lease ended before.
fn gone() -> TransferError {
    TransferError::Rejected(RejectCode::Expired)
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
