//! Messages to the proxy, ready to be sent: a body's bytes are never copied, and a piece of it costs no allocation.

use crate::frames::HEAD;
use crate::inbound::Half;
use crate::proto::{Answer, HeaderValue, HeaderValueOption, OVERWRITE, ProcessingResponse, Struct};
use baton_http::Pieces;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message as _;
use prost::encoding::{encode_varint, encoded_len_varint};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Most bytes of a body in one message. Some builds of Envoy take no more than 64 KiB.
pub(crate) const MAX_PIECE: usize = 62_000;

/// Room for what stands before a piece of a body in its message: gRPC's head, and five fields with their lengths.
const MAX_PREFIX: usize = HEAD + 6 + 5 * 5;

/// A body as short as this is copied behind the headers, so that both go out as one frame.
const SMALL: usize = 4096;

/// Data to be sent: a message, the beginning of one, or more of it.
#[derive(Debug)]
pub(crate) struct Outgoing {
    prefix: [u8; MAX_PREFIX],
    from: u8,
    to: u8,
    body: Bytes,
}

impl Outgoing {
    /// Nothing but `body`.
    pub(crate) fn bare(body: Bytes) -> Self {
        Self {
            prefix: [0; MAX_PREFIX],
            from: 0,
            to: 0,
            body,
        }
    }

    fn prefix(&self) -> &[u8] {
        &self.prefix[usize::from(self.from)..usize::from(self.to)]
    }
}

impl Buf for Outgoing {
    fn remaining(&self) -> usize {
        self.prefix().len() + self.body.len()
    }

    fn chunk(&self) -> &[u8] {
        match self.prefix() {
            [] => &self.body,
            prefix => prefix,
        }
    }

    fn chunks_vectored<'a>(&'a self, dst: &mut [IoSlice<'a>]) -> usize {
        let parts = [self.prefix(), &self.body];
        let mut n = 0;
        for (part, slot) in parts.into_iter().filter(|p| !p.is_empty()).zip(dst) {
            *slot = IoSlice::new(part);
            n += 1;
        }
        n
    }

    fn advance(&mut self, n: usize) {
        let of_prefix = n.min(self.prefix().len());
        // No more than the prefix's length, which a byte holds.
        self.from += of_prefix as u8;
        self.body.advance(n - of_prefix);
    }
}

/// Messages that wait to be sent, in order.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    queue: VecDeque<Outgoing>,
    /// Messages that have no frame of their own yet; they come after the queue.
    open: BytesMut,
}

impl Outbox {
    /// The next data to send.
    pub(crate) fn pop(&mut self) -> Option<Outgoing> {
        match self.queue.pop_front() {
            None if !self.open.is_empty() => Some(Outgoing::bare(self.open.split().freeze())),
            next => next,
        }
    }

    /// A message without a body, and with metadata if there are any.
    pub(crate) fn message(&mut self, answer: Answer, dynamic_metadata: Option<Struct>) {
        let message = ProcessingResponse {
            answer: Some(answer),
            dynamic_metadata,
        };
        let len = message.encoded_len();
        self.open.reserve(HEAD + len);
        put_head(&mut self.open, len);
        // The room was made a moment ago.
        let _ = message.encode(&mut self.open);
    }

    /// A body, or a part of one, in as many messages as it takes, the last of them with `end`. Nothing at all is one
    /// message if it ends a body, and none otherwise.
    pub(crate) fn body(
        &mut self,
        half: Half,
        body: impl IntoIterator<Item = Bytes>,
        len: usize,
        end: bool,
    ) {
        let (mut pieces, mut left) = (Parts::new(body.into_iter()), len);
        if left == 0 && !end {
            return;
        }
        loop {
            let len = left.min(MAX_PIECE);
            left -= len;
            self.part(half, &mut pieces, len, end && left == 0);
            if left == 0 {
                return;
            }
        }
    }

    /// As [`body`](Self::body).
    pub(crate) fn pieces(&mut self, half: Half, mut body: Pieces, end: bool) {
        let len = body.len();
        self.body(half, std::iter::from_fn(|| body.pop()), len, end);
    }

    /// One message with the next `len` bytes.
    fn part(
        &mut self,
        half: Half,
        pieces: &mut Parts<impl Iterator<Item = Bytes>>,
        len: usize,
        end: bool,
    ) {
        let (mut first, mut missing) = (prefix(half, len, end), len);
        if !self.open.is_empty() && len <= SMALL {
            self.open.extend_from_slice(first.prefix());
            while let Some(piece) = pieces.next(&mut missing) {
                self.open.extend_from_slice(&piece);
            }
            return;
        }
        self.close();
        first.body = pieces.next(&mut missing).unwrap_or_default();
        self.queue.push_back(first);
        while let Some(piece) = pieces.next(&mut missing) {
            self.queue.push_back(Outgoing::bare(piece));
        }
    }

    /// What comes from now on has frames of its own.
    fn close(&mut self) {
        if !self.open.is_empty() {
            self.queue
                .push_back(Outgoing::bare(self.open.split().freeze()));
        }
    }
}

/// A row of pieces, cut anew.
struct Parts<I> {
    pieces: I,
    /// What is left of a piece that was cut.
    rest: Bytes,
}

impl<I: Iterator<Item = Bytes>> Parts<I> {
    fn new(pieces: I) -> Self {
        Self {
            pieces,
            rest: Bytes::new(),
        }
    }

    /// The next piece, at most `missing` bytes of it, by which that shrinks; nothing if nothing is missing.
    fn next(&mut self, missing: &mut usize) -> Option<Bytes> {
        if *missing == 0 {
            return None;
        }
        while self.rest.is_empty() {
            self.rest = self.pieces.next()?;
        }
        let piece = self.rest.split_to(self.rest.len().min(*missing));
        *missing -= piece.len();
        Some(piece)
    }
}

/// What stands before `len` bytes of a body: a message's head and its fields down to the length of the bytes. The flag
/// for the end comes first, which protobuf allows, so that nothing has to come after the bytes.
fn prefix(half: Half, len: usize, end: bool) -> Outgoing {
    let around = |inner: usize| 1 + encoded_len_varint(inner as u64) + inner;
    let streamed = if end { 2 } else { 0 } + if len > 0 { around(len) } else { 0 };
    let mutation = around(streamed);
    let common = around(mutation);
    let answer = around(common);
    let mut outgoing = Outgoing::bare(Bytes::new());
    let mut out = &mut outgoing.prefix[..];
    put_head(&mut out, around(answer));
    let mut field = |tag: u8, len: usize| {
        out.put_u8(tag);
        encode_varint(len as u64, &mut out);
    };
    // ProcessingResponse.request_body or response_body, BodyResponse.response, CommonResponse.body_mutation,
    // BodyMutation.streamed_response
    field(if half == Half::Request { 0x1a } else { 0x22 }, answer);
    field(0x0a, common);
    field(0x1a, mutation);
    field(0x1a, streamed);
    if end {
        field(0x10, 1);
    }
    if len > 0 {
        field(0x0a, len);
    }
    outgoing.to = (MAX_PREFIX - out.len()) as u8;
    outgoing
}

/// Header `name` set to `value`, in place of any others.
pub(crate) fn set_header(name: &'static str, value: Bytes) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue {
            key: Bytes::from_static(name.as_bytes()),
            raw_value: value,
        }),
        append_action: OVERWRITE,
    }
}

fn put_head(out: &mut impl BufMut, len: usize) {
    out.put_u8(0);
    out.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::frames::Frames;
    use crate::proto::StreamedBodyResponse;
    use proptest::prelude::*;

    /// Everything that waits, as a proxy reads it.
    pub(crate) fn drained(outbox: &mut Outbox) -> Vec<ProcessingResponse> {
        let mut frames = Frames::new(1 << 20);
        while let Some(mut outgoing) = outbox.pop() {
            frames.push(outgoing.copy_to_bytes(outgoing.remaining()));
        }
        let mut messages = Vec::new();
        while let Some(message) = frames.next().unwrap() {
            messages.push(ProcessingResponse::decode(message).unwrap());
        }
        assert!(frames.is_empty());
        messages
    }

    fn streamed(message: ProcessingResponse, half: Half) -> StreamedBodyResponse {
        let answer = match (message.answer, half) {
            (Some(Answer::RequestBody(answer)), Half::Request) => answer,
            (Some(Answer::ResponseBody(answer)), Half::Response) => answer,
            other => panic!("{other:?}"),
        };
        let mutation = answer.response.unwrap().body_mutation.unwrap();
        mutation.streamed_response.unwrap()
    }

    proptest! {
        #[test]
        fn a_body_is_cut_into_pieces_that_a_proxy_takes(
            sizes in prop::collection::vec(prop_oneof![0usize..5, 61_000usize..63_000, 0usize..200_000], 0..5),
            half in prop_oneof![Just(Half::Request), Just(Half::Response)],
            end: bool,
            after_headers: bool,
        ) {
            let len: usize = sizes.iter().sum();
            let text: Bytes = (0..len).map(|i| (i % 251) as u8).collect();
            let mut rest = text.clone();
            let pieces: Vec<Bytes> = sizes.iter().map(|&n| rest.split_to(n)).collect();
            let mut outbox = Outbox::default();
            if after_headers {
                outbox.message(Answer::RequestTrailers(Default::default()), None);
            }
            outbox.body(half, pieces, len, end);
            let mut messages = drained(&mut outbox);
            if after_headers {
                prop_assert_eq!(messages.remove(0).answer, Some(Answer::RequestTrailers(Default::default())));
            }
            prop_assert_eq!(messages.len(), len.div_ceil(MAX_PIECE).max(usize::from(end)));
            let count = messages.len();
            let mut seen = Vec::new();
            for (i, message) in messages.into_iter().enumerate() {
                let streamed = streamed(message, half);
                prop_assert!(streamed.body.len() <= MAX_PIECE);
                prop_assert_eq!(streamed.end_of_stream, end && i + 1 == count);
                seen.extend_from_slice(&streamed.body);
            }
            prop_assert_eq!(seen, text);
        }
    }

    #[test]
    fn a_large_body_is_not_copied_and_a_small_one_goes_with_the_headers() {
        let large = Bytes::from(vec![7; 100_000]);
        let mut outbox = Outbox::default();
        outbox.message(Answer::RequestTrailers(Default::default()), None);
        outbox.body(Half::Request, [large.clone()], large.len(), true);
        let sent: Vec<Outgoing> = std::iter::from_fn(|| outbox.pop()).collect();
        assert_eq!(sent.len(), 3);
        let at = |outgoing: &Outgoing| outgoing.body.as_ptr().addr() - large.as_ptr().addr();
        assert_eq!((at(&sent[1]), at(&sent[2])), (0, MAX_PIECE));
        outbox.message(Answer::RequestTrailers(Default::default()), None);
        outbox.body(Half::Request, [Bytes::from_static(b"small")], 5, true);
        assert_eq!(std::iter::from_fn(|| outbox.pop()).count(), 1);
    }

    #[test]
    fn data_to_send_is_the_same_in_one_look_and_in_several() {
        let mut outgoing = prefix(Half::Response, 5, true);
        outgoing.body = Bytes::from_static(b"hello");
        let mut slices = [IoSlice::new(&[]); 4];
        let n = outgoing.chunks_vectored(&mut slices);
        let vectored: Vec<u8> = slices[..n].iter().flat_map(|s| s.to_vec()).collect();
        let mut looked = Vec::new();
        while outgoing.has_remaining() {
            looked.push(outgoing.chunk()[0]);
            outgoing.advance(1);
        }
        assert_eq!((n, vectored), (2, looked));
    }
}
