//! Plugins that are too old, broken, or fail: tables made up here.

use super::*;
use crate::extension;
use crate::{Client, Extension, Plugin, Topology};
use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Slots of the made-up table: up to and including `PJRT_Client_Create`.
const SLOTS: usize = 11;

#[repr(C)]
struct Table {
    header: sys::ApiHeader,
    slots: [Option<sys::RawFn>; SLOTS],
}

/// The plugin's idea of an error.
struct FakeError(c_int, &'static str);

/// Errors handed out and not destroyed yet.
static ERRORS: AtomicUsize = AtomicUsize::new(0);

fn fail(code: c_int, message: &'static str) -> *mut sys::Error {
    ERRORS.fetch_add(1, Ordering::SeqCst);
    Box::into_raw(Box::new(FakeError(code, message))).cast()
}

unsafe extern "C" fn error_destroy(args: *mut sys::ErrorDestroy) {
    // SAFETY: the caller's arguments are valid.
    let error = unsafe { (*args).error };
    if !error.is_null() {
        ERRORS.fetch_sub(1, Ordering::SeqCst);
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

unsafe extern "C" fn client_create(args: *mut sys::ClientCreate) -> *mut sys::Error {
    // SAFETY: the caller's arguments are valid.
    let n_options = unsafe { (*args).num_options };
    if n_options == 0 {
        fail(8, "no memory left")
    } else {
        fail(999, "")
    }
}

macro_rules! slot {
    ($function:ident, $ty:ty) => {{
        let function: $ty = $function;
        // SAFETY: the table keeps functions without their types; they are called with their own again.
        Some(unsafe { std::mem::transmute::<$ty, sys::RawFn>(function) })
    }};
}

fn table() -> Table {
    let mut slots = [None; SLOTS];
    slots[0] = slot!(error_destroy, unsafe extern "C" fn(*mut sys::ErrorDestroy));
    slots[1] = slot!(error_message, unsafe extern "C" fn(*mut sys::ErrorMessage));
    slots[2] = slot!(error_get_code, sys::Function<sys::ErrorGetCode>);
    slots[10] = slot!(client_create, sys::Function<sys::ClientCreate>);
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

fn check(table: &Table) -> Result<Api> {
    // SAFETY: the tests' functions live for ever, and extensions as long as the table's borrower uses them.
    unsafe { Api::from_table((&raw const *table).cast()) }
}

fn plugin() -> Plugin {
    Plugin::from_api(Arc::new(check(&table()).expect("the table is whole")))
}

#[test]
fn a_table_of_another_version_is_refused() {
    for (major, minor) in [(0, MIN_MINOR - 1), (1, 0), (-1, 81)] {
        let mut table = table();
        (table.header.version.major, table.header.version.minor) = (major, minor);
        let error = check(&table).err().unwrap();
        assert!(matches!(error, Error::Version { .. }), "{error}");
        assert!(
            error.to_string().contains(&format!("{major}.{minor}")),
            "{error}"
        );
    }
}

#[test]
fn a_table_without_room_for_its_header_is_refused() {
    let mut table = table();
    table.header.struct_size = size_of::<sys::ApiHeader>() - 1;
    assert!(matches!(check(&table), Err(Error::Malformed(_))));
    // SAFETY: null is allowed.
    let null = unsafe { Api::from_table(ptr::null()) };
    assert!(matches!(null, Err(Error::Malformed(_))));
}

#[test]
fn a_table_that_cannot_tell_errors_is_refused() {
    let mut cut = table();
    cut.header.struct_size = size_of::<sys::ApiHeader>() + 2 * size_of::<sys::RawFn>();
    assert!(matches!(
        check(&cut),
        Err(Error::Unsupported("PJRT_Error_GetCode"))
    ));
    let mut holed = table();
    holed.slots[1] = None;
    assert!(matches!(
        check(&holed),
        Err(Error::Unsupported("PJRT_Error_Message"))
    ));
}

#[test]
fn a_function_beyond_the_table_or_null_in_it_is_unsupported() {
    let beyond = Topology::create(&plugin(), "any", &[]).err().unwrap();
    assert!(
        matches!(
            beyond,
            Error::Unsupported("PJRT_TopologyDescription_Create")
        ),
        "{beyond}"
    );
    let null = plugin().attributes().err().unwrap();
    assert!(
        matches!(null, Error::Unsupported("PJRT_Plugin_Attributes")),
        "{null}"
    );
}

#[test]
fn a_failure_carries_call_code_and_message_and_its_error_is_freed() {
    let error = Client::create(&plugin(), &[]).err().unwrap();
    assert_eq!(error.code(), Some(Code::ResourceExhausted));
    assert_eq!(
        error.to_string(),
        "PJRT_Client_Create: resource exhausted: no memory left"
    );
    let odd = Client::create(&plugin(), &[("odd", 1.into())])
        .err()
        .unwrap();
    assert_eq!(odd.code(), Some(Code::Unknown));
    assert_eq!(ERRORS.load(Ordering::SeqCst), 0);
}

#[test]
fn extensions_are_found_along_the_chain() {
    let mut last = sys::ExtensionBase {
        struct_size: 24,
        kind: 77,
        next: ptr::null_mut(),
    };
    let mut first = sys::ExtensionBase {
        struct_size: 24,
        kind: 5,
        next: &raw mut last,
    };
    let mut table = table();
    table.header.extension_start = &raw mut first;
    let api = check(&table).unwrap();
    assert_eq!(
        extension::list(&api),
        [Extension::Ffi, Extension::Other(77)]
    );
    assert!(extension::find(&api, Extension::Ffi).is_some());
    assert!(extension::find(&api, Extension::Layouts).is_none());
}

#[test]
fn a_chain_of_extensions_that_bites_its_tail_ends() {
    let mut ring = sys::ExtensionBase {
        struct_size: 24,
        kind: 5,
        next: ptr::null_mut(),
    };
    let start = &raw mut ring;
    // SAFETY: `ring` is alive and nobody else looks at it yet.
    unsafe { (*start).next = start };
    let mut table = table();
    table.header.extension_start = start;
    let api = check(&table).unwrap();
    assert!(extension::list(&api).len() > 1);
    assert!(extension::find(&api, Extension::Layouts).is_none());
}
