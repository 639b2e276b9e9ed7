//! The control messages, and their bodies' bytes.

use std::ops::Range;

use baton_kv::LeaseToken;

use baton_shm::Place;

use super::{Cursor, WireError};
use crate::RejectCode;
use crate::checksum::checksum;

/// How a side introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Random per process, so that a restarted peer is not taken for its former self.
    pub boot_id: u64,
    /// [`fingerprint`](crate::fingerprint) of the layout; must be equal on both sides.
    pub fingerprint: u64,
    /// Fresh per connection; enters the proofs of both sides.
    pub nonce: [u8; 16],
    /// Longest chunk that the side takes or sends, in bytes.
    pub max_chunk: u32,
    /// Data connections that the side wants or allows.
    pub streams: u16,
    /// Bit set of optional abilities; none is defined yet.
    pub features: u16,
}

/// Some of a lease's KV, in the consumer's order: `[layer][kv head][block][K, V][token][dim]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Of the model's.
    pub layers: Range<u32>,
    /// Of the model's.
    pub heads: Range<u32>,
    /// Counted from the beginning of the prompt.
    pub blocks: Range<u32>,
    /// Tokens in each, which may differ from the producer's.
    pub block_size: u32,
}

/// Asks for KV of a lease.
#[derive(Clone, PartialEq, Eq)]
pub struct Open {
    /// Number that the receiver gives the transfer, unique on its control connection.
    pub xfer: u32,
    /// Which lease.
    pub lease: u64,
    /// Proof of the right to it.
    pub token: [u8; 32],
    /// Which of its bytes.
    pub selection: Selection,
    /// Bytes that may be sent before more are granted.
    pub credit: u64,
    /// Bit `i % 8` of byte `i / 8` asks for chunk `i`; empty asks for all of them.
    pub want: Vec<u8>,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Open");
        shown.field("xfer", &self.xfer).field("lease", &self.lease);
        shown.field("selection", &self.selection);
        shown.finish_non_exhaustive()
    }
}

/// Where KV lies that need not be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lent {
    /// Which transfer.
    pub xfer: u32,
    /// The rooms that it is in, with more; their blocks follow each other.
    pub rooms: Vec<LentRoom>,
}

/// Blocks of a lease that lie together, all layers and heads that the producer has of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LentRoom {
    /// Where.
    pub place: Place,
    /// Which, as the producer counts them from the first of the lease.
    pub blocks: Range<u32>,
}

/// One message on a control connection (the two `Attach` ones: on a data connection).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Both ways, first.
    Hello(Hello),
    /// Producer to consumer: prove that you know the pool's secret.
    Challenge {
        /// Fresh per connection.
        nonce: [u8; 32],
    },
    /// Consumer to producer: the proof.
    Auth {
        /// Authentication code over both hellos and the challenge.
        mac: [u8; 32],
    },
    /// Producer to consumer: you are in, and here is my own proof.
    Welcome {
        /// Authentication code over the same, under another label.
        mac: [u8; 32],
        /// The name of this control connection, for its data connections to say.
        session: u64,
    },
    /// Consumer to producer, on a data connection: belongs to that control connection.
    Attach {
        /// What `Welcome` said.
        session: u64,
        /// Authentication code over this very connection, under a key of that one.
        proof: [u8; 32],
    },
    /// Producer to consumer, on a data connection: its number from now on.
    Attached {
        /// From 1.
        stream: u16,
        /// Authentication code over the same and the number, under another label.
        proof: [u8; 32],
    },
    /// Consumer to producer: send this on the data connection that the frame names; if it is [`MEMORY`](super::MEMORY), say
    /// where it lies.
    Open(Open),
    /// Producer to consumer: it lies there, as long as the rooms' marks say so.
    Lent(Lent),
    /// Producer to consumer: chunks will come.
    Accept {
        /// Which transfer.
        xfer: u32,
        /// Longest chunk; only the last one of a layer is shorter.
        chunk_bytes: u32,
        /// Chunks of the whole transfer, wanted or not.
        total_chunks: u32,
        /// Bytes of the whole transfer.
        total_bytes: u64,
    },
    /// Producer to consumer: no, or no longer.
    Reject {
        /// Which transfer.
        xfer: u32,
        /// Why.
        code: RejectCode,
    },
    /// Consumer to producer: more may be sent.
    Credit {
        /// Which transfer.
        xfer: u32,
        /// Bytes of payload, on top of what was granted before.
        bytes: u64,
    },
    /// Consumer to producer: stop.
    Cancel {
        /// Which transfer.
        xfer: u32,
    },
    /// Producer to consumer: the last byte of the transfer has been written.
    Cancelled {
        /// Which transfer.
        xfer: u32,
    },
    /// Consumer to producer: this chunk came damaged, send it again.
    Nack {
        /// Which transfer.
        xfer: u32,
        /// Which chunk.
        chunk: u32,
    },
    /// Consumer to producer: everything of this transfer is here and verified; the lease stays for the next one.
    Received {
        /// Which transfer.
        xfer: u32,
    },
    /// Consumer to producer: tell me how a lease grows, until all of it is there.
    Watch {
        /// Which lease.
        lease: u64,
        /// Proof of the right to it.
        token: LeaseToken,
    },
    /// Producer to consumer: the KV of so many tokens, from the first on, can be fetched.
    Ready {
        /// Which lease.
        lease: u64,
        /// How many.
        n_tokens: u32,
    },
    /// Consumer to producer: the lease is not needed any more.
    Release {
        /// Which lease.
        lease: u64,
        /// Proof of the right to it.
        token: LeaseToken,
    },
    /// Producer to consumer: the lease is no more.
    Released {
        /// Which lease.
        lease: u64,
    },
    /// Consumer to producer: these leases are still wanted.
    Heartbeat {
        /// Which leases, and proofs of the right to them.
        leases: Vec<(u64, LeaseToken)>,
    },
    /// Producer to consumer: how long each lease lives from now on.
    HeartbeatAck {
        /// Lease and milliseconds; 0 for one that is gone.
        remaining_ms: Vec<(u64, u32)>,
    },
    /// Either way: are you there?
    Ping {
        /// Comes back in the answer.
        id: u64,
    },
    /// Either way: I am.
    Pong {
        /// What `Ping` said.
        id: u64,
    },
    /// Either way: the connection will not be used for anything new, or ends now.
    GoAway {
        /// Why.
        code: RejectCode,
    },
    /// A kind that a later version may define; ignored.
    Unknown {
        /// The kind.
        kind: u8,
    },
}

impl Message {
    pub(super) fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => 1,
            Self::Challenge { .. } => 2,
            Self::Auth { .. } => 3,
            Self::Welcome { .. } => 4,
            Self::Attach { .. } => 5,
            Self::Attached { .. } => 6,
            Self::Open(_) => 7,
            Self::Accept { .. } => 8,
            Self::Reject { .. } => 9,
            Self::Credit { .. } => 10,
            Self::Ready { .. } => 11,
            Self::Cancel { .. } => 12,
            Self::Cancelled { .. } => 13,
            Self::Nack { .. } => 14,
            Self::Released { .. } => 16,
            Self::Heartbeat { .. } => 17,
            Self::HeartbeatAck { .. } => 18,
            Self::Release { .. } => 19,
            Self::Ping { .. } => 20,
            Self::Pong { .. } => 21,
            Self::GoAway { .. } => 22,
            Self::Received { .. } => 23,
            Self::Watch { .. } => 24,
            Self::Lent(_) => 25,
            Self::Unknown { kind } => *kind,
        }
    }

    /// The message's name, for errors.
    pub(crate) fn name(&self) -> &'static str {
        NAMES
            .get(usize::from(self.kind()))
            .copied()
            .unwrap_or("of an unknown kind")
    }

    pub(super) fn encode_body(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello(hello) => hello.encode_body(out),
            Self::Open(open) => open.encode_body(out),
            Self::Lent(lent) => lent.encode_body(out),
            Self::Challenge { nonce: proof } | Self::Auth { mac: proof } => out.extend(proof),
            Self::Welcome { mac, session } => put(mac, &session.to_le_bytes(), out),
            Self::Attach { session, proof } => put(&session.to_le_bytes(), proof, out),
            Self::Attached { stream, proof } => put(&stream.to_le_bytes(), proof, out),
            Self::Accept {
                xfer,
                chunk_bytes,
                total_chunks,
                total_bytes,
            } => {
                out.extend(
                    [xfer, chunk_bytes, total_chunks]
                        .iter()
                        .flat_map(|n| n.to_le_bytes()),
                );
                out.extend(total_bytes.to_le_bytes());
            }
            Self::Reject { xfer, code } => {
                put(&xfer.to_le_bytes(), &code.to_wire().to_le_bytes(), out);
            }
            Self::Credit { xfer, bytes } => put(&xfer.to_le_bytes(), &bytes.to_le_bytes(), out),
            Self::Cancel { xfer } | Self::Cancelled { xfer } | Self::Received { xfer } => {
                out.extend(xfer.to_le_bytes());
            }
            Self::Nack { xfer, chunk } => put(&xfer.to_le_bytes(), &chunk.to_le_bytes(), out),
            Self::Watch { lease, token } | Self::Release { lease, token } => {
                put(&lease.to_le_bytes(), &token.0, out);
            }
            Self::Ready { lease, n_tokens } => {
                put(&lease.to_le_bytes(), &n_tokens.to_le_bytes(), out);
            }
            Self::Released { lease: n } | Self::Ping { id: n } | Self::Pong { id: n } => {
                out.extend(n.to_le_bytes());
            }
            Self::Heartbeat { leases } => {
                put_count(leases.len(), out);
                for (lease, token) in leases {
                    put(&lease.to_le_bytes(), &token.0, out);
                }
            }
            Self::HeartbeatAck { remaining_ms } => {
                put_count(remaining_ms.len(), out);
                for (lease, ms) in remaining_ms {
                    out.extend(lease.to_le_bytes());
                    out.extend(ms.to_le_bytes());
                }
            }
            Self::GoAway { code } => out.extend(code.to_wire().to_le_bytes()),
            Self::Unknown { .. } => {}
        }
    }
}

/// Names by kind.
const NAMES: [&str; 26] = [
    "0",
    "HELLO",
    "CHALLENGE",
    "AUTH",
    "WELCOME",
    "ATTACH",
    "ATTACHED",
    "OPEN",
    "ACCEPT",
    "REJECT",
    "CREDIT",
    "READY",
    "CANCEL",
    "CANCELLED",
    "NACK",
    "15",
    "RELEASED",
    "HB",
    "HB_ACK",
    "RELEASE",
    "PING",
    "PONG",
    "GOAWAY",
    "RECEIVED",
    "WATCH",
    "LENT",
];

impl Hello {
    pub(crate) fn encode_body(&self, out: &mut Vec<u8>) {
        out.extend(self.boot_id.to_le_bytes());
        out.extend(self.fingerprint.to_le_bytes());
        out.extend(self.nonce);
        out.extend(self.max_chunk.to_le_bytes());
        out.extend(self.streams.to_le_bytes());
        out.extend(self.features.to_le_bytes());
    }

    fn decode(c: &mut Cursor<'_>) -> Result<Self, WireError> {
        Ok(Self {
            boot_id: c.u64()?,
            fingerprint: c.u64()?,
            nonce: c.array()?,
            max_chunk: c.u32()?,
            streams: c.u16()?,
            features: c.u16()?,
        })
    }
}

impl Open {
    fn encode_body(&self, out: &mut Vec<u8>) {
        out.extend(self.xfer.to_le_bytes());
        out.extend(self.lease.to_le_bytes());
        out.extend(self.token);
        self.selection.encode_body(out);
        out.extend(self.credit.to_le_bytes());
        put_count(self.want.len(), out);
        out.extend(&self.want);
    }

    fn decode(c: &mut Cursor<'_>) -> Result<Self, WireError> {
        Ok(Self {
            xfer: c.u32()?,
            lease: c.u64()?,
            token: c.array()?,
            selection: Selection::decode(c)?,
            credit: c.u64()?,
            want: c.bytes()?.to_vec(),
        })
    }
}

impl Selection {
    fn encode_body(&self, out: &mut Vec<u8>) {
        for range in [&self.layers, &self.heads, &self.blocks] {
            put(&range.start.to_le_bytes(), &range.end.to_le_bytes(), out);
        }
        out.extend(self.block_size.to_le_bytes());
    }

    fn decode(c: &mut Cursor<'_>) -> Result<Self, WireError> {
        Ok(Self {
            layers: c.u32()?..c.u32()?,
            heads: c.u32()?..c.u32()?,
            blocks: c.u32()?..c.u32()?,
            block_size: c.u32()?,
        })
    }
}

impl Lent {
    /// Sealed, because no checksum covers what is read where it says.
    fn encode_body(&self, out: &mut Vec<u8>) {
        let mut fields = Vec::new();
        self.encode_fields(&mut fields);
        put(&fields, &checksum(&fields).to_le_bytes(), out);
    }

    fn encode_fields(&self, out: &mut Vec<u8>) {
        out.extend(self.xfer.to_le_bytes());
        put_count(self.rooms.len(), out);
        for LentRoom { place, blocks } in &self.rooms {
            put(&place.stamp.to_le_bytes(), &place.offset.to_le_bytes(), out);
            out.extend(place.mark.to_le_bytes());
            put(&blocks.start.to_le_bytes(), &blocks.end.to_le_bytes(), out);
        }
    }

    fn decode(c: &mut Cursor<'_>) -> Result<Self, WireError> {
        let xfer = c.u32()?;
        let rooms = c.list::<28>()?.iter().map(room).collect::<Result<_, _>>()?;
        let (lent, mut fields) = (Self { xfer, rooms }, Vec::new());
        lent.encode_fields(&mut fields);
        let is_sealed = c.u32()? == checksum(&fields);
        is_sealed.then_some(lent).ok_or(WireError::LoanChecksum)
    }
}

fn room(bytes: &[u8; 28]) -> Result<LentRoom, WireError> {
    let mut c = Cursor::new("room", bytes);
    let (stamp, offset, mark) = (c.u64()?, c.u64()?, c.u32()?);
    Ok(LentRoom {
        place: Place {
            mark,
            stamp,
            offset,
        },
        blocks: c.u32()?..c.u32()?,
    })
}

/// The messages before the first about a lease.
fn decode_greeting(kind: u8, c: &mut Cursor<'_>) -> Result<Message, WireError> {
    Ok(match kind {
        1 => Message::Hello(Hello::decode(c)?),
        2 => Message::Challenge { nonce: c.array()? },
        3 => Message::Auth { mac: c.array()? },
        4 => Message::Welcome {
            mac: c.array()?,
            session: c.u64()?,
        },
        5 => Message::Attach {
            session: c.u64()?,
            proof: c.array()?,
        },
        6 => Message::Attached {
            stream: c.u16()?,
            proof: c.array()?,
        },
        kind => Message::Unknown { kind },
    })
}

fn put(first: &[u8], second: &[u8], out: &mut Vec<u8>) {
    out.extend(first);
    out.extend(second);
}

fn put_count(n: usize, out: &mut Vec<u8>) {
    out.extend(u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes());
}

/// Reads the body of a control frame of the given kind.
///
/// # Errors
/// When the body is not exactly as long as its kind demands. An unknown kind is no error.
pub fn decode_message(kind: u8, body: &[u8]) -> Result<Message, WireError> {
    let what = NAMES.get(usize::from(kind)).copied().unwrap_or("message");
    let mut c = Cursor::new(what, body);
    let message = match kind {
        1..=6 => decode_greeting(kind, &mut c)?,
        7 => Message::Open(Open::decode(&mut c)?),
        8 => Message::Accept {
            xfer: c.u32()?,
            chunk_bytes: c.u32()?,
            total_chunks: c.u32()?,
            total_bytes: c.u64()?,
        },
        9 => Message::Reject {
            xfer: c.u32()?,
            code: RejectCode::from_wire(c.u16()?),
        },
        10 => Message::Credit {
            xfer: c.u32()?,
            bytes: c.u64()?,
        },
        11 => Message::Ready {
            lease: c.u64()?,
            n_tokens: c.u32()?,
        },
        12 => Message::Cancel { xfer: c.u32()? },
        13 => Message::Cancelled { xfer: c.u32()? },
        14 => Message::Nack {
            xfer: c.u32()?,
            chunk: c.u32()?,
        },
        16 => Message::Released { lease: c.u64()? },
        17 => heartbeat(&mut c)?,
        18 => heartbeat_ack(&mut c)?,
        19 => Message::Release {
            lease: c.u64()?,
            token: LeaseToken(c.array()?),
        },
        20 => Message::Ping { id: c.u64()? },
        21 => Message::Pong { id: c.u64()? },
        22 => Message::GoAway {
            code: RejectCode::from_wire(c.u16()?),
        },
        23 => Message::Received { xfer: c.u32()? },
        24 => Message::Watch {
            lease: c.u64()?,
            token: LeaseToken(c.array()?),
        },
        25 => Message::Lent(Lent::decode(&mut c)?),
        kind => return Ok(Message::Unknown { kind }),
    };
    c.end()?;
    Ok(message)
}

fn heartbeat(c: &mut Cursor<'_>) -> Result<Message, WireError> {
    let entry = |bytes: &[u8; 40]| {
        let mut c = Cursor::new("heartbeat", bytes);
        Ok((c.u64()?, LeaseToken(c.array()?)))
    };
    let leases = c.list()?.iter().map(entry).collect::<Result<_, _>>()?;
    Ok(Message::Heartbeat { leases })
}

fn heartbeat_ack(c: &mut Cursor<'_>) -> Result<Message, WireError> {
    let entry = |e: &[u8; 12]| {
        let [l0, l1, l2, l3, l4, l5, l6, l7, m0, m1, m2, m3] = *e;
        (
            u64::from_le_bytes([l0, l1, l2, l3, l4, l5, l6, l7]),
            u32::from_le_bytes([m0, m1, m2, m3]),
        )
    };
    let remaining_ms = c.list()?.iter().map(entry).collect();
    Ok(Message::HeartbeatAck { remaining_ms })
}
