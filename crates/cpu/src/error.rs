//! What can go wrong before a runner runs.

use std::error::Error;
use std::path::{Path, PathBuf};

/// Why a model could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The model's graph does something that this device cannot.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The shape of the KV does not suit the kernels.
    #[error("{0}")]
    Kv(String),
    /// A weight could not be read.
    #[error("weight {name}: {source}")]
    Weight {
        /// Its name.
        name: String,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
    /// Packed weights could not be kept.
    #[error("{}: {source}", path.display())]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The system gives no more threads.
    #[error("cannot start compute threads: {0}")]
    Threads(std::io::Error),
}

impl OpenError {
    pub(crate) fn cache(path: &Path, source: std::io::Error) -> Self {
        Self::Cache {
            path: path.to_owned(),
            source,
        }
    }
}

/// A graph that cannot be run row by row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this model does not run on the cpu device: {0}; --device xla-cpu may take it")]
pub struct PlanError(pub(crate) String);
