//! Servers that share a machine take turns.
//!
//! A prefill server computes for as long as it likes, and two servers' threads on the same processors would hold each other
//! up at every meeting. So a decode server says in a small shared file when it is in a step, and prefill servers rest
//! meanwhile; after a step it leaves them a share of the time that the step took, if they have work, and says when the
//! next begins: they are off the processors by then, for whom the system would otherwise let go on for milliseconds.
//! Whoever dies, hangs or lies costs the others a bounded wait.
#![expect(
    unsafe_code,
    reason = "two numbers in a file that other processes map as well"
)]

use memmap2::MmapMut;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Which turns a server takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its steps come first.
    First,
    /// It rests while others are in a step.
    GivesWay,
}

/// A server's place at the shared file.
pub struct Turns {
    side: Side,
    /// [`AtomicU64`]s, see [`Turns::word`].
    page: MmapMut,
    last: Mutex<Last>,
}

/// The last step, for whose side is first.
#[derive(Default)]
struct Last {
    took: Duration,
    /// When the next step may begin.
    rest: Option<Instant>,
}

/// What a step leaves to those who give way, as a share of its own time.
const SHARE: f64 = 0.15;
/// No step is taken to last longer, whatever its server says.
const LONGEST: Duration = Duration::from_millis(50);
/// Who gave way so long goes on.
const PATIENCE: Duration = Duration::from_millis(20);
/// Between two looks at whether a step is over.
const LOOK: Duration = Duration::from_micros(150);
/// How late a step may be that was announced.
const GRACE: Duration = Duration::from_millis(1);
/// Work that was last seen longer ago is over.
const RECENT: Duration = Duration::from_millis(20);

/// Until when a step may be under way; 0 for none. All words are nanoseconds since 1970.
const BUSY: usize = 0;
/// When somebody who gives way last had work.
const WANTED: usize = 1;
/// When the step under way is likely to end.
const LIKELY: usize = 2;
/// When the next step begins; 0 if that is not known.
const NEXT: usize = 3;

/// What those who give way read.
#[derive(Clone, Copy, Debug)]
struct Timetable {
    busy: u64,
    likely: u64,
    next: u64,
}

impl Timetable {
    /// How long to sleep at `now` before looking again; `None`: go on.
    fn pause(&self, now: u64) -> Option<Duration> {
        if now < self.busy {
            let left = Duration::from_nanos(self.likely.saturating_sub(now));
            return Some(left.clamp(LOOK, PATIENCE));
        }
        let late = now.checked_sub(self.next)?;
        (late < nanoseconds(GRACE)).then_some(LOOK)
    }
}

impl Turns {
    /// Opens the file, which is made if it is not there.
    ///
    /// # Errors
    /// It cannot be opened or mapped.
    pub fn open(path: &Path, side: Side) -> std::io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        file.set_len(4096)?;
        // SAFETY: the file never shrinks, its words are only touched as atomics, and any value of them is fine.
        let page = unsafe { MmapMut::map_mut(&file) }?;
        Ok(Self {
            side,
            page,
            last: Mutex::default(),
        })
    }

    fn word(&self, i: usize) -> &AtomicU64 {
        let word = self.page.as_ptr().cast_mut().cast::<u64>().wrapping_add(i);
        // SAFETY: a page begins at a multiple of 8 and has more words than are used; all processes use atomics only.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// A step begins: those who come first wait out what the last one left to others.
    pub(crate) fn begin(&self) {
        if self.side == Side::GivesWay {
            return;
        }
        let mut last = self.last();
        if let Some(until) = last.rest.take() {
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
        let now = now();
        self.set(LIKELY, now + nanoseconds(last.took));
        self.set(BUSY, now + nanoseconds(LONGEST));
    }

    /// The step is over, and took so long.
    pub(crate) fn end(&self, took: Duration) {
        if self.side == Side::GivesWay {
            return;
        }
        let took = took.min(LONGEST);
        let now = now();
        let is_wanted = now.saturating_sub(self.get(WANTED)) < nanoseconds(RECENT);
        let rest = is_wanted.then(|| took.mul_f64(SHARE));
        self.set(NEXT, rest.map_or(0, |rest| now + nanoseconds(rest)));
        self.set(BUSY, 0);
        *self.last() = Last {
            took,
            rest: rest.map(|rest| Instant::now() + rest),
        };
    }

    /// Waits while somebody else's step is under way or about to begin.
    pub(crate) fn give_way(&self) {
        if self.side == Side::First {
            return;
        }
        let start = now();
        self.set(WANTED, start);
        let deadline = start + nanoseconds(PATIENCE);
        let mut at = start;
        while let Some(pause) = self.timetable().pause(at)
            && (start..deadline).contains(&at)
        {
            std::thread::sleep(pause);
            at = now();
        }
    }

    fn timetable(&self) -> Timetable {
        Timetable {
            busy: self.get(BUSY),
            likely: self.get(LIKELY),
            next: self.get(NEXT),
        }
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, word: usize) -> u64 {
        self.word(word).load(Ordering::Relaxed)
    }

    fn set(&self, word: usize, value: u64) {
        self.word(word).store(value, Ordering::Relaxed);
    }
}

/// Nanoseconds since 1970, the same in all processes. Should the clock jump, a wait ends.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, nanoseconds)
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str) -> (Turns, Turns) {
        let path = std::env::temp_dir().join(format!("baton-turns-{name}-{}", std::process::id()));
        let open = |side| Turns::open(&path, side).unwrap();
        let pair = (open(Side::First), open(Side::GivesWay));
        std::fs::remove_file(path).unwrap();
        pair
    }

    #[test]
    fn those_who_give_way_wait_for_the_end_of_a_step() {
        let (first, second) = pair("wait");
        second.give_way();
        first.begin();
        let ended = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let (ended, second) = (&ended, &second);
            let waiting = scope.spawn(move || {
                second.give_way();
                ended.load(Ordering::SeqCst)
            });
            // However long this thread takes: who waits does not come back before, unless its patience ends.
            ended.store(1, Ordering::SeqCst);
            first.end(Duration::ZERO);
            assert!(waiting.join().unwrap() <= 1);
        });
        assert_eq!(first.word(BUSY).load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_server_that_never_ends_its_step_is_not_waited_for_for_ever() {
        let (first, second) = pair("dead");
        first.begin();
        drop(first);
        second.give_way();
        second.word(BUSY).store(u64::MAX, Ordering::Relaxed);
        second.give_way();
    }

    #[test]
    fn a_pause_lasts_until_the_likely_end_and_covers_the_beginning_of_the_next_step() {
        let table = Timetable {
            busy: 60_000_000,
            likely: 5_000_000,
            next: 100_000_000,
        };
        assert_eq!(table.pause(1_000_000), Some(Duration::from_millis(4)));
        assert_eq!(table.pause(5_000_000), Some(LOOK));
        assert_eq!(table.pause(60_000_000), None);
        assert_eq!(table.pause(99_999_999), None);
        assert_eq!(table.pause(100_000_000), Some(LOOK));
        assert_eq!(table.pause(100_000_000 + nanoseconds(GRACE)), None);
        let endless = Timetable {
            likely: u64::MAX,
            ..table
        };
        assert_eq!(endless.pause(0), Some(PATIENCE));
    }

    #[test]
    fn time_is_left_only_to_those_who_have_work() {
        let (first, second) = pair("rest");
        let rests = || first.last().rest.is_some();
        first.begin();
        first.end(Duration::from_millis(4));
        assert!(!rests());
        second.give_way();
        first.begin();
        first.end(Duration::from_millis(4));
        assert!(rests());
        first.begin();
        assert!(!rests());
    }
}
