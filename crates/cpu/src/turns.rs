//! Servers that share a machine take turns.
//!
//! A prefill server computes for as long as it likes, and two servers' threads on the same processors would hold each other
//! up at every meeting. So a decode server says in a small shared file when it is in a step, and prefill servers rest
//! meanwhile; after a step it leaves them a share of the time that the step took, if they have work. Whoever dies, hangs or
//! lies costs the others a bounded wait.
#![expect(
    unsafe_code,
    reason = "two numbers in a file that other processes map as well"
)]

use memmap2::MmapMut;
use std::fs::File;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
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
    /// Two [`AtomicU64`], see [`Turns::word`].
    page: MmapMut,
    /// When the next step may begin.
    rest: Mutex<Option<Instant>>,
}

/// What a step leaves to those who give way, as a share of its own time.
const SHARE: f64 = 0.35;
/// No step is taken to last longer, whatever its server says.
const LONGEST: Duration = Duration::from_millis(50);
/// Who gave way so long goes on.
const PATIENCE: Duration = Duration::from_millis(20);
/// Between two looks at whether a step is over.
const LOOK: Duration = Duration::from_micros(150);
/// Work that was last seen longer ago is over.
const RECENT: Duration = Duration::from_millis(20);

/// Until when a step is under way, in nanoseconds since 1970; 0 for none.
const BUSY: usize = 0;
/// When somebody who gives way last had work.
const WANTED: usize = 1;

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
            rest: Mutex::default(),
        })
    }

    fn word(&self, i: usize) -> &AtomicU64 {
        let word = self.page.as_ptr().cast_mut().cast::<u64>().wrapping_add(i);
        // SAFETY: a page begins at a multiple of 8 and has far more than two words; all processes use atomics only.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// A step begins: those who come first wait out what the last one left to others.
    pub(crate) fn begin(&self) {
        if self.side == Side::GivesWay {
            return;
        }
        let rest = self
            .rest
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(left) = rest.and_then(|until| until.checked_duration_since(Instant::now())) {
            std::thread::sleep(left);
        }
        let until = now() + nanoseconds(LONGEST);
        self.word(BUSY).store(until, Ordering::Relaxed);
    }

    /// The step is over, and took so long.
    pub(crate) fn end(&self, took: Duration) {
        if self.side == Side::GivesWay {
            return;
        }
        self.word(BUSY).store(0, Ordering::Relaxed);
        let wanted = self.word(WANTED).load(Ordering::Relaxed);
        if now().saturating_sub(wanted) < nanoseconds(RECENT) {
            let rest = Instant::now() + took.min(LONGEST).mul_f64(SHARE);
            *self.rest.lock().unwrap_or_else(PoisonError::into_inner) = Some(rest);
        }
    }

    /// Waits while somebody else's step is under way.
    pub(crate) fn give_way(&self) {
        if self.side == Side::First {
            return;
        }
        let start = now();
        self.word(WANTED).store(start, Ordering::Relaxed);
        let deadline = start + nanoseconds(PATIENCE);
        let mut at = start;
        while at < self.word(BUSY).load(Ordering::Relaxed) && (start..deadline).contains(&at) {
            std::thread::sleep(LOOK);
            at = now();
        }
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
    fn time_is_left_only_to_those_who_have_work() {
        let (first, second) = pair("rest");
        let rests = || first.rest.lock().unwrap().is_some();
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
