//! Requests of HTTP/2 may be for any authority.
//!
//! Envoy asks for a cluster's name where it is told no other; Istio's are like `outbound|9002||picker`, which is no
//! authority, and h2 resets such requests. Who serves one service does not look at it. So what no authority may hold
//! becomes `-` on its way in: as the name keeps its length, the table of both ends that compresses later requests (HPACK,
//! RFC 7541) keeps its shape, and nothing needs to be known of it here. All other bytes pass as they are, uncopied.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that a client sends before its first frame.
const PREFACE: usize = 24;
const FRAME_HEAD: usize = 9;
/// A frame with a request's headers, and its flags.
const HEADERS: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;
/// Longest headers that are looked at; longer ones pass.
const MAX_HEADERS: usize = 16 << 10;
/// `:authority` in HPACK's static table.
const AUTHORITY: usize = 1;

/// What a client sends, with authorities that are some.
#[derive(Debug)]
pub(crate) struct AnyAuthority<T> {
    inner: T,
    frames: Frames,
    /// What came, and may not pass yet.
    held: Vec<u8>,
    /// What may pass, and how much of it did.
    passing: Vec<u8>,
    passed: usize,
}

impl<T> AnyAuthority<T> {
    pub(crate) fn new(inner: T) -> Self {
        Self {
            inner,
            frames: Frames { pass: PREFACE },
            held: Vec::new(),
            passing: Vec::new(),
            passed: 0,
        }
    }

    /// Lets what is held pass as far as it can.
    fn settle(&mut self) {
        loop {
            let pass = self.frames.pass(&self.held);
            self.passing.extend(self.held.drain(..pass));
            let Some(frame) = whole_headers(&self.held) else {
                return;
            };
            match mended_frame(&self.held[..frame]) {
                Some(mended) => self.passing.extend(mended),
                None => self.passing.extend(&self.held[..frame]),
            }
            self.held.drain(..frame);
        }
    }

    fn give(&mut self, buf: &mut ReadBuf<'_>) {
        let left = &self.passing[self.passed..];
        let given = left.len().min(buf.remaining());
        buf.put_slice(&left[..given]);
        self.passed += given;
        if self.passed == self.passing.len() {
            self.passing.clear();
            self.passed = 0;
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for AnyAuthority<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            if !this.passing.is_empty() {
                this.give(buf);
                return Poll::Ready(Ok(()));
            }
            let begin = buf.filled().len();
            ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
            let new = &buf.filled()[begin..];
            if new.is_empty() {
                // The end: what is held will not be whole.
                this.passing = std::mem::take(&mut this.held);
                this.give(buf);
                return Poll::Ready(Ok(()));
            }
            let pass = match this.held.is_empty() {
                true => this.frames.pass(new),
                false => 0,
            };
            this.held.extend(&new[pass..]);
            buf.set_filled(begin + pass);
            this.settle();
            if pass > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

/// Where in its frames a connection is.
#[derive(Debug)]
struct Frames {
    /// Bytes to come that pass.
    pass: usize,
}

impl Frames {
    /// How many of `bytes`, the next ones, pass as they are: all before the next headers, or before a head that is cut.
    fn pass(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        loop {
            let step = self.pass.min(bytes.len() - at);
            self.pass -= step;
            at += step;
            match head(&bytes[at..]) {
                Some((kind, _)) if is_looked_at(kind) => return at,
                Some((_, length)) => self.pass = FRAME_HEAD + length,
                None => return at,
            }
        }
    }
}

/// A frame's kind with its flags, and the length of what follows its head.
type Kind = (u8, u8);

fn head(bytes: &[u8]) -> Option<(Kind, usize)> {
    let [a, b, c, kind, flags, ..] = *bytes.first_chunk::<FRAME_HEAD>()?;
    let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
    // What is too long is not waited for.
    let kind = if length > MAX_HEADERS { u8::MAX } else { kind };
    Some(((kind, flags), length))
}

/// Headers that are all in one frame, as a client's that calls a service are.
fn is_looked_at((kind, flags): Kind) -> bool {
    kind == HEADERS && flags & END_HEADERS != 0
}

/// The length of the headers that `bytes` begin with, if all are there.
fn whole_headers(bytes: &[u8]) -> Option<usize> {
    let (kind, length) = head(bytes)?;
    let whole = is_looked_at(kind) && bytes.len() >= FRAME_HEAD + length;
    whole.then_some(FRAME_HEAD + length)
}

/// The frame with an authority that is one; nothing if it is as it should be, or makes no sense.
fn mended_frame(frame: &[u8]) -> Option<Vec<u8>> {
    let (head, mut block) = frame.split_at_checked(FRAME_HEAD)?;
    let flags = head[4];
    if flags & PADDED != 0 {
        let (padding, rest) = block.split_first()?;
        block = &rest[..rest.len().checked_sub(usize::from(*padding))?];
    }
    let priority = if flags & PRIORITY != 0 { 5 } else { 0 };
    let (priority, block) = block.split_at_checked(priority)?;
    let block = mended_block(block)?;
    let length = u32::try_from(priority.len() + block.len()).ok()?;
    let mut mended = length.to_be_bytes()[1..].to_vec();
    mended.extend([HEADERS, flags & !PADDED]);
    mended.extend(&head[5..]);
    mended.extend(priority);
    mended.extend(block);
    Some(mended)
}

/// The same of compressed headers (RFC 7541, 6).
fn mended_block(block: &[u8]) -> Option<Vec<u8>> {
    let (mut mended, mut rest, mut anew) = (Vec::with_capacity(2 * block.len()), block, false);
    while let Some(&first) = rest.first() {
        let field = rest;
        let (prefix, literal) = match first {
            0x80.. => (7, false),
            0x40..0x80 => (6, true),
            0x20..0x40 => (5, false),
            0..0x20 => (4, true),
        };
        let name = integer(&mut rest, prefix)?;
        if literal {
            if name == 0 {
                string(&mut rest)?;
            }
            let before = rest.len();
            let value = string(&mut rest)?;
            if name == AUTHORITY
                && let Some(authority) = mended_authority(&value)
            {
                mended.extend(&field[..field.len() - before]);
                push_string(&mut mended, &authority);
                anew = true;
                continue;
            }
        }
        mended.extend(&field[..field.len() - rest.len()]);
    }
    anew.then_some(mended)
}

/// The authority without what none may hold; nothing if it holds none of it, or more than that.
fn mended_authority(value: &Value<'_>) -> Option<Vec<u8>> {
    let mut text = match value {
        Value::Plain(text) => text.to_vec(),
        Value::Huffman(coded) => unpacked(coded)?,
    };
    if http::uri::Authority::try_from(&*text).is_ok() {
        return None;
    }
    for byte in &mut text {
        match byte {
            b'.' | b':' | b'-' => {}
            byte if byte.is_ascii_alphanumeric() => {}
            byte if byte.is_ascii_graphic() => *byte = b'-',
            _ => return None,
        }
    }
    Some(text)
}

/// A string as it was sent.
enum Value<'a> {
    Plain(&'a [u8]),
    Huffman(&'a [u8]),
}

/// An integer of which the first byte holds `prefix` bits (RFC 7541, 5.1).
fn integer(bytes: &mut &[u8], prefix: u32) -> Option<usize> {
    let (first, mut rest) = bytes.split_first()?;
    let most = (1 << prefix) - 1;
    let mut value = usize::from(*first) & most;
    let mut shift = 0;
    let mut more = value == most;
    while more {
        let (byte, after) = rest.split_first()?;
        // Longer than anything here can be.
        if shift > 14 {
            return None;
        }
        value += usize::from(byte & 0x7f) << shift;
        (shift, more, rest) = (shift + 7, byte & 0x80 != 0, after);
    }
    *bytes = rest;
    Some(value)
}

/// (RFC 7541, 5.2)
fn string<'a>(bytes: &mut &'a [u8]) -> Option<Value<'a>> {
    let packed = bytes.first()? & 0x80 != 0;
    let length = integer(bytes, 7)?;
    let (text, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(match packed {
        true => Value::Huffman(text),
        false => Value::Plain(text),
    })
}

fn push_string(out: &mut Vec<u8>, text: &[u8]) {
    let mut length = text.len();
    if let Some(mut more) = length.checked_sub(0x7f) {
        out.push(0x7f);
        while more >= 0x80 {
            out.push((more & 0x7f) as u8 | 0x80);
            more >>= 7;
        }
        length = more;
    }
    out.push(length as u8);
    out.extend(text);
}

/// Symbols by the length of their codes, which go upwards (RFC 7541, appendix B). What has longer ones is in no name.
const BY_LENGTH: [&[u8]; 16] = [
    b"",
    b"",
    b"",
    b"",
    b"",
    b"012aceiost",
    b" %-./3456789=A_bdfghlmnpru",
    b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
    b"&*,;XZ",
    b"",
    b"!\"()?",
    b"'+|",
    b"#>",
    b"\0$@[]~",
    b"^}",
    b"<`{",
];

/// Undoes HPACK's Huffman code; nothing for what is coded wrong, or is in no name.
fn unpacked(coded: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::with_capacity(2 * coded.len());
    let (mut code, mut first, mut length) = (0, 0, 0);
    for bit in coded
        .iter()
        .flat_map(|b| (0..8).rev().map(move |i| b >> i & 1))
    {
        (code, first, length) = (code << 1 | usize::from(bit), first << 1, length + 1);
        let symbols = BY_LENGTH.get(length)?;
        if let Some(symbol) = symbols.get(code - first) {
            text.push(*symbol);
            (code, first, length) = (0, 0, 0);
        } else {
            first += symbols.len();
        }
    }
    // The rest of the last byte is ones.
    (length < 8 && code + 1 == 1 << length).then_some(text)
}

#[cfg(test)]
mod tests;
