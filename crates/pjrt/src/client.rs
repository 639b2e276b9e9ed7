//! A client: the devices of one plugin, and what lives on them.

use crate::api::{Api, slice, string};
use crate::device::Device;
use crate::event::in_callback;
use crate::executable::{self, LoadedExecutable};
use crate::{CompileOptions, Plugin, Result, Value, sys, value};
use std::ptr;
use std::sync::Arc;

/// A plugin's devices, opened. Cheap to clone; everything made from it keeps it alive.
#[derive(Clone)]
pub struct Client {
    handle: Arc<ClientHandle>,
}

/// The client itself, shared by all that lives in it.
pub(crate) struct ClientHandle {
    raw: *mut sys::Client,
    api: Arc<Api>,
}

// SAFETY: PJRT's contract is that a client, and the devices, memories and topology it owns, may be used from any
// thread at the same time; the plugin does the locking. The pointer is never exposed.
unsafe impl Send for ClientHandle {}
// SAFETY: as for `Send`.
unsafe impl Sync for ClientHandle {}

impl ClientHandle {
    pub(crate) fn api(&self) -> &Arc<Api> {
        &self.api
    }

    pub(crate) fn raw(&self) -> *mut sys::Client {
        self.raw
    }
}

impl Drop for ClientHandle {
    fn drop(&mut self) {
        let client = Orphan {
            raw: self.raw,
            api: Arc::clone(&self.api),
        };
        if in_callback() {
            // Destroying a client joins its threads, and this is one of them. Should there be no thread to be had,
            // the closure is dropped and the client leaks.
            let _ = std::thread::Builder::new().spawn(move || client.destroy());
        } else {
            client.destroy();
        }
    }
}

/// A client that nothing refers to any more.
struct Orphan {
    raw: *mut sys::Client,
    api: Arc<Api>,
}

// SAFETY: as for `ClientHandle`.
unsafe impl Send for Orphan {}

impl Orphan {
    fn destroy(self) {
        let mut args = sys::ClientDestroy {
            client: self.raw,
            ..sys::ClientDestroy::new()
        };
        // SAFETY: nothing that lives in the client is left, and it is not used again. Nobody is left to tell if it
        // fails.
        let _ = unsafe { self.api.call(&mut args) };
    }
}

impl Client {
    /// Opens the plugin's devices. What options there are is the plugin's affair (`cpu_device_count` as an
    /// integer, `memory_fraction` as a number, ...).
    ///
    /// # Errors
    /// The plugin has no device, or does not take an option.
    pub fn create(plugin: &Plugin, options: &[(&str, Value)]) -> Result<Self> {
        let raw_options = value::to_raw(options);
        let mut args = sys::ClientCreate {
            create_options: raw_options.as_ptr(),
            num_options: raw_options.len(),
            ..sys::ClientCreate::new()
        };
        // SAFETY: the options point into `options`, which outlives the call.
        unsafe { plugin.api().call(&mut args) }?;
        let handle = ClientHandle {
            raw: args.client,
            api: Arc::clone(plugin.api()),
        };
        Ok(Self {
            handle: Arc::new(handle),
        })
    }

    /// The platform's short name, such as `cpu`, `cuda` or `tpu`.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn platform_name(&self) -> Result<String> {
        let mut args = sys::ClientPlatformName {
            client: self.raw(),
            ..sys::ClientPlatformName::new()
        };
        // SAFETY: the client is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the text lives as long as the client.
        Ok(unsafe { string(args.name, args.name_size) })
    }

    /// The versions of what the platform is made of, as text for people and cache keys.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn platform_version(&self) -> Result<String> {
        let mut args = sys::ClientPlatformVersion {
            client: self.raw(),
            ..sys::ClientPlatformVersion::new()
        };
        // SAFETY: the client is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the text lives as long as the client.
        Ok(unsafe { string(args.version, args.version_size) })
    }

    /// All devices, those of other processes included.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn devices(&self) -> Result<Vec<Device>> {
        let mut args = sys::ClientDevices {
            client: self.raw(),
            ..sys::ClientDevices::new()
        };
        // SAFETY: the client is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: list and devices live as long as the client.
        Ok(unsafe { Device::list(&self.handle, slice(args.devices, args.num_devices)) })
    }

    /// The devices that this process can give work to.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn addressable_devices(&self) -> Result<Vec<Device>> {
        let mut args = sys::ClientAddressableDevices {
            client: self.raw(),
            ..sys::ClientAddressableDevices::new()
        };
        // SAFETY: the client is alive while `self` is.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: list and devices live as long as the client.
        Ok(unsafe { Device::list(&self.handle, slice(args.devices, args.num_devices)) })
    }

    /// Compiles a module of StableHLO text (or MLIR bytecode) and loads it onto the devices.
    ///
    /// # Errors
    /// The program is wrong (the message is the compiler's) or too large.
    pub fn compile(
        &self,
        program: impl AsRef<[u8]>,
        options: &CompileOptions,
    ) -> Result<LoadedExecutable> {
        let options = options.to_proto();
        let program = executable::mlir(program.as_ref());
        let mut args = sys::ClientCompile {
            client: self.raw(),
            program: &raw const program,
            compile_options: options.as_ptr().cast(),
            compile_options_size: options.len(),
            ..sys::ClientCompile::new()
        };
        // SAFETY: the client is alive; program and options outlive the call, which is all they must.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the executable was made for this client and is ours.
        unsafe { LoadedExecutable::from_raw(args.executable, &self.handle) }
    }

    /// Loads what [`Executable::serialize`](crate::Executable::serialize) gave, on the same platform and version
    /// of the plugin. It holds machine code: the bytes must be trusted like the program itself.
    ///
    /// # Errors
    /// The bytes are of another platform or version, or no executable at all.
    pub fn deserialize(&self, serialized: &[u8]) -> Result<LoadedExecutable> {
        let mut args = sys::ExecutableDeserializeAndLoad {
            client: self.raw(),
            serialized: serialized.as_ptr().cast(),
            serialized_size: serialized.len(),
            overridden_options: ptr::null(),
            ..sys::ExecutableDeserializeAndLoad::new()
        };
        // SAFETY: the client is alive, and the bytes outlive the call.
        unsafe { self.api().call(&mut args) }?;
        // SAFETY: the executable was made for this client and is ours.
        unsafe { LoadedExecutable::from_raw(args.loaded_executable, &self.handle) }
    }

    pub(crate) fn handle(&self) -> &Arc<ClientHandle> {
        &self.handle
    }

    fn api(&self) -> &Arc<Api> {
        &self.handle.api
    }

    fn raw(&self) -> *mut sys::Client {
        self.handle.raw
    }
}
