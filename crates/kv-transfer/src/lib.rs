//! Hands KV over from a prefill server (the producer) to a decode server (the consumer), through TCP or, on one machine,
//! through shared memory.
//!
//! The producer [publishes](KvServer::publish) host copies of finished blocks under a lease and answers with
//! [`KvTransferParams`](baton_kv::KvTransferParams). The consumer [holds](KvClient::hold) the lease with
//! heartbeats from the moment it admits the request, [pulls](KvClient::pull) the blocks once it has room for them,
//! and releases the lease. The receiver grants credit and the owner sends, so neither writes into memory that
//! the other has not set aside.
//!
//! What stays true: a byte reaches the caller only after its checksum was found right, or the mark of the memory that it was
//! copied from; a lease that is gone never yields data; every wait has a deadline and every buffer a bound; nothing that a peer sends panics.
//!
//! Decisions are pure state machines (`handshake`, `lease`, `control`, `outgoing`, `holdings`, `fetch`, `incoming`,
//! `geometry`, `wire`); `server` and `client` are threads and blocking sockets around them. Not here: what to do without KV
//! (the engine recomputes).
//!
//! The secret authenticates, and checksums catch accidents. On a network where others can read or alter packets both sides
//! turn on TLS, which needs no certificates: the proofs of the secret hold only between the two ends of one TLS connection.
#![forbid(unsafe_code)]

mod checksum;
mod client;
mod control;
mod error;
mod fetch;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod geometry;
mod handshake;
mod holdings;
mod incoming;
mod lease;
mod memory;
mod net;
mod outgoing;
mod secret;
mod server;
#[cfg(test)]
mod simulation;
mod sockets;
mod tls;
pub mod wire;

pub use client::{
    ClientStats, Held, KvClient, KvClientConfig, PeerPolicy, PullGuard, Pulled, PulledCallback,
};
pub use error::{RejectCode, TransferError};
pub use secret::{MIN_SECRET_LEN, Secret, SecretError, fingerprint};
pub use server::{Building, Export, KvServer, KvServerConfig, PublishError, ServerStats};
