//! A worker of the consumer: runs one transfer after the other, each from memory to verdict.
//!
//! Bytes go from the socket straight to their place in the result and are checked there; the result is handed out
//! only as far as every byte of it was found right. A broken connection is replaced once, and only what is
//! missing is asked for again.

use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::Shared;
use super::job::{Job, Pulled};
use super::memory::Buffer;
use super::session::{DataStream, Session, refusal};
use crate::geometry::ChunkMap;
use crate::incoming::{Incoming, Verdict};
use crate::net::{kind, read_some};
use crate::wire::{
    CHUNK_HEADER_LEN, ChunkHeader, MAX_CHUNK, Message, Open, WireError, decode_chunk_header,
};
use crate::{RejectCode, TransferError};

/// How often a wait looks whether it was cancelled.
pub(super) const CANCEL_CHECK: Duration = Duration::from_millis(50);
/// How long a broken transfer is tried again while the producer has not noticed yet.
const RESUME_PATIENCE: Duration = Duration::from_secs(2);

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
        let layout = &self.shared.cfg.layout;
        if self.job.blocks.end > self.job.lease.n_blocks {
            return Err(TransferError::Range);
        }
        let available = self.job.available();
        let n_blocks = u32::try_from(available.len()).map_err(|_| TransferError::Range)?;
        let whole = ChunkMap::new(layout, n_blocks, MAX_CHUNK).ok_or(TransferError::Range)?;
        let stopped = || self.stopped();
        let mut buffer = self
            .shared
            .memory
            .lend(whole.total_bytes(), self.deadline, stopped)?;
        let mut incoming = None;
        let error = self.attempts(&mut incoming, &mut buffer);
        match (error, incoming) {
            (Ok(()), Some(incoming)) => {
                buffer.truncate(incoming.map().total_bytes());
                Ok(self.pulled(buffer, incoming.map().n_blocks(), None))
            }
            (Ok(()), None) => Err(TransferError::Range),
            (Err(error), incoming) => self.salvage(error, incoming, buffer),
        }
    }

    fn pulled(&self, buffer: Buffer, n_blocks: u32, shortfall: Option<TransferError>) -> Pulled {
        Pulled {
            first_block: self.job.blocks.start,
            n_blocks,
            more: shortfall.is_none() && !self.is_last(n_blocks),
            shortfall,
            took: self.job.asked.elapsed(),
            buffer,
        }
    }

    /// Whether nothing is left to be fetched after so many blocks.
    fn is_last(&self, n_blocks: u32) -> bool {
        self.job.blocks.start + n_blocks >= self.job.blocks.end
    }

    /// The first blocks, if any of them is whole over all layers. Chunks come layer by layer, so a connection
    /// that breaks early leaves none; a chunk that stays damaged leaves those before it.
    fn salvage(
        &self,
        error: TransferError,
        incoming: Option<Incoming>,
        mut buffer: Buffer,
    ) -> Result<Pulled, TransferError> {
        let is_wanted = !matches!(error, TransferError::Cancelled | TransferError::Closed);
        let Some(incoming) = incoming.filter(|i| is_wanted && i.whole_blocks() > 0) else {
            return Err(error);
        };
        let n_blocks = incoming.whole_blocks();
        let len = incoming.map().compact(buffer.bytes_mut(), n_blocks);
        buffer.truncate(len);
        Ok(self.pulled(buffer, n_blocks, Some(error)))
    }

    fn attempts(
        &self,
        incoming: &mut Option<Incoming>,
        buffer: &mut Buffer,
    ) -> Result<(), TransferError> {
        let first = self.attempt(incoming, buffer);
        if !matches!(first, Err(TransferError::Broken(_))) {
            return first;
        }
        // The producer may take the broken connection for alive a moment longer.
        let until = self.deadline.min(Instant::now() + RESUME_PATIENCE);
        loop {
            if let Some(why) = self.stopped() {
                return Err(why);
            }
            let again = self.attempt(incoming, buffer);
            let is_busy = matches!(again, Err(TransferError::Rejected(RejectCode::Busy)));
            if !is_busy || Instant::now() >= until {
                return again;
            }
            std::thread::park_timeout(CANCEL_CHECK);
        }
    }

    fn attempt(
        &self,
        incoming: &mut Option<Incoming>,
        buffer: &mut Buffer,
    ) -> Result<(), TransferError> {
        let stopped = || self.stopped();
        let session = self.job.lease.peer.session(self.deadline, stopped)?;
        let stream = session.stream(self.shared, self.deadline, stopped)?;
        let ended = self.transfer(&session, &stream, incoming, buffer);
        // Where a transfer was cut off, bytes may follow that belong to nobody.
        let is_clean = !matches!(ended, Ended::Failed(_));
        if self.job.cancel.disarm() && is_clean {
            session.give_back(stream);
        } else {
            drop(stream);
            session.forget_stream();
        }
        match ended {
            Ended::Whole => Ok(()),
            Ended::Refused(code) => Err(TransferError::Rejected(code)),
            Ended::Failed(error) => Err(error),
        }
    }

    fn transfer(
        &self,
        session: &Session,
        stream: &DataStream,
        incoming: &mut Option<Incoming>,
        buffer: &mut Buffer,
    ) -> Ended {
        match stream.socket.try_clone() {
            Ok(socket) => self.job.cancel.arm(socket),
            Err(error) => return Ended::Failed(TransferError::Broken(kind(&error))),
        }
        let (xfer, events) = match session.register(stream) {
            Ok(registered) => registered,
            Err(error) => return Ended::Failed(error),
        };
        let wire = Wire {
            pull: self,
            session,
            stream,
            xfer,
            events,
        };
        let ended = wire.run(incoming, buffer.bytes_mut());
        session.unregister(xfer);
        // If the message is lost the lease ends by itself.
        let _ = match &ended {
            Ended::Whole if self.is_last(incoming.as_ref().map_or(0, |i| i.map().n_blocks())) => {
                self.job.lease.consumed();
                session.say(stream.number, &Message::Done { xfer })
            }
            Ended::Whole => session.say(stream.number, &Message::Received { xfer }),
            Ended::Refused(_) => Ok(()),
            Ended::Failed(_) => session.say(stream.number, &Message::Cancel { xfer }),
        };
        ended
    }
}

/// How a transfer ended on its connection.
enum Ended {
    /// Everything is here and verified.
    Whole,
    /// The producer would not begin; nothing has come.
    Refused(RejectCode),
    /// Somewhere on the way.
    Failed(TransferError),
}

/// A transfer on its connection.
struct Wire<'a> {
    pull: &'a Pull<'a>,
    session: &'a Session,
    stream: &'a DataStream,
    xfer: u32,
    events: Receiver<Message>,
}

impl Wire<'_> {
    fn run(&self, slot: &mut Option<Incoming>, buffer: &mut [u8]) -> Ended {
        let incoming = match self.begin(slot) {
            Ok(incoming) => incoming,
            Err(TransferError::Rejected(code)) => return Ended::Refused(code),
            Err(error) => return Ended::Failed(error),
        };
        match self.chunks(incoming, buffer) {
            Ok(()) => Ended::Whole,
            Err(error) => Ended::Failed(error),
        }
    }

    /// Opens the transfer, or what an earlier connection left of it.
    fn begin<'i>(&self, slot: &'i mut Option<Incoming>) -> Result<&'i mut Incoming, TransferError> {
        let want = slot.as_mut().map(Incoming::resume).unwrap_or_default();
        self.open(want)?;
        let map = self.accepted()?;
        let window = self.pull.shared.cfg.window_bytes;
        let incoming = slot.get_or_insert_with(|| Incoming::new(map.clone(), window));
        if *incoming.map() == map {
            Ok(incoming)
        } else {
            Err(WireError::Unexpected { message: "ACCEPT" }.into())
        }
    }

    fn chunks(&self, incoming: &mut Incoming, buffer: &mut [u8]) -> Result<(), TransferError> {
        while !incoming.is_over() {
            self.chunk(incoming, buffer)
                .map_err(|error| self.reason(error))?;
        }
        match incoming.given_up() {
            0 => Ok(()),
            chunks => Err(TransferError::Corrupt { chunks }),
        }
    }

    fn open(&self, want: Vec<u8>) -> Result<(), TransferError> {
        let (lease, blocks) = (&self.pull.job.lease, self.pull.job.available());
        let open = Open {
            xfer: self.xfer,
            lease: lease.id,
            token: lease.token.0,
            first_block: blocks.start,
            n_blocks: blocks.end - blocks.start,
            credit: self.pull.shared.cfg.window_bytes,
            want,
        };
        self.session.say(self.stream.number, &Message::Open(open))
    }

    /// The producer's answer: how it cuts the transfer into chunks.
    fn accepted(&self) -> Result<ChunkMap, TransferError> {
        let after = self.pull.shared.cfg.idle_timeout;
        let deadline = self.pull.deadline.min(Instant::now() + after);
        let message = loop {
            if let Some(why) = self.pull.stopped() {
                return Err(why);
            }
            match self.events.recv_timeout(CANCEL_CHECK) {
                Ok(message) => break message,
                Err(RecvTimeoutError::Disconnected) => return Err(self.session_ended()),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    return Err(TransferError::TimedOut {
                        what: "waiting for acceptance",
                        after,
                    });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        match message {
            Message::Accept {
                chunk_bytes,
                total_chunks,
                total_bytes,
                ..
            } => self.agree(chunk_bytes as usize, total_chunks, total_bytes),
            Message::Reject { code, .. } => Err(TransferError::Rejected(code)),
            other => Err(WireError::Unexpected {
                message: other.name(),
            }
            .into()),
        }
    }

    /// The producer sends the blocks that lie together on its side, which may be fewer than were asked for.
    fn agree(
        &self,
        chunk_bytes: usize,
        n_chunks: u32,
        bytes: u64,
    ) -> Result<ChunkMap, TransferError> {
        let available = self.pull.job.available();
        let layout = &self.pull.shared.cfg.layout;
        u32::try_from(bytes / layout.block_bytes().max(1) as u64)
            .ok()
            .filter(|&n_blocks| n_blocks as usize <= available.len() && chunk_bytes <= MAX_CHUNK)
            .and_then(|n_blocks| ChunkMap::new(layout, n_blocks, chunk_bytes))
            .filter(|map| map.n_chunks() == n_chunks && map.total_bytes() as u64 == bytes)
            .ok_or(TransferError::Protocol(WireError::Unexpected {
                message: "ACCEPT",
            }))
    }

    /// Receives one chunk and judges it.
    fn chunk(&self, incoming: &mut Incoming, buffer: &mut [u8]) -> Result<(), TransferError> {
        let mut header = [0; CHUNK_HEADER_LEN];
        self.receive(&mut header)?;
        let header = decode_chunk_header(&header)?;
        if header.xfer != self.xfer {
            return Err(WireError::Geometry {
                chunk: header.chunk,
            }
            .into());
        }
        let place = incoming.place(&header)?;
        let crc = self.receive(&mut buffer[place])?;
        match incoming.judge(&header, crc) {
            Verdict::Kept => {
                let received = &self.pull.shared.counters.bytes_received;
                received.fetch_add(header.len.into(), Ordering::Relaxed);
            }
            verdict => self.damaged(&header, verdict)?,
        }
        match incoming.grant() {
            Some(bytes) => self.session.say(
                self.stream.number,
                &Message::Credit {
                    xfer: self.xfer,
                    bytes,
                },
            ),
            None => Ok(()),
        }
    }

    fn damaged(&self, header: &ChunkHeader, verdict: Verdict) -> Result<(), TransferError> {
        self.pull
            .shared
            .counters
            .crc_errors
            .fetch_add(1, Ordering::Relaxed);
        tracing::warn!(chunk = header.chunk, ?verdict, "a chunk came damaged");
        if verdict == Verdict::AskAgain {
            let nack = Message::Nack {
                xfer: self.xfer,
                chunk: header.chunk,
            };
            self.session.say(self.stream.number, &nack)?;
        }
        Ok(())
    }

    /// Fills `buf` and returns its checksum, computed while the bytes are still in the cache.
    fn receive(&self, buf: &mut [u8]) -> Result<u32, TransferError> {
        let socket: &TcpStream = &self.stream.socket;
        let (mut filled, mut crc) = (0, 0);
        while filled < buf.len() {
            let n = read_some(socket, &mut buf[filled..]).map_err(|e| self.no_bytes(&e))?;
            crc = crc32c::crc32c_append(crc, &buf[filled..filled + n]);
            filled += n;
            if Instant::now() >= self.pull.deadline {
                let after = self.pull.job.asked.elapsed();
                return Err(TransferError::TimedOut {
                    what: "the transfer",
                    after,
                });
            }
        }
        Ok(crc)
    }

    fn no_bytes(&self, error: &std::io::Error) -> TransferError {
        match kind(error) {
            std::io::ErrorKind::TimedOut => {
                let after = self.pull.shared.cfg.idle_timeout;
                TransferError::TimedOut {
                    what: "waiting for bytes",
                    after,
                }
            }
            kind => TransferError::Broken(kind),
        }
    }

    /// The cause behind a failed read: a cancellation, a refusal, or the end of the session.
    fn reason(&self, error: TransferError) -> TransferError {
        if let Some(why) = self.pull.stopped() {
            return why;
        }
        let refused = self.events.try_iter().find_map(|message| refusal(&message));
        refused.map_or(error, TransferError::Rejected)
    }

    fn session_ended(&self) -> TransferError {
        self.session
            .ended()
            .unwrap_or(TransferError::Broken(std::io::ErrorKind::ConnectionAborted))
    }
}
