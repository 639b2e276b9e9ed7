//! One transfer as the consumer decides it: what to say to the producer, where its bytes go, whether to try again on
//! another connection, and what the caller gets in the end. Pure: connections, memory and the clock are arguments.
//!
//! An attempt is opened, answered, filled chunk by chunk and closed; [`Fetch::next`] says whether another follows, which
//! asks only for what is missing. No block is handed out of which a byte is not verified.

use std::io::ErrorKind;
use std::ops::Range;
use std::time::{Duration, Instant};

use baton_kv::{KvLayout, LeaseToken};

use baton_shm::Place;

use crate::geometry::{ChunkMap, Window};
use crate::incoming::{Incoming, Verdict};
use crate::wire::{
    CHUNK_HEADER_LEN, ChunkHeader, Lent, MAX_CHUNK, Message, Open, WireError, decode_chunk_header,
};
use crate::{RejectCode, TransferError};

/// How long a broken transfer is tried again while the producer has not noticed yet.
const RESUME_PATIENCE: Duration = Duration::from_secs(2);

/// What to fetch.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) lease: u64,
    pub(crate) token: LeaseToken,
    /// Blocks that the lease has or will have.
    pub(crate) n_blocks: u32,
    /// Those to be fetched, counted from the first of the lease.
    pub(crate) blocks: Range<u32>,
    /// Blocks of the lease that are there, as far as is known.
    pub(crate) n_ready: u32,
}

/// Bounds of a transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes in flight.
    pub(crate) window: u64,
    /// Without a byte or an answer.
    pub(crate) idle_timeout: Duration,
    pub(crate) asked: Instant,
    pub(crate) deadline: Instant,
}

/// Where the bytes come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// Chunks on the data connection.
    Chunks,
    /// The producer's memory.
    Memory(Loan),
}

/// Blocks in the producer's memory.
#[derive(Debug)]
pub(crate) struct Loan {
    pub(crate) place: Place,
    /// The room, counted from the beginning of the memory.
    pub(crate) room: Range<usize>,
    window: Window,
    bytes: usize,
}

impl Loan {
    /// `None` for a room that no memory holds, or that has no such blocks.
    fn new(layout: &KvLayout, lent: &Lent) -> Option<Self> {
        let begin = usize::try_from(lent.place.offset).ok()?;
        let bytes = |n: u32| layout.block_bytes().checked_mul(n as usize);
        let blocks = lent.first_block..lent.first_block.checked_add(lent.n_blocks)?;
        Some(Self {
            place: lent.place,
            room: begin..begin.checked_add(bytes(lent.room_blocks)?)?,
            window: Window::new(layout, lent.room_blocks, blocks)?,
            bytes: bytes(lent.n_blocks)?,
        })
    }

    /// The pieces of the memory that follow each other in the buffer, from its beginning.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Range<usize>> {
        let begin = self.room.start;
        let pieces = self.window.pieces(0..self.bytes);
        pieces.map(move |piece| begin + piece.start..begin + piece.end)
    }
}

/// What follows from a chunk.
#[derive(Debug)]
pub(crate) struct Judged {
    pub(crate) verdict: Verdict,
    /// To be said to the producer.
    pub(crate) replies: Vec<Message>,
}

/// How an attempt ended on its connection.
#[derive(Debug)]
pub(crate) struct Closed {
    pub(crate) result: Result<(), TransferError>,
    /// The last word about it.
    pub(crate) farewell: Option<Message>,
    /// Whether the connection can carry another transfer; bytes may follow otherwise that belong to nobody.
    pub(crate) is_clean: bool,
}

/// What follows from an attempt.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another one.
    Again,
    /// Another one, after a pause.
    Pause,
    /// It was the last.
    Over(Result<(), TransferError>),
}

/// What a transfer brought.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Brought {
    pub(crate) n_blocks: u32,
    /// What they take of the buffer, from its beginning.
    pub(crate) bytes: usize,
    /// Whether others can be fetched after them.
    pub(crate) more: bool,
    /// Why not all are here.
    pub(crate) shortfall: Option<TransferError>,
}

/// The transfer.
#[derive(Debug)]
pub(crate) struct Fetch {
    layout: KvLayout,
    wanted: Wanted,
    limits: Limits,
    /// Bytes of all that is wanted and there.
    bytes: usize,
    /// Outlives the attempts.
    incoming: Option<Incoming>,
    /// The attempt's number.
    xfer: u32,
    opened: Instant,
    is_accepted: bool,
    /// Set by the first break.
    resume_until: Option<Instant>,
}

impl Fetch {
    /// # Errors
    /// When the lease has no such blocks, none of them is there, or they fit in no memory.
    pub(crate) fn new(
        layout: &KvLayout,
        wanted: Wanted,
        limits: Limits,
    ) -> Result<Self, TransferError> {
        if wanted.blocks.end > wanted.n_blocks {
            return Err(TransferError::Range);
        }
        let n_available = u32::try_from(wanted.available().len());
        let whole = n_available
            .ok()
            .and_then(|n| ChunkMap::new(layout, n, MAX_CHUNK))
            .ok_or(TransferError::Range)?;
        Ok(Self {
            layout: layout.clone(),
            wanted,
            limits,
            bytes: whole.total_bytes(),
            incoming: None,
            xfer: 0,
            opened: limits.asked,
            is_accepted: false,
            resume_until: None,
        })
    }

    /// What the buffer must hold.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Begins an attempt under a number that is new on its session: the message that asks for what is missing.
    pub(crate) fn open(&mut self, xfer: u32, now: Instant) -> Message {
        self.xfer = xfer;
        self.opened = now;
        self.is_accepted = false;
        let blocks = self.wanted.available();
        let want = self.incoming.as_mut().map(Incoming::resume);
        Message::Open(Open {
            xfer,
            lease: self.wanted.lease,
            token: self.wanted.token.0,
            first_block: blocks.start,
            n_blocks: blocks.end - blocks.start,
            credit: self.limits.window,
            want: want.unwrap_or_default(),
        })
    }

    /// Takes the producer's answer: how it cuts the transfer into chunks, or where it lies.
    ///
    /// # Errors
    /// When it refuses, or its answer does not fit the question.
    pub(crate) fn answered(&mut self, answer: &Message) -> Result<Source, TransferError> {
        let unexpected = WireError::Unexpected {
            message: answer.name(),
        };
        let map = match *answer {
            Message::Accept {
                chunk_bytes,
                total_chunks,
                total_bytes,
                ..
            } => self.agree(chunk_bytes as usize, total_chunks, total_bytes),
            Message::Lent(lent) => {
                let map = self.map(lent.n_blocks, MAX_CHUNK);
                let loan = Loan::new(&self.layout, &lent).filter(|_| self.begin(map));
                return loan.map(Source::Memory).ok_or(unexpected.into());
            }
            Message::Reject { code, .. } => return Err(TransferError::Rejected(code)),
            _ => None,
        };
        let is_ours = self.begin(map);
        is_ours.then_some(Source::Chunks).ok_or(unexpected.into())
    }

    /// Whether the transfer is as we, and an earlier attempt, understand it; it begins then.
    fn begin(&mut self, map: Option<ChunkMap>) -> bool {
        let Some(map) = map else {
            return false;
        };
        let window = self.limits.window;
        let incoming = self
            .incoming
            .get_or_insert_with(|| Incoming::new(map.clone(), window));
        self.is_accepted = *incoming.map() == map;
        self.is_accepted
    }

    /// The producer sends the blocks that lie together on its side, which may be fewer than were asked for.
    fn agree(&self, chunk_bytes: usize, n_chunks: u32, bytes: u64) -> Option<ChunkMap> {
        u32::try_from(bytes / self.layout.block_bytes().max(1) as u64)
            .ok()
            .and_then(|n_blocks| self.map(n_blocks, chunk_bytes))
            .filter(|map| map.n_chunks() == n_chunks && map.total_bytes() as u64 == bytes)
    }

    fn map(&self, n_blocks: u32, chunk_bytes: usize) -> Option<ChunkMap> {
        let is_asked = n_blocks as usize <= self.wanted.available().len();
        (is_asked && chunk_bytes <= MAX_CHUNK)
            .then(|| ChunkMap::new(&self.layout, n_blocks, chunk_bytes))?
    }

    /// Takes what was copied out of the producer's memory, and whether it was still what it was said to be afterwards.
    ///
    /// # Errors
    /// When it was not.
    pub(crate) fn copied(&mut self, is_held: bool) -> Result<(), TransferError> {
        let incoming = self.incoming.as_mut().filter(|_| is_held);
        let incoming = incoming.ok_or(TransferError::Rejected(RejectCode::Expired))?;
        incoming.complete();
        Ok(())
    }

    /// Takes the header of the next chunk: where its payload goes in the buffer.
    ///
    /// # Errors
    /// When it is not that of a chunk we wait for; no byte that follows can be made sense of then.
    pub(crate) fn header(
        &self,
        bytes: &[u8; CHUNK_HEADER_LEN],
    ) -> Result<(ChunkHeader, Range<usize>), TransferError> {
        let header = decode_chunk_header(bytes)?;
        let stray = WireError::Geometry {
            chunk: header.chunk,
        };
        let ours = self
            .incoming
            .as_ref()
            .filter(|_| self.is_accepted && header.xfer == self.xfer);
        let place = ours.ok_or(stray)?.place(&header)?;
        Ok((header, place))
    }

    /// Takes the checksum of a chunk's payload, which is where [`header`](Self::header) said.
    pub(crate) fn payload(&mut self, header: &ChunkHeader, crc: u32) -> Judged {
        let xfer = self.xfer;
        let Some(incoming) = &mut self.incoming else {
            return Judged {
                verdict: Verdict::GivenUp,
                replies: Vec::new(),
            };
        };
        let verdict = incoming.judge(header, crc);
        let nack = (verdict == Verdict::AskAgain).then_some(Message::Nack {
            xfer,
            chunk: header.chunk,
        });
        let credit = incoming
            .grant()
            .map(|bytes| Message::Credit { xfer, bytes });
        Judged {
            verdict,
            replies: nack.into_iter().chain(credit).collect(),
        }
    }

    /// Whether no further chunk will come.
    pub(crate) fn is_filled(&self) -> bool {
        self.is_accepted && self.incoming.as_ref().is_some_and(Incoming::is_over)
    }

    /// Why to wait no longer, if so: the answer is overdue, or the whole transfer.
    pub(crate) fn late(&self, now: Instant) -> Option<TransferError> {
        let (what, until, after) = if self.is_accepted {
            let after = now.saturating_duration_since(self.limits.asked);
            ("the transfer", self.limits.deadline, after)
        } else {
            let after = self.limits.idle_timeout;
            let until = self.limits.deadline.min(self.opened + after);
            ("waiting for acceptance", until, after)
        };
        (now >= until).then_some(TransferError::TimedOut { what, after })
    }

    /// What a failed read means.
    pub(crate) fn unread(&self, kind: ErrorKind) -> TransferError {
        match kind {
            ErrorKind::TimedOut => TransferError::TimedOut {
                what: "waiting for bytes",
                after: self.limits.idle_timeout,
            },
            kind => TransferError::Broken(kind),
        }
    }

    /// Ends an attempt that failed with `error`, or that is [filled](Self::is_filled).
    pub(crate) fn close(&mut self, error: Option<TransferError>) -> Closed {
        let xfer = self.xfer;
        let was_accepted = std::mem::take(&mut self.is_accepted);
        let given_up = self.incoming.as_ref().map_or(0, Incoming::given_up);
        let corrupt = (given_up > 0).then_some(TransferError::Corrupt { chunks: given_up });
        let error = error.or(corrupt);
        let (farewell, is_clean) = match &error {
            None if self.is_last() => (Some(Message::Done { xfer }), true),
            None => (Some(Message::Received { xfer }), true),
            // Nothing has begun.
            Some(TransferError::Rejected(_)) if !was_accepted => (None, true),
            Some(_) => (Some(Message::Cancel { xfer }), false),
        };
        Closed {
            result: error.map_or(Ok(()), Err),
            farewell,
            is_clean,
        }
    }

    /// Whether nothing is left to be fetched after what this transfer brings.
    fn is_last(&self) -> bool {
        self.is_end(self.incoming.as_ref().map_or(0, |i| i.map().n_blocks()))
    }

    fn is_end(&self, n_blocks: u32) -> bool {
        self.wanted.blocks.start + n_blocks >= self.wanted.blocks.end
    }

    /// Decides after an attempt. A broken connection is replaced once; the producer may take it for alive a moment
    /// longer.
    pub(crate) fn next(&mut self, ended: Result<(), TransferError>, now: Instant) -> Next {
        match (&ended, self.resume_until) {
            (Err(TransferError::Broken(_)), None) => {
                self.resume_until = Some(self.limits.deadline.min(now + RESUME_PATIENCE));
                Next::Again
            }
            (Err(TransferError::Rejected(RejectCode::Busy)), Some(until)) if now < until => {
                Next::Pause
            }
            _ => Next::Over(ended),
        }
    }

    /// What the caller gets: everything, or the first blocks if any of them is whole over all layers, packed at the
    /// beginning of `buffer`. Chunks come layer by layer, so a connection that breaks early leaves none; a chunk that
    /// stays damaged leaves those before it.
    ///
    /// # Errors
    /// The reason why there is nothing, or nothing that anybody waits for.
    pub(crate) fn finish(
        self,
        ended: Result<(), TransferError>,
        buffer: &mut [u8],
    ) -> Result<Brought, TransferError> {
        let shortfall = ended.err();
        let is_unwanted = matches!(
            shortfall,
            Some(TransferError::Cancelled | TransferError::Closed)
        );
        let whole = self.incoming.as_ref().map_or(0, Incoming::whole_blocks);
        let Some(incoming) = self.incoming.as_ref().filter(|_| !is_unwanted && whole > 0) else {
            return Err(shortfall.unwrap_or(TransferError::Range));
        };
        Ok(Brought {
            n_blocks: whole,
            bytes: incoming.map().compact(buffer, whole),
            more: shortfall.is_none() && !self.is_end(whole),
            shortfall,
        })
    }
}

impl Wanted {
    /// What can be fetched now, perhaps nothing.
    fn available(&self) -> Range<u32> {
        self.blocks.start..self.blocks.end.min(self.n_ready)
    }
}

/// The cause behind an attempt's `error`: the wish to stop, or what the producer has `said` meanwhile.
pub(crate) fn cause(
    error: TransferError,
    stopped: Option<TransferError>,
    mut said: impl Iterator<Item = Message>,
) -> TransferError {
    let refused = || said.find_map(|message| refusal(&message).map(TransferError::Rejected));
    stopped.or_else(refused).unwrap_or(error)
}

fn refusal(message: &Message) -> Option<RejectCode> {
    match message {
        Message::Reject { code, .. } => Some(*code),
        _ => None,
    }
}
