//! A server's certificate in a folder, as Kubernetes mounts it: `tls.crt` and `tls.key`, which may change.

use crate::tls::{Identity, TlsError};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often the folder is looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// Why a folder holds no certificate.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// A file cannot be read.
    #[error(transparent)]
    Read(#[from] std::io::Error),
    /// Its text is of no use.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Identity {
    /// From `tls.crt` and `tls.key` in `folder`.
    ///
    /// # Errors
    /// See [`FolderError`].
    pub fn from_folder(folder: &Path) -> Result<Self, FolderError> {
        let (chain, key) = read_pair(folder)?;
        Ok(Self::from_pem(&chain, &key)?)
    }

    /// New connections see what lies in `folder` now; what makes no sense leaves the certificate as it was. Never ends.
    pub async fn follow_folder(self, folder: PathBuf) {
        let mut seen = None;
        loop {
            let from = folder.clone();
            let pair = tokio::task::spawn_blocking(move || read_pair(&from)).await;
            if let Ok(Ok(pair)) = pair
                && seen.as_ref() != Some(&pair)
            {
                if let Err(error) = self.replace_pem(&pair.0, &pair.1) {
                    tracing::warn!(%error, "the certificate stays as it was");
                }
                seen = Some(pair);
            }
            tokio::time::sleep(PERIOD).await;
        }
    }
}

fn read_pair(folder: &Path) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
    Ok((
        std::fs::read(folder.join("tls.crt"))?,
        std::fs::read(folder.join("tls.key"))?,
    ))
}
