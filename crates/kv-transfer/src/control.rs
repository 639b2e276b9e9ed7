//! One consumer's session as the producer sees it: messages in, answers and chunks out. Pure: bytes come and go
//! elsewhere, time is an argument.
//!
//! A data connection carries one transfer at a time, and a transfer lives on one data connection; a consumer that wants to
//! use several for one lease asks for some layers on each. Whoever breaks the protocol loses the session, never more.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_kv::LeaseToken;
use baton_shm::{Place, Room};

use crate::RejectCode;
use crate::geometry::{ChunkMap, Shard, Source, opened};
use crate::lease::{LeaseTable, Part, SessionId};
use crate::outgoing::{Next, Outgoing};
use crate::secret::{LeaseClaim, Secret};
use crate::wire::{Lent, LentRoom, MEMORY, Message, Open, WireError};

/// Leases that one consumer waits for.
const MAX_WATCHED: usize = 1 << 12;

/// Transfers of one consumer through shared memory at the same time.
const MAX_LENT: usize = 1 << 8;

/// Bytes that a consumer on this machine finds without their being sent.
pub(crate) trait Placed {
    fn place(&self) -> Place;
}

impl Placed for Room {
    fn place(&self) -> Place {
        Self::place(self)
    }
}

/// What holds for all sessions of a producer.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) secret: Secret,
    /// What this producer has.
    pub(crate) ours: Shard,
    pub(crate) boot_id: u64,
    pub(crate) fingerprint: u64,
    pub(crate) chunk_bytes: usize,
    pub(crate) max_streams: usize,
    /// A transfer without credit for this long is abandoned.
    pub(crate) starvation: Duration,
}

impl Terms {
    pub(crate) fn claim(&self, lease: u64) -> LeaseClaim {
        LeaseClaim {
            lease,
            boot_id: self.boot_id,
            fingerprint: self.fingerprint,
        }
    }

    /// Whether whoever shows `token` has the right to a lease.
    pub(crate) fn grants(&self, lease: u64, token: &LeaseToken) -> bool {
        self.secret.grants(&self.claim(lease), token)
    }
}

/// What a transfer sends, where it lies.
#[derive(Debug)]
pub(crate) struct Content<B> {
    pub(crate) parts: Vec<Arc<Part<B>>>,
    pub(crate) source: Source,
}

impl<B> Content<B> {
    fn is_revoked(&self) -> bool {
        self.parts.iter().any(|part| part.is_revoked())
    }
}

#[derive(Debug)]
struct Transfer<B> {
    xfer: u32,
    lease: u64,
    content: Arc<Content<B>>,
    out: Outgoing,
    is_cancelled: bool,
    last_progress: Instant,
    /// Since when it has waited for credit.
    starved: Option<Instant>,
}

/// One chunk to send.
#[derive(Debug)]
pub(crate) struct Chunk<B> {
    pub(crate) xfer: u32,
    pub(crate) chunk: u32,
    /// Its place in the transfer.
    pub(crate) range: Range<usize>,
    pub(crate) content: Arc<Content<B>>,
    /// How long it had to wait for credit.
    pub(crate) stalled: Duration,
}

/// What a data connection has to do.
#[derive(Debug)]
pub(crate) enum Work<B> {
    /// Send a chunk.
    Send(Chunk<B>),
    /// A transfer ended; say so on the control connection.
    Say(Message),
    /// Nothing until something changes.
    Idle,
    /// Close.
    Close,
}

/// The session.
#[derive(Debug)]
pub(crate) struct Control<B> {
    id: SessionId,
    terms: Arc<Terms>,
    next_stream: u16,
    streams: BTreeMap<u16, Option<Transfer<B>>>,
    /// Whether the consumer can read our memory.
    sees_memory: bool,
    /// Leases by the transfers that read them there.
    lent: BTreeMap<u32, u64>,
    /// Leases that the consumer waits for, and how many of their blocks it knows to be ready.
    watched: BTreeMap<u64, u32>,
    is_over: bool,
}

impl<B: Placed> Control<B> {
    pub(crate) fn new(id: SessionId, terms: Arc<Terms>) -> Self {
        Self {
            id,
            terms,
            next_stream: 1,
            streams: BTreeMap::new(),
            sees_memory: false,
            lent: BTreeMap::new(),
            watched: BTreeMap::new(),
            is_over: false,
        }
    }

    /// A data connection joins; `None` if there are enough.
    pub(crate) fn attach(&mut self) -> Option<u16> {
        if self.streams.len() >= self.terms.max_streams {
            return None;
        }
        let stream = self.next_stream;
        // Numbers are not used twice, so that a late message cannot mean a newer connection.
        self.next_stream = stream.checked_add(1)?;
        self.streams.insert(stream, None);
        Some(stream)
    }

    /// A data connection is gone.
    pub(crate) fn detach(&mut self, stream: u16, leases: &mut LeaseTable<B>) {
        if let Some(Some(transfer)) = self.streams.remove(&stream) {
            leases.close(transfer.lease, self.id);
        }
    }

    /// The consumer sees our memory from now on. Returns whether there is one.
    pub(crate) fn show_memory(&mut self) -> bool {
        self.sees_memory = !self.is_over;
        self.sees_memory
    }

    /// The control connection is gone, and with it everything.
    pub(crate) fn end(&mut self, leases: &mut LeaseTable<B>) {
        while let Some((&stream, _)) = self.streams.first_key_value() {
            self.detach(stream, leases);
        }
        while let Some((_, lease)) = self.lent.pop_first() {
            leases.close(lease, self.id);
        }
        self.is_over = true;
    }

    /// Whether the session has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// The leases of all transfers.
    #[cfg(test)]
    pub(crate) fn leases_open(&self) -> impl Iterator<Item = u64> {
        let sent = self.streams.values().flatten();
        let sent = sent.map(|transfer| transfer.lease);
        sent.chain(self.lent.values().copied())
    }

    /// Takes a message and returns the answer, if there is one.
    ///
    /// # Errors
    /// When the message has no meaning here; the session must end then.
    pub(crate) fn on_message(
        &mut self,
        (stream, message): (u16, Message),
        leases: &mut LeaseTable<B>,
        now: Instant,
    ) -> Result<Option<Message>, WireError> {
        let answer = match message {
            Message::Open(open) if stream == MEMORY => Some(self.lend(&open, leases, now)),
            Message::Open(open) => Some(self.open(stream, open, leases, now)),
            Message::Credit { xfer, bytes } => {
                self.credit(xfer, bytes, now);
                None
            }
            Message::Nack { xfer, chunk } => self.nack(xfer, chunk, leases, now),
            Message::Cancel { xfer } => self.cancel(xfer, leases),
            Message::Received { xfer } => {
                self.received(xfer, leases);
                None
            }
            Message::Watch { lease, token } => self.watch(lease, &token),
            Message::Release { lease, token } => {
                if self.terms.grants(lease, &token) {
                    leases.release(lease, self.id);
                }
                Some(Message::Released { lease })
            }
            Message::Heartbeat { leases: held } => Some(self.heartbeat(&held, leases, now)),
            Message::Ping { id } => Some(Message::Pong { id }),
            Message::Pong { .. } | Message::GoAway { .. } | Message::Unknown { .. } => None,
            other => {
                return Err(WireError::Unexpected {
                    message: other.name(),
                });
            }
        };
        Ok(answer)
    }

    fn open(
        &mut self,
        stream: u16,
        open: Open,
        leases: &mut LeaseTable<B>,
        now: Instant,
    ) -> Message {
        let (xfer, lease) = (open.xfer, open.lease);
        match self.admit(stream, open, leases, now) {
            Ok(transfer) => {
                let map = transfer.out.map();
                let accept = Message::Accept {
                    xfer,
                    chunk_bytes: u32::try_from(self.terms.chunk_bytes).unwrap_or(u32::MAX),
                    total_chunks: map.n_chunks(),
                    total_bytes: map.total_bytes() as u64,
                };
                leases.open(lease, self.id);
                self.streams.insert(stream, Some(transfer));
                accept
            }
            Err(code) => Message::Reject { xfer, code },
        }
    }

    fn lend(&mut self, open: &Open, leases: &mut LeaseTable<B>, now: Instant) -> Message {
        let xfer = open.xfer;
        let granted = if self.sees_memory && self.lent.len() < MAX_LENT {
            self.grant(open, leases, now)
        } else {
            Err(RejectCode::Busy)
        };
        let (content, _) = match granted {
            Ok(granted) => granted,
            Err(code) => return Message::Reject { xfer, code },
        };
        let room = |part: &Arc<Part<B>>| LentRoom {
            place: part.bytes.place(),
            blocks: part.blocks.clone(),
        };
        let rooms = content.parts.iter().map(room).collect();
        leases.open(open.lease, self.id);
        self.lent.insert(xfer, open.lease);
        Message::Lent(Lent { xfer, rooms })
    }

    fn admit(
        &self,
        stream: u16,
        open: Open,
        leases: &LeaseTable<B>,
        now: Instant,
    ) -> Result<Transfer<B>, RejectCode> {
        let (content, map) = self.grant(&open, leases, now)?;
        match self.streams.get(&stream) {
            Some(None) => {}
            Some(Some(_)) => return Err(RejectCode::Busy),
            // It has ended, and the consumer does not know yet.
            None => return Err(RejectCode::Disconnected),
        }
        Ok(Transfer {
            xfer: open.xfer,
            lease: open.lease,
            content: Arc::new(content),
            out: Outgoing::new(map, open.want, open.credit),
            is_cancelled: false,
            last_progress: now,
            starved: None,
        })
    }

    /// What a consumer with the right to it asks for.
    fn grant(
        &self,
        open: &Open,
        leases: &LeaseTable<B>,
        now: Instant,
    ) -> Result<(Content<B>, ChunkMap), RejectCode> {
        if let Some(code) = leases.refusal(open.lease, self.id, now) {
            return Err(code);
        }
        if !self.terms.grants(open.lease, &LeaseToken(open.token)) {
            return Err(RejectCode::BadToken);
        }
        if self.is_known(open.xfer) {
            return Err(RejectCode::Busy);
        }
        let (_, n_blocks) = leases.progress(open.lease).unwrap_or_default();
        let blocks = self.terms.ours.blocks_of(&open.selection, n_blocks);
        let parts = leases.parts(open.lease, blocks.ok_or(RejectCode::Range)?)?;
        let of = parts.iter().map(|part| part.blocks.clone()).collect();
        let ours = (&self.terms.ours, self.terms.chunk_bytes);
        let (source, map) =
            opened(ours, of, &open.selection, &open.want).ok_or(RejectCode::Range)?;
        Ok((Content { parts, source }, map))
    }

    fn is_known(&self, xfer: u32) -> bool {
        let is_it = |transfer: &Transfer<B>| transfer.xfer == xfer;
        self.lent.contains_key(&xfer) || self.streams.values().flatten().any(is_it)
    }

    fn transfer(&mut self, xfer: u32) -> Option<&mut Transfer<B>> {
        self.streams
            .values_mut()
            .flatten()
            .find(|transfer| transfer.xfer == xfer)
    }

    /// Ends a transfer; the lease that it was of.
    fn take(&mut self, xfer: u32) -> Option<u64> {
        let is_it = |slot: &&mut Option<Transfer<B>>| slot.as_ref().is_some_and(|t| t.xfer == xfer);
        let mut sent = || self.streams.values_mut().find(is_it)?.take();
        let lent = self.lent.remove(&xfer);
        lent.or_else(|| sent().map(|transfer| transfer.lease))
    }

    fn credit(&mut self, xfer: u32, bytes: u64, now: Instant) {
        if let Some(transfer) = self.transfer(xfer) {
            transfer.out.grant(bytes);
            transfer.last_progress = now;
        }
    }

    fn nack(
        &mut self,
        xfer: u32,
        chunk: u32,
        leases: &mut LeaseTable<B>,
        now: Instant,
    ) -> Option<Message> {
        let transfer = self.transfer(xfer)?;
        transfer.last_progress = now;
        if transfer.out.resend(chunk) {
            return None;
        }
        let lease = self.take(xfer)?;
        leases.close(lease, self.id);
        Some(Message::Reject {
            xfer,
            code: RejectCode::Malformed,
        })
    }

    /// The data connection answers for a running transfer, after the last byte of it.
    fn cancel(&mut self, xfer: u32, leases: &mut LeaseTable<B>) -> Option<Message> {
        if let Some(lease) = self.lent.remove(&xfer) {
            leases.close(lease, self.id);
        }
        let Some(transfer) = self.transfer(xfer) else {
            return Some(Message::Cancelled { xfer });
        };
        transfer.is_cancelled = true;
        None
    }

    /// A transfer is over, and the lease stays for the next.
    fn received(&mut self, xfer: u32, leases: &mut LeaseTable<B>) {
        if let Some(lease) = self.take(xfer) {
            leases.received(lease, self.id);
        }
    }

    /// Prolongs leases for who has the right to them; to anybody else they are gone.
    fn heartbeat(
        &self,
        held: &[(u64, LeaseToken)],
        leases: &mut LeaseTable<B>,
        now: Instant,
    ) -> Message {
        let mut remaining = |(lease, token): &(u64, LeaseToken)| {
            let may = self.terms.grants(*lease, token);
            let left = may.then(|| leases.heartbeat(*lease, now));
            let left = left.unwrap_or_default().as_millis();
            (*lease, u32::try_from(left).unwrap_or(u32::MAX))
        };
        Message::HeartbeatAck {
            remaining_ms: held.iter().map(&mut remaining).collect(),
        }
    }

    /// The consumer wants to know how a lease grows. [`tell`](Self::tell) answers.
    fn watch(&mut self, lease: u64, token: &LeaseToken) -> Option<Message> {
        let may = self.terms.grants(lease, token);
        if !may || self.watched.len() >= MAX_WATCHED {
            return Some(Message::Released { lease });
        }
        self.watched.insert(lease, 0);
        None
    }

    /// What the consumer does not know yet about the leases it watches. Called when leases have changed.
    pub(crate) fn tell(&mut self, leases: &LeaseTable<B>) -> Vec<Message> {
        // The rooms of what is gone have lost their marks; the consumer's last word may never come.
        self.lent
            .retain(|_, lease| leases.progress(*lease).is_some());
        let mut news = Vec::new();
        self.watched.retain(|&lease, told| {
            let Some((ready, n_blocks)) = leases.progress(lease) else {
                news.push(Message::Released { lease });
                return false;
            };
            if ready > *told {
                *told = ready;
                let n_tokens = ready.saturating_mul(self.terms.ours.layout.block_size);
                news.push(Message::Ready { lease, n_tokens });
            }
            ready < n_blocks
        });
        news
    }

    /// What the data connection `stream` has to do now.
    pub(crate) fn work(
        &mut self,
        stream: u16,
        leases: &mut LeaseTable<B>,
        now: Instant,
    ) -> Work<B> {
        let Some(slot) = self.streams.get_mut(&stream) else {
            return Work::Close;
        };
        let Some(transfer) = slot else {
            return Work::Idle;
        };
        let (xfer, lease) = (transfer.xfer, transfer.lease);
        let end = if transfer.is_cancelled {
            Message::Cancelled { xfer }
        } else if transfer.content.is_revoked() {
            let code = leases.refusal(lease, self.id, now);
            let code = code.unwrap_or(RejectCode::Internal);
            Message::Reject { xfer, code }
        } else {
            return transfer.work(now, self.terms.starvation);
        };
        *slot = None;
        leases.close(lease, self.id);
        Work::Say(end)
    }
}

impl<B> Transfer<B> {
    fn work(&mut self, now: Instant, starvation: Duration) -> Work<B> {
        match self.out.next() {
            Next::Send(chunk) => self.chunk(chunk, now).map_or(Work::Close, Work::Send),
            Next::Starved => {
                self.starved.get_or_insert(now);
                let is_given_up = now.saturating_duration_since(self.last_progress) > starvation;
                if is_given_up { Work::Close } else { Work::Idle }
            }
            Next::Sent => Work::Idle,
        }
    }

    fn chunk(&mut self, chunk: u32, now: Instant) -> Option<Chunk<B>> {
        let since = self.starved.take().unwrap_or(now);
        self.last_progress = now;
        Some(Chunk {
            xfer: self.xfer,
            chunk,
            range: self.out.map().range(chunk)?,
            content: Arc::clone(&self.content),
            stalled: now.saturating_duration_since(since),
        })
    }
}

#[cfg(test)]
mod tests;
