//! The threads of a process that compute together.
//!
//! A step is one piece of work that all members run from beginning to end; where its parts depend on each other they
//! meet. Members that wait spin for a moment, then give their turn away, then sleep: nothing spins while idle.

use crate::turns::Turns;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Looks before a waiting thread gives its turn away; ten microseconds or so, which is about as long as members differ in
/// a section of one token. Members may well share a processor with each other or with another server's, and then whoever
/// looks on keeps the one it waits for from running.
const SPINS: u32 = 1000;
/// Turns given away before it sleeps; half a millisecond if nobody takes them.
const YIELDS: u32 = 1000;

/// Threads that compute together. The thread that owns it is one of them.
pub(crate) struct Team {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

/// One thread's view of the work.
pub(crate) struct Member<'a> {
    /// Which of the threads this is; 0 owns the team.
    pub(crate) index: usize,
    state: &'a State,
}

/// What all members see. What they write lies apart: who takes a part must not wait for those who look at a signal.
struct State {
    n: usize,
    /// Rises with every piece of work, and once more at the end.
    work: Apart<Signal>,
    /// Rises with every meeting.
    met: Apart<Signal>,
    /// Rises when all have left a piece of work.
    done: Apart<Signal>,
    /// Members at the current meeting.
    arrived: Apart<AtomicUsize>,
    /// Members that left the current work.
    left: Apart<AtomicUsize>,
    /// The next part of the current section that is nobody's yet: each member has the one of its own number.
    next: Apart<AtomicUsize>,
    job: AtomicPtr<Job<'static>>,
    turns: Option<Turns>,
    ended: AtomicBool,
    failed: AtomicBool,
}

/// Alone on its two cache lines, which processors fetch in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Apart<T>(T);

impl<T> Deref for Apart<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// A piece of work behind one pointer.
struct Job<'a>(&'a (dyn Fn(&Member<'_>) + Sync));

impl Team {
    /// So many threads, the caller's included; at least one. They take turns with other processes' if told how.
    ///
    /// # Errors
    /// The system gives no more threads.
    pub(crate) fn new(n: usize, turns: Option<Turns>) -> std::io::Result<Self> {
        let n = n.max(1);
        let state = Arc::new(State {
            n,
            work: Apart::default(),
            met: Apart::default(),
            done: Apart::default(),
            arrived: Apart::default(),
            left: Apart::default(),
            next: Apart::default(),
            job: AtomicPtr::new(std::ptr::null_mut()),
            turns,
            ended: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        });
        let mut team = Self {
            state: Arc::clone(&state),
            threads: Vec::with_capacity(n - 1),
        };
        for index in 1..n {
            let state = Arc::clone(&state);
            let thread = std::thread::Builder::new().name(format!("compute-{index}"));
            team.threads
                .push(thread.spawn(move || serve(&state, index))?);
        }
        Ok(team)
    }

    /// Number of threads.
    pub(crate) fn len(&self) -> usize {
        self.state.n
    }

    /// Runs `work` on every thread and waits for all.
    ///
    /// # Panics
    /// If it panics on any of them.
    #[expect(
        unsafe_code,
        reason = "the job outlives the work, which the borrow checker cannot see"
    )]
    pub(crate) fn run(&mut self, work: &(dyn Fn(&Member<'_>) + Sync)) {
        let state = &*self.state;
        state.arrived.store(0, Ordering::Relaxed);
        state.left.store(0, Ordering::Relaxed);
        state.next.store(state.n, Ordering::Relaxed);
        state.failed.store(false, Ordering::Relaxed);
        let done = state.done.now();
        if let Some(turns) = &state.turns {
            turns.begin();
        }
        let start = Instant::now();
        let job = Job(work);
        // SAFETY: only the lifetime changes. Members use the job between the signal and their leaving, and this
        // function does not return, not even by a panic, before all have left.
        let job: *mut Job<'static> = unsafe { std::mem::transmute(&raw const job) };
        state.job.store(job, Ordering::Release);
        state.work.raise();
        state.take_part(0);
        state.done.wait_past(done);
        if let Some(turns) = &state.turns {
            turns.end(start.elapsed());
        }
        assert!(
            !state.failed.load(Ordering::Acquire),
            "a compute thread panicked"
        );
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Release);
        self.state.work.raise();
        for thread in self.threads.drain(..) {
            // A member's panic was already reported by `run`.
            drop(thread.join());
        }
    }
}

fn serve(state: &State, index: usize) {
    let mut seen = 0;
    loop {
        seen = state.work.wait_past(seen);
        if state.ended.load(Ordering::Acquire) {
            return;
        }
        state.take_part(index);
    }
}

impl State {
    fn check(&self) {
        assert!(
            !self.failed.load(Ordering::Acquire),
            "another compute thread panicked"
        );
    }

    /// Runs the job as one member.
    #[expect(unsafe_code, reason = "see Team::run")]
    fn take_part(&self, index: usize) {
        let member = Member { index, state: self };
        // SAFETY: `Team::run` stored it before the signal and keeps it until all members have left, below.
        let job = unsafe { &*self.job.load(Ordering::Acquire) };
        if catch_unwind(AssertUnwindSafe(|| (job.0)(&member))).is_err() {
            // Those who wait for this member must not wait for ever.
            self.failed.store(true, Ordering::Release);
            self.met.raise();
        }
        if self.left.fetch_add(1, Ordering::AcqRel) + 1 == self.n {
            self.done.raise();
        }
    }
}

impl Member<'_> {
    /// Number of threads.
    pub(crate) fn team_len(&self) -> usize {
        self.state.n
    }

    /// Runs `part` for each of `0..n` once, on whichever member is free; returns when none is left to begin. Every member
    /// must come here, with the same `n`, and meet the others before it goes on.
    pub(crate) fn share(&self, n: usize, mut part: impl FnMut(usize)) {
        let mut i = self.index;
        while i < n {
            if let Some(turns) = &self.state.turns {
                turns.give_way();
            }
            part(i);
            i = self.state.next.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until every member has come here. What they wrote before is seen by all after.
    pub(crate) fn meet(&self) {
        self.meet_after(|| ());
    }

    /// As [`meet`](Self::meet); who comes last does `rest` before anyone goes on.
    pub(crate) fn meet_after(&self, rest: impl FnOnce()) {
        let state = self.state;
        let seen = state.met.now();
        // Who fails raises the signal after the flag: whoever looks at the flag too early is woken by the signal.
        state.check();
        if state.arrived.fetch_add(1, Ordering::AcqRel) + 1 == state.n {
            rest();
            state.arrived.store(0, Ordering::Relaxed);
            state.next.store(state.n, Ordering::Relaxed);
            state.met.raise();
        } else {
            state.met.wait_past(seen);
        }
        state.check();
    }
}

/// A number that only rises, and that can be waited for.
#[derive(Default)]
struct Signal {
    value: AtomicUsize,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    risen: Condvar,
}

impl Signal {
    fn now(&self) -> usize {
        self.value.load(Ordering::Acquire)
    }

    fn raise(&self) {
        self.value.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.risen.notify_all();
        }
    }

    /// Waits until the value is not `seen` any more, and returns it.
    fn wait_past(&self, seen: usize) -> usize {
        for look in 0..SPINS + YIELDS {
            let now = self.now();
            if now != seen {
                return now;
            }
            if look < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        self.sleep_past(seen)
    }

    #[cold]
    fn sleep_past(&self, seen: usize) -> usize {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.value.load(Ordering::SeqCst) == seen {
            guard = self
                .risen
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(guard);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        self.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_done_once_and_before_anyone_goes_on() {
        for n in [1, 2, 3, 5] {
            let mut team = Team::new(n, None).unwrap();
            let done: Vec<AtomicUsize> = (0..50).map(|_| AtomicUsize::new(0)).collect();
            for round in 1..200 {
                team.run(&|member| {
                    for _ in 0..3 {
                        member.share(done.len(), |i| {
                            done[i].fetch_add(1, Ordering::Relaxed);
                        });
                        member.meet();
                        let sum: usize = done.iter().map(|d| d.load(Ordering::Relaxed)).sum();
                        member.meet();
                        assert_eq!(sum % done.len(), 0);
                    }
                });
                assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 3 * round));
            }
        }
    }

    #[test]
    fn who_comes_last_does_the_rest_before_anyone_goes_on() {
        for n in [1, 2, 3] {
            let mut team = Team::new(n, None).unwrap();
            let (before, rest) = (AtomicUsize::new(0), AtomicUsize::new(0));
            team.run(&|member| {
                for round in 1..200 {
                    before.fetch_add(1, Ordering::Relaxed);
                    member.meet_after(|| {
                        assert_eq!(before.load(Ordering::Relaxed), n * round);
                        rest.fetch_add(1, Ordering::Relaxed);
                    });
                    assert_eq!(rest.load(Ordering::Relaxed), round);
                    member.meet();
                }
            });
        }
    }

    #[test]
    fn a_panic_on_one_thread_reaches_the_owner_and_the_team_lives_on() {
        for bad in 0..3 {
            let mut team = Team::new(3, None).unwrap();
            let failed = catch_unwind(AssertUnwindSafe(|| {
                team.run(&|member| {
                    assert_ne!(member.index, bad, "on purpose");
                    std::thread::yield_now();
                    member.meet();
                });
            }));
            assert!(failed.is_err());
            let sum = AtomicUsize::new(0);
            team.run(&|member| {
                member.share(9, |i| {
                    sum.fetch_add(i, Ordering::Relaxed);
                });
                member.meet();
            });
            assert_eq!(sum.load(Ordering::Relaxed), 36);
        }
    }
}
