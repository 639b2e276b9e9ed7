//! The server over real loopback sockets, with a simulated device and a tokenizer of single bytes.

#![expect(
    clippy::unwrap_used,
    clippy::needless_pass_by_value,
    reason = "a test that panics has failed, and reads better without references"
)]

mod answers;
mod errors;
mod events;
mod handover;
mod let_go;
mod life;
mod lost_kv;
mod support;
