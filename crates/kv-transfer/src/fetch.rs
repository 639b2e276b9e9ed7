//! One transfer as the consumer decides it: what to say to the producer, where its bytes go, whether to try again on
//! another connection, and what the caller gets in the end. Pure: connections, memory and the clock are arguments.
//!
//! An attempt is opened, answered, filled chunk by chunk and closed; [`Fetch::next`] says whether another follows, which
//! asks only for what is missing. What a caller wants may come by several transfers at the same time, each with some of the
//! layers; [`join`] makes one result of theirs. No block is handed out of which a byte is not verified.

use std::io::ErrorKind;
use std::ops::Range;
use std::time::{Duration, Instant};

use baton_kv::LeaseToken;
use baton_shm::Place;

use crate::geometry::{ChunkMap, Piece, Shard, Source};
use crate::incoming::{Incoming, Verdict};
use crate::wire::{
    CHUNK_HEADER_LEN, ChunkHeader, LentRoom, MAX_CHUNK, Message, Open, Selection, WireError,
    decode_chunk_header,
};
use crate::{RejectCode, TransferError};

/// How long a broken transfer is tried again while the producer has not noticed yet.
const RESUME_PATIENCE: Duration = Duration::from_secs(2);

/// What to fetch.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) lease: u64,
    pub(crate) token: LeaseToken,
    /// Of what is there already.
    pub(crate) selection: Selection,
    /// What the producer has.
    pub(crate) theirs: Shard,
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
pub(crate) enum Origin {
    /// Chunks on the data connection.
    Chunks,
    /// The producer's memory.
    Memory(Loan),
}

/// KV in the producer's memory.
#[derive(Debug)]
pub(crate) struct Loan {
    pub(crate) places: Vec<Place>,
    /// The rooms, counted from the beginning of the memory.
    pub(crate) rooms: Vec<Range<usize>>,
    source: Source,
    bytes: usize,
}

impl Loan {
    /// `None` for rooms that no memory holds, or in which the selection is not.
    fn new(wanted: &Wanted, rooms: &[LentRoom], bytes: usize) -> Option<Self> {
        let theirs = &wanted.theirs;
        let place = |room: &LentRoom| {
            let begin = usize::try_from(room.place.offset).ok()?;
            let n_blocks = room.blocks.end.checked_sub(room.blocks.start)?;
            Some(begin..begin.checked_add(theirs.bytes(n_blocks)?)?)
        };
        let parts = rooms.iter().map(|room| room.blocks.clone()).collect();
        Some(Self {
            places: rooms.iter().map(|room| room.place).collect(),
            rooms: rooms.iter().map(place).collect::<Option<_>>()?,
            source: Source::new(theirs, parts, &wanted.selection)?,
            bytes,
        })
    }

    /// The pieces that follow each other in the buffer, from its beginning; those of the memory counted from its own.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.source.pieces(0..self.bytes).map(|piece| match piece {
            Piece::Bytes(room, range) => {
                let begin = self.rooms[room].start;
                Piece::Bytes(room, begin + range.start..begin + range.end)
            }
            zeros @ Piece::Zeros(_) => zeros,
        })
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

/// What was brought of a selection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Brought {
    pub(crate) n_blocks: u32,
    /// What they take of the buffer, from its beginning.
    pub(crate) bytes: usize,
    /// When the producer first agreed to send something.
    pub(crate) accepted: Instant,
    /// Why not all are here.
    pub(crate) shortfall: Option<TransferError>,
}

/// The transfer.
#[derive(Debug)]
pub(crate) struct Fetch {
    wanted: Wanted,
    limits: Limits,
    /// Bytes of all that is wanted.
    bytes: usize,
    /// Outlives the attempts.
    incoming: Option<Incoming>,
    /// The attempt's number.
    xfer: u32,
    opened: Instant,
    is_accepted: bool,
    /// When any attempt was first accepted.
    accepted: Option<Instant>,
    /// Set by the first break.
    resume_until: Option<Instant>,
}

impl Fetch {
    /// # Errors
    /// When the selection is empty, or fits in no memory.
    pub(crate) fn new(wanted: Wanted, limits: Limits) -> Result<Self, TransferError> {
        let whole = ChunkMap::new(&wanted.theirs.layout, &wanted.selection, MAX_CHUNK);
        Ok(Self {
            bytes: whole.ok_or(TransferError::Range)?.total_bytes(),
            wanted,
            limits,
            incoming: None,
            xfer: 0,
            opened: limits.asked,
            is_accepted: false,
            accepted: None,
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
        let want = self.incoming.as_mut().map(Incoming::resume);
        Message::Open(Open {
            xfer,
            lease: self.wanted.lease,
            token: self.wanted.token.0,
            selection: self.wanted.selection.clone(),
            credit: self.limits.window,
            want: want.unwrap_or_default(),
        })
    }

    /// Takes the producer's answer: how it cuts the transfer into chunks, or where it lies.
    ///
    /// # Errors
    /// When it refuses, or its answer does not fit the question.
    pub(crate) fn answered(
        &mut self,
        answer: &Message,
        now: Instant,
    ) -> Result<Origin, TransferError> {
        let unexpected = WireError::Unexpected {
            message: answer.name(),
        };
        let origin = match answer {
            Message::Accept {
                chunk_bytes,
                total_chunks,
                total_bytes,
                ..
            } => self
                .agree(*chunk_bytes as usize, *total_chunks, *total_bytes)
                .map(|map| (map, Origin::Chunks)),
            Message::Lent(lent) => Loan::new(&self.wanted, &lent.rooms, self.bytes)
                .and_then(|loan| Some((self.map(MAX_CHUNK)?, Origin::Memory(loan)))),
            Message::Reject { code, .. } => return Err(refused(*code)),
            _ => None,
        };
        let ours = origin.and_then(|(map, origin)| self.begin(&map).then_some(origin));
        self.accepted.get_or_insert(now);
        ours.ok_or(unexpected.into())
    }

    /// Whether the transfer is as we, and an earlier attempt, understand it; it begins then.
    fn begin(&mut self, map: &ChunkMap) -> bool {
        let window = self.limits.window;
        let incoming = self
            .incoming
            .get_or_insert_with(|| Incoming::new(map.clone(), window));
        self.is_accepted = incoming.map() == map;
        self.is_accepted
    }

    fn agree(&self, chunk_bytes: usize, n_chunks: u32, bytes: u64) -> Option<ChunkMap> {
        self.map(chunk_bytes)
            .filter(|map| map.n_chunks() == n_chunks && map.total_bytes() as u64 == bytes)
    }

    fn map(&self, chunk_bytes: usize) -> Option<ChunkMap> {
        let Wanted {
            theirs, selection, ..
        } = &self.wanted;
        (chunk_bytes <= MAX_CHUNK).then(|| ChunkMap::new(&theirs.layout, selection, chunk_bytes))?
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

    /// Leading blocks of which every byte is verified.
    fn whole_blocks(&self) -> u32 {
        self.incoming.as_ref().map_or(0, Incoming::whole_blocks)
    }
}

/// What the caller gets of `selection`, which was fetched by these transfers: everything, or the first blocks if any of them
/// is whole over all layers and heads, packed at the beginning of `buffer`. Chunks come layer by layer, so a connection that
/// breaks early leaves none; a chunk that stays damaged leaves those before it.
///
/// # Errors
/// The reason why there is nothing, or nothing that anybody waits for.
pub(crate) fn join(
    selection: &Selection,
    transfers: Vec<(Fetch, Result<(), TransferError>)>,
    buffer: &mut [u8],
) -> Result<Brought, TransferError> {
    let whole = transfers.iter().map(|(fetch, _)| fetch.whole_blocks());
    let n_blocks = whole.min().unwrap_or(0);
    let map = transfers
        .first()
        .and_then(|(fetch, _)| ChunkMap::new(&fetch.wanted.theirs.layout, selection, MAX_CHUNK));
    let accepted = transfers
        .iter()
        .filter_map(|(fetch, _)| fetch.accepted)
        .min();
    let shortfall = transfers
        .into_iter()
        .filter_map(|(_, ended)| ended.err())
        .max_by_key(is_unwanted);
    let is_unwanted = shortfall.as_ref().is_some_and(is_unwanted);
    let something = map.zip(accepted).filter(|_| !is_unwanted && n_blocks > 0);
    let Some((map, accepted)) = something else {
        return Err(shortfall.unwrap_or(TransferError::Range));
    };
    let bytes = map.compact(buffer, n_blocks);
    Ok(Brought {
        n_blocks,
        bytes,
        accepted,
        shortfall,
    })
}

fn is_unwanted(error: &TransferError) -> bool {
    matches!(error, TransferError::Cancelled | TransferError::Closed)
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

/// What it means that a transfer was refused before it began.
fn refused(code: RejectCode) -> TransferError {
    match code {
        RejectCode::Disconnected => TransferError::Broken(ErrorKind::NotConnected),
        code => TransferError::Rejected(code),
    }
}

fn refusal(message: &Message) -> Option<RejectCode> {
    match message {
        Message::Reject { code, .. } => Some(*code),
        _ => None,
    }
}
