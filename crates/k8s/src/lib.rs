//! The Kubernetes side of the picker: a pool and its pods followed, a leader elected, callers of `/metrics` checked.
//!
//! What objects mean is decided by pure functions (`rules`, `state`, [`election`], the cache in `access`); around each is a
//! thin shell that talks to the API server, waits and tries again.
#![forbid(unsafe_code)]

mod access;
mod backoff;
pub mod election;
mod kinds;
mod lease;
mod rules;
mod state;
mod watch;

pub use access::{Access, AccessError};
pub use kinds::{NEW_GROUP, OLD_GROUP, POOL_GROUP};
pub use kube::Client;
pub use lease::{LeaseName, lead};
pub use rules::{AppProtocol, Members, Objective, Pool, Rewrite, RewriteRule, RewriteTarget};
pub use state::PoolState;
pub use watch::{Pace, follow};

use std::path::Path;
use std::time::Duration;

/// Which pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolName {
    /// Its namespace, which is its pods' as well.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its API group: [`POOL_GROUP`], or [`OLD_GROUP`] for version v1alpha2.
    pub group: String,
}

impl PoolName {
    /// A pool of the stable version.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            group: POOL_GROUP.to_owned(),
        }
    }
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
#[error("no way to the API server")]
pub struct ClientError(#[source] Box<dyn std::error::Error + Send + Sync>);

/// Longer than any watch lasts, so that an answer that takes longer never comes.
const SILENCE: Duration = Duration::from_secs(75);

/// A client by a kubeconfig file, or without one by what the environment offers: `KUBECONFIG`, then the account of the
/// pod that this runs in.
///
/// # Errors
/// [`ClientError`], if the file or the environment makes no sense. The API server is not asked.
pub async fn client(kubeconfig: Option<&Path>) -> Result<Client, ClientError> {
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| ClientError(error);
    let mut config = match kubeconfig {
        Some(path) => {
            let file = kube::config::Kubeconfig::read_from(path).map_err(|e| wrong(e.into()))?;
            let options = kube::config::KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(file, &options).await;
            config.map_err(|e| wrong(e.into()))?
        }
        None => kube::Config::infer().await.map_err(|e| wrong(e.into()))?,
    };
    config.read_timeout = Some(SILENCE);
    config.reset_reader_on_write = true;
    Client::try_from(config).map_err(|e| wrong(e.into()))
}
