//! What is stored: bytes whose right value is known by definition, in memory whose rooms are given up and used again.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::rc::Rc;

use baton_kv::KvLayout;
use baton_shm::Place;

use super::dice::mix;
use crate::control::Placed;
use crate::wire::Selection;

/// Bytes before the first room.
const HEAD: usize = 64;

/// The KV of a prompt, by definition: a selection's bytes, and zeros for tokens from `end` on.
pub(super) fn truth(seed: u64, layout: &KvLayout, selection: &Selection, end: u32) -> Vec<u8> {
    let vector = layout.head_dim as usize * layout.dtype.bytes();
    let mut bytes = Vec::new();
    for layer in selection.layers.clone() {
        for head in selection.heads.clone() {
            for block in selection.blocks.clone() {
                for half in [0u64, 1] {
                    let first = block * selection.block_size;
                    for token in first..first + selection.block_size {
                        let place = u64::from(layer) << 48 | u64::from(head) << 40;
                        let word = mix(seed ^ place ^ half << 32 ^ u64::from(token));
                        let word = if token < end { word } else { 0 };
                        bytes.extend(word.to_le_bytes().iter().cycle().take(vector));
                    }
                }
            }
        }
    }
    bytes
}

/// A producer's memory.
#[derive(Debug)]
pub(super) struct Arena {
    bytes: Vec<u8>,
    /// Rooms by their first byte.
    rooms: BTreeMap<usize, Range<usize>>,
    marks: Vec<u64>,
    last_stamp: u64,
    /// Its process is gone: nobody writes here any more, and readers keep what they see.
    is_orphaned: bool,
}

pub(super) type SharedArena = Rc<RefCell<Arena>>;

impl Arena {
    pub(super) fn new(len: usize) -> SharedArena {
        Rc::new(RefCell::new(Self {
            bytes: vec![0; HEAD + len],
            rooms: BTreeMap::new(),
            marks: Vec::new(),
            last_stamp: 0,
            is_orphaned: false,
        }))
    }

    pub(super) fn orphan(&mut self) {
        self.is_orphaned = true;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rooms.is_empty()
    }

    pub(super) fn has(&self, range: &Range<usize>) -> bool {
        HEAD <= range.start && range.start <= range.end && range.end <= self.bytes.len()
    }

    pub(super) fn copy(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    pub(super) fn holds(&self, place: &Place) -> bool {
        place.stamp != 0 && self.marks.get(place.mark as usize) == Some(&place.stamp)
    }

    /// The first hole of so many bytes.
    fn hole(&self, len: usize) -> Option<Range<usize>> {
        let ends = std::iter::once(HEAD).chain(self.rooms.values().map(|room| room.end));
        let begins = self.rooms.keys().copied().chain([self.bytes.len()]);
        let mut holes = ends.zip(begins);
        holes.find_map(|(begin, end)| (begin + len <= end).then_some(begin..begin + len))
    }
}

/// Some of it.
#[derive(Debug)]
pub(super) struct Room {
    arena: SharedArena,
    range: Range<usize>,
    place: Place,
    bytes: Vec<u8>,
}

impl Room {
    /// Puts `bytes` somewhere, as soon as there is room.
    pub(super) fn new(arena: &SharedArena, bytes: Vec<u8>) -> Option<Self> {
        let mut inner = arena.borrow_mut();
        let range = inner.hole(bytes.len())?;
        inner.rooms.insert(range.start, range.clone());
        inner.bytes[range.clone()].copy_from_slice(&bytes);
        let free = inner.marks.iter().position(|mark| *mark == 0);
        let mark = free.unwrap_or_else(|| {
            inner.marks.push(0);
            inner.marks.len() - 1
        });
        inner.last_stamp += 1;
        let stamp = inner.last_stamp;
        inner.marks[mark] = stamp;
        drop(inner);
        Some(Self {
            arena: Rc::clone(arena),
            place: Place {
                mark: mark as u32,
                stamp,
                offset: range.start as u64,
            },
            range,
            bytes,
        })
    }
}

impl Deref for Room {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Placed for Room {
    fn place(&self) -> Place {
        self.place
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut inner = self.arena.borrow_mut();
        if !inner.is_orphaned {
            inner.marks[self.place.mark as usize] = 0;
            inner.rooms.remove(&self.range.start);
        }
    }
}
