//! The writer's side.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use parking_lot::Mutex;

use crate::holes::Holes;
use crate::{HEAD_BYTES, MAX_ROOMS};

/// Where a room lies, as its readers need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which mark is the room's, less than [`MAX_ROOMS`].
    pub mark: u32,
    /// What the mark says as long as the room is there. No other room of the arena ever has it.
    pub stamp: u64,
    /// First byte, counted from the beginning of the file.
    pub offset: u64,
}

/// The memory. Its pages come when they are first written, and stay.
pub struct Arena {
    map: MmapRaw,
    /// `None`: nobody else can see it.
    file: Option<File>,
    limit: usize,
    rooms: Mutex<Rooms>,
}

#[derive(Debug)]
struct Rooms {
    holes: Holes,
    free_marks: Vec<u32>,
    last_stamp: u64,
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Arena");
        shown.field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl Arena {
    /// Room for `bytes`.
    ///
    /// # Errors
    /// When no address space is left for so many.
    pub fn new(bytes: usize) -> io::Result<Arc<Self>> {
        let too_many = || io::Error::from(io::ErrorKind::OutOfMemory);
        let len = bytes.checked_add(HEAD_BYTES).ok_or_else(too_many)?;
        let (map, file) = match shared(len) {
            Ok((map, file)) => (map, Some(file)),
            Err(_) => (private(len)?, None),
        };
        let holes = Holes::new(HEAD_BYTES..len);
        Ok(Arc::new(Self {
            map,
            file,
            limit: holes.free(),
            rooms: Mutex::new(Rooms {
                holes,
                // The lowest is the last, and so the first to go.
                free_marks: (0..MAX_ROOMS as u32).rev().collect(),
                last_stamp: 0,
            }),
        }))
    }

    /// The file that readers map; `None` where memory cannot be shared.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Bytes that rooms can have.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes that rooms have.
    #[must_use]
    pub fn used(&self) -> usize {
        self.limit - self.rooms.lock().holes.free()
    }

    /// A room of `bytes`; it holds whatever was there before. `None` if no hole is large enough, or too many rooms are
    /// there.
    #[must_use]
    pub fn room(self: &Arc<Self>, bytes: usize) -> Option<Room> {
        let mut rooms = self.rooms.lock();
        let mark = *rooms.free_marks.last()?;
        let range = rooms.holes.take(bytes)?;
        rooms.free_marks.pop();
        rooms.last_stamp += 1;
        let stamp = rooms.last_stamp;
        drop(rooms);
        self.mark(mark).store(stamp, Ordering::Release);
        Some(Room {
            arena: Arc::clone(self),
            range,
            bytes,
            mark,
            stamp,
        })
    }

    fn mark(&self, mark: u32) -> &AtomicU64 {
        assert!((mark as usize) < MAX_ROOMS, "a mark of this arena");
        // SAFETY: the head of the map is made of MAX_ROOMS words, aligned as the page is that it begins with; this process
        // only ever touches them as atomics, and the map lives as long as `self`.
        unsafe { &*self.map.as_ptr().cast::<AtomicU64>().add(mark as usize) }
    }
}

#[cfg(target_os = "linux")]
fn shared(len: usize) -> io::Result<(MmapRaw, File)> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("baton-kv", flags)?);
    file.set_len(len as u64)?;
    let map = MmapOptions::new().len(len).map_raw(&file)?;
    // What is mapped here stays writable here.
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
    fcntl_add_seals(&file, seals)?;
    Ok((map, file))
}

#[cfg(not(target_os = "linux"))]
fn shared(_: usize) -> io::Result<(MmapRaw, File)> {
    Err(io::ErrorKind::Unsupported.into())
}

fn private(len: usize) -> io::Result<MmapRaw> {
    MmapMut::map_anon(len).map(MmapRaw::from)
}

/// Some of the arena's memory, to be written by its owner and read by whoever learns its [`Place`]. Dropping it takes the
/// memory back at once, whoever reads it.
#[derive(Debug)]
pub struct Room {
    arena: Arc<Arena>,
    range: Range<usize>,
    bytes: usize,
    mark: u32,
    stamp: u64,
}

impl Room {
    /// Where it lies.
    #[must_use]
    pub fn place(&self) -> Place {
        Place {
            mark: self.mark,
            stamp: self.stamp,
            offset: self.range.start as u64,
        }
    }
}

impl Deref for Room {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies within the map, is no other room's, and other processes cannot write to it.
        unsafe {
            let begin = self.arena.map.as_ptr().add(self.range.start);
            std::slice::from_raw_parts(begin, self.bytes)
        }
    }
}

impl DerefMut for Room {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above. Other processes that still read here have lost the room's mark and keep nothing of it, or were
        // told of the room and wait until it is filled.
        unsafe {
            let begin = self.arena.map.as_mut_ptr().add(self.range.start);
            std::slice::from_raw_parts_mut(begin, self.bytes)
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.arena.mark(self.mark).store(0, Ordering::Relaxed);
        // No later write to the range comes before the mark is gone; the readers' half is in `View::holds`.
        fence(Ordering::Release);
        let mut rooms = self.arena.rooms.lock();
        rooms.free_marks.push(self.mark);
        rooms.holes.give_back(self.range.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooms_are_apart_and_bounded_and_come_back() {
        let arena = Arena::new(1000).unwrap();
        let limit = arena.limit();
        assert_eq!(limit, 960);
        let (mut a, mut b) = (arena.room(500).unwrap(), arena.room(400).unwrap());
        a.fill(1);
        b.fill(2);
        assert!(a.len() == 500 && a.iter().all(|&x| x == 1) && b.iter().all(|&x| x == 2));
        assert!(arena.room(100).is_none());
        assert_ne!(a.place(), b.place());
        drop((a, b));
        assert_eq!(arena.used(), 0);
        assert!(arena.room(limit).is_some());
    }

    #[test]
    fn there_are_not_more_rooms_than_marks() {
        let arena = Arena::new(1 << 20).unwrap();
        let all: Vec<Room> = (0..MAX_ROOMS).map(|_| arena.room(1).unwrap()).collect();
        assert!(arena.room(1).is_none());
        drop(all);
        assert!(arena.room(1).is_some());
    }

    #[test]
    fn memory_beyond_all_addresses_is_refused() {
        assert!(Arena::new(usize::MAX - 1).is_err());
        assert!(Arena::new(usize::MAX / 2).is_err());
    }
}
