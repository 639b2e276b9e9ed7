//! The way to the producer's host memory for a consumer on the same machine. What is shared and how is [`baton_shm`]'s.

use std::io;

use baton_shm::{View, knock};

/// Asks a producer for its memory, with the password that its end of a control connection knows too.
///
/// # Errors
/// When it is on another machine, or does not share.
pub(crate) fn view(boot_id: u64, password: &[u8; 16]) -> io::Result<View> {
    View::open(&knock(&door_name(boot_id), password)?)
}

/// Nobody can guess it before the producer has the name, so whoever answers there is the producer.
pub(crate) fn door_name(boot_id: u64) -> String {
    format!("baton-kv-{boot_id:016x}")
}
