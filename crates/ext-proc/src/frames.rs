//! gRPC's framing: every message has a byte of flags and a length before it, and may begin and end anywhere in the data.

use crate::cursor::Cursor;
use crate::status::{Code, Status};
use bytes::{Buf, Bytes};
use std::collections::VecDeque;

/// Bytes before a message: flags, then the length as a big-endian number of four bytes.
pub(crate) const HEAD: usize = 5;

/// Data of a stream, of which whole messages are taken. Holds one unfinished message and what came with it.
#[derive(Debug)]
pub(crate) struct Frames {
    pieces: VecDeque<Bytes>,
    held: usize,
    /// Length of the message in front, once its head was read.
    expected: Option<usize>,
    max: usize,
}

impl Frames {
    /// Messages are taken up to a length of `max` bytes.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            pieces: VecDeque::new(),
            held: 0,
            expected: None,
            max,
        }
    }

    pub(crate) fn push(&mut self, data: Bytes) {
        if !data.is_empty() {
            self.held += data.len();
            self.pieces.push_back(data);
        }
    }

    /// The next message, if it is there as a whole.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` for one that is too long, which is not waited for, and `UNIMPLEMENTED` for a compressed one.
    pub(crate) fn next(&mut self) -> Result<Option<Cursor<'_>>, Status> {
        let expected = match self.expected {
            Some(expected) => expected,
            None if self.held < HEAD => return Ok(None),
            None => self.head()?,
        };
        if self.held < expected {
            self.expected = Some(expected);
            return Ok(None);
        }
        self.expected = None;
        self.held -= expected;
        Ok(Some(Cursor::new(&mut self.pieces, expected)))
    }

    fn head(&mut self) -> Result<usize, Status> {
        let mut head = Cursor::new(&mut self.pieces, HEAD);
        let (flags, len) = (head.get_u8(), head.get_u32() as usize);
        self.held -= HEAD;
        if flags != 0 {
            return Err(Status::new(
                Code::Unimplemented,
                "compressed messages are not read",
            ));
        }
        if len > self.max {
            return Err(Status::new(Code::ResourceExhausted, "message too long"));
        }
        Ok(len)
    }

    /// Whether nothing of a message is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.held == 0 && self.expected.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn framed(messages: &[Vec<u8>]) -> Vec<u8> {
        let mut data = Vec::new();
        for message in messages {
            data.push(0);
            data.extend_from_slice(&(message.len() as u32).to_be_bytes());
            data.extend_from_slice(message);
        }
        data
    }

    proptest! {
        #[test]
        fn messages_are_found_wherever_the_data_is_cut(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..6),
            cuts in prop::collection::vec(0usize..12, 0..40),
        ) {
            let mut data = Bytes::from(framed(&messages));
            let (mut frames, mut seen) = (Frames::new(64), Vec::new());
            for cut in cuts.into_iter().chain([usize::MAX]) {
                frames.push(data.split_to(cut.min(data.len())));
                while let Some(mut message) = frames.next().unwrap() {
                    seen.push(message.copy_to_bytes(message.remaining()).to_vec());
                }
            }
            prop_assert_eq!(seen, messages);
            prop_assert!(frames.is_empty());
        }
    }

    #[test]
    fn what_is_too_long_or_compressed_is_refused_by_its_head() {
        for (head, code) in [
            ([0, 0, 0, 0, 65], Code::ResourceExhausted),
            ([0, 255, 255, 255, 255], Code::ResourceExhausted),
            ([1, 0, 0, 0, 1], Code::Unimplemented),
        ] {
            let mut frames = Frames::new(64);
            frames.push(Bytes::copy_from_slice(&head));
            assert_eq!(frames.next().unwrap_err().code, code);
        }
    }

    #[test]
    fn a_message_not_read_to_its_end_does_not_disturb_the_next() {
        let mut frames = Frames::new(64);
        frames.push(framed(&[vec![1, 2, 3], vec![4]]).into());
        assert_eq!(frames.next().unwrap().unwrap().get_u8(), 1);
        assert_eq!(frames.next().unwrap().unwrap().get_u8(), 4);
        assert!(frames.next().unwrap().is_none());
    }
}
