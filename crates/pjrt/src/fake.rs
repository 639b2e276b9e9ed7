//! A made-up plugin for tests: its calls fail, refuse, or are not there.

use crate::api::Api;
use crate::{Client, Plugin, Result, sys};
use std::cell::Cell;
use std::ffi::c_int;
use std::ptr;
use std::sync::Arc;

/// Slots of the table: up to and including `PJRT_Client_Destroy`.
const SLOTS: usize = 12;

/// The table, to be spoilt by a test.
#[repr(C)]
pub(crate) struct Table {
    pub(crate) header: sys::ApiHeader,
    pub(crate) slots: [Option<sys::RawFn>; SLOTS],
}

/// The plugin's idea of an error.
struct FakeError(c_int, &'static str);

thread_local! {
    /// Errors handed out and not destroyed yet, by this thread's test.
    static ERRORS: Cell<usize> = const { Cell::new(0) };
}

pub(crate) fn live_errors() -> usize {
    ERRORS.get()
}

fn fail(code: c_int, message: &'static str) -> *mut sys::Error {
    ERRORS.set(ERRORS.get() + 1);
    Box::into_raw(Box::new(FakeError(code, message))).cast()
}

unsafe extern "C" fn error_destroy(args: *mut sys::ErrorDestroy) {
    // SAFETY: the caller's arguments are valid.
    let error = unsafe { (*args).error };
    if !error.is_null() {
        ERRORS.set(ERRORS.get() - 1);
        // SAFETY: every error is a leaked box of `fail`'s.
        drop(unsafe { Box::from_raw(error.cast::<FakeError>()) });
    }
}

unsafe extern "C" fn error_message(args: *mut sys::ErrorMessage) {
    // SAFETY: the caller's arguments are valid, and the error is `fail`'s.
    let (args, error) = unsafe { (&mut *args, &*(*args).error.cast::<FakeError>()) };
    args.message = error.1.as_ptr().cast();
    args.message_size = error.1.len();
}

unsafe extern "C" fn error_get_code(args: *mut sys::ErrorGetCode) -> *mut sys::Error {
    // SAFETY: as for `error_message`.
    let (args, error) = unsafe { (&mut *args, &*(*args).error.cast::<FakeError>()) };
    args.code = error.0;
    ptr::null_mut()
}

unsafe extern "C" fn event_destroy(_: *mut sys::EventDestroy) -> *mut sys::Error {
    fail(13, "nobody reads this")
}

unsafe extern "C" fn event_is_ready(args: *mut sys::EventIsReady) -> *mut sys::Error {
    // SAFETY: the caller's arguments are valid.
    unsafe { (*args).is_ready = true };
    ptr::null_mut()
}

unsafe extern "C" fn event_await(_: *mut sys::EventAwait) -> *mut sys::Error {
    fail(15, "chip lost")
}

/// Calls back at once with a failure.
unsafe extern "C" fn event_on_ready(args: *mut sys::EventOnReady) -> *mut sys::Error {
    // SAFETY: the caller's arguments are valid.
    let (callback, user_arg) = unsafe { ((*args).callback, (*args).user_arg) };
    if let Some(callback) = callback {
        // SAFETY: it is called once, with its own argument.
        unsafe { callback(fail(15, "chip lost"), user_arg) };
    }
    ptr::null_mut()
}

/// Never calls back.
unsafe extern "C" fn event_on_ready_refused(_: *mut sys::EventOnReady) -> *mut sys::Error {
    fail(12, "no callbacks")
}

/// Makes a client, unless options are asked for.
unsafe extern "C" fn client_create(args: *mut sys::ClientCreate) -> *mut sys::Error {
    // SAFETY: the caller's arguments are valid.
    match unsafe { (*args).num_options } {
        0 => ptr::null_mut(),
        1 => fail(8, "no memory left"),
        _ => fail(999, ""),
    }
}

unsafe extern "C" fn client_destroy(_: *mut sys::ClientDestroy) -> *mut sys::Error {
    ptr::null_mut()
}

macro_rules! slot {
    ($function:ident, $ty:ty) => {{
        let function: $ty = $function;
        // SAFETY: the table keeps functions without their types; they are called with their own again.
        Some(unsafe { std::mem::transmute::<$ty, sys::RawFn>(function) })
    }};
}

/// A whole table, but for the functions of [`sys`] beyond its end and `PJRT_Plugin_Attributes`, which is null.
pub(crate) fn table() -> Table {
    let mut slots = [None; SLOTS];
    slots[0] = slot!(error_destroy, unsafe extern "C" fn(*mut sys::ErrorDestroy));
    slots[1] = slot!(error_message, unsafe extern "C" fn(*mut sys::ErrorMessage));
    slots[2] = slot!(error_get_code, sys::Function<sys::ErrorGetCode>);
    slots[5] = slot!(event_destroy, sys::Function<sys::EventDestroy>);
    slots[6] = slot!(event_is_ready, sys::Function<sys::EventIsReady>);
    slots[8] = slot!(event_await, sys::Function<sys::EventAwait>);
    slots[9] = slot!(event_on_ready, sys::Function<sys::EventOnReady>);
    slots[10] = slot!(client_create, sys::Function<sys::ClientCreate>);
    slots[11] = slot!(client_destroy, sys::Function<sys::ClientDestroy>);
    let version = sys::ApiVersion {
        struct_size: size_of::<sys::ApiVersion>(),
        extension_start: ptr::null_mut(),
        major: 0,
        minor: 81,
    };
    let struct_size = size_of::<Table>();
    Table {
        header: sys::ApiHeader {
            struct_size,
            extension_start: ptr::null_mut(),
            version,
        },
        slots,
    }
}

/// A table whose events take no callbacks.
pub(crate) fn table_without_callbacks() -> Table {
    let mut table = table();
    table.slots[9] = slot!(event_on_ready_refused, sys::Function<sys::EventOnReady>);
    table
}

pub(crate) fn check(table: &Table) -> Result<Api> {
    // SAFETY: the functions live for ever, and the tests keep extensions alive as long as the `Api`.
    unsafe { Api::from_table((&raw const *table).cast()) }
}

pub(crate) fn plugin(table: &Table) -> Plugin {
    Plugin::from_api(Arc::new(check(table).expect("the table is whole")))
}

pub(crate) fn client(table: &Table) -> Client {
    Client::create(&plugin(table), &[]).expect("without options there is a client")
}
