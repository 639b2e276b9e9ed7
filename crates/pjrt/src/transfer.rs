//! Copies between host memory and arrays.
//!
//! Host memory is dense, the slowest dimension first. Invariant: memory that the plugin may still read or write is
//! either borrowed for a call that blocks until it is done, or owned by a callback that the plugin makes when it is
//! done; in no case can safe code free or touch it earlier.

use crate::client::ClientHandle;
use crate::dtype::{as_bytes, as_bytes_mut, host_size};
use crate::promise::{self, Receiver};
use crate::sys::host_buffer_semantics as semantics;
use crate::{Buffer, Client, DType, Device, Element, Error, Event, Memory, Result, sys};
use std::future::Future;
use std::pin::Pin;
use std::ptr;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Where an array goes.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// To a device's default memory.
    Device(&'a Device),
    /// To this memory.
    Memory(&'a Memory),
}

impl<'a> From<&'a Device> for Place<'a> {
    fn from(device: &'a Device) -> Self {
        Self::Device(device)
    }
}

impl<'a> From<&'a Memory> for Place<'a> {
    fn from(memory: &'a Memory) -> Self {
        Self::Memory(memory)
    }
}

impl Place<'_> {
    fn client(&self) -> &Arc<ClientHandle> {
        match self {
            Self::Device(device) => device.client(),
            Self::Memory(memory) => memory.client(),
        }
    }
}

/// How long an array may lean on the host memory it was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Until the copy to the device is done.
    UntilCopied,
    /// As long as the array lives: on CPUs the array is then the host memory itself, if that is aligned well
    /// enough (see [`HostMemory`](crate::HostMemory)). Elsewhere the same as `UntilCopied`.
    ZeroCopy,
}

impl Client {
    /// Makes an array from bytes, which are copied before this returns.
    ///
    /// # Errors
    /// The bytes are not as many as the array needs, or the device is out of memory.
    pub fn buffer_from_bytes<'a>(
        &self,
        bytes: &[u8],
        dtype: DType,
        dims: &[i64],
        place: impl Into<Place<'a>>,
    ) -> Result<Buffer> {
        let mut args = self.upload(bytes, dtype, dims, place.into())?;
        args.host_buffer_semantics = semantics::IMMUTABLE_ONLY_DURING_CALL;
        // SAFETY: `upload` filled in the pointers; bytes and dimensions outlive the call, which is all they must.
        unsafe { self.handle().api().call(&mut args) }?;
        // SAFETY: the call made a buffer and perhaps an event, both ours.
        let (buffer, _done) = unsafe { self.take_upload(&args) };
        Ok(buffer)
    }

    /// Makes an array from numbers, which are copied before this returns.
    ///
    /// # Errors
    /// As for [`Client::buffer_from_bytes`].
    pub fn buffer_from_slice<'a, T: Element>(
        &self,
        values: &[T],
        dims: &[i64],
        place: impl Into<Place<'a>>,
    ) -> Result<Buffer> {
        self.buffer_from_bytes(as_bytes(values), T::DTYPE, dims, place)
    }

    /// Makes an array from memory that it takes charge of: nothing is copied before this returns. `data` is dropped,
    /// on whatever thread, once the device is done with it.
    ///
    /// # Errors
    /// As for [`Client::buffer_from_bytes`].
    pub fn buffer_from_owned<'a, T: AsRef<[u8]> + Send + 'static>(
        &self,
        data: T,
        dtype: DType,
        dims: &[i64],
        place: impl Into<Place<'a>>,
        sharing: Sharing,
    ) -> Result<Buffer> {
        // Boxed, so that the bytes stay where they are even if `T` holds them inline; raw, because moving a `Box`
        // claims that nobody else looks at its contents; and asked for its bytes once only, so that they stay
        // borrowed until the box is given back.
        let data = Lent(Box::into_raw(Box::new(data)));
        // SAFETY: the pointer is to a live box that nobody writes.
        let bytes = unsafe { &*data.0 }.as_ref();
        let upload = self
            .upload(bytes, dtype, dims, place.into())
            .and_then(|mut args| {
                args.host_buffer_semantics = match sharing {
                    Sharing::UntilCopied => semantics::IMMUTABLE_UNTIL_TRANSFER_COMPLETES,
                    Sharing::ZeroCopy => semantics::IMMUTABLE_ZERO_COPY,
                };
                // SAFETY: `upload` filled in the pointers; the bytes live until `data` is given back, see below.
                unsafe { self.handle().api().call(&mut args) }.map(|()| args)
            });
        let args = match upload {
            Ok(args) => args,
            Err(error) => {
                // SAFETY: a refused call keeps no hold of the bytes.
                unsafe { data.give_back() };
                return Err(error);
            }
        };
        // SAFETY: the call made a buffer and perhaps an event, both ours.
        let (buffer, done) = unsafe { self.take_upload(&args) };
        let Some(done) = done else {
            return Err(Error::Malformed(
                "no event says when host memory is free again",
            ));
        };
        // SAFETY: the event says that the device is done with the bytes.
        match done.register(move |_| drop(unsafe { data.give_back() })) {
            Ok(()) => Ok(buffer),
            Err((error, give_back)) => {
                // Without a callback, wait here; an array that leans on the memory must go first.
                drop(buffer);
                give_back(done.wait());
                Err(error)
            }
        }
    }

    fn upload(
        &self,
        bytes: &[u8],
        dtype: DType,
        dims: &[i64],
        place: Place<'_>,
    ) -> Result<sys::ClientBufferFromHostBuffer> {
        if !Arc::ptr_eq(place.client(), self.handle()) {
            return Err(Error::Foreign("place"));
        }
        let needed = host_size(dtype, dims)?;
        if bytes.len() != needed {
            return Err(Error::HostSize {
                needed,
                got: bytes.len(),
            });
        }
        let (device, memory) = match place {
            Place::Device(device) => (device.raw(), ptr::null_mut()),
            Place::Memory(memory) => (ptr::null_mut(), memory.raw()),
        };
        Ok(sys::ClientBufferFromHostBuffer {
            client: self.handle().raw(),
            data: bytes.as_ptr().cast(),
            kind: dtype.to_raw(),
            dims: dims.as_ptr(),
            num_dims: dims.len(),
            device,
            memory,
            ..sys::ClientBufferFromHostBuffer::new()
        })
    }

    /// # Safety
    /// `args` come back from a successful call, and are taken from once.
    unsafe fn take_upload(
        &self,
        args: &sys::ClientBufferFromHostBuffer,
    ) -> (Buffer, Option<Event>) {
        const ORIGIN: &str = "PJRT_Client_BufferFromHostBuffer";
        let event = args.done_with_host_buffer;
        // SAFETY: the event was made for us.
        let event =
            (!event.is_null()).then(|| unsafe { Event::from_raw(event, ORIGIN, self.handle()) });
        // SAFETY: the buffer was made for us.
        (
            unsafe { Buffer::from_raw(args.buffer, self.handle()) },
            event,
        )
    }
}

/// A box whose contents the plugin reads or writes. Leaks unless given back.
struct Lent<T>(*mut T);

// SAFETY: it stands for a `Box<T>` that changes threads.
unsafe impl<T: Send> Send for Lent<T> {}

impl<T> Lent<T> {
    /// # Safety
    /// The plugin is done with the contents.
    unsafe fn give_back(self) -> Box<T> {
        // SAFETY: the pointer is from `Box::into_raw` and used once, as `self` is.
        unsafe { Box::from_raw(self.0) }
    }
}

/// Minor-to-major order of a dense array whose slowest dimension comes first; the tail of it for lower ranks.
const DENSE: [i64; MAX_RANK] = {
    let mut order = [0; MAX_RANK];
    let mut i = 0;
    while i < MAX_RANK {
        order[i] = (MAX_RANK - 1 - i) as i64;
        i += 1;
    }
    order
};
const MAX_RANK: usize = 64;

impl Buffer {
    /// Copies the array into `dst`, and returns once it is there.
    ///
    /// # Errors
    /// `dst` is not exactly as large as the array, or the array's computation failed.
    pub fn copy_to_host(&self, dst: &mut [u8]) -> Result<()> {
        // SAFETY: `dst` is borrowed until the copy is done.
        let copy = unsafe { self.download(dst.as_mut_ptr(), dst.len()) }?;
        copy.wait()
    }

    /// The array's elements, once they are there.
    ///
    /// # Errors
    /// The elements are no `T`, or the array's computation failed.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        let got = self.dtype()?;
        if got != T::DTYPE {
            return Err(Error::ElementType {
                expected: T::DTYPE,
                got,
            });
        }
        let mut values = vec![T::default(); self.host_size()? / size_of::<T>()];
        self.copy_to_host(as_bytes_mut(&mut values))?;
        Ok(values)
    }

    /// Begins to copy the array into memory that it takes charge of, and gives back when done. The buffer may be
    /// dropped, or given to a program, meanwhile.
    ///
    /// # Errors
    /// `dst` is not exactly as large as the array. A failed computation shows in the [`Download`].
    pub fn download_into<T: AsMut<[u8]> + Send + 'static>(&self, dst: T) -> Result<Download<T>> {
        // As for uploads: boxed, asked for its bytes once, and raw while the plugin writes.
        let dst = Box::into_raw(Box::new(dst));
        // SAFETY: it is a live box that nobody else refers to yet.
        let bytes = unsafe { &mut *dst }.as_mut();
        let (start, len) = (bytes.as_mut_ptr(), bytes.len());
        let dst = Lent(dst);
        // SAFETY: the bytes live until `dst` is given back, see below.
        let copy = match unsafe { self.download(start, len) } {
            Ok(copy) => copy,
            Err(error) => {
                // SAFETY: a refused call keeps no hold of the bytes.
                unsafe { dst.give_back() };
                return Err(error);
            }
        };
        let (sender, receiver) = promise::channel();
        let deliver = move |outcome: Result<()>| {
            // SAFETY: the event says that the device is done with the bytes.
            let dst = unsafe { dst.give_back() };
            sender.send(outcome.map(|()| *dst));
        };
        if let Err((error, deliver)) = copy.register(deliver) {
            // Without a callback, wait here.
            deliver(copy.wait().and(Err(error)));
        }
        Ok(Download(receiver))
    }

    /// Begins to copy the array to `dst`.
    ///
    /// # Safety
    /// `dst` points to `len` bytes that nobody else touches until the event is ready.
    unsafe fn download(&self, dst: *mut u8, len: usize) -> Result<Event> {
        let needed = self.host_size()?;
        if len != needed {
            return Err(Error::HostSize { needed, got: len });
        }
        let dims = self.dims()?;
        let rank = dims.len();
        let order = DENSE
            .get(MAX_RANK.wrapping_sub(rank)..)
            .ok_or_else(|| Error::Dimensions(dims.to_vec()))?;
        let tiled = sys::TiledLayout {
            minor_to_major: order.as_ptr(),
            minor_to_major_size: rank,
            ..sys::TiledLayout::new()
        };
        let mut layout = sys::MemoryLayout {
            tiled,
            ..sys::MemoryLayout::new()
        };
        let mut args = sys::BufferToHostBuffer {
            buffer: self.raw(),
            host_layout: &raw mut layout,
            dst: dst.cast(),
            dst_size: len,
            ..sys::BufferToHostBuffer::new()
        };
        // SAFETY: the buffer is alive, the layout outlives the call, and the caller vouches for `dst`.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the event was made for us.
        Ok(unsafe { Event::from_raw(args.event, "PJRT_Buffer_ToHostBuffer", self.client()) })
    }
}

/// An array on its way to host memory: `await` it or wait for it. Dropping it does not block; the memory is then
/// freed when the copy is done.
pub struct Download<T>(Receiver<Result<T>>);

impl<T> Download<T> {
    /// Blocks until the copy is done, and gives the memory back.
    ///
    /// # Errors
    /// The array's computation or the copy failed.
    pub fn wait(self) -> Result<T> {
        self.0.wait()
    }

    /// Whether the copy is done, well or not.
    pub fn is_ready(&self) -> bool {
        self.0.is_ready()
    }
}

impl<T> Future for Download<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}
