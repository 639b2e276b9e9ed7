//! The files that the processes of a stack share, in a folder that goes when the stack does.

use anyhow::Context as _;
use baton_gateway::EndpointConfig;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;

const ENDPOINTS: &str = "endpoints.json";

/// A folder of our own, readable by nobody else; removed when dropped.
#[derive(Debug)]
pub(super) struct RuntimeDir {
    path: PathBuf,
}

impl RuntimeDir {
    /// Makes one.
    pub(super) fn new() -> anyhow::Result<Self> {
        let unique = getrandom::u64().map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
        let path = std::env::temp_dir().join(format!("baton-{unique:016x}"));
        // Fails if it is there already, so that it is never somebody else's.
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| path.display().to_string())?;
        Ok(Self { path })
    }

    /// Where the endpoints file is.
    pub(super) fn endpoints(&self) -> PathBuf {
        self.path.join(ENDPOINTS)
    }

    /// Where servers find out whose turn it is; the first one makes the file.
    pub(super) fn turns(&self) -> PathBuf {
        self.path.join("turns")
    }

    /// Replaces the endpoints file; a reader sees the old one or the new one, whole.
    pub(super) fn write_endpoints(&self, endpoints: &[EndpointConfig]) -> anyhow::Result<()> {
        let new = self.write("endpoints.new", &serde_json::to_vec_pretty(endpoints)?)?;
        std::fs::rename(new, self.endpoints()).context("cannot replace the endpoints file")
    }

    /// Writes a file and returns where it is.
    pub(super) fn write(&self, name: &str, content: &[u8]) -> anyhow::Result<PathBuf> {
        let path = self.path.join(name);
        std::fs::write(&path, content)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        // What cannot be removed is left to the system's cleaning.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
