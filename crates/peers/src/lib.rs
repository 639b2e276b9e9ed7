//! Pickers of one fleet tell each other what they sent where, so that each decides as if it had routed everything.
//!
//! Each connects to every other and tells (`tell`): how much it has in flight at each server, as it is now, and which
//! prompts went to which servers. The other end hears (`hear`) and counts it to its own for as long as the connection
//! lives. What is in flight is told as it is and not how it changes, so that whatever is missed is made good by the next
//! message; a prompt that is missed costs a cache hit. Nobody waits for anybody, and nobody leads.
//!
//! Messages are parsed by pure functions (`wire`). Connections are TLS without certificates: both ends prove that they
//! know one secret, over what only the two ends of that connection know (`secret`).
//! Invariants: what a peer sends is bounded in memory and time; what a peer has told is forgotten with its connection;
//! who does not know the secret is told nothing and heard in nothing.
#![forbid(unsafe_code)]

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod greet;
mod hear;
mod meet;
mod secret;
mod tell;
mod wire;

pub use meet::{BindError, Bound, MAX_PEERS, Peer, PeerError, Settings};
pub use secret::{MIN_SECRET_LEN, Secret, SecretError};

#[cfg(test)]
mod tests;
