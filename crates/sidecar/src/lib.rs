//! The routing proxy beside a decode server: has prompts computed by a prefill server first, as llm-d's sidecar does.
//!
//! One file a station: `front` (what a request is), `foreign` (what clients must not say), `dispatch` (where it goes),
//! `serial` and `concurrent` (the legs, by a `connector`'s words), `attempts` and `fallback` (what to do when prefill
//! fails), `usage` (the one thing changed in an answer). It knows no model and interprets no `kv_transfer_params`.
//! Invariants: of a body only the bytes of named fields change; nothing a client says steers servers; one request's
//! failure is that request's answer, never the process's end; every body, wait and queue has a bound.
#![forbid(unsafe_code)]

mod allow;
mod answer;
mod answer_body;
mod attempts;
mod concurrent;
mod config;
mod connector;
mod dispatch;
mod early;
mod edit;
mod engines;
mod fallback;
mod field;
mod foreign;
mod front;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod legs;
mod listen;
mod metrics;
mod pool;
mod refusal;
mod release;
mod route;
mod serial;
mod settings;
mod target;
mod usage;

pub use allow::AllowError;
pub use config::{Certificate, Config, ConfigError, Resolved};
pub use connector::Connector;
pub use fallback::Fallback;
pub use front::StartError;
pub use listen::{Bound, ListenError, bind, run};
pub use pool::{Cluster, PoolError, PoolRef, PoolVersion};
pub use settings::{Ignored, Settings};
