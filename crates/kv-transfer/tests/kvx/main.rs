//! Hand-overs over real loopback sockets. One program, so that it links once.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot set up its scene must fail"
)]

mod common;
mod deaths;
mod early;
mod faults;
mod handover;
mod hostile;
mod layouts;
mod memory;
mod partition;
mod process;
mod tls;
