//! Which prefill servers may be asked, whatever a header says.
//!
//! The list is a file's, one `host:port` or `host:*` a line, read again when it changes. A list that cannot be read
//! at start is an error; one that breaks later leaves the list as it was.

use crate::config::Allowed;
use crate::target::Target;
use arc_swap::ArcSwapOption;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Longest file that is read.
const MAX_FILE: u64 = 16 << 20;
/// How often the file is looked at.
const PERIOD: Duration = Duration::from_secs(2);

/// Why a list cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AllowError {
    /// It cannot be read.
    #[error("cannot read allow-list {path}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A line is no `host:port` or `host:*`.
    #[error("allow-list line {0} is not host:port or host:*")]
    Line(usize),
    /// It is too long.
    #[error("allow-list {0} is longer than 16 MiB")]
    TooLong(PathBuf),
}

/// Hosts with a port each, or with any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Servers(HashSet<(String, Option<u16>)>);

impl Servers {
    pub(crate) fn parse(text: &str) -> Result<Self, AllowError> {
        let lines = text.lines().enumerate().map(|(at, line)| {
            let line = line.split('#').next().unwrap_or_default().trim();
            (at + 1, line)
        });
        let entry = |(at, line): (usize, &str)| {
            let any = line.strip_suffix(":*");
            let address = any.map_or_else(|| line.to_owned(), |host| format!("{host}:1"));
            let target = Target::parse(&address).ok_or(AllowError::Line(at))?;
            Ok((name(&target), any.is_none().then(|| target.port())))
        };
        let lines = lines.filter(|(_, line)| !line.is_empty());
        Ok(Self(lines.map(entry).collect::<Result<_, _>>()?))
    }

    fn has(&self, target: &Target) -> bool {
        let name = name(target);
        [Some(target.port()), None]
            .into_iter()
            .any(|port| self.0.contains(&(name.clone(), port)))
    }
}

/// Addresses have many spellings; names only differ in case.
fn name(target: &Target) -> String {
    let host = target.host();
    host.parse::<std::net::IpAddr>().map_or_else(
        |_| host.to_ascii_lowercase(),
        |ip| ip.to_canonical().to_string(),
    )
}

/// The list in force; none allows everyone.
#[derive(Debug)]
pub(crate) struct AllowList {
    servers: ArcSwapOption<Servers>,
    file: Option<PathBuf>,
}

impl AllowList {
    pub(crate) fn new(allowed: &Allowed) -> Result<Self, AllowError> {
        let (servers, file) = match allowed {
            Allowed::Anyone => (None, None),
            Allowed::File(path) => (Some(Servers::parse(&read(path)?)?), Some(path.clone())),
        };
        Ok(Self {
            servers: ArcSwapOption::new(servers.map(Arc::new)),
            file,
        })
    }

    pub(crate) fn allows(&self, target: &Target) -> bool {
        self.servers.load().as_ref().is_none_or(|s| s.has(target))
    }

    /// Follows the file for ever.
    pub(crate) async fn follow(&self) {
        let Some(path) = &self.file else { return };
        let mut seen = String::new();
        loop {
            tokio::time::sleep(PERIOD).await;
            let from = path.clone();
            let text = tokio::task::spawn_blocking(move || read(&from)).await;
            let Ok(Ok(text)) = text else { continue };
            if text == seen {
                continue;
            }
            match Servers::parse(&text) {
                Ok(servers) => self.servers.store(Some(Arc::new(servers))),
                Err(error) => tracing::warn!(%error, "the allow-list stays as it was"),
            }
            seen = text;
        }
    }
}

fn read(path: &Path) -> Result<String, AllowError> {
    use std::io::Read as _;
    let failed = |source| AllowError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    let n = file
        .take(MAX_FILE + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    match n as u64 > MAX_FILE {
        true => Err(AllowError::TooLong(path.to_owned())),
        false => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_names_hosts_with_one_port_or_all() {
        let servers =
            Servers::parse("# prefill\n10.0.0.1:8000\n\n Pod-1.ns.svc:* # all ports\n[::1]:9\n")
                .unwrap();
        for (address, expect) in [
            ("10.0.0.1:8000", true),
            ("10.0.0.1:8001", false),
            ("10.0.0.2:8000", false),
            ("pod-1.NS.svc:1", true),
            ("[0:0:0:0:0:0:0:1]:9", true),
            ("[::ffff:10.0.0.1]:8000", true),
        ] {
            assert_eq!(
                servers.has(&Target::parse(address).unwrap()),
                expect,
                "{address}"
            );
        }
        assert!(matches!(
            Servers::parse("a:1\nb\n"),
            Err(AllowError::Line(2))
        ));
        assert_eq!(Servers::parse("").unwrap(), Servers::default());
    }

    #[test]
    fn without_a_list_everyone_is_allowed_and_an_empty_one_allows_nobody() {
        let target = Target::parse("h:1").unwrap();
        assert!(AllowList::new(&Allowed::Anyone).unwrap().allows(&target));
        let file = std::env::temp_dir().join(format!("baton-allow-{}", std::process::id()));
        std::fs::write(&file, "# nobody\n").unwrap();
        let list = AllowList::new(&Allowed::File(file.clone())).unwrap();
        assert!(!list.allows(&target));
        std::fs::remove_file(&file).unwrap();
        assert!(AllowList::new(&Allowed::File(file)).is_err());
    }
}
