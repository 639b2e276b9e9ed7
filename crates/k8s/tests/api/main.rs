//! What this crate does beside an API server.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot set up its scene must fail"
)]

mod fake;
mod follow;
mod lease;
