//! Transfers that wait for a worker: bounded in number, and in time. One that is cancelled or late leaves the
//! queue at once, however busy the workers are.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::job::Job;
use crate::TransferError;

/// How often waiting transfers are looked through.
const SWEEP_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(super) struct Queue {
    limit: usize,
    /// How long a transfer may wait.
    patience: Duration,
    state: Mutex<State>,
    /// Wakes a worker.
    work: Condvar,
    /// Wakes whoever looks through what waits.
    delay: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    /// Workers with nothing to do, some of which may have been woken already.
    idle: usize,
    is_closed: bool,
}

impl Queue {
    pub(super) fn new(limit: usize, patience: Duration) -> Self {
        Self {
            limit,
            patience,
            state: Mutex::default(),
            work: Condvar::new(),
            delay: Condvar::new(),
        }
    }

    /// Queues a transfer, or completes it with the reason why not.
    pub(super) fn push(&self, job: Job) {
        let mut state = self.state.lock();
        let refused = if state.is_closed {
            TransferError::Closed
        } else if state.waiting.len() >= self.limit {
            TransferError::Busy {
                what: "queued transfers",
            }
        } else {
            state.waiting.push_back(job);
            let must_wait = state.waiting.len() > state.idle;
            drop(state);
            self.work.notify_one();
            if must_wait {
                self.delay.notify_one();
            }
            return;
        };
        drop(state);
        job.finish(Err(refused));
    }

    /// The next transfer to run; `None` when the client stops.
    pub(super) fn pop(&self) -> Option<Job> {
        let mut state = self.state.lock();
        while !state.is_closed {
            if let Some(job) = state.waiting.pop_front() {
                return Some(job);
            }
            state.idle += 1;
            self.work.wait(&mut state);
            state.idle -= 1;
        }
        None
    }

    /// Completes what is cancelled or late, until the queue is closed.
    pub(super) fn sweep(&self) {
        loop {
            let mut state = self.state.lock();
            if state.is_closed {
                return;
            }
            let now = Instant::now();
            let over: Vec<Job> = state.take_if(|job| self.end(job, now).is_some());
            if !over.is_empty() {
                drop(state);
                over.into_iter().for_each(|job| {
                    let why = self.end(&job, now).unwrap_or(TransferError::Cancelled);
                    job.finish(Err(why));
                });
            } else if state.waiting.is_empty() {
                self.delay.wait(&mut state);
            } else {
                self.delay.wait_for(&mut state, SWEEP_PAUSE);
            }
        }
    }

    fn end(&self, job: &Job, now: Instant) -> Option<TransferError> {
        if job.cancel.is_cancelled() {
            return Some(TransferError::Cancelled);
        }
        let after = now.saturating_duration_since(job.asked);
        let what = "waiting for a worker";
        (after >= self.patience).then_some(TransferError::TimedOut { what, after })
    }

    /// Nothing gets in or out from now on; completes what waits.
    pub(super) fn close(&self) {
        let waiting = {
            let mut state = self.state.lock();
            state.is_closed = true;
            std::mem::take(&mut state.waiting)
        };
        self.work.notify_all();
        self.delay.notify_all();
        waiting
            .into_iter()
            .for_each(|job| job.finish(Err(TransferError::Closed)));
    }
}

impl State {
    fn take_if(&mut self, is_over: impl Fn(&Job) -> bool) -> Vec<Job> {
        if !self.waiting.iter().any(&is_over) {
            return Vec::new();
        }
        let (over, waiting) = self.waiting.drain(..).partition(is_over);
        self.waiting = waiting;
        over.into()
    }
}
