//! Plugins that are too old, broken, or fail.

use super::*;
use crate::extension;
use crate::fake::{check, live_errors, plugin, table};
use crate::{Client, Extension, Topology};
use std::ptr;

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
fn a_table_that_cannot_tell_errors_or_the_end_of_work_is_refused() {
    let mut cut = table();
    cut.header.struct_size = size_of::<sys::ApiHeader>() + 2 * size_of::<sys::RawFn>();
    assert!(matches!(
        check(&cut),
        Err(Error::Unsupported("PJRT_Error_GetCode"))
    ));
    for (slot, name) in [(1, "PJRT_Error_Message"), (8, "PJRT_Event_Await")] {
        let mut holed = table();
        holed.slots[slot] = None;
        let error = check(&holed).err().unwrap();
        assert!(
            matches!(error, Error::Unsupported(missing) if missing == name),
            "{error}"
        );
    }
}

#[test]
fn a_function_beyond_the_table_or_null_in_it_is_unsupported() {
    let beyond = Topology::create(&plugin(&table()), "any", &[])
        .err()
        .unwrap();
    assert!(
        matches!(
            beyond,
            Error::Unsupported("PJRT_TopologyDescription_Create")
        ),
        "{beyond}"
    );
    let null = plugin(&table()).attributes().err().unwrap();
    assert!(
        matches!(null, Error::Unsupported("PJRT_Plugin_Attributes")),
        "{null}"
    );
}

#[test]
fn a_failure_carries_call_code_and_message_and_its_error_is_freed() {
    let plugin = plugin(&table());
    let full = Client::create(&plugin, &[("a", 1.into())]).err().unwrap();
    assert_eq!(full.code(), Some(Code::ResourceExhausted));
    assert_eq!(
        full.to_string(),
        "PJRT_Client_Create: resource exhausted: no memory left"
    );
    let odd = Client::create(&plugin, &[("a", 1.into()), ("b", 2.into())])
        .err()
        .unwrap();
    assert_eq!(odd.code(), Some(Code::Unknown));
    assert_eq!(live_errors(), 0);
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
