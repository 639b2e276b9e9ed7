//! One transfer as the producer sees it: which chunk goes next, and whether there is credit for it. Pure.
//!
//! Chunks go in order, those asked for again first. The bytes sent never exceed the bytes granted.

use std::collections::VecDeque;

use crate::geometry::ChunkMap;

/// Chunks that one transfer may ask for again.
const MAX_RESENDS: u32 = 64;

/// What to do next for a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Send this chunk.
    Send(u32),
    /// Wait for credit.
    Starved,
    /// Everything has been sent; wait for the consumer's verdict.
    Sent,
}

/// Progress of one transfer.
#[derive(Debug)]
pub(crate) struct Outgoing {
    map: ChunkMap,
    /// Bit per chunk; empty means all.
    want: Vec<u8>,
    cursor: u32,
    again: VecDeque<u32>,
    resends_left: u32,
    credit: u64,
}

impl Outgoing {
    pub(crate) fn new(map: ChunkMap, want: Vec<u8>, credit: u64) -> Self {
        Self {
            map,
            want,
            cursor: 0,
            again: VecDeque::new(),
            resends_left: MAX_RESENDS,
            credit,
        }
    }

    pub(crate) fn map(&self) -> &ChunkMap {
        &self.map
    }

    /// More may be sent.
    pub(crate) fn grant(&mut self, bytes: u64) {
        self.credit = self.credit.saturating_add(bytes);
    }

    /// A chunk came damaged. Returns false when the consumer asks for what it cannot.
    pub(crate) fn resend(&mut self, chunk: u32) -> bool {
        if chunk >= self.cursor || self.resends_left == 0 {
            return false;
        }
        self.resends_left -= 1;
        self.again.push_back(chunk);
        true
    }

    /// Takes the next chunk, and its length off the credit.
    pub(crate) fn next(&mut self) -> Next {
        while self.cursor < self.map.n_chunks() && !self.is_wanted(self.cursor) {
            self.cursor += 1;
        }
        let chunk = self.again.front().copied().unwrap_or(self.cursor);
        let Some(range) = self.map.range(chunk) else {
            return Next::Sent;
        };
        let Some(credit) = self.credit.checked_sub(range.len() as u64) else {
            return Next::Starved;
        };
        self.credit = credit;
        if self.again.pop_front().is_none() {
            self.cursor += 1;
        }
        Next::Send(chunk)
    }

    fn is_wanted(&self, chunk: u32) -> bool {
        let byte = self.want.get(chunk as usize / 8).copied().unwrap_or(0);
        self.want.is_empty() || byte >> (chunk % 8) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::tests::{layout, selection};

    /// Twelve chunks of 64 bytes.
    fn map() -> ChunkMap {
        let map = ChunkMap::new(&layout(), &selection(0..2), 64).unwrap();
        assert_eq!(map.n_chunks(), 12);
        map
    }

    fn sent(outgoing: &mut Outgoing) -> Vec<u32> {
        std::iter::from_fn(|| match outgoing.next() {
            Next::Send(chunk) => Some(chunk),
            _ => None,
        })
        .collect()
    }

    #[test]
    fn chunks_go_in_order_as_far_as_the_credit_reaches() {
        let mut outgoing = Outgoing::new(map(), vec![], 64 * 5 + 63);
        assert_eq!(sent(&mut outgoing), [0, 1, 2, 3, 4]);
        assert_eq!(outgoing.next(), Next::Starved);
        outgoing.grant(1);
        assert_eq!(sent(&mut outgoing), [5]);
        outgoing.grant(u64::MAX);
        outgoing.grant(u64::MAX);
        assert_eq!(sent(&mut outgoing), [6, 7, 8, 9, 10, 11]);
        assert_eq!(outgoing.next(), Next::Sent);
    }

    #[test]
    fn a_chunk_asked_for_again_goes_first_and_costs_credit() {
        let mut outgoing = Outgoing::new(map(), vec![], 64 * 3);
        assert_eq!(sent(&mut outgoing), [0, 1, 2]);
        assert!(outgoing.resend(1));
        assert!(!outgoing.resend(3), "it has not been sent yet");
        assert_eq!(outgoing.next(), Next::Starved);
        outgoing.grant(128);
        assert_eq!(sent(&mut outgoing), [1, 3]);
    }

    #[test]
    fn resends_are_bounded() {
        let mut outgoing = Outgoing::new(map(), vec![], u64::MAX);
        sent(&mut outgoing);
        assert_eq!(
            (0..1000).filter(|_| outgoing.resend(0)).count(),
            MAX_RESENDS as usize
        );
    }

    #[test]
    fn only_wanted_chunks_go() {
        let mut outgoing = Outgoing::new(map(), vec![0b1000_0010], u64::MAX);
        assert_eq!(sent(&mut outgoing), [1, 7]);
        assert_eq!(outgoing.next(), Next::Sent);
    }
}
