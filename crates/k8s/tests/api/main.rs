//! What this crate does beside an API server.

mod fake;
mod follow;
mod lease;
