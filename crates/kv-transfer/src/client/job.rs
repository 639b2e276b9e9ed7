//! A transfer as its caller sees it: asked for, cancelled by dropping its guard, completed exactly once.

use std::fmt;
use std::net::TcpStream;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

use super::link::Lease;
use super::memory::Buffer;
use crate::TransferError;
use crate::net::hang_up;

/// What a transfer brought. Its memory counts against the client's budget until it is dropped.
#[derive(Debug)]
pub struct Pulled {
    /// First block, counted from the first of the lease.
    pub first_block: u32,
    /// Blocks that are here, each with every layer: all, or the first of those asked for.
    pub n_blocks: u32,
    /// Why not all are here.
    pub shortfall: Option<TransferError>,
    pub(super) buffer: Buffer,
}

impl Pulled {
    /// The blocks in the canonical order of [`KvLayout`](baton_kv::KvLayout), every byte verified.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.buffer
    }
}

/// Takes the result of a transfer.
pub type PulledCallback = Box<dyn FnOnce(Result<Pulled, TransferError>) + Send>;

/// Calls back exactly once, whatever happens to the thread that should.
pub(super) struct Completion(Option<PulledCallback>);

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Completion")
    }
}

impl Completion {
    pub(super) fn new(done: PulledCallback) -> Self {
        Self(Some(done))
    }

    fn call(&mut self, result: Result<Pulled, TransferError>) {
        let Some(done) = self.0.take() else { return };
        // A callback that panics must not take a worker with it.
        if catch_unwind(AssertUnwindSafe(|| done(result))).is_err() {
            tracing::error!("the callback of a transfer panicked");
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

/// Carries the wish to stop to a worker, which may be blocked on its socket.
#[derive(Debug, Default)]
pub(super) struct Cancel {
    is_cancelled: AtomicBool,
    socket: Mutex<Option<TcpStream>>,
}

impl Cancel {
    pub(super) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::SeqCst)
    }

    fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::SeqCst);
        if let Some(socket) = &*self.socket.lock() {
            hang_up(socket);
        }
    }

    /// From now on cancelling hangs up on `socket`; until [`disarm`](Self::disarm).
    pub(super) fn arm(&self, socket: TcpStream) {
        let mut armed = self.socket.lock();
        if self.is_cancelled() {
            hang_up(&socket);
        }
        *armed = Some(socket);
    }

    /// The socket goes back to common use. Returns false if it was hung up on.
    pub(super) fn disarm(&self) -> bool {
        *self.socket.lock() = None;
        !self.is_cancelled()
    }
}

/// A transfer that was asked for.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) lease: Arc<Lease>,
    pub(super) blocks: Range<u32>,
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
        (
            Self {
                lease,
                blocks,
                cancel,
                asked: Instant::now(),
                done,
            },
            guard,
        )
    }

    pub(super) fn finish(mut self, result: Result<Pulled, TransferError>) {
        self.done.call(result);
    }
}
