//! The bytes of the kvx protocol: preface, control frames, chunk headers. Pure functions over slices.
//!
//! Every integer is little-endian. A length is checked before anything is allocated for it, and nothing here
//! panics whatever a peer sends. Not here: which message may follow which (`handshake`, `control`, `receive`).
//!
//! ```text
//! preface       magic "KVX1" | role u8 | flags u8 (1: TLS) | version u16                     8 bytes
//! frame         body length u32 | kind u8 | flags u8 | stream u16 | body                     8 bytes + body
//! chunk header  magic u16 | version u8 | flags u8 | xfer u32 | chunk u32 | length u32
//!               | offset u64 | crc32c of payload u32 | crc32c of the 28 bytes before u32    32 bytes, then payload
//! ```

mod cursor;
mod message;

pub use message::{Hello, Lent, LentRoom, Message, Open, Selection, decode_message};

use crate::checksum::checksum;
use cursor::Cursor;

/// Version of the protocol that this crate speaks.
pub const VERSION: u16 = 2;
/// Bytes of a [`Preface`].
pub const PREFACE_LEN: usize = 8;
/// Bytes before the body of a control frame.
pub const FRAME_HEADER_LEN: usize = 8;
/// Bytes before the payload of a chunk.
pub const CHUNK_HEADER_LEN: usize = 32;
/// Longest body of a control frame.
pub const MAX_BODY: usize = 1 << 20;
/// Longest body of a control frame from a peer that has not proved that it belongs to the pool. Together with
/// the number of frames of a handshake it keeps what a stranger can make us read below 8 KiB.
pub const MAX_BODY_BEFORE_AUTH: usize = 1 << 10;
/// Longest payload of a chunk.
pub const MAX_CHUNK: usize = 1 << 20;

/// In place of a data connection's number: memory that both sides see.
pub const MEMORY: u16 = 0;

const PREFACE_MAGIC: [u8; 4] = *b"KVX1";
const FLAG_TLS: u8 = 1;
const FLAG_NEAR: u8 = 2;
const CHUNK_MAGIC: u16 = 0x784b;
const CHUNK_VERSION: u8 = 1;

/// Bytes that no peer of ours would send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A structure ends before its last field.
    #[error("{what} is cut short")]
    Truncated {
        /// Which structure.
        what: &'static str,
    },
    /// A structure goes on after its last field.
    #[error("{what} has bytes left over")]
    Trailing {
        /// Which structure.
        what: &'static str,
    },
    /// A length beyond what its field may say.
    #[error("{what} of {len} bytes, at most {limit} are allowed")]
    TooLong {
        /// Which structure.
        what: &'static str,
        /// The length that the peer claims.
        len: u64,
        /// The longest allowed.
        limit: u64,
    },
    /// The peer speaks something else.
    #[error("{what} does not begin with its magic")]
    Magic {
        /// Which structure.
        what: &'static str,
    },
    /// The peer speaks another version.
    #[error("version {version} of the protocol is not spoken here")]
    Version {
        /// The version that the peer named.
        version: u16,
    },
    /// A connection of neither kind.
    #[error("role {role} is unknown")]
    Role {
        /// The role that the peer named.
        role: u8,
    },
    /// A chunk header whose own checksum is wrong.
    #[error("checksum of a chunk header is wrong")]
    HeaderChecksum,
    /// Rooms of shared memory whose checksum is wrong.
    #[error("checksum of a loan is wrong")]
    LoanChecksum,
    /// A well-formed chunk that is not part of the transfer it names.
    #[error("chunk {chunk} does not fit the transfer")]
    Geometry {
        /// The chunk's index.
        chunk: u32,
    },
    /// A well-formed message at a point where it has no meaning.
    #[error("message {message} is out of place")]
    Unexpected {
        /// The message's name.
        message: &'static str,
    },
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Messages about leases and transfers.
    Control,
    /// Chunks.
    Data,
}

/// The first bytes of every connection, sent by the side that connects. They are never encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preface {
    /// What the connection is for.
    pub role: Role,
    /// Whether all that follows is TLS.
    pub is_tls: bool,
    /// Whether the answer to a packet comes so soon that little needs to be under way. Advice: who sends may ignore it.
    pub is_near: bool,
}

impl Preface {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(self) -> [u8; PREFACE_LEN] {
        let role = match self.role {
            Role::Control => 0,
            Role::Data => 1,
        };
        let [m0, m1, m2, m3] = PREFACE_MAGIC;
        let [v0, v1] = VERSION.to_le_bytes();
        let flags = (u8::from(self.is_tls) * FLAG_TLS) | (u8::from(self.is_near) * FLAG_NEAR);
        [m0, m1, m2, m3, role, flags, v0, v1]
    }
}

/// Reads a preface.
///
/// # Errors
/// When the peer speaks another protocol or version, or names an unknown role. Unknown flags are ignored.
pub fn decode_preface(bytes: &[u8]) -> Result<Preface, WireError> {
    let mut c = Cursor::new("preface", bytes);
    if c.array()? != PREFACE_MAGIC {
        return Err(WireError::Magic { what: "preface" });
    }
    let (role, flags, version) = (c.u8()?, c.u8()?, c.u16()?);
    c.end()?;
    if version != VERSION {
        return Err(WireError::Version { version });
    }
    let role = match role {
        0 => Role::Control,
        1 => Role::Data,
        role => return Err(WireError::Role { role }),
    };
    Ok(Preface {
        role,
        is_tls: flags & FLAG_TLS != 0,
        is_near: flags & FLAG_NEAR != 0,
    })
}

/// What precedes the body of a control frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of the body that follows.
    pub len: u32,
    /// Which message the body is.
    pub kind: u8,
    /// The data connection that the message is about; 0 when it is about none.
    pub stream: u16,
}

/// Reads a frame's header and refuses a body longer than `max_body`.
///
/// # Errors
/// When cut short or too long.
pub fn decode_frame_header(bytes: &[u8], max_body: usize) -> Result<FrameHeader, WireError> {
    let mut c = Cursor::new("frame header", bytes);
    let (len, kind, _flags, stream) = (c.u32()?, c.u8()?, c.u8()?, c.u16()?);
    c.end()?;
    if len as usize > max_body {
        return Err(WireError::TooLong {
            what: "frame",
            len: len.into(),
            limit: max_body as u64,
        });
    }
    Ok(FrameHeader { len, kind, stream })
}

/// One control frame, header and body.
///
/// A body never exceeds [`MAX_BODY`]: every list in a [`Message`] is bounded where it is made.
#[must_use]
pub fn encode_frame(stream: u16, message: &Message) -> Vec<u8> {
    let mut frame = vec![0; FRAME_HEADER_LEN];
    message.encode_body(&mut frame);
    let len = u32::try_from(frame.len() - FRAME_HEADER_LEN).unwrap_or(u32::MAX);
    frame[..4].copy_from_slice(&len.to_le_bytes());
    frame[4] = message.kind();
    frame[6..8].copy_from_slice(&stream.to_le_bytes());
    frame
}

/// What precedes the payload of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// The transfer, as the receiver numbered it.
    pub xfer: u32,
    /// Index of the chunk in the transfer.
    pub chunk: u32,
    /// Bytes of payload.
    pub len: u32,
    /// Where the payload goes in the receiver's buffer.
    pub offset: u64,
    /// CRC-32C of the payload.
    pub crc: u32,
}

impl ChunkHeader {
    /// The bytes on the wire, sealed with their own checksum.
    #[must_use]
    pub fn encode(&self) -> [u8; CHUNK_HEADER_LEN] {
        let mut bytes = [0; CHUNK_HEADER_LEN];
        bytes[..2].copy_from_slice(&CHUNK_MAGIC.to_le_bytes());
        bytes[2] = CHUNK_VERSION;
        bytes[4..8].copy_from_slice(&self.xfer.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.chunk.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.len.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.crc.to_le_bytes());
        let seal = checksum(&bytes[..28]);
        bytes[28..].copy_from_slice(&seal.to_le_bytes());
        bytes
    }
}

/// Reads a chunk's header.
///
/// # Errors
/// When cut short, damaged, of another version, or announcing more than [`MAX_CHUNK`]. The bytes that follow
/// cannot be made sense of then, and the connection is lost.
pub fn decode_chunk_header(bytes: &[u8]) -> Result<ChunkHeader, WireError> {
    let mut c = Cursor::new("chunk header", bytes);
    let (magic, version, _flags) = (c.u16()?, c.u8()?, c.u8()?);
    let header = ChunkHeader {
        xfer: c.u32()?,
        chunk: c.u32()?,
        len: c.u32()?,
        offset: c.u64()?,
        crc: c.u32()?,
    };
    let seal = c.u32()?;
    c.end()?;
    if magic != CHUNK_MAGIC {
        return Err(WireError::Magic {
            what: "chunk header",
        });
    }
    if bytes
        .get(..28)
        .is_none_or(|sealed| checksum(sealed) != seal)
    {
        return Err(WireError::HeaderChecksum);
    }
    if version != CHUNK_VERSION {
        return Err(WireError::Version {
            version: version.into(),
        });
    }
    if header.len as usize > MAX_CHUNK {
        let limit = MAX_CHUNK as u64;
        return Err(WireError::TooLong {
            what: "chunk",
            len: header.len.into(),
            limit,
        });
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_kv::LeaseToken;
    use proptest::prelude::*;

    fn hello() -> impl Strategy<Value = Message> {
        any::<(u64, u64, [u8; 16], u32, u16)>().prop_map(
            |(boot_id, fingerprint, nonce, max_chunk, streams)| {
                let features = 0;
                Message::Hello(Hello {
                    boot_id,
                    fingerprint,
                    nonce,
                    max_chunk,
                    streams,
                    features,
                })
            },
        )
    }

    fn range() -> impl Strategy<Value = std::ops::Range<u32>> {
        any::<(u32, u32)>().prop_map(|(start, end)| start..end)
    }

    fn selection() -> impl Strategy<Value = Selection> {
        (range(), range(), range(), any::<u32>()).prop_map(|(layers, heads, blocks, block_size)| {
            Selection {
                layers,
                heads,
                blocks,
                block_size,
            }
        })
    }

    fn open() -> impl Strategy<Value = Message> {
        let want = prop::collection::vec(any::<u8>(), 0..300);
        (any::<(u32, u64, [u8; 32], u64)>(), selection(), want).prop_map(
            |((xfer, lease, token, credit), selection, want)| {
                Message::Open(Open {
                    xfer,
                    lease,
                    token,
                    selection,
                    credit,
                    want,
                })
            },
        )
    }

    fn lent() -> impl Strategy<Value = Message> {
        let room =
            (any::<(u32, u64, u64)>(), range()).prop_map(|((mark, stamp, offset), blocks)| {
                let place = baton_shm::Place {
                    mark,
                    stamp,
                    offset,
                };
                LentRoom { place, blocks }
            });
        let rooms = prop::collection::vec(room, 0..9);
        (any::<u32>(), rooms).prop_map(|(xfer, rooms)| Message::Lent(Lent { xfer, rooms }))
    }

    fn code() -> impl Strategy<Value = crate::RejectCode> {
        prop::sample::select(&crate::RejectCode::ALL[..])
    }

    /// Messages before the first chunk.
    fn greeting() -> impl Strategy<Value = Message> {
        prop_oneof![
            hello(),
            any::<[u8; 32]>().prop_map(|nonce| Message::Challenge { nonce }),
            any::<[u8; 32]>().prop_map(|mac| Message::Auth { mac }),
            any::<([u8; 32], u64)>().prop_map(|(mac, session)| Message::Welcome { mac, session }),
            any::<(u64, [u8; 32])>()
                .prop_map(|(session, proof)| Message::Attach { session, proof }),
            any::<(u16, [u8; 32])>()
                .prop_map(|(stream, proof)| Message::Attached { stream, proof }),
        ]
    }

    /// Messages about a transfer.
    fn transfer() -> impl Strategy<Value = Message> {
        let accept =
            any::<(u32, u32, u32, u64)>().prop_map(|(xfer, chunk_bytes, n, total_bytes)| {
                Message::Accept {
                    xfer,
                    chunk_bytes,
                    total_chunks: n,
                    total_bytes,
                }
            });
        prop_oneof![
            open(),
            accept,
            (any::<u32>(), code()).prop_map(|(xfer, code)| Message::Reject { xfer, code }),
            any::<(u32, u64)>().prop_map(|(xfer, bytes)| Message::Credit { xfer, bytes }),
            any::<u32>().prop_map(|xfer| Message::Cancel { xfer }),
            any::<u32>().prop_map(|xfer| Message::Cancelled { xfer }),
            any::<(u32, u32)>().prop_map(|(xfer, chunk)| Message::Nack { xfer, chunk }),
            any::<u32>().prop_map(|xfer| Message::Received { xfer }),
            lent(),
        ]
    }

    /// Messages about leases and the connection.
    fn lease() -> impl Strategy<Value = Message> {
        let held = any::<(u64, [u8; 32])>().prop_map(|(lease, token)| (lease, LeaseToken(token)));
        let leases = prop::collection::vec(held, 0..50);
        let remaining = prop::collection::vec(any::<(u64, u32)>(), 0..50);
        prop_oneof![
            any::<(u64, [u8; 32])>().prop_map(|(lease, token)| Message::Watch {
                lease,
                token: LeaseToken(token),
            }),
            any::<(u64, u32)>().prop_map(|(lease, n_tokens)| Message::Ready { lease, n_tokens }),
            any::<(u64, [u8; 32])>().prop_map(|(lease, token)| Message::Release {
                lease,
                token: LeaseToken(token),
            }),
            any::<u64>().prop_map(|lease| Message::Released { lease }),
            leases.prop_map(|leases| Message::Heartbeat { leases }),
            remaining.prop_map(|remaining_ms| Message::HeartbeatAck { remaining_ms }),
            any::<u64>().prop_map(|id| Message::Ping { id }),
            any::<u64>().prop_map(|id| Message::Pong { id }),
            code().prop_map(|code| Message::GoAway { code }),
        ]
    }

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![greeting(), transfer(), lease()]
    }

    proptest! {
        #[test]
        fn every_message_survives_a_round_trip(stream: u16, message in message()) {
            let frame = encode_frame(stream, &message);
            let header = decode_frame_header(&frame[..FRAME_HEADER_LEN], MAX_BODY).unwrap();
            prop_assert_eq!(header.len as usize, frame.len() - FRAME_HEADER_LEN);
            prop_assert_eq!(header.stream, stream);
            prop_assert_eq!(decode_message(header.kind, &frame[FRAME_HEADER_LEN..]), Ok(message));
        }

        #[test]
        fn a_message_cut_short_or_with_bytes_left_over_is_refused(message in message(), cut in 1usize..9) {
            let frame = encode_frame(0, &message);
            let body = &frame[FRAME_HEADER_LEN..];
            prop_assert!(decode_message(frame[4], &body[..body.len().saturating_sub(cut)]).is_err());
            prop_assert!(decode_message(frame[4], &[body, &[0]].concat()).is_err());
        }

        #[test]
        fn a_damaged_loan_is_refused(lent in lent(), at: usize, bit in 0u8..8) {
            let mut frame = encode_frame(0, &lent);
            let at = FRAME_HEADER_LEN + at % (frame.len() - FRAME_HEADER_LEN);
            frame[at] ^= 1 << bit;
            prop_assert!(decode_message(frame[4], &frame[FRAME_HEADER_LEN..]).is_err());
        }

        #[test]
        fn decoders_survive_any_bytes(kind: u8, bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            let _ = decode_preface(&bytes);
            let _ = decode_frame_header(&bytes, MAX_BODY);
            let _ = decode_chunk_header(&bytes);
            if let Ok(message) = decode_message(kind, &bytes) {
                // What a decoder builds is never larger than a small multiple of what it was given.
                prop_assert!(encode_frame(0, &message).len() <= bytes.len() + FRAME_HEADER_LEN);
            }
        }

        #[test]
        fn a_chunk_header_survives_a_round_trip_and_no_flipped_bit(
            xfer: u32, chunk: u32, len in 0..=MAX_CHUNK as u32, offset: u64, crc: u32, bit in 0usize..256,
        ) {
            let header = ChunkHeader { xfer, chunk, len, offset, crc };
            let mut bytes = header.encode();
            prop_assert_eq!(decode_chunk_header(&bytes), Ok(header));
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode_chunk_header(&bytes).is_err());
        }
    }

    #[test]
    fn a_preface_names_role_encryption_nearness_and_version() {
        let data = Preface {
            role: Role::Data,
            is_tls: false,
            is_near: false,
        };
        for (role, is_tls, is_near) in [
            (Role::Control, false, false),
            (Role::Control, true, false),
            (Role::Data, true, true),
            (Role::Data, false, true),
        ] {
            let preface = Preface {
                role,
                is_tls,
                is_near,
            };
            assert_eq!(decode_preface(&preface.encode()), Ok(preface));
        }
        let mut bytes = data.encode();
        bytes[6] = 9;
        assert_eq!(
            decode_preface(&bytes),
            Err(WireError::Version { version: 9 })
        );
        assert_eq!(
            decode_preface(b"GET / HT"),
            Err(WireError::Magic { what: "preface" })
        );
        assert_eq!(
            decode_preface(b"KVX1"),
            Err(WireError::Truncated { what: "preface" })
        );
    }

    #[test]
    fn a_list_that_claims_more_entries_than_it_has_bytes_allocates_nothing() {
        let huge = u32::MAX.to_le_bytes();
        assert!(decode_message(Message::Heartbeat { leases: vec![] }.kind(), &huge).is_err());
        assert!(
            decode_message(
                Message::HeartbeatAck {
                    remaining_ms: vec![]
                }
                .kind(),
                &huge
            )
            .is_err()
        );
    }
}
