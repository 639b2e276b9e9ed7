//! Launches: arguments in, results out.
//!
//! Invariant: an argument that is lent is never donated by the plugin, whatever the program says, and an argument
//! that is given away cannot be used again.

use crate::client::ClientHandle;
use crate::{Buffer, Error, Event, LoadedExecutable, Result, sys};
use std::ptr;
use std::sync::{Arc, PoisonError};

/// An argument of a launch.
pub enum Arg<'a> {
    /// Lent: still there afterwards, with the same contents.
    Borrow(&'a Buffer),
    /// Given away. If the program marks it (`tf.aliasing_output`), the result takes its memory. It is gone even if
    /// the launch fails.
    Donate(Buffer),
}

impl<'a> From<&'a Buffer> for Arg<'a> {
    fn from(buffer: &'a Buffer) -> Self {
        Self::Borrow(buffer)
    }
}

impl From<Buffer> for Arg<'_> {
    fn from(buffer: Buffer) -> Self {
        Self::Donate(buffer)
    }
}

/// The lists that a launch is made of. Empty between launches; kept for their memory.
#[derive(Default)]
pub(crate) struct Scratch {
    /// All devices' arguments, device by device.
    args: Vec<*mut sys::Buffer>,
    arg_lists: Vec<*const *mut sys::Buffer>,
    /// All devices' results, device by device.
    outputs: Vec<*mut sys::Buffer>,
    output_lists: Vec<*mut *mut sys::Buffer>,
    done: Vec<*mut sys::Event>,
    /// Which arguments of each device are lent.
    lent: Vec<i64>,
    donated: Vec<Buffer>,
}

// SAFETY: between launches, when it may change threads, it holds no pointer; during one it stays on its thread.
unsafe impl Send for Scratch {}

impl Scratch {
    fn clear(&mut self) {
        self.args.clear();
        self.arg_lists.clear();
        self.outputs.clear();
        self.output_lists.clear();
        self.done.clear();
        self.lent.clear();
        self.donated.clear();
    }

    /// Fills all lists for a launch, and says how many arguments each device has.
    fn fill<'a, A: IntoIterator<Item = Arg<'a>>>(
        &mut self,
        shards: impl IntoIterator<Item = A>,
        program: &LoadedExecutable,
    ) -> Result<usize> {
        let devices = program.n_devices();
        let mut lists = 0;
        let mut n_args = 0;
        for shard in shards {
            let n = self.push(shard, program.client())?;
            if lists > 0 && n != n_args {
                return Err(Error::Arguments { lists, devices });
            }
            n_args = n;
            lists += 1;
        }
        if lists != devices {
            return Err(Error::Arguments { lists, devices });
        }
        if devices > 1 {
            // The plugin has one list for all devices: lent anywhere is lent everywhere.
            self.lent.sort_unstable();
            self.lent.dedup();
        }
        self.outputs
            .resize(devices * program.n_outputs(), ptr::null_mut());
        self.done.resize(devices, ptr::null_mut());
        for device in 0..devices {
            self.arg_lists.push(self.args[device * n_args..].as_ptr());
            self.output_lists
                .push(self.outputs[device * program.n_outputs()..].as_mut_ptr());
        }
        Ok(n_args)
    }

    /// Appends one device's arguments, and says how many they are.
    fn push<'a>(
        &mut self,
        args: impl IntoIterator<Item = Arg<'a>>,
        client: &Arc<ClientHandle>,
    ) -> Result<usize> {
        let start = self.args.len();
        for arg in args {
            let buffer = match &arg {
                Arg::Borrow(buffer) => *buffer,
                Arg::Donate(buffer) => buffer,
            };
            if !Arc::ptr_eq(buffer.client(), client) {
                return Err(Error::Foreign("argument"));
            }
            match arg {
                Arg::Borrow(buffer) => {
                    self.lent.push((self.args.len() - start) as i64);
                    self.args.push(buffer.raw());
                }
                Arg::Donate(buffer) => {
                    self.args.push(buffer.raw());
                    self.donated.push(buffer);
                }
            }
        }
        Ok(self.args.len() - start)
    }
}

impl LoadedExecutable {
    /// Launches the program on its one device, and returns without waiting for the results to be computed.
    ///
    /// # Errors
    /// Arguments of wrong number, type or shape, or no memory for the results. Later failures show in the results.
    pub fn execute<'a>(&self, args: impl IntoIterator<Item = Arg<'a>>) -> Result<Vec<Buffer>> {
        self.with_scratch(|scratch| {
            self.launch(scratch, [args], Track::No)?;
            self.take_outputs(scratch, 0)
        })
    }

    /// As [`LoadedExecutable::execute`], with the event of the launch's end.
    ///
    /// # Errors
    /// As for [`LoadedExecutable::execute`].
    pub fn execute_tracked<'a>(
        &self,
        args: impl IntoIterator<Item = Arg<'a>>,
    ) -> Result<(Vec<Buffer>, Event)> {
        self.with_scratch(|scratch| {
            self.launch(scratch, [args], Track::Yes)?;
            let done = self.take_done(scratch);
            Ok((self.take_outputs(scratch, 0)?, done?))
        })
    }

    /// Launches the program on all its devices: one list of arguments for each, in the order of
    /// [`LoadedExecutable::devices`], and one list of results from each. An argument is donated only if it is
    /// given away on every device.
    ///
    /// # Errors
    /// As for [`LoadedExecutable::execute`].
    pub fn execute_sharded<'a, A: IntoIterator<Item = Arg<'a>>>(
        &self,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Vec<Vec<Buffer>>> {
        self.with_scratch(|scratch| {
            self.launch(scratch, args, Track::No)?;
            // All lists are taken before any failure is passed on: what is not taken would leak.
            let outputs: Vec<_> = (0..self.n_devices())
                .map(|device| self.take_outputs(scratch, device))
                .collect();
            outputs.into_iter().collect()
        })
    }

    /// Lends the lists of an earlier launch. Two launches at once do not wait for each other: the later one begins
    /// with empty lists.
    fn with_scratch<T>(&self, launch: impl FnOnce(&mut Scratch) -> T) -> T {
        let lock = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = std::mem::take(&mut *lock());
        let result = launch(&mut scratch);
        scratch.clear();
        *lock() = scratch;
        result
    }

    /// Fills `scratch.outputs`, and `scratch.done` if tracked.
    fn launch<'a, A: IntoIterator<Item = Arg<'a>>>(
        &self,
        scratch: &mut Scratch,
        shards: impl IntoIterator<Item = A>,
        track: Track,
    ) -> Result<()> {
        let n_args = scratch.fill(shards, self)?;
        let mut options = sys::ExecuteOptions {
            non_donatable_input_indices: scratch.lent.as_ptr(),
            num_non_donatable_input_indices: scratch.lent.len(),
            ..sys::ExecuteOptions::new()
        };
        let mut args = sys::LoadedExecutableExecute {
            executable: self.raw(),
            options: &raw mut options,
            argument_lists: scratch.arg_lists.as_ptr(),
            num_devices: self.n_devices(),
            num_args: n_args,
            output_lists: scratch.output_lists.as_ptr(),
            device_complete_events: match track {
                Track::Yes => scratch.done.as_mut_ptr(),
                Track::No => ptr::null_mut(),
            },
            ..sys::LoadedExecutableExecute::new()
        };
        // SAFETY: the program is alive; so are the arguments, lent for `'a` or held in `scratch.donated`. The lists
        // are as long as the header asks, and nothing moves them before the call returns.
        unsafe { self.client().api().call(&mut args) }
    }

    fn take_outputs(&self, scratch: &mut Scratch, device: usize) -> Result<Vec<Buffer>> {
        let start = device * self.n_outputs();
        let raw = &mut scratch.outputs[start..start + self.n_outputs()];
        let mut outputs = Vec::with_capacity(raw.len());
        for raw in raw
            .iter_mut()
            .map(|raw| std::mem::replace(raw, ptr::null_mut()))
        {
            if !raw.is_null() {
                // SAFETY: the launch made it for us, and it is taken once.
                outputs.push(unsafe { Buffer::from_raw(raw, self.client()) });
            }
        }
        if outputs.len() < self.n_outputs() {
            return Err(Error::Malformed("a launch left out a result"));
        }
        Ok(outputs)
    }

    fn take_done(&self, scratch: &mut Scratch) -> Result<Event> {
        let event = scratch
            .done
            .first()
            .copied()
            .filter(|event| !event.is_null());
        let event = event.ok_or(Error::Malformed("a launch left out its event"))?;
        // SAFETY: the launch made it for us, and it is taken once: the list is cleared next.
        Ok(unsafe { Event::from_raw(event, "PJRT_LoadedExecutable_Execute", self.client()) })
    }
}

/// Whether a launch makes an event for its end.
#[derive(Clone, Copy)]
enum Track {
    Yes,
    No,
}
