//! One message of the proxy: a `ProcessingRequest`, read without copying a body.

use crate::cursor::{Chunk, Cursor};
use crate::headers::Headers;
use crate::proto::ProtocolConfiguration;
use bytes::{Buf, Bytes};
use prost::Message as _;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// Longest message that is not a body: headers, metadata. Envoy takes 60 KiB of headers unless told otherwise.
const MAX_SMALL: usize = 1 << 20;

/// Why a message cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("malformed message: {0}")]
pub(crate) struct Malformed(pub(crate) &'static str);

impl From<prost::DecodeError> for Malformed {
    fn from(_: prost::DecodeError) -> Self {
        Self("not protobuf")
    }
}

/// What the proxy says.
#[derive(Debug, PartialEq)]
pub(crate) struct Inbound {
    pub(crate) event: Event,
    /// An encoded `Metadata`, empty if there is none.
    pub(crate) metadata: Bytes,
    pub(crate) protocol: Option<ProtocolConfiguration>,
    /// The proxy tells what happens and wants no answer.
    pub(crate) observing: bool,
}

/// Which half of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Request,
    Response,
}

/// The part of a message that moves the exchange on.
#[derive(Debug, PartialEq)]
pub(crate) enum Event {
    Headers {
        half: Half,
        headers: Headers,
        end: bool,
    },
    Body {
        half: Half,
        data: Chunk,
        end: bool,
    },
    /// What they say is not read.
    Trailers(Half),
}

impl Inbound {
    /// Reads one message. Of several events, as protobuf has it, the last counts.
    pub(crate) fn read(mut message: Cursor<'_>) -> Result<Self, Malformed> {
        let mut event = None;
        let (mut metadata, mut protocol, mut observing) = (Bytes::new(), None, false);
        while message.has_remaining() {
            let (tag, kind) = decode_key(&mut message)?;
            match (tag, kind) {
                (2 | 3, WireType::LengthDelimited) => {
                    let (headers, end) = http_headers(small(&mut message)?)?;
                    let half = half(tag % 2 == 0);
                    event = Some(Event::Headers { half, headers, end });
                }
                (4 | 5, WireType::LengthDelimited) => {
                    let (data, end) = http_body(&mut message)?;
                    let half = half(tag % 2 == 0);
                    event = Some(Event::Body { half, data, end });
                }
                (6 | 7, WireType::LengthDelimited) => {
                    skip_field(kind, tag, &mut message, DecodeContext::default())?;
                    event = Some(Event::Trailers(half(tag % 2 == 0)));
                }
                (8, WireType::LengthDelimited) => metadata = small(&mut message)?,
                (10, WireType::Varint) => observing = decode_varint(&mut message)? != 0,
                (11, WireType::LengthDelimited) => {
                    protocol = Some(ProtocolConfiguration::decode(small(&mut message)?)?);
                }
                _ => skip_field(kind, tag, &mut message, DecodeContext::default())?,
            }
        }
        Ok(Self {
            event: event.ok_or(Malformed("it says nothing that is known"))?,
            metadata,
            protocol,
            observing,
        })
    }
}

fn half(request: bool) -> Half {
    if request {
        Half::Request
    } else {
        Half::Response
    }
}

/// A length, and so many bytes in one piece.
fn small(message: &mut Cursor<'_>) -> Result<Bytes, Malformed> {
    let len = length(message)?;
    if len > MAX_SMALL {
        return Err(Malformed("a part that is too long"));
    }
    Ok(part(message, len)?.join())
}

fn length(message: &mut Cursor<'_>) -> Result<usize, Malformed> {
    Ok(usize::try_from(decode_varint(message)?).unwrap_or(usize::MAX))
}

fn part(message: &mut Cursor<'_>, len: usize) -> Result<Chunk, Malformed> {
    message
        .cut(len)
        .ok_or(Malformed("a part is longer than the whole"))
}

/// `HttpHeaders`: the headers, and whether no body follows.
fn http_headers(text: Bytes) -> Result<(Headers, bool), Malformed> {
    let (mut headers, mut end) = (Headers::default(), false);
    let mut rest = text;
    while rest.has_remaining() {
        match decode_key(&mut rest)? {
            (1, WireType::LengthDelimited) => {
                let len = usize::try_from(decode_varint(&mut rest)?).unwrap_or(usize::MAX);
                if len > rest.len() {
                    return Err(Malformed("a part is longer than the whole"));
                }
                headers = Headers::read(rest.split_to(len))?;
            }
            (3, WireType::Varint) => end = decode_varint(&mut rest)? != 0,
            (tag, kind) => skip_field(kind, tag, &mut rest, DecodeContext::default())?,
        }
    }
    Ok((headers, end))
}

/// `HttpBody`: the data, and whether nothing follows.
fn http_body(message: &mut Cursor<'_>) -> Result<(Chunk, bool), Malformed> {
    let len = length(message)?;
    let Some(after) = message.remaining().checked_sub(len) else {
        return Err(Malformed("a part is longer than the whole"));
    };
    let (mut data, mut end) = (Chunk::default(), false);
    while message.remaining() > after {
        match decode_key(message)? {
            (1, WireType::LengthDelimited) => {
                let len = length(message)?;
                data = part(message, len)?;
            }
            (2, WireType::Varint) => end = decode_varint(message)? != 0,
            (tag, kind) => skip_field(kind, tag, message, DecodeContext::default())?,
        }
    }
    if message.remaining() < after {
        return Err(Malformed("a part is longer than the whole"));
    }
    Ok((data, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn read(text: &[u8], cut: usize) -> Result<Inbound, Malformed> {
        let mut pieces: VecDeque<Bytes> = text.chunks(cut).map(Bytes::copy_from_slice).collect();
        Inbound::read(Cursor::new(&mut pieces, text.len()))
    }

    #[test]
    fn every_event_is_read_wherever_it_is_cut() {
        let headers = [(":path", "/v1/models"), ("x", "y")];
        for cut in 1..80 {
            let message = peer::headers(Half::Request, &headers, true);
            let Event::Headers { half, headers, end } =
                read(&message.encode_to_vec(), cut).unwrap().event
            else {
                panic!("no headers");
            };
            assert_eq!(
                (half, headers.text(":path"), end),
                (Half::Request, Some("/v1/models"), true)
            );
            let message = peer::body(Half::Response, b"some text", false);
            let read_back = read(&message.encode_to_vec(), cut).unwrap().event;
            let Event::Body { half, data, end } = read_back else {
                panic!("no body");
            };
            assert_eq!(
                (half, &data.join()[..], end),
                (Half::Response, &b"some text"[..], false)
            );
            let message = peer::trailers(Half::Response);
            assert_eq!(
                read(&message.encode_to_vec(), cut).unwrap().event,
                Event::Trailers(Half::Response)
            );
        }
    }

    #[test]
    fn what_goes_with_a_message_is_read_too() {
        let mut message = peer::body(Half::Request, b"", true);
        message.metadata_context = Some(peer::metadata("envoy.lb", "k", "v"));
        message.observability_mode = true;
        message.protocol_config = Some(ProtocolConfiguration {
            request_body_mode: 4,
            response_body_mode: 0,
        });
        let inbound = read(&message.encode_to_vec(), 1000).unwrap();
        assert!(inbound.observing && !inbound.metadata.is_empty());
        assert_eq!(inbound.protocol.unwrap().request_body_mode, 4);
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for broken in [
            &b""[..],
            b"\x22\x05\x0a\x01a",        // a body that is cut off
            b"\x22\x03\x0a\x09a",        // data longer than the body it is in
            b"\x22\x03\x0a\x03abc\x10",  // data that ends behind its body
            b"\x12\x02\x0a\x05abcde",    // headers longer than the message of headers
            b"\x42\xff\xff\xff\xff\x0f", // metadata without end
            b"\x22\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        ] {
            assert!(read(broken, 3.max(broken.len())).is_err(), "{broken:x?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(text in prop::collection::vec(any::<u8>(), 0..60), cut in 1usize..9) {
            let _ = read(&text, cut);
        }
    }
}
