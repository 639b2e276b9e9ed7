//! Connections: bytes in order within each way of each connection, and no order between them.
//!
//! What one side writes lies in its way, in the segments in which it was written, until the schedule delivers some of it;
//! it can be spoilt there. A connection that is severed carries nothing any more, and neither side is told.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::dice::Dice;
use crate::wire::{
    CHUNK_HEADER_LEN, ChunkHeader, FRAME_HEADER_LEN, Message, WireError, decode_chunk_header,
    decode_frame_header, decode_message,
};

pub(super) type ConnId = u64;

/// Which end, and the way that leads there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    Producer,
    Consumer,
}

impl At {
    fn other(self) -> Self {
        match self {
            Self::Producer => Self::Consumer,
            Self::Consumer => Self::Producer,
        }
    }
}

#[derive(Debug, Default)]
struct Way {
    segments: VecDeque<Vec<u8>>,
    /// Its writer has closed.
    is_ended: bool,
    stalled_until: Option<Instant>,
    /// Every so many segments one is damaged; 0 for none.
    noise: usize,
    /// Of so many segments at first.
    noisy: usize,
    n_sent: usize,
    /// The last chunk, which may come again.
    last: Vec<u8>,
    /// Delivered, and not read yet.
    inbox: Vec<u8>,
    /// The reader has closed.
    is_closed: bool,
    /// The reader knows that the writer has.
    is_told: bool,
}

#[derive(Debug, Default)]
struct Connection {
    /// To the producer, to the consumer.
    ways: [Way; 2],
    is_severed: bool,
    is_data: bool,
}

/// All connections.
#[derive(Debug, Default)]
pub(super) struct Net {
    conns: BTreeMap<ConnId, Connection>,
    last: ConnId,
    /// Of new data connections, from the producer.
    pub(super) noise: usize,
}

impl Net {
    pub(super) fn connect(&mut self, is_data: bool) -> ConnId {
        self.last += 1;
        let mut connection = Connection {
            is_data,
            ..Connection::default()
        };
        if is_data {
            let way = &mut connection.ways[At::Consumer as usize];
            // Twice: a chunk that comes damaged a third time is given up.
            (way.noise, way.noisy) = (self.noise, 2 * self.noise);
        }
        self.conns.insert(self.last, connection);
        self.last
    }

    pub(super) fn is_empty(&self) -> bool {
        self.conns.is_empty()
    }

    fn way(&mut self, conn: ConnId, at: At) -> Option<&mut Way> {
        self.conns.get_mut(&conn).map(|c| &mut c.ways[at as usize])
    }

    /// Writes to the other end; `false` if this one is closed.
    pub(super) fn send(&mut self, conn: ConnId, to: At, mut bytes: Vec<u8>) -> bool {
        let Some(connection) = self.conns.get_mut(&conn) else {
            return false;
        };
        if connection.ways[to.other() as usize].is_closed {
            return false;
        }
        let is_severed = connection.is_severed;
        let way = &mut connection.ways[to as usize];
        way.n_sent += 1;
        if way.n_sent <= way.noisy
            && way.n_sent.checked_rem(way.noise) == Some(0)
            && let Some(last) = bytes.last_mut()
        {
            *last ^= 1;
        }
        if connection.is_data {
            way.last.clone_from(&bytes);
        }
        if !is_severed && !way.is_closed && !way.is_ended {
            way.segments.push_back(bytes);
        }
        true
    }

    /// Bytes that were written and did not arrive yet.
    pub(super) fn backlog(&mut self, conn: ConnId, to: At) -> usize {
        let way = self.way(conn, to);
        way.map_or(0, |way| way.segments.iter().map(Vec::len).sum())
    }

    pub(super) fn close(&mut self, conn: ConnId, at: At) {
        let Some(connection) = self.conns.get_mut(&conn) else {
            return;
        };
        connection.ways[at.other() as usize].is_ended = true;
        let way = &mut connection.ways[at as usize];
        way.is_closed = true;
        way.segments.clear();
        if connection.ways.iter().all(|way| way.is_closed) {
            self.conns.remove(&conn);
        }
    }

    /// What has arrived.
    pub(super) fn inbox(&mut self, conn: ConnId, at: At) -> &[u8] {
        self.way(conn, at).map_or(&[], |way| &way.inbox)
    }

    /// Whether no more will arrive, or this end is closed.
    pub(super) fn is_over(&mut self, conn: ConnId, at: At) -> bool {
        self.way(conn, at)
            .is_none_or(|way| way.is_told || way.is_closed)
    }

    pub(super) fn is_closed(&mut self, conn: ConnId, at: At) -> bool {
        self.way(conn, at).is_none_or(|way| way.is_closed)
    }

    /// At most `n` bytes of what has arrived.
    pub(super) fn take(&mut self, conn: ConnId, at: At, n: usize) -> Vec<u8> {
        let way = self.way(conn, at);
        way.map_or_else(Vec::new, |way| {
            let n = n.min(way.inbox.len());
            way.inbox.drain(..n).collect()
        })
    }

    /// The next frame, if it is there.
    pub(super) fn frame(
        &mut self,
        (conn, at): (ConnId, At),
        max_body: usize,
    ) -> Result<Option<(u16, Message)>, WireError> {
        let inbox = self.inbox(conn, at);
        let Some(head) = inbox.get(..FRAME_HEADER_LEN) else {
            return Ok(None);
        };
        let header = decode_frame_header(head, max_body)?;
        let len = FRAME_HEADER_LEN + header.len as usize;
        let Some(body) = inbox.get(FRAME_HEADER_LEN..len) else {
            return Ok(None);
        };
        let message = decode_message(header.kind, body)?;
        self.take(conn, at, len);
        Ok(Some((header.stream, message)))
    }

    /// Ways in which something could arrive now.
    pub(super) fn deliverable(&self, now: Instant) -> Vec<(ConnId, At)> {
        let has_some = |way: &Way| !way.segments.is_empty() || way.is_ended && !way.is_told;
        let is_open = |way: &Way| !way.is_closed && way.stalled_until.is_none_or(|at| at <= now);
        let mut ways = Vec::new();
        for (&conn, connection) in self.conns.iter().filter(|(_, c)| !c.is_severed) {
            for at in [At::Producer, At::Consumer] {
                let way = &connection.ways[at as usize];
                if has_some(way) && is_open(way) {
                    ways.push((conn, at));
                }
            }
        }
        ways
    }

    /// Bytes that have arrived and were not read.
    pub(super) fn n_unread(&self) -> usize {
        let ways = self.conns.values().flat_map(|c| &c.ways);
        ways.map(|way| way.inbox.len()).sum()
    }

    /// Some of the first segment arrives, or the news that there are no more.
    pub(super) fn deliver(&mut self, conn: ConnId, at: At, most: usize) {
        let Some(way) = self.way(conn, at) else {
            return;
        };
        let Some(segment) = way.segments.front_mut() else {
            way.is_told = way.is_ended;
            return;
        };
        let n = most.clamp(1, segment.len().max(1)).min(segment.len());
        way.inbox.extend(segment.drain(..n));
        if segment.is_empty() {
            way.segments.pop_front();
        }
    }

    /// Does something bad to a connection; says what.
    pub(super) fn harm(&mut self, dice: &mut Dice, now: Instant) -> &'static str {
        let all: Vec<_> = self.conns.keys().copied().collect();
        let Some(conn) = dice.pick(&all) else {
            return "nothing to harm";
        };
        let at = if dice.once_in(2) {
            At::Producer
        } else {
            At::Consumer
        };
        match dice.below(16) {
            0 => self.sever(conn),
            1 => self.reset(conn),
            2 => self.disturb(conn, dice.pick(&[1, 1, 2, 3, 5]).unwrap_or(1)),
            3..6 => self.stall(conn, at, now + Duration::from_millis(dice.roll() % 6000)),
            _ => self.spoil(conn, at, dice),
        }
    }

    fn sever(&mut self, conn: ConnId) -> &'static str {
        if let Some(connection) = self.conns.get_mut(&conn) {
            connection.is_severed = true;
        }
        "a connection is severed"
    }

    /// Both ends are told, and what was on its way is lost.
    fn reset(&mut self, conn: ConnId) -> &'static str {
        for at in [At::Producer, At::Consumer] {
            if let Some(way) = self.way(conn, at) {
                way.segments.clear();
                (way.is_ended, way.is_told) = (true, true);
            }
        }
        "a connection is reset"
    }

    /// Whatever chunks follow, some of their payloads come damaged.
    fn disturb(&mut self, conn: ConnId, noise: usize) -> &'static str {
        let Some(connection) = self.conns.get_mut(&conn).filter(|c| c.is_data) else {
            return "nothing to disturb";
        };
        let way = &mut connection.ways[At::Consumer as usize];
        (way.noise, way.noisy) = (noise, usize::MAX);
        "a data connection is disturbed"
    }

    fn stall(&mut self, conn: ConnId, at: At, until: Instant) -> &'static str {
        if let Some(way) = self.way(conn, at) {
            way.stalled_until = Some(until);
        }
        "a way is stalled"
    }

    /// Alters bytes on their way.
    fn spoil(&mut self, conn: ConnId, at: At, dice: &mut Dice) -> &'static str {
        let Some(connection) = self.conns.get_mut(&conn) else {
            return "no bytes";
        };
        let is_data = connection.is_data && at == At::Consumer;
        let way = &mut connection.ways[at as usize];
        if is_data && dice.once_in(4) && !way.is_ended && !way.is_closed {
            way.segments.push_back(way.last.clone());
            return "an old segment comes again";
        }
        if way.segments.is_empty() {
            return "no bytes to spoil";
        }
        let i = dice.below(way.segments.len());
        match dice.below(8) {
            0 => {
                let copy = way.segments[i].clone();
                way.segments.insert(i + 1, copy);
                "a segment comes twice"
            }
            1 => {
                way.segments.truncate(i + 1);
                let len = dice.below(way.segments[i].len().max(1));
                way.segments[i].truncate(len);
                way.is_ended = true;
                "a way ends in mid segment"
            }
            2 => {
                way.segments.remove(i);
                "a segment is left out"
            }
            3..5 if is_data => lie(&mut way.segments[i], dice),
            _ => flip(&mut way.segments[i], dice),
        }
    }

    /// What lies in the ways can be delivered.
    pub(super) fn calm(&mut self) {
        let ways = self.conns.values_mut().flat_map(|c| &mut c.ways);
        ways.for_each(|way| way.stalled_until = None);
    }
}

fn flip(segment: &mut [u8], dice: &mut Dice) -> &'static str {
    if segment.is_empty() {
        return "nothing to flip";
    }
    let len = match dice.once_in(2) {
        true => segment.len(),
        false => segment.len().min(CHUNK_HEADER_LEN),
    };
    segment[dice.below(len)] ^= 1 << dice.below(8);
    "a bit is flipped"
}

/// A well-formed header that says something else in one of its fields.
fn lie(segment: &mut [u8], dice: &mut Dice) -> &'static str {
    let Some(Ok(header)) = segment.get(..CHUNK_HEADER_LEN).map(decode_chunk_header) else {
        return "nothing to lie about";
    };
    let n = dice.pick(&[1, 2, 3, 64, 1 << 20, u32::MAX]).unwrap_or(1);
    let lie = match dice.below(5) {
        0 => ChunkHeader {
            len: header.len.wrapping_add(n),
            ..header
        },
        1 => ChunkHeader {
            len: header.len.saturating_sub(n),
            ..header
        },
        2 => ChunkHeader {
            offset: header.offset.wrapping_add(n.into()),
            ..header
        },
        3 => ChunkHeader {
            chunk: header.chunk.wrapping_add(n),
            ..header
        },
        _ => ChunkHeader {
            xfer: header.xfer.wrapping_add(n),
            ..header
        },
    };
    segment[..CHUNK_HEADER_LEN].copy_from_slice(&lie.encode());
    "a header lies"
}
