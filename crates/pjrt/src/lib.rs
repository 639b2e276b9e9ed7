//! A safe binding of the PJRT C API: device plugins loaded at run time, programs given as StableHLO text.
//!
//! Knows nothing of models; builds with nothing but Rust. All `unsafe` of the project is here. What holds throughout:
//! whatever a handle needs it keeps alive (a buffer its client, a client its plugin), so handles can be dropped in
//! any order; a function that a plugin lacks is [`Error::Unsupported`], never a call to nowhere; errors carry the
//! plugin's words.
//!
//! ```no_run
//! use baton_pjrt::{Arg, Client, CompileOptions, Plugin};
//!
//! # fn main() -> baton_pjrt::Result<()> {
//! let plugin = Plugin::load("pjrt_c_api_cpu_plugin.so")?;
//! let client = Client::create(&plugin, &[("cpu_device_count", 1.into())])?;
//! let device = &client.addressable_devices()?[0];
//! let double = client.compile(
//!     "func.func public @main(%x: tensor<3xf32>) -> tensor<3xf32> {
//!        %y = stablehlo.add %x, %x : tensor<3xf32>
//!        return %y : tensor<3xf32>
//!      }",
//!     &CompileOptions::default(),
//! )?;
//! let x = client.buffer_from_slice(&[1.0_f32, 2.0, 3.0], &[3], device)?;
//! let y = double.execute([Arg::Borrow(&x)])?;
//! assert_eq!(y[0].to_vec::<f32>()?, [2.0, 4.0, 6.0]);
//! # Ok(())
//! # }
//! ```

#![expect(
    unsafe_code,
    reason = "this crate is where the project's unsafe code lives"
)]

mod api;
mod buffer;
mod client;
mod device;
mod dtype;
mod error;
mod event;
mod executable;
mod execute;
mod extension;
#[cfg(test)]
mod fake;
mod host_memory;
mod options;
mod plugin;
mod promise;
mod sys;
mod topology;
mod transfer;
mod value;

pub use buffer::Buffer;
pub use client::Client;
pub use device::{Device, DeviceDescription, Memory, MemoryStats};
pub use dtype::{DType, Element};
pub use error::{Code, Error, Result};
pub use event::{Completion, Event};
pub use executable::{CompiledMemory, Cost, Executable, LoadedExecutable, Serialized};
pub use execute::Arg;
pub use extension::Extension;
pub use host_memory::HostMemory;
pub use options::{CompileOptions, DeviceAssignment, Partitioner};
pub use plugin::Plugin;
pub use topology::Topology;
pub use transfer::{Download, Place, Sharing};
pub use value::Value;

/// Lowest minor version of the C API (0.x) that is spoken: 0.57 was the last to move functions within the table.
pub(crate) const MIN_MINOR: i32 = 57;
