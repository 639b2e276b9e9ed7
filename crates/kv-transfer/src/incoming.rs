//! One transfer as the consumer sees it: which chunks are here and verified, which to ask for again, how much
//! more to let the producer send. Pure.
//!
//! A chunk counts only after its checksum was found right; what is given up stays missing.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::geometry::ChunkMap;
use crate::wire::{ChunkHeader, WireError};

/// Times that one chunk is asked for again.
const MAX_NACKS_PER_CHUNK: u8 = 2;
/// Chunks that one transfer asks for again; below what the producer grants.
const MAX_NACKS: u32 = 32;

/// What follows from a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is verified.
    Kept,
    /// It is damaged: ask for it again.
    AskAgain,
    /// It is damaged, and was too often before.
    GivenUp,
}

/// Progress of one transfer.
#[derive(Debug)]
pub(crate) struct Incoming {
    map: ChunkMap,
    have: Vec<bool>,
    /// Chunks neither verified nor given up.
    pending: u32,
    given_up: u32,
    nacks: BTreeMap<u32, u8>,
    nacks_left: u32,
    /// Bytes that the producer may send before we grant more.
    window: u64,
    /// Received since the last grant.
    ungranted: u64,
}

impl Incoming {
    pub(crate) fn new(map: ChunkMap, window: u64) -> Self {
        let n = map.n_chunks();
        Self {
            map,
            have: vec![false; n as usize],
            pending: n,
            given_up: 0,
            nacks: BTreeMap::new(),
            nacks_left: MAX_NACKS,
            window,
            ungranted: 0,
        }
    }

    pub(crate) fn map(&self) -> &ChunkMap {
        &self.map
    }

    /// Where a chunk's payload goes.
    ///
    /// # Errors
    /// When the header is not that of a chunk we still wait for.
    pub(crate) fn place(&self, header: &ChunkHeader) -> Result<Range<usize>, WireError> {
        let is_awaited = self.have.get(header.chunk as usize) == Some(&false);
        self.map
            .range(header.chunk)
            .filter(|range| {
                let (begin, len) = (range.start as u64, range.len() as u64);
                is_awaited && begin == header.offset && len == u64::from(header.len)
            })
            .ok_or(WireError::Geometry {
                chunk: header.chunk,
            })
    }

    /// Judges a chunk that has been received where [`place`](Self::place) said.
    pub(crate) fn judge(&mut self, header: &ChunkHeader, crc: u32) -> Verdict {
        self.ungranted += u64::from(header.len);
        if crc == header.crc {
            self.have[header.chunk as usize] = true;
            self.pending -= 1;
            return Verdict::Kept;
        }
        let nacks = self.nacks.entry(header.chunk).or_insert(0);
        if *nacks < MAX_NACKS_PER_CHUNK && self.nacks_left > 0 {
            *nacks += 1;
            self.nacks_left -= 1;
            return Verdict::AskAgain;
        }
        self.pending -= 1;
        self.given_up += 1;
        Verdict::GivenUp
    }

    /// Everything is there, by other means than chunks.
    pub(crate) fn complete(&mut self) {
        self.have.fill(true);
        self.pending = 0;
        self.given_up = 0;
    }

    /// What to grant the producer now, once it is worth a message.
    pub(crate) fn grant(&mut self) -> Option<u64> {
        let is_due = self.ungranted * 2 >= self.window && self.pending > 0;
        is_due.then(|| std::mem::take(&mut self.ungranted))
    }

    /// Whether no further chunk will come.
    pub(crate) fn is_over(&self) -> bool {
        self.pending == 0
    }

    /// Damaged chunks that were given up.
    pub(crate) fn given_up(&self) -> u32 {
        self.given_up
    }

    /// Leading blocks of which every byte is verified.
    pub(crate) fn whole_blocks(&self) -> u32 {
        self.map.whole_blocks(
            (0u32..)
                .zip(&self.have)
                .filter(|(_, have)| !**have)
                .map(|(c, _)| c),
        )
    }

    /// A new connection takes over: the bits of what is still missing, as `Open` asks for it.
    pub(crate) fn resume(&mut self) -> Vec<u8> {
        self.ungranted = 0;
        self.pending += std::mem::take(&mut self.given_up);
        if self.have.iter().all(|have| !have) {
            return Vec::new();
        }
        let bits = |eight: &[bool]| {
            (0..)
                .zip(eight)
                .fold(0, |b, (i, have)| b | u8::from(!have) << i)
        };
        self.have.chunks(8).map(bits).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::tests::{layout, selection};
    use crate::outgoing::{Next, Outgoing};
    use proptest::prelude::*;

    fn header(map: &ChunkMap, chunk: u32) -> ChunkHeader {
        let range = map.range(chunk).unwrap();
        ChunkHeader {
            xfer: 1,
            chunk,
            len: range.len() as u32,
            offset: range.start as u64,
            crc: 5,
        }
    }

    fn incoming(window: u64) -> Incoming {
        Incoming::new(
            ChunkMap::new(&layout(), &selection(0..2), 64).unwrap(),
            window,
        )
    }

    #[test]
    fn only_the_exact_header_of_an_awaited_chunk_has_a_place() {
        let mut incoming = incoming(1 << 20);
        let good = header(incoming.map(), 3);
        assert_eq!(incoming.place(&good), Ok(192..256));
        for bad in [
            ChunkHeader { chunk: 4, ..good },
            ChunkHeader {
                chunk: u32::MAX,
                ..good
            },
            ChunkHeader { len: 63, ..good },
            ChunkHeader { len: 65, ..good },
            ChunkHeader {
                offset: u64::MAX,
                ..good
            },
        ] {
            assert_eq!(
                incoming.place(&bad),
                Err(WireError::Geometry { chunk: bad.chunk })
            );
        }
        assert_eq!(incoming.judge(&good, 5), Verdict::Kept);
        assert!(incoming.place(&good).is_err(), "it is here already");
    }

    #[test]
    fn a_damaged_chunk_is_asked_for_twice_and_then_limits_the_prefix() {
        let mut incoming = incoming(1 << 20);
        for chunk in 0..12 {
            let header = header(incoming.map(), chunk);
            if chunk != 5 {
                assert_eq!(incoming.judge(&header, 5), Verdict::Kept);
                continue;
            }
            assert_eq!(incoming.judge(&header, 6), Verdict::AskAgain);
            assert_eq!(incoming.judge(&header, 6), Verdict::AskAgain);
            assert_eq!(incoming.judge(&header, 6), Verdict::GivenUp);
        }
        assert!(incoming.is_over());
        assert_eq!(incoming.given_up(), 1);
        // Chunk 5 is the second block of the first head of layer 1.
        assert_eq!(incoming.whole_blocks(), 1);
        assert_eq!(incoming.resume(), [0b0010_0000, 0]);
        assert!(!incoming.is_over());
    }

    proptest! {
        #[test]
        fn whatever_is_damaged_both_sides_agree_on_the_end(damage in prop::collection::vec(0u8..3, 0..200)) {
            let map = ChunkMap::new(&layout(), &selection(0..2), 64).unwrap();
            let window = 256;
            let (mut out, mut inc) =
                (Outgoing::new(map.clone(), vec![], window), Incoming::new(map.clone(), window));
            let mut damage = damage.into_iter();
            let mut steps = 0;
            while !inc.is_over() {
                steps += 1;
                prop_assert!(steps < 1000);
                let Next::Send(chunk) = out.next() else {
                    return Err(TestCaseError::fail("the producer has nothing to send"));
                };
                let header = header(&map, chunk);
                prop_assert!(inc.place(&header).is_ok());
                if inc.judge(&header, if damage.next() == Some(0) { 6 } else { 5 }) == Verdict::AskAgain {
                    prop_assert!(out.resend(chunk));
                }
                inc.grant().into_iter().for_each(|bytes| out.grant(bytes));
            }
            prop_assert_eq!(out.next(), Next::Sent);
            prop_assert_eq!(inc.given_up() == 0, inc.whole_blocks() == 2);
        }
    }
}
