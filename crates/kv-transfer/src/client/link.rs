//! One producer as the consumer sees it: the leases held there, and the thread that keeps them alive.
//!
//! The thread connects when there is something to say, sends heartbeats and releases, reconnects after a pause,
//! and ends when it has had nothing to do for a while. Holders and droppers only touch a short list.

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
use crate::holdings::{Holdings, News};
use crate::server::spawn;
use crate::wire::Message;
use crate::{RejectCode, TransferError};

/// Between two attempts to reach a producer.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

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
        let (lease, token) = (self.id, self.token);
        let is_told = session.say(0, &Message::Release { lease, token }).is_ok();
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
    holdings: Holdings<Job>,
    link: Link,
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
        Peer::hold(shared, params, kvx)
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
    ) -> Result<Arc<Self>, TransferError> {
        let mut peers = shared.peers.lock();
        if shared.is_stopping() {
            return Err(TransferError::Closed);
        }
        let key = (params.remote_host.clone(), params.remote_port);
        if let Some(peer) = peers.get(&key) {
            peer.add(params.uuid, kvx)?;
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
        peer.add(params.uuid, kvx)?;
        let (for_thread, with) = (Arc::clone(&peer), Arc::clone(shared));
        let thread = spawn("kvx-link", move || for_thread.run(&with))
            .map_err(|_| TransferError::Busy { what: "threads" })?;
        let mut links = shared.links.lock();
        links.retain(|link| !link.is_finished());
        links.push(thread);
        peers.insert(key, Arc::clone(&peer));
        Ok(peer)
    }

    fn add(&self, lease: u64, kvx: &Kvx) -> Result<(), TransferError> {
        let ttl = Duration::from_millis(kvx.ttl_ms.into());
        let holdings = &mut self.state.lock().holdings;
        let is_held = holdings.hold(lease, kvx.tok, kvx.early, ttl);
        self.changed.notify_all();
        let why = TransferError::Rejected(RejectCode::BadToken);
        is_held.then_some(()).ok_or(why)
    }

    /// One holder less; the last one has the lease released, unless it is gone already.
    fn let_go(&self, lease: u64, is_consumed: bool) {
        let mut state = self.state.lock();
        let is_to_be_said = !is_consumed && !state.is_over;
        state.holdings.let_go(lease, is_to_be_said);
        self.changed.notify_all();
    }

    /// Keeps a transfer until its first block is there; gives it back if that is so already. One whose lease is gone is
    /// over.
    pub(super) fn wait(&self, mut job: Job) -> Option<Job> {
        let mut state = self.state.lock();
        let lease = job.lease.id;
        let n_ready = state.holdings.n_ready(lease).filter(|_| !state.is_over);
        let Some(n_ready) = n_ready else {
            drop(state);
            job.finish(Err(gone()));
            return None;
        };
        job.n_ready = job.lease.blocks_of(n_ready);
        if job.available().is_empty() {
            state.holdings.keep(lease, job);
            return None;
        }
        Some(job)
    }

    /// The KV of more tokens of a lease can be fetched.
    fn grown(&self, shared: &Shared, lease: u64, n_ready: u32) {
        let waiting = self.state.lock().holdings.grown(lease, n_ready);
        for mut job in waiting {
            job.asked = Instant::now();
            shared.start(job);
        }
    }

    /// Says what is left to say, and ends the thread.
    pub(super) fn stop(&self) {
        let waiting = {
            let mut state = self.state.lock();
            state.is_over = true;
            state.holdings.end_waiting()
        };
        finish(waiting, &TransferError::Closed);
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
            if state.holdings.is_needed() && !state.is_over {
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
        if !state.is_over && !state.holdings.is_empty() {
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
        let waiting = state.holdings.unreachable();
        self.changed.notify_all();
        drop(state);
        finish(waiting, error);
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
            state.holdings.reconnected();
            self.changed.notify_all();
        }
        let why = self
            .keep_alive(shared, session)
            .err()
            .unwrap_or(TransferError::Closed);
        session.end(why);
        // It ends because the connection has.
        let _ = reader.join();
    }

    fn keep_alive(&self, shared: &Shared, session: &Session) -> Result<(), TransferError> {
        let mut last_use = Instant::now();
        let mut next_beat = Instant::now();
        loop {
            let (news, is_over) = self.news(next_beat, session);
            if let Some(why) = session.ended() {
                return Err(why);
            }
            let mut messages = news.messages.iter();
            messages.try_for_each(|message| session.say(0, message))?;
            finish(news.cancelled, &TransferError::Cancelled);
            let now = Instant::now();
            if !news.is_idle {
                last_use = now;
            }
            if is_over || now.saturating_duration_since(last_use) >= shared.cfg.linger {
                return Ok(());
            }
            if now >= next_beat {
                next_beat = now + self.state.lock().holdings.interval();
            }
        }
    }

    /// Waits until a heartbeat is due, a lease is new or to be released, or the end has come.
    fn news(&self, next_beat: Instant, session: &Session) -> (News<Job>, bool) {
        let mut state = self.state.lock();
        while !state.is_over
            && !state.holdings.is_pressing()
            && Instant::now() < next_beat
            && session.ended().is_none()
        {
            self.changed.wait_until(&mut state, next_beat);
        }
        let is_due = Instant::now() >= next_beat;
        let is_cancelled = |job: &Job| job.cancel.is_cancelled();
        (state.holdings.news(is_due, is_cancelled), state.is_over)
    }

    /// Reads what the producer says until the connection ends.
    fn listen(&self, shared: &Shared, session: &Session) {
        let why = loop {
            let patience = self.state.lock().holdings.patience();
            match session.listen(Instant::now() + patience) {
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

    fn forget(&self, lease: u64) {
        let waiting = self.state.lock().holdings.forget(lease);
        finish(waiting, &gone());
    }
}

fn finish(jobs: Vec<Job>, why: &TransferError) {
    jobs.into_iter()
        .for_each(|job| job.finish(Err(why.clone())));
}

/// What a transfer ends with whose lease ended before.
fn gone() -> TransferError {
    TransferError::Rejected(RejectCode::Expired)
}
