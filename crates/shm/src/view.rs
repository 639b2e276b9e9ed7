//! The reader's side.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};

use crate::{HEAD_BYTES, MAX_ROOMS, Place, past_caches};

/// Another process's arena, read-only.
#[derive(Debug)]
pub struct View {
    map: MmapRaw,
}

impl View {
    /// Maps the arena.
    ///
    /// # Errors
    /// When the file could shrink under us, which would kill us, or is no arena.
    pub fn open(file: &File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len()).unwrap_or(0);
        if len < HEAD_BYTES || !is_sealed(file) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let map = MmapOptions::new().len(len).map_raw_read_only(file)?;
        Ok(Self { map })
    }

    /// Whether all of `range`, counted from the beginning of the file, is memory of rooms.
    #[must_use]
    pub fn has(&self, range: &Range<usize>) -> bool {
        HEAD_BYTES <= range.start && range.start <= range.end && range.end <= self.map.len()
    }

    /// Copies what lies at `from` on. What it is worth, [`holds`](Self::holds) says afterwards.
    ///
    /// # Panics
    /// When the view [has](Self::has) no such range.
    pub fn copy(&self, from: usize, to: &mut [u8]) {
        let begin = self.at(from, to.len());
        // SAFETY: the range lies within the map, whose file cannot shrink, and `to` is ours alone. The owner may write
        // there meanwhile: no reference to the memory is made, and what was copied then is thrown away.
        unsafe { std::ptr::copy_nonoverlapping(begin, to.as_mut_ptr(), to.len()) }
    }

    /// The same for a part of something larger than the caches, which would only drive out of them what is needed.
    ///
    /// # Panics
    /// As [`copy`](Self::copy).
    pub fn copy_past_caches(&self, from: usize, to: &mut [u8]) {
        let begin = self.at(from, to.len());
        // SAFETY: as in `copy`.
        unsafe { past_caches::copy(begin, to.as_mut_ptr(), to.len()) }
    }

    /// Where a range begins.
    fn at(&self, from: usize, len: usize) -> *const u8 {
        let fits = from
            .checked_add(len)
            .is_some_and(|end| self.has(&(from..end)));
        assert!(fits, "a range of the view");
        // SAFETY: it lies within the map.
        unsafe { self.map.as_ptr().add(from) }
    }

    /// Whether what was copied before belongs to the room of `place`.
    #[must_use]
    pub fn holds(&self, place: &Place) -> bool {
        if place.mark as usize >= MAX_ROOMS || place.stamp == 0 {
            return false;
        }
        // What was copied was read before the mark is.
        fence(Ordering::Acquire);
        // SAFETY: the mark lies in the head of the map, aligned; whoever writes it does so atomically.
        let mark = unsafe {
            &*self
                .map
                .as_ptr()
                .cast::<AtomicU64>()
                .add(place.mark as usize)
        };
        mark.load(Ordering::Relaxed) == place.stamp
    }
}

#[cfg(target_os = "linux")]
fn is_sealed(file: &File) -> bool {
    use rustix::fs::{SealFlags, fcntl_get_seals};
    fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
}

#[cfg(not(target_os = "linux"))]
fn is_sealed(_: &File) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::Arena;
    use std::io::Write as _;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_room_is_read_where_it_lies_until_it_is_given_up() {
        let arena = Arena::new(4096).unwrap();
        let mut room = arena.room(100).unwrap();
        room.copy_from_slice(&std::array::from_fn::<u8, 100, _>(|i| i as u8));
        let (view, place) = (View::open(arena.file().unwrap()).unwrap(), room.place());
        let mut seen = [0; 90];
        view.copy(place.offset as usize + 10, &mut seen);
        assert!(view.holds(&place) && seen.iter().zip(10..).all(|(&x, i)| x == i));
        drop(room);
        assert!(!view.holds(&place));
        let again = arena.room(100).unwrap();
        assert!(again.place().offset == place.offset && !view.holds(&place));
        assert!(view.holds(&again.place()));
    }

    #[test]
    fn a_reader_never_keeps_what_was_written_over() {
        let arena = Arena::new(1 << 16).unwrap();
        let view = View::open(arena.file().unwrap()).unwrap();
        let (places, is_over) = (parking_lot::Mutex::new(None), AtomicBool::new(false));
        let looks = AtomicU64::new(0);
        let (mut kept, mut dropped) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..20_000u32 {
                    let mut room = arena.room(1 << 16).unwrap();
                    room.fill(n as u8);
                    *places.lock() = Some((room.place(), n as u8));
                    // Now and then it stays until it was read from its beginning to its end.
                    let before = looks.load(Ordering::SeqCst);
                    while n % 64 == 0 && looks.load(Ordering::SeqCst) < before + 2 {
                        std::thread::yield_now();
                    }
                }
                is_over.store(true, Ordering::SeqCst);
            });
            let mut seen = vec![0; 1 << 16];
            while !is_over.load(Ordering::SeqCst) {
                let Some((place, n)) = *places.lock() else {
                    continue;
                };
                view.copy(place.offset as usize, &mut seen);
                if view.holds(&place) {
                    kept += 1;
                    assert!(seen.iter().all(|&x| x == n), "torn");
                } else {
                    dropped += 1;
                }
                looks.fetch_add(1, Ordering::SeqCst);
            }
        });
        assert!(kept > 0 && dropped > 0, "kept {kept}, dropped {dropped}");
    }

    #[test]
    fn nobody_else_can_write_to_an_arena_or_cut_it() {
        let arena = Arena::new(4096).unwrap();
        let mut file = arena.file().unwrap();
        assert!(file.set_len(10).is_err() && file.set_len(1 << 20).is_err());
        assert!(file.write_all(b"x").is_err());
        assert!(MmapOptions::new().map_raw(file).is_err());
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("x", flags).unwrap());
        file.set_len(1 << 20).unwrap();
        assert!(View::open(&file).is_err());
        let short = rustix::fs::memfd_create("x", flags).unwrap();
        rustix::fs::fcntl_add_seals(&short, rustix::fs::SealFlags::SHRINK).unwrap();
        assert!(View::open(&File::from(short)).is_err());
    }

    #[test]
    fn claims_about_what_is_not_there_are_refused() {
        let arena = Arena::new(4096).unwrap();
        let view = View::open(arena.file().unwrap()).unwrap();
        let place = |mark, stamp| Place {
            mark,
            stamp,
            offset: 0,
        };
        assert!(!view.holds(&place(0, 0)) && !view.holds(&place(MAX_ROOMS as u32, 1)));
        let end = HEAD_BYTES + 4096;
        assert!(view.has(&(HEAD_BYTES..end)) && !view.has(&(HEAD_BYTES..end + 1)));
        assert!(
            !view.has(&(0..10))
                && !view.has(&Range {
                    start: end,
                    end: HEAD_BYTES
                })
        );
    }
}
