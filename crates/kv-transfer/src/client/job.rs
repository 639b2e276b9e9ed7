//! A transfer as its caller sees it: asked for, cancelled by dropping its guard, completed exactly once.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::link::Lease;
use super::memory::Buffer;
use crate::TransferError;
use crate::net::Socket;

/// What a transfer brought. Its memory counts against the client's budget until it is dropped.
#[derive(Debug)]
pub struct Pulled {
    /// First block, counted from the first of the lease.
    pub first_block: u32,
    /// Blocks that are here, each with every layer: all, or the first of those asked for.
    pub n_blocks: u32,
    /// Why not all are here.
    pub shortfall: Option<TransferError>,
    /// Whether the callback will be called again, with the blocks that follow or the reason why they do not.
    pub more: bool,
    /// From when the blocks could be fetched until they were here.
    pub took: Duration,
    /// Of that, until the first of their bytes could come: waiting for a worker, memory, a connection and the producer's word.
    pub opening: Duration,
    /// Whether they were read out of the producer's memory rather than sent.
    pub is_shared: bool,
    pub(super) buffer: Buffer,
}

impl Pulled {
    /// The blocks in the canonical order of [`KvLayout`](baton_kv::KvLayout), every byte verified.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.buffer
    }
}

/// Takes what a transfer brings, part by part; a result without [`more`](Pulled::more), or an error, is the last.
pub type PulledCallback = Box<dyn FnMut(Result<Pulled, TransferError>) + Send>;

/// Calls back with exactly one last result, whatever happens to the thread that should.
///
/// The lock is never contended; it lets the threads of a transfer share what surrounds it.
pub(super) struct Completion(Mutex<Option<PulledCallback>>);

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Completion")
    }
}

impl Completion {
    pub(super) fn new(done: PulledCallback) -> Self {
        Self(Mutex::new(Some(done)))
    }

    fn call(&mut self, result: Result<Pulled, TransferError>) {
        let is_last = !result.as_ref().is_ok_and(|pulled| pulled.more);
        let Some(mut done) = self.0.get_mut().take() else {
            return;
        };
        // A callback that panics must not take a worker with it.
        if catch_unwind(AssertUnwindSafe(|| done(result))).is_err() {
            tracing::error!("the callback of a transfer panicked");
        } else if !is_last {
            *self.0.get_mut() = Some(done);
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.call(Err(TransferError::Closed));
    }
}

/// Cancels a transfer when dropped.
#[derive(Debug)]
#[must_use = "dropping the guard cancels the transfer"]
pub struct PullGuard {
    cancel: Arc<Cancel>,
}

impl Drop for PullGuard {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// Carries the wish to stop to the threads of a transfer, which may be blocked on their sockets.
#[derive(Debug, Default)]
pub(super) struct Cancel {
    is_cancelled: AtomicBool,
    /// By the number of the data connection.
    sockets: Mutex<BTreeMap<u16, Arc<Socket>>>,
}

impl Cancel {
    pub(super) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::SeqCst)
    }

    fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::SeqCst);
        self.sockets.lock().values().for_each(|s| s.hang_up());
    }

    /// From now on cancelling hangs up on the data connection; until [`disarm`](Self::disarm).
    pub(super) fn arm(&self, number: u16, socket: Arc<Socket>) {
        let mut armed = self.sockets.lock();
        if self.is_cancelled() {
            socket.hang_up();
        }
        armed.insert(number, socket);
    }

    /// The data connection goes back to common use. Returns false if it was hung up on.
    pub(super) fn disarm(&self, number: u16) -> bool {
        self.sockets.lock().remove(&number);
        !self.is_cancelled()
    }
}

/// A transfer that was asked for.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) lease: Arc<Lease>,
    /// What is still to be fetched.
    pub(super) blocks: Range<u32>,
    /// Blocks of the lease that are there, of the consumer's size, as far as is known.
    pub(super) n_ready: u32,
    pub(super) cancel: Arc<Cancel>,
    /// The total time limit counts from here.
    pub(super) asked: Instant,
    done: Completion,
}

impl Job {
    pub(super) fn new(
        lease: Arc<Lease>,
        blocks: Range<u32>,
        done: Completion,
    ) -> (Self, PullGuard) {
        let cancel = Arc::<Cancel>::default();
        let guard = PullGuard {
            cancel: Arc::clone(&cancel),
        };
        let n_ready = if lease.is_early { 0 } else { lease.n_blocks };
        (
            Self {
                lease,
                blocks,
                n_ready,
                cancel,
                asked: Instant::now(),
                done,
            },
            guard,
        )
    }

    /// What can be fetched now, perhaps nothing.
    pub(super) fn available(&self) -> Range<u32> {
        self.blocks.start..self.blocks.end.min(self.n_ready)
    }

    /// Hands over some of the blocks; the rest is fetched as if it had been asked for now.
    pub(super) fn part(&mut self, pulled: Pulled) {
        self.blocks.start += pulled.n_blocks;
        self.asked = Instant::now();
        self.done.call(Ok(pulled));
    }

    /// Lets go of the lease before it says so: who is told that it is over may ask at once for another of the same number.
    pub(super) fn finish(self, result: Result<Pulled, TransferError>) {
        let Self {
            lease, mut done, ..
        } = self;
        drop(lease);
        done.call(result);
    }
}
