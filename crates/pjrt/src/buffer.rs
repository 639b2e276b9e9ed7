//! Arrays on a device.

use crate::api::{Api, slice};
use crate::client::ClientHandle;
use crate::{DType, Device, Error, Event, Memory, Result, sys};
use std::sync::Arc;

/// An array on a device. Its memory is freed on drop, once work that reads it is done.
///
/// The contents may still be being computed: whatever reads them waits, and fails if the computation failed.
pub struct Buffer {
    raw: *mut sys::Buffer,
    client: Arc<ClientHandle>,
}

// SAFETY: PJRT's contract lets a buffer be used and destroyed on any thread.
unsafe impl Send for Buffer {}
// SAFETY: all methods on a shared buffer read its immutable description or enqueue work that the plugin orders
// itself. What ends a buffer (donation, deletion) takes it by value.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// # Safety
    /// `raw` is a buffer of this client's that nobody else destroys.
    pub(crate) unsafe fn from_raw(raw: *mut sys::Buffer, client: &Arc<ClientHandle>) -> Self {
        Self {
            raw,
            client: Arc::clone(client),
        }
    }

    /// Type of the elements.
    ///
    /// # Errors
    /// The type has no place in [`DType`].
    pub fn dtype(&self) -> Result<DType> {
        let mut args = sys::BufferElementType {
            buffer: self.raw,
            ..sys::BufferElementType::new()
        };
        // SAFETY: the buffer is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        DType::from_raw(args.kind)
    }

    /// The array's dimensions, the slowest first; none for a scalar.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn dims(&self) -> Result<&[i64]> {
        let mut args = sys::BufferDimensions {
            buffer: self.raw,
            ..sys::BufferDimensions::new()
        };
        // SAFETY: the buffer is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the dimensions live as long as the buffer, and do not change.
        Ok(unsafe { slice(args.dims, args.num_dims) })
    }

    /// Bytes the array takes in host memory: what copies to the host need.
    ///
    /// # Errors
    /// The element type has no place in [`DType`].
    pub fn host_size(&self) -> Result<usize> {
        crate::dtype::host_size(self.dtype()?, self.dims()?)
    }

    /// Bytes the array takes on the device, padding included.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn on_device_size(&self) -> Result<usize> {
        let mut args = sys::BufferOnDeviceSize {
            buffer: self.raw,
            ..sys::BufferOnDeviceSize::new()
        };
        // SAFETY: the buffer is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        Ok(args.size)
    }

    /// Where the array lies: an address on the device, for comparing only.
    ///
    /// # Errors
    /// The platform does not tell addresses, or the computation of the array failed.
    pub fn address(&self) -> Result<usize> {
        let mut args = sys::BufferUnsafePointer {
            buffer: self.raw,
            ..sys::BufferUnsafePointer::new()
        };
        // SAFETY: the buffer is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        Ok(args.address)
    }

    /// The device that the array is on.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn device(&self) -> Result<Device> {
        let mut args = sys::BufferDevice {
            buffer: self.raw,
            ..sys::BufferDevice::new()
        };
        // SAFETY: the buffer is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        Ok(Device::from_raw(args.device, &self.client))
    }

    /// The memory that the array is in.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn memory(&self) -> Result<Memory> {
        let mut args = sys::BufferMemory {
            buffer: self.raw,
            ..sys::BufferMemory::new()
        };
        // SAFETY: the buffer is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        Ok(Memory::from_raw(args.memory, &self.client))
    }

    /// When the array's contents are there.
    ///
    /// # Errors
    /// The plugin refuses. A failed computation shows in the event, not here.
    pub fn ready(&self) -> Result<Event> {
        let mut args = sys::BufferReadyEvent {
            buffer: self.raw,
            ..sys::BufferReadyEvent::new()
        };
        // SAFETY: the buffer is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the event was made for us.
        Ok(unsafe { Event::from_raw(args.event, "PJRT_Buffer_ReadyEvent", &self.client) })
    }

    /// Copies the array to another device of the same client.
    ///
    /// # Errors
    /// The array is on that device already, or memory is short there.
    pub fn copy_to_device(&self, device: &Device) -> Result<Self> {
        if !Arc::ptr_eq(&self.client, device.client()) {
            return Err(Error::Foreign("device"));
        }
        let mut args = sys::BufferCopyToDevice {
            buffer: self.raw,
            device: device.raw(),
            ..sys::BufferCopyToDevice::new()
        };
        // SAFETY: buffer and device are alive, and of one client.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the copy was made for us.
        Ok(unsafe { Self::from_raw(args.copy, &self.client) })
    }

    /// Copies the array to another memory of the same client.
    ///
    /// # Errors
    /// The array is in that memory already, or it is full.
    pub fn copy_to_memory(&self, memory: &Memory) -> Result<Self> {
        if !Arc::ptr_eq(&self.client, memory.client()) {
            return Err(Error::Foreign("memory"));
        }
        let mut args = sys::BufferCopyToMemory {
            buffer: self.raw,
            memory: memory.raw(),
            ..sys::BufferCopyToMemory::new()
        };
        // SAFETY: buffer and memory are alive, and of one client.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the copy was made for us.
        Ok(unsafe { Self::from_raw(args.copy, &self.client) })
    }

    /// Frees the array's memory, and says whether that went well; dropping it does the same in silence.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn delete(self) -> Result<()> {
        let mut args = sys::BufferDelete {
            buffer: self.raw,
            ..sys::BufferDelete::new()
        };
        // SAFETY: the buffer is alive, and only destroyed hereafter.
        unsafe { self.api().call(&mut args) }
    }

    pub(crate) fn raw(&self) -> *mut sys::Buffer {
        self.raw
    }

    pub(crate) fn client(&self) -> &Arc<ClientHandle> {
        &self.client
    }

    pub(crate) fn api(&self) -> &Arc<Api> {
        self.client.api()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut args = sys::BufferDestroy {
            buffer: self.raw,
            ..sys::BufferDestroy::new()
        };
        // SAFETY: the buffer is ours and not used again; the plugin keeps its memory until work on it is done.
        // Nobody is left to tell if it fails.
        let _ = unsafe { self.api().call(&mut args) };
    }
}
