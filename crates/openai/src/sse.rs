//! Server-sent events: one JSON document an event.

use serde::Serialize;

/// The last event of every stream.
pub const DONE: &[u8] = b"data: [DONE]\n\n";

/// Appends `value` to `buffer` as one event.
///
/// # Panics
/// Never for the types of this crate: they have string keys and nothing that can fail to serialize.
pub fn write_event<T: Serialize>(buffer: &mut Vec<u8>, value: &T) {
    buffer.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *buffer, value).expect("wire types serialize into memory");
    buffer.extend_from_slice(b"\n\n");
}
