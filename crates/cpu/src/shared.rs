//! Memory that the members of a team write together, each its own part.
#![expect(
    unsafe_code,
    reason = "columns of one row go to different threads, which slices cannot say"
)]

use memmap2::{Advice, MmapMut};
use std::ops::Range;
use std::ptr::NonNull;

/// Numbers for which zero bytes mean zero.
pub(crate) trait Plain: Copy + Send + Sync + 'static {}

impl Plain for f32 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u8 {}
impl Plain for i8 {}

/// From here on a buffer asks for pages of 2 MB.
const LARGE: usize = 8 << 20;

/// A fixed number of elements, zero at first, aligned to a page. Pages that nobody wrote take no memory.
pub(crate) struct Shared<T> {
    start: NonNull<T>,
    len: usize,
    /// Keeps the memory.
    _map: MmapMut,
}

// SAFETY: it owns plain numbers; who reads and writes which of them when is the callers' promise.
unsafe impl<T: Plain> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Shared<T> {}

impl<T: Plain> Shared<T> {
    /// So many zeros.
    ///
    /// # Panics
    /// If the system has not so much memory to promise.
    pub(crate) fn zeroed(len: usize) -> Self {
        let bytes = len
            .checked_mul(size_of::<T>())
            .expect("buffers are far smaller than the address space");
        // A map of nothing is refused.
        let mut map = MmapMut::map_anon(bytes.max(1)).expect("the system has memory to promise");
        if bytes >= LARGE {
            // Long reads are quicker through large pages; where there are none, nothing is lost.
            drop(map.advise(Advice::HugePage));
        }
        let start = NonNull::from(&mut map[..]).cast();
        Self {
            start,
            len,
            _map: map,
        }
    }

    /// Number of elements.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Reads a part.
    ///
    /// # Safety
    /// Nobody writes any of it as long as the slice lives.
    #[inline(always)]
    pub(crate) unsafe fn get(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds and initialized; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(range.start), range.len()) }
    }

    /// Writes a part.
    ///
    /// # Safety
    /// Nobody else reads or writes any of it as long as the slice lives.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts differ")]
    pub(crate) unsafe fn get_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds and initialized; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(range.start), range.len()) }
    }

    /// All of it, for whoever has it alone.
    pub(crate) fn all(&mut self) -> &mut [T] {
        // SAFETY: `&mut self` means that nobody else has a part.
        unsafe { self.get_mut(0..self.len) }
    }
}
