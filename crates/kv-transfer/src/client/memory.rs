//! Host memory for transfers, and its bound. A buffer counts from its lending to its return; a few returned ones
//! are kept, because fresh memory costs a page fault every 4 KiB, as much as the transfer itself.

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::MmapMut;
use parking_lot::{Condvar, Mutex};

use crate::TransferError;

/// How often a wait looks whether it was cancelled.
const CANCEL_CHECK: Duration = Duration::from_millis(50);
/// Buffers kept for the next transfer; together with those lent they stay within the limit.
const MAX_IDLE: usize = 4;

/// The bound, and what is in use of it.
#[derive(Debug)]
pub(super) struct Memory {
    limit: usize,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lent: usize,
    idle: Vec<MmapMut>,
}

impl State {
    /// A buffer of at least `bytes`, if the limit allows it.
    fn take(&mut self, bytes: usize, limit: usize) -> Option<MmapMut> {
        let room = limit.checked_sub(self.lent)?;
        // A much larger one would charge the transfer for what it does not use.
        let suits = |b: &MmapMut| (bytes..=bytes.saturating_mul(2).min(room)).contains(&b.len());
        if let Some(i) = self.idle.iter().position(suits) {
            let buffer = self.idle.swap_remove(i);
            self.lent += buffer.len();
            return Some(buffer);
        }
        if bytes > room {
            return None;
        }
        while self.idle.iter().map(|b| b.len()).sum::<usize>() > room - bytes {
            self.idle.pop();
        }
        let buffer = fresh(bytes).ok()?;
        self.lent += bytes;
        Some(buffer)
    }
}

/// Memory in large pages, if the system has them: bytes get there faster, and the first ones much faster.
fn fresh(bytes: usize) -> io::Result<MmapMut> {
    let buffer = MmapMut::map_anon(bytes)?;
    #[cfg(target_os = "linux")]
    // Small pages do as well.
    let _ = buffer.advise(Advice::HugePage);
    Ok(buffer)
}

impl Memory {
    pub(super) fn new(limit: u64) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        Self {
            limit,
            state: Mutex::default(),
            returned: Condvar::new(),
        }
    }

    pub(super) fn used(&self) -> u64 {
        self.state.lock().lent as u64
    }

    /// Waits for a buffer of `bytes` until `deadline`, or until `stop` says why to give up.
    pub(super) fn lend(
        self: &Arc<Self>,
        bytes: usize,
        deadline: Instant,
        stop: impl Fn() -> Option<TransferError>,
    ) -> Result<Buffer, TransferError> {
        if bytes > self.limit {
            let budget = self.limit as u64;
            return Err(TransferError::TooLarge {
                bytes: bytes as u64,
                budget,
            });
        }
        let begun = Instant::now();
        let mut state = self.state.lock();
        loop {
            if let Some(error) = stop() {
                return Err(error);
            }
            if let Some(data) = state.take(bytes, self.limit) {
                return Ok(Buffer {
                    data: Some(data),
                    len: bytes,
                    memory: Arc::clone(self),
                });
            }
            if Instant::now() >= deadline {
                let after = begun.elapsed();
                return Err(TransferError::TimedOut {
                    what: "waiting for memory",
                    after,
                });
            }
            self.returned.wait_for(&mut state, CANCEL_CHECK);
        }
    }
}

/// Borrowed memory. What it holds before it is written is somebody else's KV.
#[derive(Debug)]
pub(super) struct Buffer {
    /// Until it is returned.
    data: Option<MmapMut>,
    len: usize,
    memory: Arc<Memory>,
}

impl Buffer {
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        self.data.as_mut().map_or(&mut [], |data| &mut data[..len])
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.data.as_ref().map_or(&[], |data| &data[..self.len])
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(data) = self.data.take() else {
            return;
        };
        let mut state = self.memory.state.lock();
        state.lent -= data.len();
        if state.idle.len() >= MAX_IDLE {
            state.idle.remove(0);
        }
        state.idle.push(data);
        drop(state);
        self.memory.returned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lend(memory: &Arc<Memory>, bytes: usize) -> Result<Buffer, TransferError> {
        memory.lend(bytes, Instant::now(), || None)
    }

    #[test]
    fn what_is_lent_and_kept_never_exceeds_the_limit() {
        let memory = Arc::new(Memory::new(100));
        let (a, b) = (lend(&memory, 60).unwrap(), lend(&memory, 40).unwrap());
        assert!(matches!(
            lend(&memory, 1),
            Err(TransferError::TimedOut { .. })
        ));
        drop((a, b));
        assert_eq!(memory.used(), 0);
        let all = lend(&memory, 100).unwrap();
        assert!(
            memory.state.lock().idle.is_empty(),
            "kept buffers make room"
        );
        drop(all);
        assert!(matches!(
            lend(&memory, 101),
            Err(TransferError::TooLarge { .. })
        ));
    }

    #[test]
    fn a_returned_buffer_is_lent_again_for_a_similar_length() {
        let memory = Arc::new(Memory::new(1000));
        drop(lend(&memory, 100).unwrap());
        let again = lend(&memory, 60).unwrap();
        assert_eq!((again.len(), memory.used()), (60, 100));
        drop(again);
        let small = lend(&memory, 10).unwrap();
        assert_eq!((small.len(), memory.used()), (10, 10));
    }

    #[test]
    fn a_wait_ends_when_it_is_cancelled() {
        let memory = Arc::new(Memory::new(10));
        let _all = lend(&memory, 10).unwrap();
        let far = Instant::now() + Duration::from_secs(600);
        let cancelled = memory.lend(1, far, || Some(TransferError::Cancelled));
        assert_eq!(cancelled.unwrap_err(), TransferError::Cancelled);
    }
}
