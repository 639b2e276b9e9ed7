//! Host memory aligned so that devices can use it as it lies.

use crate::Element;
use crate::dtype::{as_bytes, as_bytes_mut};
use std::alloc::{self, Layout};
use std::ptr::NonNull;

/// Zeroed bytes on the host, aligned to 64: what XLA's CPU backend asks of memory that it uses in place.
pub struct HostMemory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its bytes, as a `Vec<u8>` does.
unsafe impl Send for HostMemory {}
// SAFETY: as for `Send`; shared access only reads.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Alignment in bytes.
    pub const ALIGN: usize = 64;

    /// `len` zero bytes. Aborts, as `Vec` does, if there is no memory.
    ///
    /// # Panics
    /// If `len` is over half the address space.
    pub fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        if len == 0 {
            return Self {
                start: NonNull::<Aligned>::dangling().cast(),
                len,
            };
        }
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc::alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| alloc::handle_alloc_error(layout));
        Self { start, len }
    }

    /// A copy of numbers.
    pub fn from_slice<T: Element>(values: &[T]) -> Self {
        let mut memory = Self::zeroed(size_of_val(values));
        memory.as_mut().copy_from_slice(as_bytes(values));
        memory
    }

    /// The bytes as numbers; a rest shorter than one number is left out.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        // SAFETY: the start is aligned for every `Element`, of which every pattern of bytes is a value, and
        // `len / size_of` of them lie within the bytes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / size_of::<T>()) }
    }

    /// The bytes as numbers to be overwritten; a rest shorter than one number is left out.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        // SAFETY: as for `as_slice`; the borrow is exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len / size_of::<T>())
        }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, Self::ALIGN).expect("the size fits in the address space")
    }
}

/// Lends its alignment to the address of no bytes.
#[repr(align(64))]
struct Aligned;

impl AsRef<[u8]> for HostMemory {
    fn as_ref(&self) -> &[u8] {
        as_bytes(self.as_slice::<u8>())
    }
}

impl AsMut<[u8]> for HostMemory {
    fn as_mut(&mut self) -> &mut [u8] {
        as_bytes_mut(self.as_mut_slice::<u8>())
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: it was allocated with this layout.
            unsafe { alloc::dealloc(self.start.as_ptr(), Self::layout(self.len)) };
        }
    }
}
