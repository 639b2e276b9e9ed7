//! The chain of extensions behind a plugin's table.
//!
//! Only says which are there; the pointers stay inside the crate.

use crate::api::Api;
use crate::sys;
use std::ptr::NonNull;

/// Longest chain that is followed: a bound against a chain that bites its tail.
const MAX_LINKS: usize = 256;

macro_rules! extensions {
    ($($(#[$doc:meta])* $name:ident $raw:literal)*) => {
        /// What an extension is for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Extension {
            $($(#[$doc])* $name,)*
            /// One that this crate has no name for.
            Other(i32),
        }

        impl Extension {
            fn from_raw(raw: i32) -> Self {
                match raw { $($raw => Self::$name,)* _ => Self::Other(raw) }
            }
        }
    };
}

extensions! {
    /// Custom calls on GPUs, the older way.
    GpuCustomCall 0
    /// Profiling.
    Profiler 1
    /// Partitioners for custom calls.
    CustomPartitioner 2
    /// Streams of other libraries.
    Stream 3
    /// Layouts of buffers and programs.
    Layouts 4
    /// Handlers for custom calls (XLA FFI).
    Ffi 5
    /// Which memories a device has.
    MemoryDescriptions 6
    /// Compilation of Triton IR.
    Triton 7
    /// Untyped device memory.
    RawBuffer 8
    /// Compilation in phases.
    PhaseCompile 9
    /// An example.
    Example 10
    /// A placeholder.
    Unknown 11
    /// Transfers between hosts.
    CrossHostTransfers 12
    /// What an executable says of itself.
    ExecutableMetadata 13
    /// Callbacks.
    Callback 14
    /// Allocation of host memory.
    HostAllocator 15
    /// Topology of TPUs.
    TpuTopology 16
    /// Executables of TPUs.
    TpuExecutable 17
    /// Several slices of TPUs.
    Megascale 18
    /// Shardings of arguments and results.
    Shardings 19
    /// Compatibility of executables.
    AbiVersion 20
    /// Collectives.
    Collectives 21
    /// Several slices.
    MultiSlice 22
    /// Allocation of host memory, the newer way.
    HostMemoryAllocator 23
    /// Passes over programs.
    XlaTransform 24
}

pub(crate) fn list(api: &Api) -> Vec<Extension> {
    links(api).map(|(kind, _)| kind).collect()
}

/// The extension's struct, which begins with [`sys::ExtensionBase`] and lives as long as the process.
pub(crate) fn find(api: &Api, kind: Extension) -> Option<NonNull<sys::ExtensionBase>> {
    links(api)
        .find(|(found, _)| *found == kind)
        .map(|(_, link)| link)
}

fn links(api: &Api) -> impl Iterator<Item = (Extension, NonNull<sys::ExtensionBase>)> {
    let first = NonNull::new(api.extension_start().cast_mut());
    // SAFETY: links are static data of the plugin, each null-terminated chain built before the plugin was loaded.
    let chain = std::iter::successors(first, |link| NonNull::new(unsafe { link.as_ref() }.next));
    // SAFETY: as above.
    chain
        .take(MAX_LINKS)
        .map(|link| (Extension::from_raw(unsafe { link.as_ref() }.kind), link))
}
