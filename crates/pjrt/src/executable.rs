//! Compiled programs: what they need, what they cost, and how they are kept.

use crate::api::{Api, slice, string};
use crate::client::ClientHandle;
use crate::device::Owner;
use crate::execute::Scratch;
use crate::{Device, Error, Result, Value, sys, value};
use std::ops::Deref;
use std::sync::{Arc, Mutex};

/// A compiled program that is on no device: made for a topology, or the description of a loaded one.
pub struct Executable {
    raw: *mut sys::Executable,
    owner: Owner,
}

// SAFETY: an executable is read-only once made, and PJRT's contract lets any thread use and destroy it.
unsafe impl Send for Executable {}
// SAFETY: as for `Send`.
unsafe impl Sync for Executable {}

/// Bytes that a program takes on one device; what a platform does not say is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompiledMemory {
    /// Machine code.
    pub code: i64,
    /// Arguments.
    pub arguments: i64,
    /// Results, those in the place of arguments included.
    pub results: i64,
    /// Results that take the place of donated arguments.
    pub aliased: i64,
    /// Temporaries.
    pub temporaries: i64,
    /// Most at one time, as far as the compiler knows.
    pub peak: i64,
}

impl CompiledMemory {
    /// Device memory that must be there to run the program.
    pub fn total(&self) -> i64 {
        self.code + self.arguments + self.results - self.aliased + self.temporaries
    }
}

impl Executable {
    /// # Safety
    /// `raw` is an executable of the owner's that nobody else destroys.
    pub(crate) unsafe fn from_raw(raw: *mut sys::Executable, owner: Owner) -> Self {
        Self { raw, owner }
    }

    /// The program's name: the module's.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn name(&self) -> Result<String> {
        let mut args = sys::ExecutableName {
            executable: self.raw,
            ..sys::ExecutableName::new()
        };
        // SAFETY: the executable is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the text lives as long as the executable.
        Ok(unsafe { string(args.name, args.name_size) })
    }

    /// Arrays that one launch gives per device.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn n_outputs(&self) -> Result<usize> {
        let mut args = sys::ExecutableNumOutputs {
            executable: self.raw,
            ..sys::ExecutableNumOutputs::new()
        };
        // SAFETY: the executable is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        Ok(args.num_outputs)
    }

    /// Copies of the program that run side by side.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn n_replicas(&self) -> Result<usize> {
        let mut args = sys::ExecutableNumReplicas {
            executable: self.raw,
            ..sys::ExecutableNumReplicas::new()
        };
        // SAFETY: the executable is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        Ok(args.num_replicas)
    }

    /// Devices that share the work of one copy.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn n_partitions(&self) -> Result<usize> {
        let mut args = sys::ExecutableNumPartitions {
            executable: self.raw,
            ..sys::ExecutableNumPartitions::new()
        };
        // SAFETY: the executable is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        Ok(args.num_partitions)
    }

    /// Bytes of machine code.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn code_size(&self) -> Result<i64> {
        let mut args = sys::ExecutableSizeOfGeneratedCode {
            executable: self.raw,
            ..sys::ExecutableSizeOfGeneratedCode::new()
        };
        // SAFETY: the executable is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        Ok(args.size_in_bytes)
    }

    /// Device memory that the program needs.
    ///
    /// # Errors
    /// The platform does not say.
    pub fn memory(&self) -> Result<CompiledMemory> {
        let mut args = sys::ExecutableGetCompiledMemoryStats {
            executable: self.raw,
            ..sys::ExecutableGetCompiledMemoryStats::new()
        };
        // SAFETY: the executable is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        Ok(CompiledMemory {
            code: args.generated_code_size_in_bytes,
            arguments: args.argument_size_in_bytes,
            results: args.output_size_in_bytes,
            aliased: args.alias_size_in_bytes,
            temporaries: args.temp_size_in_bytes,
            peak: args.peak_memory_in_bytes,
        })
    }

    /// Everything the compiler reckons a run costs, by XLA's names.
    ///
    /// # Errors
    /// The platform does not say.
    pub fn cost_analysis(&self) -> Result<Vec<(String, Value)>> {
        let mut args = sys::ExecutableGetCostAnalysis {
            executable: self.raw,
            ..sys::ExecutableGetCostAnalysis::new()
        };
        // SAFETY: the executable is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the properties live as long as the executable.
        Ok(unsafe { value::from_raw(args.properties, args.num_properties) })
    }

    /// Floating-point operations and bytes of memory traffic of one run, as the compiler reckons.
    ///
    /// # Errors
    /// The platform does not say.
    pub fn cost(&self) -> Result<Cost> {
        let properties = self.cost_analysis()?;
        let number = |wanted: &str| {
            properties.iter().find_map(|(name, value)| match value {
                Value::Float(number) if name == wanted => Some(f64::from(*number)),
                _ => None,
            })
        };
        Ok(Cost {
            flops: number("flops"),
            bytes_accessed: number("bytes accessed"),
        })
    }

    /// Bytes, often text, that are equal for equal programs compiled alike.
    ///
    /// # Errors
    /// The platform has no such thing.
    pub fn fingerprint(&self) -> Result<Vec<u8>> {
        let mut args = sys::ExecutableFingerprint {
            executable: self.raw,
            ..sys::ExecutableFingerprint::new()
        };
        // SAFETY: the executable is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the bytes live as long as the executable.
        Ok(unsafe { slice(args.fingerprint.cast(), args.fingerprint_size) }.to_vec())
    }

    /// The program as bytes, for [`Client::deserialize`](crate::Client::deserialize) on the same platform and version.
    ///
    /// # Errors
    /// The platform cannot.
    pub fn serialize(&self) -> Result<Serialized> {
        let mut args = sys::ExecutableSerialize {
            executable: self.raw,
            ..sys::ExecutableSerialize::new()
        };
        // SAFETY: the executable is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        Ok(Serialized { args })
    }

    fn api(&self) -> &Arc<Api> {
        self.owner.api()
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        let mut args = sys::ExecutableDestroy {
            executable: self.raw,
            ..sys::ExecutableDestroy::new()
        };
        // SAFETY: the executable is ours and not used again. Nobody is left to tell if it fails.
        let _ = unsafe { self.api().call(&mut args) };
    }
}

/// What one run costs; `None` where the platform does not say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: Option<f64>,
    /// Bytes read and written.
    pub bytes_accessed: Option<f64>,
}

/// A serialised program, in the plugin's own memory. Derefs to its bytes.
pub struct Serialized {
    args: sys::ExecutableSerialize,
}

// SAFETY: it owns its bytes, which nobody writes and any thread may free; the plugin's code stays loaded.
unsafe impl Send for Serialized {}
// SAFETY: as for `Send`.
unsafe impl Sync for Serialized {}

impl Deref for Serialized {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes live until the deleter is called, in `drop`.
        unsafe { slice(self.args.bytes.cast(), self.args.bytes_size) }
    }
}

impl Drop for Serialized {
    fn drop(&mut self) {
        if let Some(deleter) = self.args.deleter {
            // SAFETY: it is called once, on what it came with, which is not used again.
            unsafe { deleter(self.args.serialized) };
        }
    }
}

/// A compiled program on its devices, ready to run.
pub struct LoadedExecutable {
    raw: *mut sys::LoadedExecutable,
    executable: Executable,
    n_outputs: usize,
    n_devices: usize,
    /// Lists of the last launch, for the next one to fill again.
    pub(crate) scratch: Mutex<Scratch>,
    client: Arc<ClientHandle>,
}

// SAFETY: PJRT's contract lets any thread launch, describe and destroy a loaded executable.
unsafe impl Send for LoadedExecutable {}
// SAFETY: as for `Send`; the scratch lists are behind a mutex.
unsafe impl Sync for LoadedExecutable {}

impl LoadedExecutable {
    /// # Safety
    /// `raw` is a loaded executable of this client's that nobody else destroys.
    pub(crate) unsafe fn from_raw(
        raw: *mut sys::LoadedExecutable,
        client: &Arc<ClientHandle>,
    ) -> Result<Self> {
        let loaded = Loaded {
            raw,
            api: client.api(),
        };
        let mut args = sys::LoadedExecutableGetExecutable {
            loaded_executable: raw,
            ..sys::LoadedExecutableGetExecutable::new()
        };
        // SAFETY: the loaded executable is alive.
        unsafe { client.api().call(&mut args) }?;
        // SAFETY: the executable was made for us.
        let executable =
            unsafe { Executable::from_raw(args.executable, Owner::Client(Arc::clone(client))) };
        let n_outputs = executable.n_outputs()?;
        let n_devices = loaded.devices()?.len();
        if n_devices == 0 {
            return Err(Error::Malformed("a loaded program has no device"));
        }
        Ok(Self {
            raw: loaded.into_raw(),
            executable,
            n_outputs,
            n_devices,
            scratch: Mutex::default(),
            client: Arc::clone(client),
        })
    }

    /// What the program is, apart from being loaded.
    pub fn executable(&self) -> &Executable {
        &self.executable
    }

    /// Arrays that one launch gives per device.
    pub fn n_outputs(&self) -> usize {
        self.n_outputs
    }

    /// Devices of this process that one launch runs on.
    pub fn n_devices(&self) -> usize {
        self.n_devices
    }

    /// The devices of this process that one launch runs on, in the order of its argument lists.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn devices(&self) -> Result<Vec<Device>> {
        let devices = addressable_devices(self.client.api(), self.raw)?;
        // SAFETY: the devices belong to the client.
        Ok(unsafe { Device::list(&self.client, devices) })
    }

    pub(crate) fn raw(&self) -> *mut sys::LoadedExecutable {
        self.raw
    }

    pub(crate) fn client(&self) -> &Arc<ClientHandle> {
        &self.client
    }
}

impl Drop for LoadedExecutable {
    fn drop(&mut self) {
        drop(Loaded {
            raw: self.raw,
            api: self.client.api(),
        });
    }
}

/// A loaded executable that is destroyed on drop: what a [`LoadedExecutable`] is while it is being made.
struct Loaded<'a> {
    raw: *mut sys::LoadedExecutable,
    api: &'a Api,
}

impl Loaded<'_> {
    fn devices(&self) -> Result<&[*mut sys::Device]> {
        addressable_devices(self.api, self.raw)
    }

    fn into_raw(self) -> *mut sys::LoadedExecutable {
        std::mem::ManuallyDrop::new(self).raw
    }
}

impl Drop for Loaded<'_> {
    fn drop(&mut self) {
        let mut args = sys::LoadedExecutableDestroy {
            executable: self.raw,
            ..sys::LoadedExecutableDestroy::new()
        };
        // SAFETY: it is ours and not used again. Nobody is left to tell if it fails.
        let _ = unsafe { self.api.call(&mut args) };
    }
}

fn addressable_devices(api: &Api, raw: *mut sys::LoadedExecutable) -> Result<&[*mut sys::Device]> {
    let mut args = sys::LoadedExecutableAddressableDevices {
        executable: raw,
        ..sys::LoadedExecutableAddressableDevices::new()
    };
    // SAFETY: both callers hold the loaded executable alive.
    unsafe { api.call(&mut args) }?;
    // SAFETY: the list lives as long as the loaded executable.
    Ok(unsafe { slice(args.devices, args.num_devices) })
}

/// StableHLO, text or bytecode, in C form. Points into `code`, so it must not outlive it.
pub(crate) fn mlir(code: &[u8]) -> sys::Program {
    const FORMAT: &str = "mlir";
    sys::Program {
        code: code.as_ptr().cast(),
        code_size: code.len(),
        format: FORMAT.as_ptr().cast(),
        format_size: FORMAT.len(),
        ..sys::Program::new()
    }
}
