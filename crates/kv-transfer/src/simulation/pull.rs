//! A worker's transfer: from memory over its stripes to its verdict, one small step at a time.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::ops::Range;
use std::time::Instant;

use super::consumer::{Consumer, Job, Session, attach, attached, say, waiting};
use super::net::{At, ConnId};
use super::producer::Producer;
use super::{Air, CANCEL_CHECK, IDLE, TOTAL};
use crate::RejectCode;
use crate::TransferError;
use crate::checksum::checksum;
use crate::fetch::{Fetch, Limits, Loan, Next, Origin, Wanted, cause, join};
use crate::geometry::{Piece, stripes};
use crate::wire::{CHUNK_HEADER_LEN, ChunkHeader, MEMORY, Message, Selection, WireError};

/// Bytes of another machine's memory that are copied in one step.
const COPY_BYTES: usize = 96;

/// A transfer that has a worker.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) job: Job,
    /// Empty until there is memory for it.
    pub(super) buffer: Vec<u8>,
    pub(super) stripes: Vec<Stripe>,
    failed: Option<TransferError>,
}

/// Some layers of it.
#[derive(Debug)]
pub(super) struct Stripe {
    fetch: Fetch,
    /// Where its bytes lie in the buffer.
    place: Range<usize>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// An attempt begins.
    Session,
    Stream(ConnId),
    Attaching {
        session: ConnId,
        conn: ConnId,
        until: Instant,
    },
    Asked(Way),
    Receiving(Way, Reading),
    Copying(Way, Loan, VecDeque<Piece>, usize),
    Paused(Instant),
    Over(Result<(), TransferError>),
}

/// A transfer's number, and what it is about.
#[derive(Clone, Copy, Debug)]
struct Way {
    session: ConnId,
    stream: Option<(u16, ConnId)>,
    xfer: u32,
}

impl Way {
    fn number(&self) -> u16 {
        self.stream.map_or(MEMORY, |(number, _)| number)
    }
}

/// How far a chunk has come.
#[derive(Debug)]
struct Reading {
    header: Option<(ChunkHeader, Range<usize>)>,
    n_read: usize,
    last_byte: Instant,
}

impl Reading {
    fn new(now: Instant) -> Self {
        Self {
            header: None,
            n_read: 0,
            last_byte: now,
        }
    }
}

/// What a stripe's thread sees.
struct Cx<'a> {
    consumer: &'a mut Consumer,
    air: &'a mut Air,
    job: &'a Job,
    buffer: &'a mut [u8],
}

impl Cx<'_> {
    fn stopped(&self) -> Option<TransferError> {
        self.job.is_cancelled.then_some(TransferError::Cancelled)
    }

    fn deadline(&self) -> Instant {
        self.job.asked + TOTAL
    }

    fn session(&mut self, conn: ConnId) -> Result<&mut Session, TransferError> {
        let session = self.consumer.sessions.get_mut(&conn);
        session.ok_or(TransferError::Broken(ErrorKind::NotConnected))
    }
}

impl Running {
    pub(super) fn new(job: Job) -> Self {
        Self {
            job,
            buffer: Vec::new(),
            stripes: Vec::new(),
            failed: None,
        }
    }

    pub(super) fn cancel(&mut self, air: &mut Air) {
        self.job.is_cancelled = true;
        self.stripes.iter().for_each(|stripe| stripe.hang_up(air));
    }

    /// Returns whether it is over.
    pub(super) fn step(
        &mut self,
        consumer: &mut Consumer,
        air: &mut Air,
        producers: &mut [Option<Producer>],
        is_thorough: bool,
    ) -> bool {
        if self.stripes.is_empty()
            && let Err(why) = self.begin(consumer, air)
        {
            self.failed = Some(why);
            return true;
        }
        let mut cx = Cx {
            consumer,
            air,
            job: &self.job,
            buffer: &mut self.buffer,
        };
        for stripe in &mut self.stripes {
            let n_steps = if is_thorough {
                16
            } else {
                cx.air.dice.below(3)
            };
            for _ in 0..n_steps {
                stripe.step(&mut cx, producers);
            }
        }
        let is_over = |stripe: &Stripe| matches!(stripe.stage, Stage::Over(_));
        !self.stripes.is_empty() && self.stripes.iter().all(is_over)
    }

    /// Memory first, then a session, then the stripes.
    fn begin(&mut self, consumer: &mut Consumer, air: &mut Air) -> Result<(), TransferError> {
        if self.job.is_cancelled {
            return Err(TransferError::Cancelled);
        }
        let selection = self.selection(consumer)?;
        let whole = self.fetch(selection.clone(), consumer)?;
        let late = TransferError::TimedOut {
            what: "waiting for memory",
            after: TOTAL,
        };
        let late = (air.now >= self.job.asked + TOTAL).then_some(late);
        let bytes = whole.bytes();
        if self.buffer.is_empty() {
            if consumer.lent + bytes > consumer.cfg.budget {
                return late.map_or(Ok(()), Err);
            }
            consumer.lent += bytes;
            // What a returned buffer still holds is somebody else's KV.
            self.buffer = vec![0xee; bytes];
        }
        let Some(session) = consumer.session(self.job.params.producer) else {
            return late.map_or(Ok(()), Err);
        };
        let session = session?;
        let is_shared = consumer.sessions[&session].view.is_some();
        let n = match is_shared {
            true => 1,
            false => (bytes / consumer.cfg.stripe_bytes).clamp(1, consumer.cfg.n_streams),
        };
        let mut at = 0;
        for selection in stripes(&selection, n) {
            let fetch = self.fetch(selection, consumer)?;
            let place = at..at + fetch.bytes();
            at = place.end;
            let stage = Stage::Session;
            self.stripes.push(Stripe {
                fetch,
                place,
                stage,
            });
        }
        Ok(())
    }

    fn selection(&self, consumer: &Consumer) -> Result<Selection, TransferError> {
        let blocks = self.job.available();
        let ours = &consumer.cfg.ours;
        (!blocks.is_empty())
            .then(|| Selection {
                layers: 0..ours.layout.n_layers,
                heads: self.job.heads.clone(),
                blocks,
                block_size: ours.layout.block_size,
            })
            .ok_or(TransferError::Range)
    }

    fn fetch(&self, selection: Selection, consumer: &Consumer) -> Result<Fetch, TransferError> {
        let params = &self.job.params;
        let wanted = Wanted {
            lease: params.lease,
            token: params.token,
            selection,
            theirs: params.theirs.clone(),
        };
        let limits = Limits {
            window: consumer.cfg.window,
            idle_timeout: IDLE,
            asked: self.job.asked,
            deadline: self.job.asked + TOTAL,
        };
        Fetch::new(wanted, limits)
    }

    /// What the caller gets: `None` if more will follow, or whether all has come; and whether the producer was told that
    /// nothing more is wanted.
    pub(super) fn result(
        mut self,
        consumer: &mut Consumer,
        air: &mut Air,
    ) -> (Job, Result<Option<bool>, TransferError>, bool) {
        let len = self.buffer.len();
        let selection = self.selection(consumer);
        let (mut job, mut buffer) = (self.job, self.buffer);
        let brought = match (self.failed.take(), selection) {
            (Some(why), _) | (None, Err(why)) => Err(why),
            (None, Ok(selection)) => {
                let transfers = self.stripes.into_iter().map(Stripe::into_ended).collect();
                let brought = join(&selection, transfers, &mut buffer);
                brought.map(|brought| (brought, selection))
            }
        };
        let (brought, selection) = match brought {
            Ok(brought) => brought,
            Err(why) => {
                consumer.lent -= len;
                return (job, Err(why), false);
            }
        };
        let begin = selection.blocks.start;
        let blocks = begin..begin + brought.n_blocks;
        let got = Selection {
            blocks,
            ..selection
        };
        job.params.check(&got, &buffer[..brought.bytes]);
        assert_eq!(brought.shortfall.is_none(), got.blocks == job.available());
        consumer.keep(len);
        job.blocks.start = got.blocks.end;
        job.asked = air.now;
        let is_whole = brought.shortfall.is_none();
        let is_last = is_whole && got.blocks.end >= job.n_blocks;
        let (lease, token) = (job.params.lease, job.params.token);
        let is_told = is_last
            && matches!(consumer.session(job.params.producer), Some(Ok(session))
                if say(air, session, 0, &Message::Release { lease, token }));
        let more = is_whole && !job.blocks.is_empty();
        (job, Ok((!more).then_some(is_whole)), is_told)
    }
}

impl Stripe {
    fn into_ended(self) -> (Fetch, Result<(), TransferError>) {
        match self.stage {
            Stage::Over(ended) => (self.fetch, ended),
            _ => (self.fetch, Err(TransferError::Closed)),
        }
    }

    fn conn(&self) -> Option<ConnId> {
        match &self.stage {
            Stage::Attaching { conn, .. } => Some(*conn),
            Stage::Asked(way) | Stage::Receiving(way, _) => way.stream.map(|(_, conn)| conn),
            _ => None,
        }
    }

    pub(super) fn is_on(&self, conn: ConnId) -> bool {
        match &self.stage {
            Stage::Stream(session) | Stage::Attaching { session, .. } => *session == conn,
            Stage::Asked(way) | Stage::Receiving(way, _) | Stage::Copying(way, ..) => {
                way.session == conn
            }
            Stage::Session | Stage::Paused(_) | Stage::Over(_) => false,
        }
    }

    pub(super) fn hang_up(&self, air: &mut Air) {
        if let Some(conn) = self.conn() {
            air.net.close(conn, At::Consumer);
        }
    }

    fn step(&mut self, cx: &mut Cx<'_>, producers: &mut [Option<Producer>]) {
        let stage = std::mem::replace(&mut self.stage, Stage::Session);
        self.stage = match stage {
            Stage::Session => self.find_session(cx),
            Stage::Stream(session) => self.find_stream(session, cx, producers),
            Stage::Attaching {
                session,
                conn,
                until,
            } => self.attaching((session, conn), until, cx),
            Stage::Asked(way) => self.asked(way, cx),
            Stage::Receiving(way, reading) => self.receiving(way, reading, cx),
            Stage::Copying(way, loan, pieces, at) => self.copying(way, (loan, pieces, at), cx),
            Stage::Paused(until) if cx.air.now >= until => self.go_on(cx),
            stage @ (Stage::Paused(_) | Stage::Over(_)) => stage,
        };
    }

    /// An attempt is over.
    fn ended(&mut self, ended: Result<(), TransferError>, cx: &mut Cx<'_>) -> Stage {
        match self.fetch.next(ended, cx.air.now) {
            Next::Again => self.go_on(cx),
            Next::Pause => Stage::Paused(cx.air.now + CANCEL_CHECK),
            Next::Over(ended) => Stage::Over(ended),
        }
    }

    fn go_on(&self, cx: &Cx<'_>) -> Stage {
        match cx.stopped() {
            Some(why) => Stage::Over(Err(why)),
            None => Stage::Session,
        }
    }

    fn late(cx: &Cx<'_>) -> Option<TransferError> {
        let late = TransferError::TimedOut {
            what: "waiting for a connection",
            after: TOTAL,
        };
        (cx.air.now >= cx.deadline()).then_some(late)
    }

    fn find_session(&mut self, cx: &mut Cx<'_>) -> Stage {
        if let Some(why) = cx.stopped() {
            return self.ended(Err(why), cx);
        }
        match cx.consumer.session(cx.job.params.producer) {
            Some(Ok(session)) if cx.consumer.sessions[&session].view.is_some() => {
                self.open(session, None, cx)
            }
            Some(Ok(session)) => Stage::Stream(session),
            Some(Err(why)) => self.ended(Err(why), cx),
            None => match Self::late(cx) {
                Some(why) => self.ended(Err(why), cx),
                None => Stage::Session,
            },
        }
    }

    fn find_stream(
        &mut self,
        conn: ConnId,
        cx: &mut Cx<'_>,
        producers: &mut [Option<Producer>],
    ) -> Stage {
        let n_streams = cx.consumer.cfg.n_streams;
        let (stopped, late) = (cx.stopped(), Self::late(cx));
        let Some(session) = cx.consumer.sessions.get_mut(&conn) else {
            return self.ended(Err(TransferError::Broken(ErrorKind::NotConnected)), cx);
        };
        if let Some(why) = stopped.or_else(|| session.ended.clone()) {
            return self.ended(Err(why), cx);
        }
        while let Some((number, socket)) = session.idle.pop() {
            let has_bytes = !cx.air.net.inbox(socket, At::Consumer).is_empty();
            if !has_bytes && !cx.air.net.is_over(socket, At::Consumer) {
                return self.open(conn, Some((number, socket)), cx);
            }
            cx.air.net.close(socket, At::Consumer);
            session.n_open -= 1;
        }
        if session.n_open >= n_streams {
            return match late {
                Some(why) => self.ended(Err(why), cx),
                None => Stage::Stream(conn),
            };
        }
        match attach(session, cx.air, producers) {
            Some(socket) => {
                session.n_open += 1;
                Stage::Attaching {
                    session: conn,
                    conn: socket,
                    until: cx.deadline().min(cx.air.now + IDLE),
                }
            }
            None => self.ended(Err(TransferError::Broken(ErrorKind::ConnectionRefused)), cx),
        }
    }

    fn attaching(&mut self, way: (ConnId, ConnId), until: Instant, cx: &mut Cx<'_>) -> Stage {
        let (session, conn) = way;
        match attached(cx.air, conn, until) {
            Ok(None) => Stage::Attaching {
                session,
                conn,
                until,
            },
            Ok(Some(number)) => self.open(session, Some((number, conn)), cx),
            Err(why) => {
                Self::drop_stream(session, conn, cx);
                self.ended(Err(Self::unattached(session, why, cx)), cx)
            }
        }
    }

    /// A producer that does not know the session has given it up.
    fn unattached(conn: ConnId, why: TransferError, cx: &mut Cx<'_>) -> TransferError {
        let Some(session) = cx.consumer.sessions.get_mut(&conn) else {
            return why;
        };
        if why != TransferError::Rejected(RejectCode::Unauthorized) {
            return why;
        }
        let why = TransferError::Broken(ErrorKind::NotConnected);
        session.end(conn, why.clone(), cx.air);
        why
    }

    fn drop_stream(session: ConnId, conn: ConnId, cx: &mut Cx<'_>) {
        cx.air.net.close(conn, At::Consumer);
        if let Some(session) = cx.consumer.sessions.get_mut(&session) {
            session.n_open -= 1;
        }
    }

    fn forget_idle(session: ConnId, cx: &mut Cx<'_>) {
        let Some(session) = cx.consumer.sessions.get_mut(&session) else {
            return;
        };
        for (_, conn) in session.idle.drain(..) {
            cx.air.net.close(conn, At::Consumer);
            session.n_open -= 1;
        }
    }

    /// Asks for the transfer, or what an earlier connection left of it.
    fn open(&mut self, session: ConnId, stream: Option<(u16, ConnId)>, cx: &mut Cx<'_>) -> Stage {
        if let (Some((_, conn)), true) = (stream, cx.job.is_cancelled) {
            cx.air.net.close(conn, At::Consumer);
        }
        let socket = stream.map(|(_, conn)| conn);
        let registered = cx.session(session).and_then(|s| s.register(socket));
        let xfer = match registered {
            Ok(xfer) => xfer,
            Err(why) => {
                if let Some((_, conn)) = stream {
                    Self::drop_stream(session, conn, cx);
                }
                return self.ended(Err(why), cx);
            }
        };
        let way = Way {
            session,
            stream,
            xfer,
        };
        let open = self.fetch.open(xfer, cx.air.now);
        match say(cx.air, session, way.number(), &open) {
            true => Stage::Asked(way),
            false => {
                let why = TransferError::Broken(ErrorKind::BrokenPipe);
                self.close(way, Some(why), cx)
            }
        }
    }

    /// An attempt is over that was asked for.
    fn close(&mut self, way: Way, failed: Option<TransferError>, cx: &mut Cx<'_>) -> Stage {
        if let Some(session) = cx.consumer.sessions.get_mut(&way.session) {
            session.unregister(way.xfer);
        }
        let closed = self.fetch.close(failed);
        if let Some(farewell) = &closed.farewell {
            say(cx.air, way.session, way.number(), farewell);
        }
        if let Some((number, conn)) = way.stream {
            let session = cx.consumer.sessions.get_mut(&way.session);
            let session = session.filter(|session| session.ended.is_none());
            match session {
                Some(session) if closed.is_clean && !cx.job.is_cancelled => {
                    session.idle.push((number, conn));
                }
                _ => Self::drop_stream(way.session, conn, cx),
            }
        }
        if matches!(closed.result, Err(TransferError::Broken(_))) {
            Self::forget_idle(way.session, cx);
        }
        self.ended(closed.result, cx)
    }

    fn asked(&mut self, way: Way, cx: &mut Cx<'_>) -> Stage {
        if let Some(why) = cx.stopped() {
            return self.close(way, Some(why), cx);
        }
        let event = cx.session(way.session).and_then(|s| s.event(way.xfer));
        let answer = match event {
            Ok(Some(answer)) => answer,
            Ok(None) => {
                return match self.fetch.late(cx.air.now) {
                    Some(late) => self.close(way, Some(late), cx),
                    None => Stage::Asked(way),
                };
            }
            Err(why) => return self.close(way, Some(why), cx),
        };
        let unexpected = WireError::Unexpected {
            message: answer.name(),
        };
        match (way.stream, self.fetch.answered(&answer, cx.air.now)) {
            (Some(_), Ok(Origin::Chunks)) => Stage::Receiving(way, Reading::new(cx.air.now)),
            (None, Ok(Origin::Memory(loan))) => {
                let view = cx.session(way.session).ok().and_then(|s| s.view.clone());
                let has = |room| view.as_ref().is_some_and(|view| view.borrow().has(room));
                if !loan.rooms.iter().all(has) {
                    let nowhere = WireError::Geometry { chunk: 0 };
                    return self.close(way, Some(nowhere.into()), cx);
                }
                let pieces = loan.pieces().collect();
                Stage::Copying(way, loan, pieces, 0)
            }
            (_, Ok(_)) => self.close(way, Some(unexpected.into()), cx),
            (_, Err(why)) => self.close(way, Some(why), cx),
        }
    }

    /// Copies some of the producer's memory, which it may take back meanwhile.
    fn copying(
        &mut self,
        way: Way,
        (loan, mut pieces, at): (Loan, VecDeque<Piece>, usize),
        cx: &mut Cx<'_>,
    ) -> Stage {
        let late = || self.fetch.late(cx.air.now);
        if let Some(why) = cx.stopped().or_else(late) {
            return self.close(way, Some(why), cx);
        }
        let view = cx.session(way.session).ok().and_then(|s| s.view.clone());
        let Some(view) = view else {
            return self.close(way, Some(TransferError::Closed), cx);
        };
        let buffer = &mut cx.buffer[self.place.clone()];
        match pieces.pop_front() {
            Some(Piece::Zeros(n)) => {
                buffer[at..at + n].fill(0);
                Stage::Copying(way, loan, pieces, at + n)
            }
            Some(Piece::Bytes(room, range)) => {
                let n = range.len().min(COPY_BYTES);
                let begin = range.start;
                buffer[at..at + n].copy_from_slice(view.borrow().copy(begin..begin + n));
                if n < range.len() {
                    pieces.push_front(Piece::Bytes(room, begin + n..range.end));
                }
                Stage::Copying(way, loan, pieces, at + n)
            }
            None => {
                let is_held = loan.places.iter().all(|place| view.borrow().holds(place));
                let copied = self.fetch.copied(is_held);
                cx.consumer.tally.copied += usize::from(copied.is_ok());
                self.close(way, copied.err(), cx)
            }
        }
    }

    fn receiving(&mut self, way: Way, mut reading: Reading, cx: &mut Cx<'_>) -> Stage {
        if self.fetch.is_filled() {
            return self.close(way, None, cx);
        }
        match self.read(way, &mut reading, cx) {
            Ok(()) => Stage::Receiving(way, reading),
            Err(why) => {
                let said = cx.session(way.session).map(|s| s.events(way.xfer));
                let why = cause(why, cx.stopped(), said.unwrap_or_default().into_iter());
                self.close(way, Some(why), cx)
            }
        }
    }

    /// Reads what there is, as far as the end of a header or of a payload.
    fn read(
        &mut self,
        way: Way,
        reading: &mut Reading,
        cx: &mut Cx<'_>,
    ) -> Result<(), TransferError> {
        let Some((_, conn)) = way.stream else {
            return Ok(());
        };
        let is_closed = cx.air.net.is_closed(conn, At::Consumer);
        let n_there = cx.air.net.inbox(conn, At::Consumer).len();
        if is_closed || n_there == 0 {
            if is_closed || cx.air.net.is_over(conn, At::Consumer) {
                return Err(self.fetch.unread(ErrorKind::UnexpectedEof));
            }
            let is_late = cx.air.now >= reading.last_byte + IDLE;
            let late = || self.fetch.unread(ErrorKind::TimedOut);
            return if is_late { Err(late()) } else { Ok(()) };
        }
        match reading.header.take() {
            None if n_there < CHUNK_HEADER_LEN => {
                let until = reading.last_byte + IDLE;
                return waiting(cx.air, conn, until).map_err(|error| match error {
                    TransferError::Broken(kind) => self.fetch.unread(kind),
                    _ => self.fetch.unread(ErrorKind::TimedOut),
                });
            }
            None => {
                let bytes = cx.air.net.take(conn, At::Consumer, CHUNK_HEADER_LEN);
                let bytes = bytes.first_chunk().ok_or(TransferError::Closed)?;
                reading.header = Some(self.fetch.header(bytes)?);
                reading.n_read = 0;
            }
            Some((header, place)) => {
                let rest = place.len() - reading.n_read;
                let bytes = cx.air.net.take(conn, At::Consumer, rest);
                let buffer = &mut cx.buffer[self.place.clone()][place.clone()];
                buffer[reading.n_read..][..bytes.len()].copy_from_slice(&bytes);
                reading.n_read += bytes.len();
                reading.header = Some((header, place.clone()));
                if reading.n_read == place.len() {
                    let crc = checksum(buffer);
                    reading.header = None;
                    let judged = self.fetch.payload(&header, crc);
                    for reply in &judged.replies {
                        if !say(cx.air, way.session, way.number(), reply) {
                            return Err(TransferError::Broken(ErrorKind::BrokenPipe));
                        }
                    }
                }
            }
        }
        reading.last_byte = cx.air.now;
        self.fetch.late(cx.air.now).map_or(Ok(()), Err)
    }
}
