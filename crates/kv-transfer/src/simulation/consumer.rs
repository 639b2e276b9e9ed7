//! A consumer's process: the real holdings, handshakes and fetches, and what its threads do around them.
//!
//! The threads' rules are those of `client`: a link connects when it has something to say, says its news, counts a silent
//! producer as dead and pauses after a failure (`link`); a session numbers transfers and lends data connections (`session`);
//! a worker waits for memory and a session, runs its stripes side by side and joins them (`pull`); what waits for a worker
//! ends when it is cancelled or late (`queue`). Memory is counted as `memory` counts it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;

use super::arena::SharedArena;
use super::net::{At, ConnId};
use super::producer::Producer;
use super::pull::Running;
use super::{Air, IDLE, LINGER, Params, RETRY_PAUSE, TOTAL, TTL};
use crate::geometry::Shard;
use crate::handshake::{ConsumerHandshake, Step, hello};
use crate::holdings::Holdings;
use crate::secret::{ConnKey, Secret, UNBOUND};
use crate::wire::{
    Lent, MAX_BODY, MAX_BODY_BEFORE_AUTH, Message, Preface, Role, WireError, encode_frame,
};
use crate::{RejectCode, TransferError};

/// How a consumer runs.
#[derive(Debug)]
pub(super) struct Cfg {
    pub(super) secret: Secret,
    /// What it wants of a model, in its own block size.
    pub(super) ours: Shard,
    pub(super) window: u64,
    pub(super) n_streams: usize,
    pub(super) n_workers: usize,
    pub(super) stripe_bytes: usize,
    pub(super) budget: usize,
    /// Whether it is on the producers' machine.
    pub(super) shares_memory: bool,
}

#[derive(Debug)]
pub(super) struct Consumer {
    pub(super) cfg: Cfg,
    boot_id: u64,
    /// By producer.
    links: BTreeMap<usize, Link>,
    /// By their control connections; those that have ended stay while transfers look at them.
    pub(super) sessions: BTreeMap<ConnId, Session>,
    queue: VecDeque<Job>,
    pub(super) running: Vec<Running>,
    /// Bytes of results that the caller still has.
    kept: Vec<usize>,
    /// Of the budget.
    pub(super) lent: usize,
    /// Leases that are held beyond their transfer.
    handles: Vec<(usize, u64)>,
    pub(super) tally: Tally,
    /// Why transfers failed.
    pub(super) failures: Vec<TransferError>,
}

/// What became of transfers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) asked: usize,
    pub(super) whole: usize,
    pub(super) partial: usize,
    pub(super) failed: usize,
    pub(super) lost: usize,
    pub(super) copied: usize,
}

#[derive(Debug, Default)]
struct Link {
    holdings: Holdings<Job>,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    Greeting {
        conn: ConnId,
        handshake: Option<ConsumerHandshake>,
        boot_id: u64,
        deadline: Instant,
    },
    Up {
        session: ConnId,
        next_beat: Instant,
        last_use: Instant,
        last_heard: Instant,
    },
    Failed {
        why: TransferError,
        until: Instant,
    },
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) producer: usize,
    /// The producer's name of it.
    name: u64,
    key: ConnKey,
    pub(super) view: Option<SharedArena>,
    running: BTreeMap<u32, Events>,
    last: u32,
    pub(super) ended: Option<TransferError>,
    pub(super) idle: Vec<(u16, ConnId)>,
    pub(super) n_open: usize,
}

#[derive(Debug)]
struct Events {
    messages: VecDeque<Message>,
    socket: Option<ConnId>,
    is_accepted: bool,
}

impl Session {
    /// Numbers a transfer.
    pub(super) fn register(&mut self, socket: Option<ConnId>) -> Result<u32, TransferError> {
        if let Some(why) = &self.ended {
            return Err(why.clone());
        }
        self.last += 1;
        let events = Events {
            messages: VecDeque::new(),
            socket,
            is_accepted: false,
        };
        self.running.insert(self.last, events);
        Ok(self.last)
    }

    pub(super) fn unregister(&mut self, xfer: u32) {
        self.running.remove(&xfer);
    }

    /// What has been said about a transfer; an error once the session has ended.
    pub(super) fn event(&mut self, xfer: u32) -> Result<Option<Message>, TransferError> {
        match self.running.get_mut(&xfer) {
            Some(events) => Ok(events.messages.pop_front()),
            None => Err(self.ended.clone().unwrap_or(TransferError::Closed)),
        }
    }

    pub(super) fn events(&mut self, xfer: u32) -> Vec<Message> {
        let events = self.running.get_mut(&xfer);
        events.map_or_else(Vec::new, |events| events.messages.drain(..).collect())
    }

    fn deliver(&mut self, xfer: u32, message: Message, air: &mut Air) {
        let Some(events) = self.running.get_mut(&xfer) else {
            return;
        };
        events.is_accepted |= matches!(message, Message::Accept { .. });
        let is_late = events.is_accepted && matches!(message, Message::Reject { .. });
        events.messages.push_back(message);
        if is_late && let Some(socket) = events.socket {
            air.net.close(socket, At::Consumer);
        }
    }

    pub(super) fn end(&mut self, conn: ConnId, why: TransferError, air: &mut Air) {
        self.ended.get_or_insert(why);
        air.net.close(conn, At::Consumer);
        let sockets = self.running.values().filter_map(|events| events.socket);
        let idle = self.idle.drain(..).map(|(_, conn)| conn);
        sockets
            .chain(idle)
            .for_each(|conn| air.net.close(conn, At::Consumer));
        self.running.clear();
    }
}

/// A transfer that was asked for.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) params: Rc<Params>,
    pub(super) heads: Range<u32>,
    pub(super) blocks: Range<u32>,
    pub(super) n_blocks: u32,
    n_ready: u32,
    pub(super) asked: Instant,
    pub(super) is_cancelled: bool,
}

impl Job {
    pub(super) fn available(&self) -> Range<u32> {
        self.blocks.start..self.blocks.end.min(self.n_ready)
    }

    fn grow(&mut self, n_tokens: u32, block_size: u32) {
        self.n_ready = match n_tokens >= self.params.n_tokens {
            true => self.n_blocks,
            false => n_tokens / block_size,
        };
    }
}

/// Says something on a control connection; `false` if it is closed.
pub(super) fn say(air: &mut Air, session: ConnId, stream: u16, message: &Message) -> bool {
    air.net
        .send(session, At::Producer, encode_frame(stream, message))
}

impl Consumer {
    pub(super) fn new(cfg: Cfg, air: &mut Air) -> Self {
        Self {
            cfg,
            boot_id: air.dice.roll(),
            links: BTreeMap::new(),
            sessions: BTreeMap::new(),
            queue: VecDeque::new(),
            running: Vec::new(),
            kept: Vec::new(),
            lent: 0,
            handles: Vec::new(),
            tally: Tally::default(),
            failures: Vec::new(),
        }
    }

    /// The process dies and another takes its place.
    pub(super) fn restart(&mut self, air: &mut Air) {
        let links = std::mem::take(&mut self.links);
        for link in links.into_values() {
            if let State::Greeting { conn, .. } = link.state {
                air.net.close(conn, At::Consumer);
            }
        }
        for (conn, mut session) in std::mem::take(&mut self.sessions) {
            session.end(conn, TransferError::Closed, air);
        }
        let stripes = self.running.drain(..).flat_map(|running| running.stripes);
        stripes.for_each(|stripe| stripe.hang_up(air));
        self.boot_id = air.dice.roll();
        self.queue.clear();
        self.kept.clear();
        self.handles.clear();
        self.lent = 0;
        self.tally.lost =
            self.tally.asked - self.tally.whole - self.tally.partial - self.tally.failed;
    }

    /// Takes hold of a lease and asks for its blocks from `from` on, as its own size counts them; the last if there are fewer.
    ///
    /// Who was told of the lease early waits for what is yet to be computed.
    pub(super) fn pull(
        &mut self,
        params: &Rc<Params>,
        (from, is_early): (u32, bool),
        now: Instant,
    ) {
        self.tally.asked += 1;
        let (ours, theirs) = (&self.cfg.ours, &params.theirs);
        let heads = ours.heads.start.max(theirs.heads.start)..ours.heads.end.min(theirs.heads.end);
        if heads.is_empty() || ours.layout.model_fingerprint != theirs.layout.model_fingerprint {
            // Where the parameters are checked, before anything is held.
            self.tally.failed += 1;
            return;
        }
        let n_blocks = ours.layout.blocks_for(params.n_tokens as usize) as u32;
        let job = Job {
            params: Rc::clone(params),
            heads,
            blocks: from.min(n_blocks - 1)..n_blocks,
            n_blocks,
            n_ready: if is_early { 0 } else { n_blocks },
            asked: now,
            is_cancelled: false,
        };
        match self.hold(params) {
            true => self.start(job),
            // It is held by another right.
            false => self.tally.failed += 1,
        }
    }

    fn hold(&mut self, params: &Params) -> bool {
        let link = self.links.entry(params.producer).or_default();
        link.holdings.hold(params.lease, params.token, true, TTL)
    }

    /// Holds a lease without fetching.
    pub(super) fn keep_alive(&mut self, params: &Params) {
        if self.hold(params) {
            self.handles.push((params.producer, params.lease));
        }
    }

    /// Lets go of such a lease, and of a result.
    pub(super) fn let_go(&mut self, air: &mut Air) {
        if !self.handles.is_empty() {
            let i = air.dice.below(self.handles.len());
            let (producer, lease) = self.handles.swap_remove(i);
            self.unhold(producer, lease, true);
        }
        if !self.kept.is_empty() {
            let i = air.dice.below(self.kept.len());
            self.lent -= self.kept.swap_remove(i);
        }
    }

    fn unhold(&mut self, producer: usize, lease: u64, is_to_be_said: bool) {
        if let Some(link) = self.links.get_mut(&producer) {
            link.holdings.let_go(lease, is_to_be_said);
        }
    }

    /// One of the transfers is not wanted any more.
    pub(super) fn cancel(&mut self, air: &mut Air) {
        let n = self.queue.len() + self.running.len();
        if n == 0 {
            return;
        }
        let i = air.dice.below(n);
        match self.running.get_mut(i) {
            Some(running) => running.cancel(air),
            None => self.queue[i - self.running.len()].is_cancelled = true,
        }
    }

    /// Queues a transfer; one whose blocks are yet to be computed waits for them first.
    pub(super) fn start(&mut self, mut job: Job) {
        if !job.available().is_empty() {
            return self.queue.push_back(job);
        }
        let link = self.links.entry(job.params.producer).or_default();
        let Some(n_tokens) = link.holdings.n_ready(job.params.lease) else {
            return self.finish(
                &job,
                Err(TransferError::Rejected(RejectCode::Expired)),
                false,
            );
        };
        job.grow(n_tokens, self.cfg.ours.layout.block_size);
        if job.available().is_empty() {
            return link.holdings.keep(job.params.lease, job);
        }
        self.queue.push_back(job);
    }

    /// The last word about a transfer; `Ok` says whether all came.
    pub(super) fn finish(&mut self, job: &Job, ended: Result<bool, TransferError>, is_told: bool) {
        match ended {
            Ok(true) => self.tally.whole += 1,
            Ok(false) => self.tally.partial += 1,
            Err(why) => {
                self.tally.failed += 1;
                self.failures.push(why);
            }
        }
        self.unhold(job.params.producer, job.params.lease, !is_told);
    }

    fn finish_all(&mut self, jobs: Vec<Job>, why: &TransferError) {
        let all = jobs.into_iter();
        all.for_each(|job| self.finish(&job, Err(why.clone()), false));
    }

    /// The caller has a result from now on.
    pub(super) fn keep(&mut self, bytes: usize) {
        self.kept.push(bytes);
    }

    /// The session with a producer, once there is one; an error if it cannot be reached.
    pub(super) fn session(&self, producer: usize) -> Option<Result<ConnId, TransferError>> {
        match &self.links.get(&producer)?.state {
            State::Up { session, .. } => {
                let session_of = self.sessions.get(session);
                let is_alive = session_of.is_some_and(|session| session.ended.is_none());
                is_alive.then_some(Ok(*session))
            }
            State::Failed { why, .. } => Some(Err(why.clone())),
            State::Idle | State::Greeting { .. } => None,
        }
    }

    /// Every thread does something, or is not run this time.
    pub(super) fn step(&mut self, air: &mut Air, producers: &mut [Option<Producer>], all: bool) {
        let links: Vec<_> = self.links.keys().copied().collect();
        for producer in links {
            if all || air.dice.once_in(2) {
                self.step_link(producer, air, producers);
            }
        }
        self.sweep(air.now);
        while self.running.len() < self.cfg.n_workers
            && let Some(job) = self.queue.pop_front()
        {
            self.running.push(Running::new(job));
        }
        for mut running in std::mem::take(&mut self.running) {
            if running.step(self, air, producers, all) {
                self.conclude(running, air);
            } else {
                self.running.push(running);
            }
        }
        let is_used = |conn: &ConnId, running: &[Running]| {
            let mut stripes = running.iter().flat_map(|running| &running.stripes);
            stripes.any(|stripe| stripe.is_on(*conn))
        };
        self.sessions
            .retain(|conn, session| session.ended.is_none() || is_used(conn, &self.running));
    }

    fn conclude(&mut self, running: Running, air: &mut Air) {
        let (job, result, is_told) = running.result(self, air);
        match result {
            Ok(None) => self.start(job),
            Ok(Some(is_whole)) => self.finish(&job, Ok(is_whole), is_told),
            Err(why) => self.finish(&job, Err(why), is_told),
        }
    }

    /// Ends what waits for a worker in vain.
    fn sweep(&mut self, now: Instant) {
        let late = |job: &Job| job.is_cancelled || now >= job.asked + TOTAL;
        let (over, waiting): (Vec<_>, Vec<_>) = self.queue.drain(..).partition(late);
        self.queue = waiting.into();
        self.finish_all(over, &TransferError::Cancelled);
    }

    fn step_link(&mut self, number: usize, air: &mut Air, producers: &mut [Option<Producer>]) {
        let Some(link) = self.links.get_mut(&number) else {
            return;
        };
        match &link.state {
            State::Idle if link.holdings.is_needed() => {
                self.connect(number, air, producers);
            }
            State::Idle => {}
            State::Failed { until, .. } => {
                if air.now >= *until {
                    link.state = State::Idle;
                }
            }
            State::Greeting { .. } => {
                if let Err(why) = self.greet(number, air, producers) {
                    self.fail(number, &why, air);
                }
            }
            &State::Up { session, .. } => {
                let talked = self.listen(number, session, air);
                let talked = talked.and_then(|()| self.keep_link_alive(number, session, air));
                if let Err(why) = talked {
                    self.end_session(number, session, why, air);
                }
            }
        }
    }

    fn connect(&mut self, number: usize, air: &mut Air, producers: &mut [Option<Producer>]) {
        let Some(producer) = &mut producers[number] else {
            let refused = std::io::ErrorKind::ConnectionRefused;
            return self.fail(number, &TransferError::Connect(refused), air);
        };
        let conn = air.net.connect(false);
        producer.accept(conn, air.now);
        let fingerprint = self.cfg.ours.layout.model_fingerprint;
        let ours = hello(self.boot_id, fingerprint, air.dice.bytes(), 4);
        let role = Role::Control;
        air.net.send(conn, At::Producer, preface(role));
        say(air, conn, 0, &Message::Hello(ours));
        air.recorded = vec![preface(role), encode_frame(0, &Message::Hello(ours))];
        if let Some(link) = self.links.get_mut(&number) {
            link.state = State::Greeting {
                conn,
                handshake: Some(ConsumerHandshake::Greeted {
                    ours,
                    binding: UNBOUND,
                }),
                boot_id: 0,
                deadline: air.now + IDLE,
            };
        }
    }

    fn fail(&mut self, number: usize, why: &TransferError, air: &mut Air) {
        let Some(link) = self.links.get_mut(&number) else {
            return;
        };
        if let State::Greeting { conn, .. } = link.state {
            air.net.close(conn, At::Consumer);
        }
        link.state = State::Failed {
            why: why.clone(),
            until: air.now + RETRY_PAUSE,
        };
        let waiting = link.holdings.unreachable();
        self.finish_all(waiting, why);
    }

    fn greet(
        &mut self,
        number: usize,
        air: &mut Air,
        producers: &mut [Option<Producer>],
    ) -> Result<(), TransferError> {
        let Some(Link {
            state:
                State::Greeting {
                    conn,
                    handshake,
                    boot_id,
                    deadline,
                },
            holdings,
        }) = self.links.get_mut(&number)
        else {
            return Ok(());
        };
        let conn = *conn;
        let Some((_, message)) = air.net.frame((conn, At::Consumer), MAX_BODY_BEFORE_AUTH)? else {
            return waiting(air, conn, *deadline);
        };
        if let Message::Hello(theirs) = &message {
            *boot_id = theirs.boot_id;
        }
        let state = handshake.take().ok_or(TransferError::Impostor)?;
        match state.on_message(&self.cfg.secret, message)? {
            Step::Wait(next) => *handshake = Some(next),
            Step::Reply(reply, next) => {
                *handshake = Some(next);
                say(air, conn, 0, &reply);
                air.recorded.push(encode_frame(0, &reply));
            }
            Step::Done(name, key) => {
                let producer = producers[number].as_mut();
                let may_share = self.cfg.shares_memory;
                let knock = |producer: &mut Producer| producer.knock(*boot_id, &key.password());
                let session = Session {
                    producer: number,
                    view: producer.filter(|_| may_share).and_then(knock),
                    name,
                    key,
                    running: BTreeMap::new(),
                    last: 0,
                    ended: None,
                    idle: Vec::new(),
                    n_open: 0,
                };
                self.sessions.insert(conn, session);
                holdings.reconnected();
                let now = air.now;
                if let Some(link) = self.links.get_mut(&number) {
                    link.state = State::Up {
                        session: conn,
                        next_beat: now,
                        last_use: now,
                        last_heard: now,
                    };
                }
            }
        }
        Ok(())
    }

    /// Reads what the producer has said.
    fn listen(&mut self, number: usize, conn: ConnId, air: &mut Air) -> Result<(), TransferError> {
        while let Some((_, message)) = air.net.frame((conn, At::Consumer), MAX_BODY)? {
            if let Some(State::Up { last_heard, .. }) = self.state(number) {
                *last_heard = air.now;
            }
            self.heed(number, conn, message, air);
        }
        let Some(link) = self.links.get_mut(&number) else {
            return Ok(());
        };
        let patience = link.holdings.patience();
        match &link.state {
            State::Up { last_heard, .. } => waiting(air, conn, *last_heard + patience),
            _ => Ok(()),
        }
    }

    fn heed(&mut self, number: usize, conn: ConnId, message: Message, air: &mut Air) {
        match message {
            Message::Accept { xfer, .. }
            | Message::Lent(Lent { xfer, .. })
            | Message::Reject { xfer, .. }
            | Message::Cancelled { xfer } => {
                if let Some(session) = self.sessions.get_mut(&conn) {
                    session.deliver(xfer, message, air);
                }
            }
            Message::Ping { id } => drop(say(air, conn, 0, &Message::Pong { id })),
            Message::HeartbeatAck { remaining_ms } => {
                let gone = remaining_ms.into_iter().filter(|(_, ms)| *ms == 0);
                gone.for_each(|(lease, _)| self.forget(number, lease));
            }
            Message::Released { lease } => self.forget(number, lease),
            Message::Ready { lease, n_tokens } => self.grown(number, (lease, n_tokens), air.now),
            _ => {}
        }
    }

    fn state(&mut self, number: usize) -> Option<&mut State> {
        self.links.get_mut(&number).map(|link| &mut link.state)
    }

    fn forget(&mut self, number: usize, lease: u64) {
        if let Some(link) = self.links.get_mut(&number) {
            let waiting = link.holdings.forget(lease);
            self.finish_all(waiting, &TransferError::Rejected(RejectCode::Expired));
        }
    }

    fn grown(&mut self, number: usize, (lease, n_tokens): (u64, u32), now: Instant) {
        let Some(link) = self.links.get_mut(&number) else {
            return;
        };
        for mut job in link.holdings.grown(lease, n_tokens) {
            job.asked = now;
            self.start(job);
        }
    }

    fn keep_link_alive(
        &mut self,
        number: usize,
        conn: ConnId,
        air: &mut Air,
    ) -> Result<(), TransferError> {
        let Some(Link {
            holdings,
            state:
                State::Up {
                    next_beat,
                    last_use,
                    ..
                },
        }) = self.links.get_mut(&number)
        else {
            return Ok(());
        };
        let is_due = air.now >= *next_beat;
        if !is_due && !holdings.is_pressing() {
            return Ok(());
        }
        let news = holdings.news(is_due, |job| job.is_cancelled);
        if is_due {
            *next_beat = air.now + holdings.interval();
        }
        if !news.is_idle {
            *last_use = air.now;
        }
        let is_over = air.now >= *last_use + LINGER;
        for message in &news.messages {
            if !say(air, conn, 0, message) {
                return Err(TransferError::Broken(std::io::ErrorKind::BrokenPipe));
            }
        }
        self.finish_all(news.cancelled, &TransferError::Cancelled);
        match is_over {
            true => Err(TransferError::Closed),
            false => Ok(()),
        }
    }

    fn end_session(&mut self, number: usize, conn: ConnId, why: TransferError, air: &mut Air) {
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.end(conn, why, air);
        }
        if let Some(state) = self.state(number) {
            *state = State::Idle;
        }
    }

    /// Whether a transfer is on its way.
    pub(super) fn is_busy(&self) -> bool {
        let Tally {
            asked,
            whole,
            partial,
            failed,
            lost,
            ..
        } = self.tally;
        asked > whole + partial + failed + lost
    }

    /// What must hold at every step: nothing is later than its deadline, and what a blocked read takes beyond it.
    pub(super) fn check(&self, now: Instant) {
        let jobs = self.queue.iter().chain(self.running.iter().map(|r| &r.job));
        for job in jobs {
            assert!(
                now < job.asked + TOTAL + IDLE + IDLE / 2,
                "a transfer is stuck: {self:#?}"
            );
        }
        let running: usize = self
            .running
            .iter()
            .map(|running| running.buffer.len())
            .sum();
        assert_eq!(
            self.lent,
            running + self.kept.iter().sum::<usize>(),
            "memory"
        );
        assert!(self.lent <= self.cfg.budget, "more memory than there is");
    }

    /// What must hold when everybody has gone.
    pub(super) fn check_empty(&self) {
        assert!(self.sessions.is_empty(), "sessions are left");
        assert!(
            self.links.values().all(|link| !link.holdings.is_needed()),
            "leases are left"
        );
        assert_eq!(self.lent, 0, "memory is left");
    }
}

/// Nothing has come yet: the reason why nothing will, if so.
pub(super) fn waiting(air: &mut Air, conn: ConnId, until: Instant) -> Result<(), TransferError> {
    if air.net.is_over(conn, At::Consumer) {
        return Err(TransferError::Broken(std::io::ErrorKind::UnexpectedEof));
    }
    let late = TransferError::TimedOut {
        what: "waiting for a message",
        after: IDLE,
    };
    (air.now < until).then_some(()).ok_or(late)
}

/// Used by stripes that attach a data connection.
pub(super) fn attach(
    session: &Session,
    air: &mut Air,
    producers: &mut [Option<Producer>],
) -> Option<ConnId> {
    let producer = producers[session.producer].as_mut()?;
    let conn = air.net.connect(true);
    producer.accept(conn, air.now);
    let role = Role::Data;
    air.net.send(conn, At::Producer, preface(role));
    let proof = session.key.attach_proof(&UNBOUND);
    let session = session.name;
    say(air, conn, 0, &Message::Attach { session, proof });
    Some(conn)
}

/// The number of a data connection, once the producer has said it.
pub(super) fn attached(
    air: &mut Air,
    conn: ConnId,
    until: Instant,
) -> Result<Option<u16>, TransferError> {
    match air.net.frame((conn, At::Consumer), MAX_BODY_BEFORE_AUTH)? {
        None => waiting(air, conn, until).map(|()| None),
        Some((_, Message::Attached { stream, .. })) => Ok(Some(stream)),
        Some((_, Message::GoAway { code })) => Err(TransferError::Rejected(code)),
        Some((_, other)) => {
            let message = other.name();
            Err(WireError::Unexpected { message }.into())
        }
    }
}

fn preface(role: Role) -> Vec<u8> {
    let is_tls = false;
    let is_near = false;
    Preface {
        role,
        is_tls,
        is_near,
    }
    .encode()
    .to_vec()
}
