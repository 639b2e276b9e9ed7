//! What a transcript cannot show: who hangs up or dies when, long bodies, ranks, TLS, the end.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod failures;
mod fake;
mod hanging_up;
#[cfg(target_os = "linux")]
mod memory;
mod passing;
mod serving;
