//! The endpoint picker: what Envoy, and every gateway that is made of it, asks where a request goes (`ext_proc`).
//!
//! One file a station: `picker` (a request begins), `exchange` (its body, its answer, its end), `intent` (what its headers
//! say), `words` (its prompt in tokens), `queue`, `route` (the decision in the proxy's words), `refusals`; beside them
//! `objects` (what operators say of models and priorities), `pool` (the same from Kubernetes, with the endpoints),
//! `reports` (what servers say of their caches), `readiness`, `usage` and `restore` (the little that is read and changed
//! of an answer), `account`, `series` and
//! `metrics`, `decisions` and `trace` (why it went there). How servers are chosen is `baton_scheduler`'s, what is known of them `baton_fleet`'s, and how
//! Envoy speaks `baton_ext_proc`'s. Invariants: a body goes on as it came, but for the model's name where that changes;
//! what a client may not say to servers does not reach them; what is in flight is given back on every ending.
#![forbid(unsafe_code)]

mod account;
mod decisions;
mod exchange;
mod intent;
mod listen;
mod metrics;
mod names;
mod objects;
mod peer_flags;
mod picker;
mod pool;
mod queue;
mod readers;
mod readiness;
mod refusals;
mod reports;
mod restore;
mod route;
mod selector;
mod series;
mod server_flags;
mod settings;
mod trace;
mod usage;
mod words;

pub use listen::{Bound, ListenError, bind, run};
pub use objects::{Objects, Rewrite, Target};
pub use peer_flags::{PeerFlags, PeerFlagsError};
pub use selector::SelectorError;
pub use server_flags::ServerFlags;
pub use settings::{Config, Ignored, Settings, SettingsError};

use std::path::Path;

/// What `baton epp check-config` says of the configuration in `file`: its warnings and errors, and how it is understood.
/// The flag says whether it can be used.
///
/// # Errors
/// A file that cannot be read, or is no YAML.
pub fn check_config(file: &Path) -> Result<(String, bool), SettingsError> {
    let text = std::fs::read_to_string(file);
    let text = text.map_err(|error| SettingsError::Read(file.to_owned(), error))?;
    Ok(baton_scheduler::config::report(&serde_norway::from_str(
        &text,
    )?))
}
