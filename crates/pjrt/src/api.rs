//! The plugin's table of functions: checked once when the plugin is loaded, then called through.
//!
//! Not aware of any function's meaning. Invariant: a function that lies beyond the end of the plugin's table, or is
//! null there, is never called; functions to read errors and to wait for work are always there; the library is never unloaded, so the table's functions stay valid.

use crate::sys::{self, Call};
use crate::{Code, Error, MIN_MINOR, Result};
use libloading::Library;
use std::ffi::c_char;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// More functions than any table has: a bound against a nonsensical `struct_size`.
const MAX_SLOTS: usize = 4096;

/// Tables whose plugin has been initialised, by address. A plugin is initialised once a process.
static INITIALIZED: Mutex<Vec<usize>> = Mutex::new(Vec::new());

type EntryPoint = unsafe extern "C" fn() -> *const sys::ApiHeader;

/// A plugin's functions.
pub(crate) struct Api {
    slots: Box<[Option<sys::RawFn>]>,
    version: (i32, i32),
    extension_start: *const sys::ExtensionBase,
    error_destroy: unsafe extern "C" fn(*mut sys::ErrorDestroy),
    error_message: unsafe extern "C" fn(*mut sys::ErrorMessage),
    error_get_code: sys::Function<sys::ErrorGetCode>,
    /// Never unloaded: plugins start threads and register exit handlers that do not survive it.
    _library: Option<ManuallyDrop<Library>>,
}

// SAFETY: the table is read-only after construction, and PJRT's contract is that its functions may be called from
// any thread. The chain of extensions is static data of the plugin that nobody writes after `GetPjrtApi` returned.
unsafe impl Send for Api {}
// SAFETY: as for `Send`.
unsafe impl Sync for Api {}

impl Api {
    /// Loads the library at `path`, checks its table and initialises the plugin.
    pub(crate) fn load(path: &Path) -> Result<Arc<Self>> {
        // SAFETY: running the library's initialisers is what the caller asks for; `Plugin::load` says that the
        // file must be trusted.
        let library = unsafe { Library::new(path) }.map_err(|source| Error::Load {
            path: path.to_owned(),
            source,
        })?;
        // SAFETY: every library that exports this name is a PJRT plugin, and this is the name's type there.
        let entry = unsafe { library.get::<EntryPoint>(b"GetPjrtApi\0") }
            .map(|symbol| *symbol)
            .map_err(|_| Error::NotAPlugin {
                path: path.to_owned(),
            })?;
        let library = ManuallyDrop::new(library);
        // SAFETY: it takes nothing and returns the plugin's static table, or null.
        let table = unsafe { entry() };
        // SAFETY: a non-null result points to a table that lives as long as the library, which stays loaded.
        let mut api = unsafe { Self::from_table(table) }?;
        api._library = Some(library);
        api.initialize_once(table as usize)?;
        Ok(Arc::new(api))
    }

    /// Checks a table and copies what is needed of it.
    ///
    /// # Safety
    /// `table` is null or points to a table of at least its own `struct_size` bytes whose functions and
    /// extensions stay valid for the rest of the process.
    pub(crate) unsafe fn from_table(table: *const sys::ApiHeader) -> Result<Self> {
        if table.is_null() {
            return Err(Error::Malformed("GetPjrtApi returned null"));
        }
        // SAFETY: `struct_size` is the first field of every version of the table.
        let struct_size = unsafe { (*table).struct_size };
        if struct_size < size_of::<sys::ApiHeader>() {
            return Err(Error::Malformed("the table ends before its version"));
        }
        // SAFETY: the header lies within `struct_size`, which was just checked.
        let header = unsafe { table.read() };
        let version = (header.version.major, header.version.minor);
        if version.0 != 0 || version.1 < MIN_MINOR {
            return Err(Error::Version {
                major: version.0,
                minor: version.1,
            });
        }
        let n_slots = (struct_size - size_of::<sys::ApiHeader>()) / size_of::<sys::RawFn>();
        // SAFETY: the slots follow the header; `n_slots` of them lie within `struct_size`.
        let slots = unsafe {
            std::slice::from_raw_parts(
                table.add(1).cast::<Option<sys::RawFn>>(),
                n_slots.min(MAX_SLOTS),
            )
        };
        Self::from_parts(slots, version, header.extension_start)
    }

    fn from_parts(
        slots: &[Option<sys::RawFn>],
        version: (i32, i32),
        extension_start: *const sys::ExtensionBase,
    ) -> Result<Self> {
        let required = |slot: usize, name| {
            slots
                .get(slot)
                .copied()
                .flatten()
                .ok_or(Error::Unsupported(name))
        };
        let destroy = required(sys::ERROR_DESTROY_SLOT, "PJRT_Error_Destroy")?;
        let message = required(sys::ERROR_MESSAGE_SLOT, "PJRT_Error_Message")?;
        let get_code = required(sys::ERROR_GET_CODE_SLOT, "PJRT_Error_GetCode")?;
        // Work that was begun must be waited for: to learn then that one cannot would be too late.
        required(sys::EventAwait::SLOT, sys::EventAwait::NAME)?;
        required(sys::EventOnReady::SLOT, sys::EventOnReady::NAME)?;
        Ok(Self {
            slots: slots.into(),
            version,
            extension_start,
            // SAFETY: the API's version fixes the type of the function in this slot.
            error_destroy: unsafe {
                std::mem::transmute::<sys::RawFn, unsafe extern "C" fn(*mut sys::ErrorDestroy)>(
                    destroy,
                )
            },
            // SAFETY: as above.
            error_message: unsafe {
                std::mem::transmute::<sys::RawFn, unsafe extern "C" fn(*mut sys::ErrorMessage)>(
                    message,
                )
            },
            // SAFETY: as above.
            error_get_code: unsafe {
                std::mem::transmute::<sys::RawFn, sys::Function<sys::ErrorGetCode>>(get_code)
            },
            _library: None,
        })
    }

    fn initialize_once(&self, table: usize) -> Result<()> {
        let mut initialized = INITIALIZED.lock().unwrap_or_else(PoisonError::into_inner);
        if !initialized.contains(&table) {
            // SAFETY: the arguments hold no pointers.
            unsafe { self.call(&mut sys::PluginInitialize::new()) }?;
            initialized.push(table);
        }
        Ok(())
    }

    pub(crate) fn version(&self) -> (i32, i32) {
        self.version
    }

    pub(crate) fn extension_start(&self) -> *const sys::ExtensionBase {
        self.extension_start
    }

    /// Calls the function whose arguments these are.
    ///
    /// # Safety
    /// Every pointer in `args` is what the C header asks for, and stays so for as long as the header asks.
    pub(crate) unsafe fn call<C: Call>(&self, args: &mut C) -> Result<()> {
        // SAFETY: passed on to the caller.
        unsafe { self.call_as(C::NAME, args) }
    }

    /// As [`Api::call`], but an error names `origin`: for outcomes of work that another call began.
    ///
    /// # Safety
    /// As for [`Api::call`].
    pub(crate) unsafe fn call_as<C: Call>(&self, origin: &'static str, args: &mut C) -> Result<()> {
        let function = self.slots.get(C::SLOT).copied().flatten();
        let function = function.ok_or(Error::Unsupported(C::NAME))?;
        // SAFETY: `Call` pairs each slot with its argument struct, and all these functions return an error.
        let function = unsafe { std::mem::transmute::<sys::RawFn, sys::Function<C>>(function) };
        // SAFETY: the caller vouches for what `args` points to.
        let error = unsafe { function(args) };
        // SAFETY: the function hands over the error that it returns.
        unsafe { self.take_error(origin, error) }
    }

    /// Turns an error of the plugin's into ours and frees it; null is success.
    ///
    /// # Safety
    /// `error` is null or an error of this plugin's that nobody else frees.
    pub(crate) unsafe fn take_error(
        &self,
        call: &'static str,
        error: *mut sys::Error,
    ) -> Result<()> {
        if error.is_null() {
            return Ok(());
        }
        let mut text = sys::ErrorMessage {
            error,
            ..sys::ErrorMessage::new()
        };
        // SAFETY: the error is alive until the end of this function.
        unsafe { (self.error_message)(&raw mut text) };
        // SAFETY: the message lives as long as the error.
        let message = unsafe { string(text.message, text.message_size) };
        let mut code = sys::ErrorGetCode {
            error,
            ..sys::ErrorGetCode::new()
        };
        // SAFETY: as for the message.
        let nested = unsafe { (self.error_get_code)(&raw mut code) };
        for error in [nested, error] {
            let mut args = sys::ErrorDestroy {
                error,
                ..sys::ErrorDestroy::new()
            };
            // SAFETY: both are ours to free, once; null is allowed.
            unsafe { (self.error_destroy)(&raw mut args) };
        }
        Err(Error::Call {
            call,
            code: Code::from_raw(code.code),
            message,
        })
    }
}

/// Copies text that the plugin owns.
///
/// # Safety
/// `text` is null or points to `size` readable bytes.
pub(crate) unsafe fn string(text: *const c_char, size: usize) -> String {
    // SAFETY: passed on to the caller.
    String::from_utf8_lossy(unsafe { slice(text.cast::<u8>(), size) }).into_owned()
}

/// A view of an array that the plugin owns; null is empty.
///
/// # Safety
/// `items` is null or points to `len` initialised items that stay unchanged for `'a`.
pub(crate) unsafe fn slice<'a, T>(items: *const T, len: usize) -> &'a [T] {
    if items.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: passed on to the caller.
    unsafe { std::slice::from_raw_parts(items, len) }
}

#[cfg(test)]
mod tests;
