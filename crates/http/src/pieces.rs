//! A body in several pieces, none of them copied: what is left of a long text after small edits.

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Pieces of one text, in order. Cheap to clone: the bytes are shared.
#[derive(Clone, Debug, Default)]
pub struct Pieces {
    pieces: VecDeque<Bytes>,
    len: usize,
}

impl Pieces {
    /// Adds `piece` at the end.
    pub fn push(&mut self, piece: impl Into<Bytes>) {
        let piece = piece.into();
        if !piece.is_empty() {
            self.len += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// Adds all of `other` at the end.
    pub fn append(&mut self, other: Self) {
        self.len += other.len;
        self.pieces.extend(other.pieces);
    }

    /// The same text with stretches of it replaced, each by something else. They are places in this text, in order, and
    /// do not overlap. What is not replaced is not copied.
    #[must_use]
    pub fn replaced(mut self, edits: impl IntoIterator<Item = (Range<usize>, Bytes)>) -> Self {
        let (mut out, mut at) = (Self::default(), 0);
        for (span, new) in edits {
            out.append(self.split_to(span.start.saturating_sub(at)));
            self.split_to(span.len());
            out.push(new);
            at = span.end;
        }
        out.append(self);
        out
    }

    /// Takes `n` bytes from the front, or all there are.
    fn split_to(&mut self, mut n: usize) -> Self {
        let mut taken = Self::default();
        while n > 0 {
            let Some(mut piece) = self.pieces.pop_front() else {
                break;
            };
            let part = piece.split_to(n.min(piece.len()));
            n -= part.len();
            self.len -= part.len();
            taken.push(part);
            if !piece.is_empty() {
                self.pieces.push_front(piece);
            }
        }
        taken
    }

    /// The pieces, in order; none of them is empty.
    pub fn iter(&self) -> impl Iterator<Item = &Bytes> {
        self.pieces.iter()
    }

    /// Takes the first piece away.
    pub fn pop(&mut self) -> Option<Bytes> {
        let piece = self.pieces.pop_front()?;
        self.len -= piece.len();
        Some(piece)
    }

    /// Length of the whole, in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left of it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The whole in one piece; copies if there are several.
    pub fn into_bytes(mut self) -> Bytes {
        if self.pieces.len() <= 1 {
            return self.pieces.pop_front().unwrap_or_default();
        }
        let mut joined = BytesMut::with_capacity(self.len);
        for piece in self.pieces {
            joined.extend_from_slice(&piece);
        }
        joined.freeze()
    }
}

impl<B: Into<Bytes>> From<B> for Pieces {
    fn from(piece: B) -> Self {
        let mut pieces = Self::default();
        pieces.push(piece);
        pieces
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.pop().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.len as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt as _;

    #[tokio::test]
    async fn pieces_are_one_text_and_know_their_length() {
        let mut text = Pieces::from("ab");
        text.push("");
        text.append(Pieces::from("cde"));
        assert_eq!((text.len(), text.size_hint().exact()), (5, Some(5)));
        assert!(text.iter().eq(["ab", "cde"]));
        assert_eq!(text.clone().into_bytes(), "abcde");
        assert_eq!(text.clone().pop().unwrap(), "ab");
        assert_eq!(text.collect().await.unwrap().to_bytes(), "abcde");
        assert!(Pieces::default().is_empty() && Pieces::default().is_end_stream());
    }

    #[test]
    fn stretches_are_replaced_wherever_the_pieces_end() {
        let text = || {
            let mut text = Pieces::from("012");
            text.push("34567");
            text.push("89");
            text
        };
        let replaced = |edits: &[(Range<usize>, &'static str)]| {
            let edits = edits
                .iter()
                .map(|(span, new)| (span.clone(), Bytes::from(*new)));
            let replaced = text().replaced(edits);
            let len = replaced.len();
            let whole = replaced.into_bytes();
            assert_eq!(len, whole.len());
            String::from_utf8(whole.to_vec()).unwrap()
        };
        assert_eq!(replaced(&[]), "0123456789");
        assert_eq!(
            replaced(&[(0..1, "a"), (2..4, "bcd"), (9..10, "")]),
            "a1bcd45678"
        );
        assert_eq!(replaced(&[(0..10, "x")]), "x");
        assert_eq!(replaced(&[(3..3, "-"), (8..99, "!")]), "012-34567!");
        assert_eq!(replaced(&[(50..60, "!")]), "0123456789!");
    }
}
