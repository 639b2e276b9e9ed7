//! Greetings, frames and commands as bytes. Pure: bytes in, messages out.

use bytes::{Buf as _, Bytes, BytesMut};

/// Bytes of a greeting.
pub(crate) const GREETING: usize = 64;

/// Most frames of a message.
const MAX_FRAMES: usize = 16;

/// Most bytes of a command's body.
const MAX_COMMAND: usize = 4096;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Why a peer is not listened to any longer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtocolError {
    #[error("the peer does not speak ZMTP 3")]
    Greeting,
    #[error("the peer wants the mechanism {0:?}; only NULL is spoken here")]
    Mechanism(String),
    #[error("a frame with unknown flags")]
    Flags,
    #[error("a message of more than {0} bytes")]
    TooLarge(usize),
    #[error("a message of more than {MAX_FRAMES} frames")]
    TooMany,
    #[error("a command that makes no sense")]
    Command,
    #[error("a command inside a message")]
    Interleaved,
    #[error("the peer's socket is a {0:?}")]
    Socket(String),
    #[error("the peer refuses: {0}")]
    Refused(String),
}

/// A kind of socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Socket {
    Pub,
    Sub,
    Router,
    Dealer,
}

impl Socket {
    const fn name(self) -> &'static str {
        match self {
            Self::Pub => "PUB",
            Self::Sub => "SUB",
            Self::Router => "ROUTER",
            Self::Dealer => "DEALER",
        }
    }

    /// Whether the protocol lets this kind talk with a peer of that name.
    fn talks_with(self, peer: &str) -> bool {
        match self {
            Self::Pub => matches!(peer, "SUB" | "XSUB"),
            Self::Sub => matches!(peer, "PUB" | "XPUB"),
            Self::Router => matches!(peer, "REQ" | "DEALER" | "ROUTER"),
            Self::Dealer => matches!(peer, "REP" | "DEALER" | "ROUTER"),
        }
    }
}

/// What is said first.
pub(crate) fn greeting() -> [u8; GREETING] {
    let mut bytes = [0; GREETING];
    bytes[0] = 0xff;
    bytes[8] = 1;
    bytes[9] = 0x7f;
    // Version 3.0: peers of later versions then send what every version understands.
    bytes[10] = 3;
    bytes[12..16].copy_from_slice(b"NULL");
    bytes
}

/// Looks at what a peer says first.
pub(crate) fn check_greeting(bytes: &[u8; GREETING]) -> Result<(), ProtocolError> {
    if bytes[0] != 0xff || bytes[9] != 0x7f || bytes[10] < 3 {
        return Err(ProtocolError::Greeting);
    }
    let mechanism = &bytes[12..32];
    let end = mechanism.iter().position(|&b| b == 0).unwrap_or(20);
    match &mechanism[..end] {
        b"NULL" => Ok(()),
        other => Err(ProtocolError::Mechanism(
            String::from_utf8_lossy(other).into_owned(),
        )),
    }
}

/// Appends a frame.
pub(crate) fn put_frame(out: &mut BytesMut, body: &[u8], is_last: bool) {
    put_flagged(out, body, if is_last { 0 } else { MORE });
}

/// Appends a message.
pub(crate) fn put_message(out: &mut BytesMut, frames: &[&[u8]]) {
    for (i, frame) in frames.iter().enumerate() {
        put_frame(out, frame, i + 1 == frames.len());
    }
}

/// Appends the command by which a socket says what it is.
pub(crate) fn put_ready(out: &mut BytesMut, socket: Socket) {
    let mut body = BytesMut::from(&b"\x05READY"[..]);
    put_property(&mut body, "Socket-Type", socket.name().as_bytes());
    if matches!(socket, Socket::Dealer | Socket::Router) {
        put_property(&mut body, "Identity", b"");
    }
    put_flagged(out, &body, COMMAND);
}

/// Appends the answer to [`Incoming::Ping`].
pub(crate) fn put_pong(out: &mut BytesMut, context: &[u8]) {
    let mut body = BytesMut::from(&b"\x04PONG"[..]);
    body.extend_from_slice(context);
    put_flagged(out, &body, COMMAND);
}

/// Appends the message by which a SUB asks for topics that begin with `prefix`.
pub(crate) fn put_subscription(out: &mut BytesMut, prefix: &[u8]) {
    let mut body = BytesMut::from(&[1][..]);
    body.extend_from_slice(prefix);
    put_frame(out, &body, true);
}

fn put_property(body: &mut BytesMut, name: &str, value: &[u8]) {
    body.extend_from_slice(&[u8::try_from(name.len()).unwrap_or(u8::MAX)]);
    body.extend_from_slice(name.as_bytes());
    body.extend_from_slice(&u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
    body.extend_from_slice(value);
}

fn put_flagged(out: &mut BytesMut, body: &[u8], flags: u8) {
    match u8::try_from(body.len()) {
        Ok(n) => out.extend_from_slice(&[flags, n]),
        Err(_) => {
            out.extend_from_slice(&[flags | LONG]);
            out.extend_from_slice(&(body.len() as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(body);
}

/// What a peer sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Incoming {
    /// Its frames, at least one.
    Message(Vec<Bytes>),
    /// The kind of socket it is.
    Ready(String),
    /// To be answered with the same bytes.
    Ping(Bytes),
    /// Topics that it wants, by how they begin.
    Subscribe(Bytes),
    /// Topics that it wanted.
    Cancel(Bytes),
    /// Nothing that asks for anything.
    Other,
}

/// Takes frames out of a stream of bytes and puts them together.
#[derive(Debug)]
pub(crate) struct Parser {
    /// Most bytes of a message.
    max_message: usize,
    frames: Vec<Bytes>,
    n_bytes: usize,
}

impl Parser {
    pub(crate) const fn new(max_message: usize) -> Self {
        Self {
            max_message,
            frames: Vec::new(),
            n_bytes: 0,
        }
    }

    /// Takes the next message or command off the front of `buf`; `None` if it is not all there.
    pub(crate) fn next(&mut self, buf: &mut BytesMut) -> Result<Option<Incoming>, ProtocolError> {
        while let Some((flags, body)) = self.frame(buf)? {
            if flags & COMMAND != 0 {
                if !self.frames.is_empty() {
                    return Err(ProtocolError::Interleaved);
                }
                return command(body).map(Some);
            }
            if self.frames.len() == MAX_FRAMES {
                return Err(ProtocolError::TooMany);
            }
            self.n_bytes += body.len();
            self.frames.push(body);
            if flags & MORE == 0 {
                self.n_bytes = 0;
                return Ok(Some(Incoming::Message(std::mem::take(&mut self.frames))));
            }
        }
        Ok(None)
    }

    fn frame(&self, buf: &mut BytesMut) -> Result<Option<(u8, Bytes)>, ProtocolError> {
        let Some(&flags) = buf.first() else {
            return Ok(None);
        };
        if flags & !(MORE | LONG | COMMAND) != 0 || flags & (COMMAND | MORE) == COMMAND | MORE {
            return Err(ProtocolError::Flags);
        }
        let (head, size) = if flags & LONG == 0 {
            let Some(&size) = buf.get(1) else {
                return Ok(None);
            };
            (2, u64::from(size))
        } else {
            let Some(size) = buf.get(1..9).and_then(|b| b.first_chunk()) else {
                return Ok(None);
            };
            (9, u64::from_be_bytes(*size))
        };
        let (most, left) = if flags & COMMAND == 0 {
            (self.max_message, self.max_message - self.n_bytes)
        } else {
            (MAX_COMMAND, MAX_COMMAND)
        };
        let size = usize::try_from(size)
            .ok()
            .filter(|&size| size <= left)
            .ok_or(ProtocolError::TooLarge(most))?;
        if buf.len() < head + size {
            return Ok(None);
        }
        buf.advance(head);
        Ok(Some((flags, buf.split_to(size).freeze())))
    }
}

fn command(mut body: Bytes) -> Result<Incoming, ProtocolError> {
    let name = short_text(&mut body)?;
    Ok(match &name[..] {
        b"READY" => Incoming::Ready(socket_type(body)?),
        b"ERROR" => {
            let reason = short_text(&mut body)?;
            let reason = String::from_utf8_lossy(&reason).into_owned();
            return Err(ProtocolError::Refused(reason));
        }
        // Two bytes say how long the peer waits; what follows comes back.
        b"PING" if body.len() >= 2 => Incoming::Ping(body.slice(2..body.len().min(18))),
        b"SUBSCRIBE" => Incoming::Subscribe(body),
        b"CANCEL" => Incoming::Cancel(body),
        _ => Incoming::Other,
    })
}

/// A length in a byte, and as much text.
fn short_text(body: &mut Bytes) -> Result<Bytes, ProtocolError> {
    let n = usize::from(body.try_get_u8().map_err(|_| ProtocolError::Command)?);
    if body.len() < n {
        return Err(ProtocolError::Command);
    }
    Ok(body.split_to(n))
}

fn socket_type(mut properties: Bytes) -> Result<String, ProtocolError> {
    while !properties.is_empty() {
        let name = short_text(&mut properties)?;
        let n = properties
            .try_get_u32()
            .map_err(|_| ProtocolError::Command)? as usize;
        if properties.len() < n {
            return Err(ProtocolError::Command);
        }
        let value = properties.split_to(n);
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Ok(String::from_utf8_lossy(&value).into_owned());
        }
    }
    Err(ProtocolError::Command)
}

/// Whether the peer is of a kind that `socket` can talk with.
pub(crate) fn check_ready(socket: Socket, first: Incoming) -> Result<(), ProtocolError> {
    match first {
        Incoming::Ready(peer) if socket.talks_with(&peer) => Ok(()),
        Incoming::Ready(peer) => Err(ProtocolError::Socket(peer)),
        _ => Err(ProtocolError::Command),
    }
}

/// A message of a SUB that says which topics it wants, or wants no longer, as all versions of the protocol may say it.
pub(crate) fn as_subscription(incoming: Incoming) -> Incoming {
    let Incoming::Message(mut frames) = incoming else {
        return incoming;
    };
    match (frames.len(), frames.first_mut()) {
        (1, Some(frame)) => match frame.try_get_u8() {
            Ok(1) => Incoming::Subscribe(frame.clone()),
            Ok(0) => Incoming::Cancel(frame.clone()),
            _ => Incoming::Other,
        },
        _ => Incoming::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(parser: &mut Parser, bytes: &[u8]) -> Result<Vec<Incoming>, ProtocolError> {
        let mut buf = BytesMut::from(bytes);
        let mut seen = Vec::new();
        while let Some(incoming) = parser.next(&mut buf)? {
            seen.push(incoming);
        }
        Ok(seen)
    }

    #[test]
    fn greetings_of_version_three_without_security_are_taken() {
        let mut peer = greeting();
        assert_eq!(check_greeting(&peer), Ok(()));
        // libzmq 4.3 says 3.1.
        peer[11] = 1;
        assert_eq!(check_greeting(&peer), Ok(()));
        peer[12..17].copy_from_slice(b"CURVE");
        let refused = ProtocolError::Mechanism("CURVE".to_owned());
        assert_eq!(check_greeting(&peer), Err(refused));
        peer[10] = 1;
        assert_eq!(check_greeting(&peer), Err(ProtocolError::Greeting));
    }

    /// Bytes that libzmq 4.3.5 sends for a SUB.
    #[test]
    fn a_ready_of_libzmq_is_read() {
        let bytes = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB";
        let seen = all(&mut Parser::new(100), bytes).unwrap();
        assert_eq!(seen, [Incoming::Ready("SUB".to_owned())]);
        assert!(check_ready(Socket::Pub, seen[0].clone()).is_ok());
        let wrong = check_ready(Socket::Router, seen[0].clone());
        assert_eq!(wrong, Err(ProtocolError::Socket("SUB".to_owned())));
        let mut ours = BytesMut::new();
        put_ready(&mut ours, Socket::Sub);
        assert_eq!(&ours[..], bytes);
    }

    #[test]
    fn subscriptions_come_in_two_forms() {
        let mut bytes = b"\x00\x03\x01kv\x04\x0c\x09SUBSCRIBEkv\x00\x03\x00kv".to_vec();
        bytes.extend(b"\x04\x09\x06CANCELkv");
        let seen = all(&mut Parser::new(100), &bytes).unwrap();
        let seen: Vec<_> = seen.into_iter().map(as_subscription).collect();
        let kv = Bytes::from_static(b"kv");
        let (wants, no_longer) = (Incoming::Subscribe(kv.clone()), Incoming::Cancel(kv));
        assert_eq!(seen, [wants.clone(), wants, no_longer.clone(), no_longer]);
    }

    #[test]
    fn a_ping_is_answered_with_its_context() {
        let seen = all(&mut Parser::new(100), b"\x04\x09\x04PING\x00\x0ahi").unwrap();
        assert_eq!(seen, [Incoming::Ping(Bytes::from_static(b"hi"))]);
        let mut out = BytesMut::new();
        put_pong(&mut out, b"hi");
        assert_eq!(&out[..], b"\x04\x07\x04PONGhi");
    }

    #[test]
    fn what_is_too_much_is_refused_before_it_is_there() {
        let refused = |bytes: &[u8]| all(&mut Parser::new(10), bytes).unwrap_err();
        assert_eq!(refused(b"\x00\x0b"), ProtocolError::TooLarge(10));
        assert_eq!(
            refused(b"\x02\xff\xff\xff\xff\xff\xff\xff\xff"),
            ProtocolError::TooLarge(10)
        );
        assert_eq!(
            refused(b"\x01\x06sixsix\x00\x05"),
            ProtocolError::TooLarge(10)
        );
        assert_eq!(refused(&[1, 0].repeat(17)), ProtocolError::TooMany);
        assert_eq!(refused(b"\x08"), ProtocolError::Flags);
        assert_eq!(refused(b"\x01\0\x04\x01\0"), ProtocolError::Interleaved);
        assert_eq!(refused(b"\x04\x05\x09READ"), ProtocolError::Command);
        assert_eq!(
            refused(b"\x04\x0a\x05ERROR\x03no!"),
            ProtocolError::Refused("no!".to_owned())
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn messages_come_back_however_they_are_cut(
            messages in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..5), 0..5),
            step in 1..50_usize,
        ) {
            let mut bytes = BytesMut::new();
            for message in &messages {
                let frames: Vec<_> = message.iter().map(Vec::as_slice).collect();
                put_message(&mut bytes, &frames);
            }
            let (mut parser, mut buf, mut seen) = (Parser::new(2000), BytesMut::new(), Vec::new());
            for piece in bytes.chunks(step) {
                buf.extend_from_slice(piece);
                while let Some(Incoming::Message(frames)) = parser.next(&mut buf).unwrap() {
                    seen.push(frames.iter().map(|frame| frame.to_vec()).collect::<Vec<_>>());
                }
            }
            prop_assert_eq!(seen, messages);
        }

        #[test]
        fn nothing_panics(bytes: Vec<u8>) {
            let _ = all(&mut Parser::new(64), &bytes);
        }
    }
}
