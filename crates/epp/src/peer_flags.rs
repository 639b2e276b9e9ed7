//! Flags about other pickers of the same endpoints.

use baton_peers::{Peer, Secret, Settings};
use clap::Args;

/// Other pickers of the same endpoints, who tell each other what they sent where.
#[derive(Clone, Default, Args)]
#[command(next_help_heading = "Other pickers of the same endpoints")]
pub struct PeerFlags {
    /// Another picker, or a name of several, such as a headless Service; this picker may be among them. May be repeated.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', value_parser = Peer::parse)]
    pub peer: Vec<Peer>,
    /// Port on which other pickers are heard; 0 takes a free one.
    #[arg(long, default_value_t = 9004, value_name = "PORT")]
    pub peer_port: u16,
    /// What all pickers of these endpoints know and nobody else, at least 32 characters. Without it they share nothing.
    #[arg(
        long,
        env = "BATON_PEER_SECRET",
        hide_env_values = true,
        value_name = "SECRET"
    )]
    pub peer_secret: Option<String>,
}

/// A secret is not shown.
impl std::fmt::Debug for PeerFlags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerFlags")
            .field("peer", &self.peer)
            .field("peer_port", &self.peer_port)
            .finish_non_exhaustive()
    }
}

/// What is wrong with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerFlagsError {
    /// It could be guessed.
    #[error("--peer-secret: {0}")]
    Secret(#[from] baton_peers::SecretError),
    /// Anybody could be a peer.
    #[error("--peer needs a --peer-secret, or BATON_PEER_SECRET, by which pickers know each other")]
    NoSecret,
}

impl PeerFlags {
    /// Who the peers are, and the port on which they are heard; nothing, if there are none.
    pub(crate) fn resolve(&self) -> Result<Option<(Settings, u16)>, PeerFlagsError> {
        let said = self.peer_secret.as_deref().filter(|s| !s.is_empty());
        let Some(secret) = said else {
            return match self.peer.is_empty() {
                true => Ok(None),
                false => Err(PeerFlagsError::NoSecret),
            };
        };
        let settings = Settings {
            secret: Secret::new(secret.trim().as_bytes())?,
            peers: self.peer.clone(),
        };
        Ok(Some((settings, self.peer_port)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_need_a_secret_that_nobody_guesses_or_sees() {
        let flags = |peers: &[&str], secret: Option<&str>| PeerFlags {
            peer: peers.iter().map(|p| Peer::parse(p).unwrap()).collect(),
            peer_port: 9004,
            peer_secret: secret.map(str::to_owned),
        };
        assert!(flags(&[], None).resolve().unwrap().is_none());
        assert!(flags(&[], Some("")).resolve().unwrap().is_none());
        let alone = flags(&["a:1"], None).resolve();
        assert_eq!(alone.unwrap_err(), PeerFlagsError::NoSecret);
        assert!(flags(&["a:1"], Some("short")).resolve().is_err());
        let secret = "x".repeat(32);
        let told = flags(&["a:1", "b:2"], Some(&secret));
        let (settings, port) = told.resolve().unwrap().unwrap();
        assert_eq!((settings.peers.len(), port), (2, 9004));
        assert!(!format!("{told:?} {settings:?}").contains(&secret));
    }
}
