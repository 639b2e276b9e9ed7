//! Devices that are not there, to compile for.

use crate::api::{Api, slice, string};
use crate::device::Owner;
use crate::executable::{self, Executable};
use crate::{CompileOptions, DeviceDescription, Plugin, Result, Value, sys, value};
use std::ptr;
use std::sync::Arc;

/// How devices are arranged: enough to compile for them on a machine that has none.
#[derive(Clone)]
pub struct Topology {
    handle: Arc<TopologyHandle>,
}

/// The topology itself, shared by what describes it and what was compiled for it.
pub(crate) struct TopologyHandle {
    raw: *mut sys::Topology,
    api: Arc<Api>,
}

// SAFETY: a topology is read-only once made, and PJRT's contract lets any thread use and destroy it.
unsafe impl Send for TopologyHandle {}
// SAFETY: as for `Send`.
unsafe impl Sync for TopologyHandle {}

impl TopologyHandle {
    pub(crate) fn api(&self) -> &Arc<Api> {
        &self.api
    }
}

impl Drop for TopologyHandle {
    fn drop(&mut self) {
        let mut args = sys::TopologyDestroy {
            topology: self.raw,
            ..sys::TopologyDestroy::new()
        };
        // SAFETY: the topology is ours and not used again. Nobody is left to tell if it fails.
        let _ = unsafe { self.api.call(&mut args) };
    }
}

impl Topology {
    /// Describes devices by the platform's own name for their arrangement, such as `v6e:2x4`.
    ///
    /// # Errors
    /// The plugin knows no such arrangement, or describes none.
    pub fn create(plugin: &Plugin, name: &str, options: &[(&str, Value)]) -> Result<Self> {
        let raw_options = value::to_raw(options);
        let mut args = sys::TopologyCreate {
            name: name.as_ptr().cast(),
            name_size: name.len(),
            create_options: raw_options.as_ptr(),
            num_options: raw_options.len(),
            ..sys::TopologyCreate::new()
        };
        // SAFETY: name and options outlive the call.
        unsafe { plugin.api().call(&mut args) }?;
        let handle = TopologyHandle {
            raw: args.topology,
            api: Arc::clone(plugin.api()),
        };
        Ok(Self {
            handle: Arc::new(handle),
        })
    }

    /// The platform's short name.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn platform_name(&self) -> Result<String> {
        let mut args = sys::TopologyPlatformName {
            topology: self.raw(),
            ..sys::TopologyPlatformName::new()
        };
        // SAFETY: the topology is alive while `self` is.
        unsafe { self.handle.api.call(&mut args) }?;
        // SAFETY: the text lives as long as the topology.
        Ok(unsafe { string(args.name, args.name_size) })
    }

    /// The versions of what the platform is made of, as text for people and cache keys.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn platform_version(&self) -> Result<String> {
        let mut args = sys::TopologyPlatformVersion {
            topology: self.raw(),
            ..sys::TopologyPlatformVersion::new()
        };
        // SAFETY: the topology is alive while `self` is.
        unsafe { self.handle.api.call(&mut args) }?;
        // SAFETY: the text lives as long as the topology.
        Ok(unsafe { string(args.version, args.version_size) })
    }

    /// The devices, always in the same order.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn devices(&self) -> Result<Vec<DeviceDescription>> {
        let mut args = sys::TopologyDevices {
            topology: self.raw(),
            ..sys::TopologyDevices::new()
        };
        // SAFETY: the topology is alive while `self` is.
        unsafe { self.handle.api.call(&mut args) }?;
        // SAFETY: list and descriptions live as long as the topology.
        let descriptions = unsafe { slice(args.descriptions, args.num_descriptions) };
        let owner = || Owner::Topology(Arc::clone(&self.handle));
        Ok(descriptions
            .iter()
            .map(|&raw| DeviceDescription::from_raw(raw, owner()))
            .collect())
    }

    /// What else the plugin says of the arrangement.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn attributes(&self) -> Result<Vec<(String, Value)>> {
        let mut args = sys::TopologyAttributes {
            topology: self.raw(),
            ..sys::TopologyAttributes::new()
        };
        // SAFETY: the topology is alive while `self` is.
        unsafe { self.handle.api.call(&mut args) }?;
        // SAFETY: the attributes live as long as the topology.
        Ok(unsafe { value::from_raw(args.attributes, args.num_attributes) })
    }

    /// Compiles a module of StableHLO text (or MLIR bytecode) for these devices.
    ///
    /// # Errors
    /// The program is wrong (the message is the compiler's), or does not fit.
    pub fn compile(
        &self,
        program: impl AsRef<[u8]>,
        options: &CompileOptions,
    ) -> Result<Executable> {
        let options = options.to_proto();
        let program = executable::mlir(program.as_ref());
        let mut args = sys::Compile {
            topology: self.raw(),
            program: &raw const program,
            compile_options: options.as_ptr().cast(),
            compile_options_size: options.len(),
            client: ptr::null_mut(),
            ..sys::Compile::new()
        };
        // SAFETY: the topology is alive; program and options outlive the call, which is all they must.
        unsafe { self.handle.api.call(&mut args) }?;
        // SAFETY: the executable was made for us.
        Ok(unsafe {
            Executable::from_raw(args.executable, Owner::Topology(Arc::clone(&self.handle)))
        })
    }

    fn raw(&self) -> *mut sys::Topology {
        self.handle.raw
    }
}
