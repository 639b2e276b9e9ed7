//! Devices, the memories they reach, and what they say of themselves.

use crate::api::{Api, slice, string};
use crate::client::ClientHandle;
use crate::topology::TopologyHandle;
use crate::{Result, Value, sys, value};
use std::sync::Arc;

/// A device of a client's.
#[derive(Clone)]
pub struct Device {
    raw: *mut sys::Device,
    client: Arc<ClientHandle>,
}

// SAFETY: a device is owned by its client, which is kept alive and may be used from any thread.
unsafe impl Send for Device {}
// SAFETY: as for `Send`.
unsafe impl Sync for Device {}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.raw, other.raw)
    }
}

impl Eq for Device {}

impl Device {
    /// # Safety
    /// The devices belong to the client.
    pub(crate) unsafe fn list(
        client: &Arc<ClientHandle>,
        devices: &[*mut sys::Device],
    ) -> Vec<Self> {
        devices
            .iter()
            .map(|&raw| Self {
                raw,
                client: Arc::clone(client),
            })
            .collect()
    }

    /// What the device is.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn description(&self) -> Result<DeviceDescription> {
        let mut args = sys::DeviceGetDescription {
            device: self.raw,
            ..sys::DeviceGetDescription::new()
        };
        // SAFETY: the device lives as long as its client.
        unsafe { self.api().call(&mut args) }?;
        Ok(DeviceDescription {
            raw: args.description,
            owner: Owner::Client(Arc::clone(&self.client)),
        })
    }

    /// Whether this process can give the device work.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn is_addressable(&self) -> Result<bool> {
        let mut args = sys::DeviceIsAddressable {
            device: self.raw,
            ..sys::DeviceIsAddressable::new()
        };
        // SAFETY: the device lives as long as its client.
        unsafe { self.api().call(&mut args) }?;
        Ok(args.is_addressable)
    }

    /// The hardware's own number, such as CUDA's; -1 if it has none.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn local_hardware_id(&self) -> Result<i32> {
        let mut args = sys::DeviceLocalHardwareId {
            device: self.raw,
            ..sys::DeviceLocalHardwareId::new()
        };
        // SAFETY: the device lives as long as its client.
        unsafe { self.api().call(&mut args) }?;
        Ok(args.id)
    }

    /// The memories that the device reaches.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn memories(&self) -> Result<Vec<Memory>> {
        let mut args = sys::DeviceAddressableMemories {
            device: self.raw,
            ..sys::DeviceAddressableMemories::new()
        };
        // SAFETY: the device lives as long as its client.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: list and memories live as long as the client.
        let memories = unsafe { slice(args.memories, args.num_memories) };
        Ok(memories
            .iter()
            .map(|&raw| Memory {
                raw,
                client: Arc::clone(&self.client),
            })
            .collect())
    }

    /// The memory that arrays go to unless told otherwise.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn default_memory(&self) -> Result<Memory> {
        let mut args = sys::DeviceDefaultMemory {
            device: self.raw,
            ..sys::DeviceDefaultMemory::new()
        };
        // SAFETY: the device lives as long as its client.
        unsafe { self.api().call(&mut args) }?;
        Ok(Memory {
            raw: args.memory,
            client: Arc::clone(&self.client),
        })
    }

    /// What the device's allocator says now.
    ///
    /// # Errors
    /// Many platforms, CPUs among them, keep no such figures.
    pub fn memory_stats(&self) -> Result<MemoryStats> {
        let mut args = sys::DeviceMemoryStats {
            device: self.raw,
            ..sys::DeviceMemoryStats::new()
        };
        // SAFETY: the device lives as long as its client.
        unsafe { self.api().call(&mut args) }?;
        Ok(MemoryStats {
            bytes_in_use: args.bytes_in_use,
            peak_bytes_in_use: args
                .peak_bytes_in_use_is_set
                .then_some(args.peak_bytes_in_use),
            bytes_limit: args.bytes_limit_is_set.then_some(args.bytes_limit),
            bytes_reserved: args.bytes_reserved_is_set.then_some(args.bytes_reserved),
            largest_free_block: args
                .largest_free_block_bytes_is_set
                .then_some(args.largest_free_block_bytes),
            pool_bytes: args.pool_bytes_is_set.then_some(args.pool_bytes),
        })
    }

    pub(crate) fn raw(&self) -> *mut sys::Device {
        self.raw
    }

    pub(crate) fn client(&self) -> &Arc<ClientHandle> {
        &self.client
    }

    pub(crate) fn from_raw(raw: *mut sys::Device, client: &Arc<ClientHandle>) -> Self {
        Self {
            raw,
            client: Arc::clone(client),
        }
    }

    fn api(&self) -> &Arc<Api> {
        self.client.api()
    }
}

/// Figures of a device's allocator, in bytes; `None` where the platform does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Allocated now.
    pub bytes_in_use: i64,
    /// Most that was ever allocated.
    pub peak_bytes_in_use: Option<i64>,
    /// Most that can be allocated.
    pub bytes_limit: Option<i64>,
    /// Set aside.
    pub bytes_reserved: Option<i64>,
    /// Largest piece that can be allocated.
    pub largest_free_block: Option<i64>,
    /// Held by the allocator, in use or not.
    pub pool_bytes: Option<i64>,
}

/// A memory of a client's.
#[derive(Clone)]
pub struct Memory {
    raw: *mut sys::Memory,
    client: Arc<ClientHandle>,
}

// SAFETY: a memory is owned by its client, which is kept alive and may be used from any thread.
unsafe impl Send for Memory {}
// SAFETY: as for `Send`.
unsafe impl Sync for Memory {}

impl Memory {
    /// Its number among the client's memories.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn id(&self) -> Result<i32> {
        let mut args = sys::MemoryId {
            memory: self.raw,
            ..sys::MemoryId::new()
        };
        // SAFETY: the memory lives as long as its client.
        unsafe { self.client.api().call(&mut args) }?;
        Ok(args.id)
    }

    /// Its kind, such as `device`, `pinned_host` or `unpinned_host`.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn kind(&self) -> Result<String> {
        let mut args = sys::MemoryKind {
            memory: self.raw,
            ..sys::MemoryKind::new()
        };
        // SAFETY: the memory lives as long as its client.
        unsafe { self.client.api().call(&mut args) }?;
        // SAFETY: the text lives as long as the memory.
        Ok(unsafe { string(args.kind, args.kind_size) })
    }

    pub(crate) fn from_raw(raw: *mut sys::Memory, client: &Arc<ClientHandle>) -> Self {
        Self {
            raw,
            client: Arc::clone(client),
        }
    }

    pub(crate) fn raw(&self) -> *mut sys::Memory {
        self.raw
    }

    pub(crate) fn client(&self) -> &Arc<ClientHandle> {
        &self.client
    }
}

/// Who keeps a description, or an executable, alive.
#[derive(Clone)]
pub(crate) enum Owner {
    Client(Arc<ClientHandle>),
    Topology(Arc<TopologyHandle>),
}

impl Owner {
    pub(crate) fn api(&self) -> &Arc<Api> {
        match self {
            Self::Client(client) => client.api(),
            Self::Topology(topology) => topology.api(),
        }
    }
}

/// What a device is: one that is there, or one of a topology that programs are compiled for.
#[derive(Clone)]
pub struct DeviceDescription {
    raw: *mut sys::DeviceDescription,
    owner: Owner,
}

// SAFETY: a description is read-only and owned by a client or topology, which is kept alive.
unsafe impl Send for DeviceDescription {}
// SAFETY: as for `Send`.
unsafe impl Sync for DeviceDescription {}

impl DeviceDescription {
    pub(crate) fn from_raw(raw: *mut sys::DeviceDescription, owner: Owner) -> Self {
        Self { raw, owner }
    }

    /// Its number among all devices of its kind.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn id(&self) -> Result<i32> {
        let mut args = sys::DeviceDescriptionId {
            description: self.raw,
            ..sys::DeviceDescriptionId::new()
        };
        // SAFETY: the description lives as long as its owner.
        unsafe { self.owner.api().call(&mut args) }?;
        Ok(args.id)
    }

    /// The number of the process that the device belongs to.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn process_index(&self) -> Result<i32> {
        let mut args = sys::DeviceDescriptionProcessIndex {
            description: self.raw,
            ..sys::DeviceDescriptionProcessIndex::new()
        };
        // SAFETY: the description lives as long as its owner.
        unsafe { self.owner.api().call(&mut args) }?;
        Ok(args.process_index)
    }

    /// The vendor's name for this kind of device, such as `TPU v6 lite`.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn kind(&self) -> Result<String> {
        let mut args = sys::DeviceDescriptionKind {
            description: self.raw,
            ..sys::DeviceDescriptionKind::new()
        };
        // SAFETY: the description lives as long as its owner.
        unsafe { self.owner.api().call(&mut args) }?;
        // SAFETY: the text lives as long as the description.
        Ok(unsafe { string(args.kind, args.kind_size) })
    }

    /// The device's name for people.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn name(&self) -> Result<String> {
        let mut args = sys::DeviceDescriptionToString {
            description: self.raw,
            ..sys::DeviceDescriptionToString::new()
        };
        // SAFETY: the description lives as long as its owner.
        unsafe { self.owner.api().call(&mut args) }?;
        // SAFETY: the text lives as long as the description.
        Ok(unsafe { string(args.text, args.text_size) })
    }

    /// What else the plugin says of the device, such as its coordinates.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn attributes(&self) -> Result<Vec<(String, Value)>> {
        let mut args = sys::DeviceDescriptionAttributes {
            description: self.raw,
            ..sys::DeviceDescriptionAttributes::new()
        };
        // SAFETY: the description lives as long as its owner.
        unsafe { self.owner.api().call(&mut args) }?;
        // SAFETY: the attributes live as long as the description.
        Ok(unsafe { value::from_raw(args.attributes, args.num_attributes) })
    }
}
