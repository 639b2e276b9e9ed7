//! From what a user calls a model to its files.

use crate::CheckpointError;
use std::path::{Path, PathBuf};

/// What a MODEL argument means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelPath {
    /// A folder or file that is here.
    Here(PathBuf),
    /// A model that `baton fetch` knows by this name.
    Fetched(String),
}

/// Names that `baton fetch` knows.
const KNOWN: &[&str] = &["smollm2"];

/// Finds a model: a path, a name that `baton fetch` knows, or a Hugging Face repo id in the local hub cache `hub`.
pub fn resolve(model: &str, hub: Option<&Path>) -> Result<ModelPath, CheckpointError> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(ModelPath::Here(path.to_owned()));
    }
    if KNOWN.contains(&model) {
        return Ok(ModelPath::Fetched(model.to_owned()));
    }
    let cached = hub.and_then(|hub| hub_snapshot(hub, model));
    cached
        .map(ModelPath::Here)
        .ok_or_else(|| CheckpointError::NotFound {
            model: model.to_owned(),
        })
}

/// The folder of a repo's main revision in a hub cache: `models--ORG--NAME/snapshots/REVISION`.
pub fn hub_snapshot(hub: &Path, repo: &str) -> Option<PathBuf> {
    let (org, name) = repo.split_once('/')?;
    let plain = |s: &str| !s.is_empty() && !s.starts_with('.') && !s.contains(['/', '\\']);
    if !plain(org) || !plain(name) {
        return None;
    }
    let folder = hub.join(format!("models--{org}--{name}"));
    let revision = std::fs::read_to_string(folder.join("refs/main")).ok()?;
    let revision = revision.trim();
    let snapshot = plain(revision).then(|| folder.join("snapshots").join(revision))?;
    snapshot.join("config.json").exists().then_some(snapshot)
}
