//! A request's body as it comes: kept in pieces, paid for, with a limit.

use crate::refusal::Refusal;
use baton_http::{Account, Pieces};
use bytes::{Bytes, BytesMut};

/// Shorter pieces are copied together: a piece keeps the whole buffer alive in which it came, and a body that comes byte
/// by byte would keep very much.
const SHORT: usize = 4096;

/// A body, or what came of it so far.
#[derive(Debug)]
pub(crate) struct RequestBody {
    pieces: Pieces,
    /// Short pieces that came last.
    short: BytesMut,
    account: Account,
    max: usize,
}

impl RequestBody {
    pub(crate) fn new(account: Account, max: usize) -> Self {
        Self {
            pieces: Pieces::default(),
            short: BytesMut::new(),
            account,
            max,
        }
    }

    /// # Errors
    /// The answer for a client whose body is too long, or for whom there is no room.
    pub(crate) fn push(&mut self, piece: Bytes) -> Result<(), Refusal> {
        if self.len().saturating_add(piece.len()) > self.max {
            return Err(Refusal::too_large(self.max));
        }
        let paid = self.account.charge(piece.len());
        paid.map_err(|_| Refusal::full())?;
        if piece.len() >= SHORT {
            self.close();
            self.pieces.push(piece);
        } else {
            self.short.extend_from_slice(&piece);
            if self.short.len() >= SHORT {
                self.close();
            }
        }
        Ok(())
    }

    fn len(&self) -> usize {
        self.pieces.len() + self.short.len()
    }

    fn close(&mut self) {
        if !self.short.is_empty() {
            self.pieces.push(self.short.split().freeze());
        }
    }

    /// The whole, once nothing more comes.
    pub(crate) fn whole(&mut self) -> &Pieces {
        self.close();
        &self.pieces
    }

    /// Takes the bytes; they stay paid for until [`release`](Self::release).
    pub(crate) fn take(&mut self) -> Pieces {
        self.close();
        std::mem::take(&mut self.pieces)
    }

    /// Nothing is held any longer.
    pub(crate) fn release(&mut self) {
        self.pieces = Pieces::default();
        self.short = BytesMut::new();
        self.account.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_http::Budget;

    #[test]
    fn short_pieces_are_joined_and_long_ones_kept() {
        let mut body = RequestBody::new(Budget::new(1 << 20).account(), 1 << 20);
        let long = Bytes::from(vec![1; SHORT]);
        for piece in [&b"a"[..], b"", b"bc"] {
            body.push(Bytes::from_static(piece)).unwrap();
        }
        body.push(long.clone()).unwrap();
        body.push(Bytes::from_static(b"d")).unwrap();
        assert!(body.whole().iter().eq([&b"abc"[..], &long, b"d"]));
        assert_eq!(body.whole().iter().nth(1).unwrap().as_ptr(), long.as_ptr());
    }

    #[test]
    fn a_body_is_refused_at_its_limit_and_when_others_take_all_the_room() {
        let budget = Budget::new(6 << 10);
        let mut body = RequestBody::new(budget.account(), 5000);
        body.push(vec![0; 5000].into()).unwrap();
        let refused = body.push(vec![0].into()).unwrap_err();
        assert_eq!(refused.status(), 413);
        let mut other = RequestBody::new(budget.account(), 5000);
        let refused = other.push(vec![0; 5000].into()).unwrap_err();
        assert_eq!(refused.status(), 503);
        body.release();
        assert!(other.push(vec![0; 5000].into()).is_ok());
    }
}
