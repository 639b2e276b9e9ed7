//! Reading a message that lies in several pieces, without joining them.

use bytes::{Buf, Bytes, BytesMut};
use std::collections::VecDeque;

/// The first `left` bytes of a queue of pieces; reading takes them away.
///
/// Dropping it takes away what was not read, so that the next message begins at the front.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    pieces: &'a mut VecDeque<Bytes>,
    left: usize,
}

impl<'a> Cursor<'a> {
    /// `pieces` hold `left` bytes at least, and none of them is empty.
    pub(crate) fn new(pieces: &'a mut VecDeque<Bytes>, left: usize) -> Self {
        Self { pieces, left }
    }

    /// Takes what remains of the first piece, at most `n` bytes; empty only if nothing is left.
    fn take_some(&mut self, n: usize) -> Bytes {
        let n = n.min(self.left);
        let Some(front) = self.pieces.front_mut() else {
            return Bytes::new();
        };
        let taken = if front.len() <= n {
            self.pieces.pop_front().unwrap_or_default()
        } else {
            front.split_to(n)
        };
        self.left -= taken.len();
        taken
    }

    /// The next `n` bytes as they lie, or nothing if there are not so many.
    pub(crate) fn cut(&mut self, n: usize) -> Option<Chunk> {
        if n > self.left {
            return None;
        }
        let first = self.take_some(n);
        let mut missing = n - first.len();
        let mut rest = Vec::new();
        while missing > 0 {
            let piece = self.take_some(missing);
            missing -= piece.len();
            rest.push(piece);
        }
        Some(Chunk { first, rest })
    }
}

impl Buf for Cursor<'_> {
    fn remaining(&self) -> usize {
        self.left
    }

    fn chunk(&self) -> &[u8] {
        let front = self.pieces.front().map_or(&[][..], |piece| piece);
        &front[..front.len().min(self.left)]
    }

    fn advance(&mut self, mut n: usize) {
        while n > 0 && self.left > 0 {
            n -= self.take_some(n).len();
        }
    }
}

impl Drop for Cursor<'_> {
    fn drop(&mut self) {
        self.advance(self.left);
    }
}

/// Some bytes of a message, in the pieces in which they came: nearly always one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chunk {
    first: Bytes,
    rest: Vec<Bytes>,
}

impl Chunk {
    pub(crate) fn len(&self) -> usize {
        self.first.len() + self.rest.iter().map(Bytes::len).sum::<usize>()
    }

    /// Shows every piece, and with it whether it is the last of all, which it is if this chunk is the `end`.
    pub(crate) fn each(&self, end: bool, mut see: impl FnMut(&Bytes, bool)) {
        see(&self.first, end && self.rest.is_empty());
        for (i, piece) in self.rest.iter().enumerate() {
            see(piece, end && i + 1 == self.rest.len());
        }
    }

    /// In one piece; copies if there are several.
    pub(crate) fn join(self) -> Bytes {
        if self.rest.is_empty() {
            return self.first;
        }
        let mut joined = BytesMut::with_capacity(self.len());
        for piece in self {
            joined.extend_from_slice(&piece);
        }
        joined.freeze()
    }
}

impl From<Bytes> for Chunk {
    fn from(first: Bytes) -> Self {
        Self {
            first,
            rest: Vec::new(),
        }
    }
}

impl IntoIterator for Chunk {
    type Item = Bytes;
    type IntoIter = std::iter::Chain<std::iter::Once<Bytes>, std::vec::IntoIter<Bytes>>;

    /// The pieces in order; the only one may be empty.
    fn into_iter(self) -> Self::IntoIter {
        std::iter::once(self.first).chain(self.rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_come_out_in_order_however_they_are_cut(
            sizes in prop::collection::vec(1usize..9, 1..9),
            takes in prop::collection::vec(0usize..9, 0..20),
            end in 0usize..40,
        ) {
            let text: Vec<u8> = (0..sizes.iter().sum::<usize>()).map(|i| i as u8).collect();
            let mut all = Bytes::from(text.clone());
            let mut pieces: VecDeque<Bytes> = sizes.iter().map(|&n| all.split_to(n)).collect();
            let end = end.min(text.len());
            let mut cursor = Cursor::new(&mut pieces, end);
            let mut seen = Vec::new();
            for n in takes {
                let left = cursor.remaining();
                match cursor.cut(n) {
                    Some(chunk) => {
                        prop_assert_eq!(chunk.len(), n);
                        seen.extend_from_slice(&chunk.join());
                    }
                    None => prop_assert!(n > left),
                }
            }
            prop_assert_eq!(&seen[..], &text[..seen.len()]);
            drop(cursor);
            let rest: Vec<u8> = pieces.into_iter().flatten().collect();
            prop_assert_eq!(rest, &text[end..]);
        }
    }
}
