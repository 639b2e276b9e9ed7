//! Messages as bytes. Pure: nothing that comes in makes this fail but by an error, and nothing grows without a bound.
//!
//! A frame is its length (four bytes, little-endian, of what follows), a kind, and a body; numbers are little-endian.
//! Servers are named by numbers, which the teller gives them ([`Message::Server`]) and may give to others later.

use baton_fleet::MAX_ENDPOINTS;
use baton_scheduler::{BlockHash, Certainty, UnderWay};

/// Begins every hello. The last digit is the version: another one is another protocol.
const MAGIC: [u8; 8] = *b"batonpr1";
/// Longest name of a server.
const MAX_NAME: usize = 1024;
/// Most blocks of a note; what is behind them distinguishes few prompts.
const MAX_BLOCKS: usize = 8192;
/// Longest body, its kind included.
const MAX_BODY: usize = 8 + 8 * MAX_BLOCKS;
/// Longest frame.
pub(crate) const MAX_FRAME: usize = 4 + MAX_BODY;

const HELLO: u8 = 1;
const PROOF: u8 = 2;
const SERVER: u8 = 3;
const LOAD: u8 = 4;
const NOTE: u8 = 5;
const BEAT: u8 = 6;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Drawn when the process began.
    pub(crate) instance: u64,
    /// How long blocks are: notes of others make no sense.
    pub(crate) block_bytes: u32,
    /// Drawn for this connection.
    pub(crate) nonce: [u8; 16],
}

/// What is said.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Message {
    /// First, by both.
    Hello(Hello),
    /// Then, by both, the teller first.
    Proof([u8; 32]),
    /// From now on `number` is the server of this name; nobody, if it is empty.
    Server { number: u16, name: Box<str> },
    /// So much is in flight there now.
    Load { number: u16, under_way: UnderWay },
    /// A prompt of these blocks was sent there, or computed.
    Note {
        number: u16,
        certainty: Certainty,
        blocks: Vec<BlockHash>,
    },
    /// Nothing is new.
    Beat,
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("the other end speaks another version")]
    Version,
    #[error("a message is longer than any")]
    TooLong,
    #[error("there is no message of kind {0}")]
    Kind(u8),
    #[error("a message of kind {0} is malformed")]
    Malformed(u8),
}

impl Hello {
    /// As it travels, and as proofs cover it.
    pub(crate) fn bytes(&self) -> [u8; 36] {
        let mut bytes = [0; 36];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.instance.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.block_bytes.to_le_bytes());
        bytes[20..].copy_from_slice(&self.nonce);
        bytes
    }
}

/// Appends a frame of `kind`, whose body `write` makes.
fn frame(out: &mut Vec<u8>, kind: u8, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend([0; 4]);
    out.push(kind);
    write(out);
    let length = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

/// Appends a note without making a message of it: notes are long, and there are many.
pub(crate) fn note(out: &mut Vec<u8>, number: u16, certainty: Certainty, blocks: &[BlockHash]) {
    let blocks = &blocks[..blocks.len().min(MAX_BLOCKS)];
    frame(out, NOTE, |out| {
        out.extend(number.to_le_bytes());
        out.push(u8::from(certainty == Certainty::Computed));
        out.extend(blocks.iter().flat_map(|b| b.number().to_le_bytes()));
    });
}

impl Message {
    /// Appends it.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello(hello) => frame(out, HELLO, |out| out.extend(hello.bytes())),
            Self::Proof(proof) => frame(out, PROOF, |out| out.extend(proof)),
            Self::Server { number, name } => frame(out, SERVER, |out| {
                out.extend(number.to_le_bytes());
                out.extend(name.as_bytes());
            }),
            Self::Load { number, under_way } => frame(out, LOAD, |out| {
                out.extend(number.to_le_bytes());
                out.extend(under_way.requests.to_le_bytes());
                out.extend(under_way.tokens.to_le_bytes());
                out.extend(under_way.queued.to_le_bytes());
                out.extend(under_way.work.to_le_bytes());
            }),
            Self::Note {
                number,
                certainty,
                blocks,
            } => note(out, *number, *certainty, blocks),
            Self::Beat => frame(out, BEAT, |_| {}),
        }
    }

    /// The first message of `bytes` and its length; nothing, if more is to come.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, WireError> {
        let Some((length, rest)) = bytes.split_first_chunk() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_BODY {
            return Err(WireError::TooLong);
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let Some((&kind, body)) = body.split_first() else {
            return Err(WireError::Malformed(0));
        };
        let message = Self::read(kind, body)?;
        Ok(Some((message, 4 + length)))
    }

    fn read(kind: u8, body: &[u8]) -> Result<Self, WireError> {
        let mut body = Body(body);
        let read = match kind {
            HELLO => {
                if body.take() != Some(MAGIC) {
                    return Err(WireError::Version);
                }
                body.hello().map(Self::Hello)
            }
            PROOF => body.take().map(Self::Proof),
            SERVER => body.server(),
            LOAD => body.load(),
            NOTE => body.note(),
            BEAT => Some(Self::Beat),
            other => return Err(WireError::Kind(other)),
        };
        read.filter(|_| body.0.is_empty())
            .ok_or(WireError::Malformed(kind))
    }
}

/// What is not read yet of a body.
struct Body<'a>(&'a [u8]);

impl Body<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// The number of a server.
    fn number(&mut self) -> Option<u16> {
        let number = self.take().map(u16::from_le_bytes)?;
        (usize::from(number) < MAX_ENDPOINTS).then_some(number)
    }

    fn hello(&mut self) -> Option<Hello> {
        Some(Hello {
            instance: self.u64()?,
            block_bytes: self.take().map(u32::from_le_bytes)?,
            nonce: self.take()?,
        })
    }

    fn server(&mut self) -> Option<Message> {
        let number = self.number()?;
        let name = std::str::from_utf8(std::mem::take(&mut self.0)).ok()?;
        (name.len() <= MAX_NAME).then(|| Message::Server {
            number,
            name: name.into(),
        })
    }

    fn load(&mut self) -> Option<Message> {
        Some(Message::Load {
            number: self.number()?,
            under_way: UnderWay {
                requests: self.take().map(u32::from_le_bytes)?,
                tokens: self.u64()?,
                queued: self.take().map(u32::from_le_bytes)?,
                work: self.take().map(f64::from_le_bytes)?,
            },
        })
    }

    fn note(&mut self) -> Option<Message> {
        let number = self.number()?;
        let certainty = match self.take()? {
            [0] => Certainty::Expected,
            [1] => Certainty::Computed,
            _ => return None,
        };
        let (blocks, rest) = std::mem::take(&mut self.0).as_chunks();
        let blocks = blocks
            .iter()
            .map(|b| BlockHash::new(u64::from_le_bytes(*b)));
        rest.is_empty().then(|| Message::Note {
            number,
            certainty,
            blocks: blocks.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message() -> impl Strategy<Value = Message> {
        let number = 0..MAX_ENDPOINTS as u16;
        let hello = (any::<u64>(), any::<u32>(), any::<[u8; 16]>());
        let counts = (any::<u32>(), any::<u64>(), any::<u32>());
        let load = (number.clone(), counts, 0.0..1e300f64);
        let blocks = prop::collection::vec(any::<u64>(), 0..20);
        prop_oneof![
            hello.prop_map(|(instance, block_bytes, nonce)| Message::Hello(Hello {
                instance,
                block_bytes,
                nonce
            })),
            any::<[u8; 32]>().prop_map(Message::Proof),
            (number.clone(), ".{0,20}").prop_map(|(number, name)| Message::Server {
                number,
                name: name.into()
            }),
            load.prop_map(|(number, (requests, tokens, queued), work)| Message::Load {
                number,
                under_way: UnderWay {
                    requests,
                    tokens,
                    queued,
                    work,
                }
            }),
            (number, any::<bool>(), blocks).prop_map(|(number, computed, blocks)| Message::Note {
                number,
                certainty: match computed {
                    true => Certainty::Computed,
                    false => Certainty::Expected,
                },
                blocks: blocks.into_iter().map(BlockHash::new).collect(),
            }),
            Just(Message::Beat),
        ]
    }

    proptest! {
        #[test]
        fn what_was_said_is_heard_in_pieces_too(message in message(), more in any::<u8>()) {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            let length = bytes.len();
            bytes.push(more);
            for end in 0..length {
                prop_assert_eq!(Message::decode(&bytes[..end]), Ok(None));
            }
            prop_assert_eq!(Message::decode(&bytes), Ok(Some((message, length))));
        }

        #[test]
        fn whatever_comes_is_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..60), kind in 0u8..8) {
            let mut frame = (bytes.len() as u32 + 1).to_le_bytes().to_vec();
            frame.push(kind);
            frame.extend(&bytes);
            if let Ok(Some((message, length))) = Message::decode(&frame) {
                let mut again = Vec::new();
                message.encode(&mut again);
                prop_assert_eq!(&again[..], &frame[..length]);
            }
        }
    }

    #[test]
    fn what_is_too_long_or_of_another_time_is_refused() {
        let long = u32::MAX.to_le_bytes();
        assert_eq!(Message::decode(&long), Err(WireError::TooLong));
        let mut hello = Vec::new();
        let said = Message::Hello(Hello {
            instance: 1,
            block_bytes: 2,
            nonce: [3; 16],
        });
        said.encode(&mut hello);
        hello[12] = b'2';
        assert_eq!(Message::decode(&hello), Err(WireError::Version));
        let server = Message::Server {
            number: MAX_ENDPOINTS as u16,
            name: "a".into(),
        };
        let mut bytes = Vec::new();
        server.encode(&mut bytes);
        assert_eq!(Message::decode(&bytes), Err(WireError::Malformed(SERVER)));
        let mut longest = Vec::new();
        note(
            &mut longest,
            0,
            Certainty::Expected,
            &vec![BlockHash::new(7); 2 * MAX_BLOCKS],
        );
        assert!(longest.len() <= MAX_FRAME && Message::decode(&longest).is_ok());
    }
}
