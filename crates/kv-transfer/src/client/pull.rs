//! A worker of the consumer: runs one transfer after the other, each from memory to verdict.
//!
//! Bytes go from the socket straight to their place in the result and are checked there. What to say, where bytes go and
//! what follows from a failure is [`Fetch`]'s to decide; here are the threads, sockets and waits around it.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use baton_shm::View;

use super::Shared;
use super::job::{Job, Pulled};
use super::session::{DataStream, Session};
use crate::TransferError;
use crate::checksum::Checksum;
use crate::fetch::{Closed, Fetch, Limits, Loan, Next, Origin, Wanted, cause, join};
use crate::geometry::{Piece, stripes};
use crate::incoming::Verdict;
use crate::net::{Socket, kind};
use crate::server::STACK_BYTES;
use crate::wire::{CHUNK_HEADER_LEN, ChunkHeader, MEMORY, Message, Selection, WireError};

/// Copied between two looks whether to stop.
const COPY_BYTES: usize = 8 << 20;

/// A transfer of so many bytes finds none of them in a cache, and leaves none there.
const MANY_BYTES: usize = 64 << 20;

/// Read at once: what a core's own cache holds, so that the checksum finds it there.
const READ_BYTES: usize = 128 << 10;

/// How often a wait looks whether it was cancelled.
pub(super) const CANCEL_CHECK: Duration = Duration::from_millis(50);

/// Runs transfers until the client stops.
pub(super) fn work(shared: &Shared) {
    while let Some(mut job) = shared.queue.pop() {
        match Pull::new(shared, &job).run() {
            Ok(pulled) if pulled.more => {
                job.part(pulled);
                shared.start(job);
            }
            result => {
                shared.count(&result);
                job.finish(result);
            }
        }
    }
}

/// A transfer that is over.
type Ended = (Fetch, Result<(), TransferError>);

struct Pull<'a> {
    shared: &'a Shared,
    job: &'a Job,
    deadline: Instant,
}

impl<'a> Pull<'a> {
    fn new(shared: &'a Shared, job: &'a Job) -> Self {
        let deadline = job.asked + shared.cfg.total_timeout;
        Self {
            shared,
            job,
            deadline,
        }
    }

    /// Why to give up, if so.
    fn stopped(&self) -> Option<TransferError> {
        if self.job.cancel.is_cancelled() {
            return Some(TransferError::Cancelled);
        }
        self.shared.is_stopping().then_some(TransferError::Closed)
    }

    fn run(&self) -> Result<Pulled, TransferError> {
        let selection = self.selection()?;
        let whole = self.fetch(selection.clone())?;
        let stopped = || self.stopped();
        let mut buffer = self
            .shared
            .memory
            .lend(whole.bytes(), self.deadline, stopped)?;
        let session = self.job.lease.peer.session(self.deadline, stopped)?;
        let is_shared = session.memory().is_some();
        drop(session);
        let fetches = match is_shared {
            true => vec![whole],
            false => self.striped(whole, &selection)?,
        };
        let transfers = self.side_by_side(fetches, buffer.bytes_mut())?;
        let brought = join(&selection, transfers, buffer.bytes_mut())?;
        buffer.truncate(brought.bytes);
        let blocks = self.job.blocks.start + brought.n_blocks..self.job.blocks.end;
        let more = brought.shortfall.is_none() && !blocks.is_empty();
        if brought.shortfall.is_none() && blocks.start >= self.job.lease.n_blocks {
            self.release();
        }
        Ok(Pulled {
            first_block: self.job.blocks.start,
            n_blocks: brought.n_blocks,
            more,
            shortfall: brought.shortfall,
            took: self.job.asked.elapsed(),
            opening: brought.accepted.saturating_duration_since(self.job.asked),
            is_shared,
            buffer,
        })
    }

    /// What can be fetched now.
    fn selection(&self) -> Result<Selection, TransferError> {
        let Job { lease, blocks, .. } = self.job;
        let available = self.job.available();
        if available.is_empty() || blocks.end > lease.n_blocks {
            return Err(TransferError::Range);
        }
        let layout = &self.shared.cfg.layout;
        Ok(Selection {
            layers: 0..layout.n_layers,
            heads: lease.heads.clone(),
            blocks: available,
            block_size: layout.block_size,
        })
    }

    fn fetch(&self, selection: Selection) -> Result<Fetch, TransferError> {
        let cfg = &self.shared.cfg;
        let lease = &self.job.lease;
        let wanted = Wanted {
            lease: lease.id,
            token: lease.token,
            selection,
            theirs: lease.theirs.clone(),
        };
        let limits = Limits {
            window: cfg.window_bytes,
            idle_timeout: cfg.idle_timeout,
            asked: self.job.asked,
            deadline: self.deadline,
        };
        Fetch::new(wanted, limits)
    }

    /// The transfer on as many data connections as its bytes are worth.
    fn striped(&self, whole: Fetch, selection: &Selection) -> Result<Vec<Fetch>, TransferError> {
        let cfg = &self.shared.cfg;
        match (whole.bytes() / cfg.stripe_bytes).clamp(1, cfg.n_streams) {
            1 => Ok(vec![whole]),
            n => {
                let stripes = stripes(selection, n).into_iter();
                stripes.map(|stripe| self.fetch(stripe)).collect()
            }
        }
    }

    /// Transfers at the same time, whose bytes follow each other in `buffer`. None waits for another: one that gets no
    /// connection yet waits for one that ends.
    fn side_by_side(
        &self,
        fetches: Vec<Fetch>,
        mut buffer: &mut [u8],
    ) -> Result<Vec<Ended>, TransferError> {
        let mut parts = Vec::with_capacity(fetches.len());
        for fetch in fetches {
            let (part, rest) = buffer.split_at_mut(fetch.bytes());
            parts.push((fetch, part));
            buffer = rest;
        }
        let run = |(fetch, part)| self.attempts(fetch, part);
        thread::scope(|scope| {
            let own = parts.pop();
            let spawn = |part| {
                let thread = thread::Builder::new().stack_size(STACK_BYTES);
                thread.spawn_scoped(scope, move || run(part))
            };
            let others: Vec<_> = parts.into_iter().map(spawn).collect();
            let own = own.map(run).map(Ok);
            let ended = |other: io::Result<ScopedJoinHandle<'_, Ended>>| {
                let thread = other.map_err(|_| TransferError::Busy { what: "threads" })?;
                // It panicked otherwise.
                thread.join().map_err(|_| TransferError::Closed)
            };
            others.into_iter().map(ended).chain(own).collect()
        })
    }

    /// Nothing more will be fetched of the lease. If this is lost the lease ends by itself.
    fn release(&self) {
        let lease = &self.job.lease;
        if let Ok(session) = lease.peer.session(Instant::now(), || None) {
            lease.release(&session);
        }
    }

    fn attempts(&self, mut fetch: Fetch, buffer: &mut [u8]) -> Ended {
        loop {
            let ended = self.attempt(&mut fetch, buffer);
            match fetch.next(ended, Instant::now()) {
                Next::Again => {}
                Next::Pause => thread::park_timeout(CANCEL_CHECK),
                Next::Over(ended) => return (fetch, ended),
            }
            if let Some(why) = self.stopped() {
                return (fetch, Err(why));
            }
        }
    }

    fn attempt(&self, fetch: &mut Fetch, buffer: &mut [u8]) -> Result<(), TransferError> {
        let stopped = || self.stopped();
        let session = self.job.lease.peer.session(self.deadline, stopped)?;
        if let Some(view) = session.memory() {
            let way = Way::Memory(view);
            return self.transfer(&session, way, fetch, buffer)?.result;
        }
        let stream = session.stream(self.shared, self.deadline, stopped)?;
        let cancel = &self.job.cancel;
        cancel.arm(stream.number, Arc::clone(&stream.socket));
        let ended = self.transfer(&session, Way::Socket(&stream), fetch, buffer);
        let is_clean = ended.as_ref().is_ok_and(|closed| closed.is_clean);
        if cancel.disarm(stream.number) && is_clean {
            session.give_back(stream);
        } else {
            drop(stream);
            session.forget_stream();
        }
        let ended = ended?.result;
        if matches!(ended, Err(TransferError::Broken(_))) {
            session.forget_idle();
        }
        ended
    }

    /// # Errors
    /// When the transfer could not even be asked for.
    fn transfer(
        &self,
        session: &Session,
        way: Way<'_>,
        fetch: &mut Fetch,
        buffer: &mut [u8],
    ) -> Result<Closed, TransferError> {
        let (xfer, events) = session.register(way.stream())?;
        let wire = Wire {
            pull: self,
            session,
            way,
            events,
        };
        let failed = wire.run(xfer, fetch, buffer).err();
        session.unregister(xfer);
        let closed = fetch.close(failed);
        if let Some(farewell) = &closed.farewell {
            // If the message is lost the lease ends by itself.
            let _ = session.say(way.number(), farewell);
        }
        Ok(closed)
    }
}

/// How bytes come.
#[derive(Clone, Copy)]
enum Way<'a> {
    Socket(&'a DataStream),
    Memory(&'a View),
}

impl<'a> Way<'a> {
    fn stream(self) -> Option<&'a DataStream> {
        match self {
            Self::Socket(stream) => Some(stream),
            Self::Memory(_) => None,
        }
    }

    fn number(self) -> u16 {
        self.stream().map_or(MEMORY, |stream| stream.number)
    }
}

/// A transfer on its way.
struct Wire<'a> {
    pull: &'a Pull<'a>,
    session: &'a Session,
    way: Way<'a>,
    events: Receiver<Message>,
}

impl Wire<'_> {
    /// Opens the transfer, or what an earlier connection left of it, and receives it.
    fn run(&self, xfer: u32, fetch: &mut Fetch, buffer: &mut [u8]) -> Result<(), TransferError> {
        self.say(&fetch.open(xfer, Instant::now()))?;
        let answer = self.answer(fetch)?;
        match (self.way, fetch.answered(&answer, Instant::now())?) {
            (Way::Socket(stream), Origin::Chunks) => self.receive_all(stream, fetch, buffer),
            (Way::Memory(view), Origin::Memory(loan)) => self.copy(view, &loan, fetch, buffer),
            _ => Err(WireError::Unexpected {
                message: answer.name(),
            }
            .into()),
        }
    }

    fn receive_all(
        &self,
        stream: &DataStream,
        fetch: &mut Fetch,
        buffer: &mut [u8],
    ) -> Result<(), TransferError> {
        while !fetch.is_filled() {
            self.chunk(&stream.socket, fetch, buffer)
                .map_err(|error| cause(error, self.pull.stopped(), self.events.try_iter()))?;
        }
        Ok(())
    }

    /// Copies out of the producer's memory, which it may take back meanwhile.
    fn copy(
        &self,
        view: &View,
        loan: &Loan,
        fetch: &mut Fetch,
        buffer: &mut [u8],
    ) -> Result<(), TransferError> {
        if !loan.rooms.iter().all(|room| view.has(room)) {
            return Err(WireError::Geometry { chunk: 0 }.into());
        }
        let mut rest = buffer;
        for piece in loan.pieces() {
            let (part, after) = rest.split_at_mut(piece.len());
            rest = after;
            match piece {
                Piece::Bytes(_, range) => self.copy_piece(view, range, fetch, part)?,
                Piece::Zeros(_) => part.fill(0),
            }
        }
        fetch.copied(loan.places.iter().all(|place| view.holds(place)))?;
        let copied = &self.pull.shared.counters.bytes_copied;
        copied.fetch_add(fetch.bytes() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn copy_piece(
        &self,
        view: &View,
        range: Range<usize>,
        fetch: &Fetch,
        part: &mut [u8],
    ) -> Result<(), TransferError> {
        let begins = range.step_by(COPY_BYTES);
        for (begin, part) in begins.zip(part.chunks_mut(COPY_BYTES)) {
            match fetch.bytes() {
                MANY_BYTES.. => view.copy_past_caches(begin, part),
                _ => view.copy(begin, part),
            }
            if part.len() == COPY_BYTES {
                let late = || fetch.late(Instant::now());
                self.pull.stopped().or_else(late).map_or(Ok(()), Err)?;
            }
        }
        Ok(())
    }

    fn say(&self, message: &Message) -> Result<(), TransferError> {
        self.session.say(self.way.number(), message)
    }

    fn answer(&self, fetch: &Fetch) -> Result<Message, TransferError> {
        loop {
            if let Some(why) = self.pull.stopped() {
                return Err(why);
            }
            match self.events.recv_timeout(CANCEL_CHECK) {
                Ok(message) => return Ok(message),
                Err(RecvTimeoutError::Disconnected) => return Err(self.session_ended()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(late) = fetch.late(Instant::now()) {
                return Err(late);
            }
        }
    }

    /// Receives one chunk and has it judged.
    fn chunk(
        &self,
        socket: &Socket,
        fetch: &mut Fetch,
        buffer: &mut [u8],
    ) -> Result<(), TransferError> {
        let mut header = [0; CHUNK_HEADER_LEN];
        receive(socket, fetch, &mut header)?;
        let (header, place) = fetch.header(&header)?;
        let crc = receive(socket, fetch, &mut buffer[place])?;
        let judged = fetch.payload(&header, crc);
        self.count(&header, judged.verdict);
        judged.replies.iter().try_for_each(|reply| self.say(reply))
    }

    fn count(&self, header: &ChunkHeader, verdict: Verdict) {
        let counters = &self.pull.shared.counters;
        if verdict == Verdict::Kept {
            let received = &counters.bytes_received;
            received.fetch_add(header.len.into(), Ordering::Relaxed);
        } else {
            counters.crc_errors.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(chunk = header.chunk, ?verdict, "a chunk came damaged");
        }
    }

    fn session_ended(&self) -> TransferError {
        self.session
            .ended()
            .unwrap_or(TransferError::Broken(io::ErrorKind::ConnectionAborted))
    }
}

/// Fills `buf` and returns its checksum, computed while the bytes are still in the cache.
fn receive(socket: &Socket, fetch: &Fetch, buf: &mut [u8]) -> Result<u32, TransferError> {
    let mut sum = Checksum::new();
    let mut filled = 0;
    while filled < buf.len() {
        let end = buf.len().min(filled + READ_BYTES);
        let n = socket
            .read(&mut buf[filled..end])
            .map_err(|e| fetch.unread(kind(&e)))?;
        sum.add(&buf[filled..filled + n]);
        filled += n;
        if let Some(late) = fetch.late(Instant::now()) {
            return Err(late);
        }
    }
    Ok(sum.value())
}
