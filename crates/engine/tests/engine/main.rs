//! The engine from outside, on a device that is simulated and watched.
#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    reason = "tests fail by panicking, and so do their helpers"
)]

mod handover;
mod paced;
mod random;
mod scenarios;
mod support;
mod transcript;
