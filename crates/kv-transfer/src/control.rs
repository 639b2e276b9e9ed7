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

/// Leases in one heartbeat, so that the answer fits in a frame.
pub(crate) const MAX_HEARTBEAT: usize = 1 << 16;
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
            Message::Release { lease } => {
                leases.release(lease, self.id);
                Some(Message::Released { lease })
            }
            Message::Heartbeat { leases: held } => Some(heartbeat(&held, leases, now)?),
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
        if !matches!(self.streams.get(&stream), Some(None)) {
            return Err(RejectCode::Busy);
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
        let claim = self.terms.claim(open.lease);
        if !self.terms.secret.grants(&claim, &LeaseToken(open.token)) {
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

    /// The consumer wants to know how a lease grows. [`tell`](Self::tell) answers.
    fn watch(&mut self, lease: u64, token: &LeaseToken) -> Option<Message> {
        let may = self.terms.secret.grants(&self.terms.claim(lease), token);
        if !may || self.watched.len() >= MAX_WATCHED {
            return Some(Message::Released { lease });
        }
        self.watched.insert(lease, 0);
        None
    }

    /// What the consumer does not know yet about the leases it watches.
    pub(crate) fn tell(&mut self, leases: &LeaseTable<B>) -> Vec<Message> {
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

fn heartbeat<B>(
    held: &[u64],
    leases: &mut LeaseTable<B>,
    now: Instant,
) -> Result<Message, WireError> {
    if held.len() > MAX_HEARTBEAT {
        let (len, limit) = (held.len() as u64, MAX_HEARTBEAT as u64);
        return Err(WireError::TooLong {
            what: "heartbeat",
            len,
            limit,
        });
    }
    let mut remaining = |&lease: &u64| {
        let left = leases.heartbeat(lease, now).as_millis();
        (lease, u32::try_from(left).unwrap_or(u32::MAX))
    };
    Ok(Message::HeartbeatAck {
        remaining_ms: held.iter().map(&mut remaining).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::tests::{selection, shard};
    use crate::lease::LeaseTerms;
    use proptest::prelude::*;

    impl Placed for () {
        fn place(&self) -> Place {
            Place {
                mark: 0,
                stamp: 1,
                offset: 0,
            }
        }
    }

    const SECOND: Duration = Duration::from_secs(1);
    const LEASE: u64 = 42;

    struct Bed {
        control: Control<()>,
        leases: LeaseTable<()>,
        now: Instant,
        token: [u8; 32],
    }

    impl Bed {
        fn new() -> Self {
            let terms = Terms {
                secret: Secret::new(&[1; 32]).unwrap(),
                ours: shard(),
                boot_id: 1,
                fingerprint: 2,
                chunk_bytes: 64,
                max_streams: 2,
                starvation: 5 * SECOND,
            };
            let now = Instant::now();
            let mut leases = LeaseTable::new(LeaseTerms {
                ttl: 15 * SECOND,
                cap: 600 * SECOND,
            });
            leases.begin(LEASE, 2, now);
            assert!(leases.append(LEASE, (), 2, now));
            let token = terms.secret.lease_token(&terms.claim(LEASE), [3; 16]).0;
            let mut control = Control::new(SessionId(1), Arc::new(terms));
            assert_eq!(control.attach(), Some(1));
            Self {
                control,
                leases,
                now,
                token,
            }
        }

        fn terms_token(&self, lease: u64) -> [u8; 32] {
            let terms = &self.control.terms;
            terms.secret.lease_token(&terms.claim(lease), [3; 16]).0
        }

        fn say(&mut self, message: Message) -> Option<Message> {
            self.control
                .on_message((1, message), &mut self.leases, self.now)
                .unwrap()
        }

        fn open(&self) -> Open {
            Open {
                xfer: 9,
                lease: LEASE,
                token: self.token,
                selection: selection(0..2),
                credit: 128,
                want: vec![],
            }
        }

        fn work(&mut self) -> Work<()> {
            self.control.work(1, &mut self.leases, self.now)
        }

        fn refusal(&mut self, open: Open) -> RejectCode {
            match self.say(Message::Open(open)) {
                Some(Message::Reject { code, .. }) => code,
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_transfer_runs_on_credit_and_consumes_its_lease() {
        let mut bed = Bed::new();
        let accept = bed.say(Message::Open(bed.open()));
        let expected = Message::Accept {
            xfer: 9,
            chunk_bytes: 64,
            total_chunks: 12,
            total_bytes: 768,
        };
        assert_eq!(accept, Some(expected));
        assert!(matches!(bed.work(), Work::Send(Chunk { chunk: 0, .. })));
        assert!(matches!(bed.work(), Work::Send(Chunk { chunk: 1, .. })));
        assert!(matches!(bed.work(), Work::Idle));
        bed.now += SECOND;
        bed.say(Message::Credit { xfer: 9, bytes: 64 });
        let third = bed.work();
        assert!(matches!(
            third,
            Work::Send(Chunk {
                chunk: 2,
                stalled: SECOND,
                ..
            })
        ));
        assert_eq!(bed.say(Message::Received { xfer: 9 }), None);
        assert!(matches!(bed.work(), Work::Idle));
        let released = Message::Released { lease: LEASE };
        assert_eq!(bed.say(Message::Release { lease: LEASE }), Some(released));
        assert_eq!(bed.refusal(bed.open()), RejectCode::Consumed);
    }

    #[test]
    fn a_growing_lease_is_fetched_part_by_part() {
        let mut bed = Bed::new();
        let token = bed.terms_token(LEASE + 1);
        bed.leases.begin(LEASE + 1, 3, bed.now);
        let watch = Message::Watch {
            lease: LEASE + 1,
            token: LeaseToken(token),
        };
        assert_eq!(bed.say(watch), None);
        assert_eq!(bed.control.tell(&bed.leases), []);
        assert!(bed.leases.append(LEASE + 1, (), 2, bed.now));
        let ready = |n_tokens| Message::Ready {
            lease: LEASE + 1,
            n_tokens,
        };
        assert_eq!(bed.control.tell(&bed.leases), [ready(4)]);
        assert_eq!(bed.control.tell(&bed.leases), []);
        let open = |xfer, blocks| Open {
            xfer,
            lease: LEASE + 1,
            token,
            selection: selection(blocks),
            credit: 1000,
            want: vec![],
        };
        let accepted = |answer| match answer {
            Some(Message::Accept { total_bytes, .. }) => total_bytes,
            other => panic!("{other:?}"),
        };
        assert_eq!(accepted(bed.say(Message::Open(open(1, 0..2)))), 768);
        assert_eq!(bed.say(Message::Received { xfer: 1 }), None);
        assert_eq!(bed.refusal(open(2, 1..3)), RejectCode::Range);
        assert!(bed.leases.append(LEASE + 1, (), 1, bed.now));
        assert_eq!(bed.control.tell(&bed.leases), [ready(6)]);
        assert_eq!(accepted(bed.say(Message::Open(open(3, 1..3)))), 768);
        assert_eq!(bed.say(Message::Received { xfer: 3 }), None);
        let released = Message::Released { lease: LEASE + 1 };
        let release = Message::Release { lease: LEASE + 1 };
        assert_eq!(bed.say(release), Some(released.clone()));
        let watch = Message::Watch {
            lease: LEASE + 1,
            token: LeaseToken(token),
        };
        assert_eq!(bed.say(watch), None);
        assert_eq!(bed.control.tell(&bed.leases), [released]);
        let forged = Message::Watch {
            lease: LEASE,
            token: LeaseToken([0; 32]),
        };
        assert_eq!(bed.say(forged), Some(Message::Released { lease: LEASE }));
    }

    #[test]
    fn what_cannot_be_granted_is_refused_with_its_reason() {
        let mut bed = Bed::new();
        let open = bed.open();
        let unknown = Open {
            lease: 1,
            ..bed.open()
        };
        assert_eq!(bed.refusal(unknown), RejectCode::UnknownLease);
        let forged = Open {
            token: [0; 32],
            ..bed.open()
        };
        assert_eq!(bed.refusal(forged), RejectCode::BadToken);
        for blocks in [0..0, 0..3, 2..3, u32::MAX - 1..u32::MAX, 1..u32::MAX] {
            let selection = selection(blocks);
            let open = Open {
                selection,
                ..bed.open()
            };
            assert_eq!(bed.refusal(open), RejectCode::Range);
        }
        let odd = Open {
            want: vec![1],
            ..bed.open()
        };
        assert_eq!(bed.refusal(odd), RejectCode::Range);
        bed.say(Message::Open(open.clone()));
        assert_eq!(
            bed.refusal(Open { xfer: 10, ..open }),
            RejectCode::Busy,
            "the stream"
        );
    }

    #[test]
    fn a_cancelled_transfer_is_acknowledged_after_its_last_byte_and_can_be_opened_again() {
        let mut bed = Bed::new();
        bed.say(Message::Open(bed.open()));
        assert_eq!(bed.say(Message::Cancel { xfer: 9 }), None);
        assert!(matches!(
            bed.work(),
            Work::Say(Message::Cancelled { xfer: 9 })
        ));
        let again = bed.say(Message::Open(bed.open()));
        assert!(matches!(again, Some(Message::Accept { .. })));
        assert_eq!(
            bed.say(Message::Cancel { xfer: 8 }),
            Some(Message::Cancelled { xfer: 8 })
        );
    }

    #[test]
    fn a_transfer_whose_lease_ends_is_stopped_with_the_reason() {
        let mut bed = Bed::new();
        bed.say(Message::Open(bed.open()));
        bed.now += 15 * SECOND;
        bed.leases.expire(bed.now);
        let stop = Message::Reject {
            xfer: 9,
            code: RejectCode::Expired,
        };
        assert!(matches!(bed.work(), Work::Say(message) if message == stop));
    }

    #[test]
    fn a_consumer_that_grants_nothing_loses_its_connection_and_frees_the_lease() {
        let mut bed = Bed::new();
        bed.say(Message::Open(Open {
            credit: 0,
            ..bed.open()
        }));
        assert!(matches!(bed.work(), Work::Idle));
        bed.now += 6 * SECOND;
        assert!(matches!(bed.work(), Work::Close));
        bed.control.detach(1, &mut bed.leases);
        assert_eq!(bed.leases.refusal(LEASE, SessionId(2), bed.now), None);
    }

    #[test]
    fn data_connections_are_bounded() {
        let mut bed = Bed::new();
        assert_eq!(bed.control.attach(), Some(2));
        assert_eq!(bed.control.attach(), None);
        bed.control.detach(1, &mut bed.leases);
        assert_eq!(bed.control.attach(), Some(3));
    }

    #[test]
    fn heartbeats_are_answered_for_live_and_gone_leases() {
        let mut bed = Bed::new();
        let ack = bed.say(Message::Heartbeat {
            leases: vec![LEASE, 1],
        });
        let remaining_ms = vec![(LEASE, 15_000), (1, 0)];
        assert_eq!(ack, Some(Message::HeartbeatAck { remaining_ms }));
        let flood = Message::Heartbeat {
            leases: vec![0; MAX_HEARTBEAT + 1],
        };
        let now = bed.now;
        assert!(
            bed.control
                .on_message((0, flood), &mut bed.leases, now)
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn no_sequence_of_messages_sends_more_than_was_granted(
            script in prop::collection::vec((0u8..7, 0u32..14, 0u64..200), 0..60),
        ) {
            let mut bed = Bed::new();
            let (mut granted, mut sent) = (0, 0);
            for (what, chunk, bytes) in script {
                let answer = match what {
                    0 => bed.say(Message::Open(Open { credit: bytes, ..bed.open() })),
                    1 => bed.say(Message::Credit { xfer: 9, bytes }),
                    2 => bed.say(Message::Nack { xfer: 9, chunk }),
                    3 => bed.say(Message::Cancel { xfer: 9 }),
                    4 => bed.say(Message::Ping { id: bytes }),
                    _ => {
                        if let Work::Send(chunk) = bed.work() {
                            sent += chunk.range.len() as u64;
                        }
                        None
                    }
                };
                if matches!(answer, Some(Message::Accept { .. })) || what == 1 {
                    granted += bytes;
                }
                prop_assert!(sent <= granted);
            }
        }
    }
}
