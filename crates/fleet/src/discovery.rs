//! Which endpoints there are, from a file that is followed: it is read again whenever it changes, also when it is a
//! link that is pointed elsewhere, as Kubernetes does with mounted configuration.

use crate::endpoint::{Address, EndpointSpec, Labels};
use crate::fleet::Fleet;
use serde::Deserialize;
use std::error::Error;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How often the file is looked at.
const INTERVAL: Duration = Duration::from_millis(200);
/// Longest file that is read.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why a form of file is none.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// A file that lists endpoints.
#[derive(Clone, Debug)]
pub struct EndpointsFile {
    path: PathBuf,
    parse: fn(&[u8]) -> Result<Vec<EndpointSpec>, BoxError>,
}

/// Why no list came of a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read endpoints file {0}")]
    Read(PathBuf, #[source] io::Error),
    /// It is longer than a mebibyte.
    #[error("endpoints file {0} is longer than {MAX_FILE_BYTES} bytes")]
    TooLong(PathBuf),
    /// It is no list of endpoints.
    #[error("endpoints file {0}")]
    Form(PathBuf, #[source] BoxError),
}

/// What tells one state of a file from the next.
type Stamp = (SystemTime, u64, u64, u64);

impl EndpointsFile {
    /// The file at `path`, whose form `parse` knows.
    #[must_use]
    pub fn new(
        path: impl Into<PathBuf>,
        parse: fn(&[u8]) -> Result<Vec<EndpointSpec>, BoxError>,
    ) -> Self {
        Self {
            path: path.into(),
            parse,
        }
    }

    /// Reads it. Blocks.
    ///
    /// # Errors
    /// See [`FileError`].
    pub fn read(&self) -> Result<Vec<EndpointSpec>, FileError> {
        let mut text = Vec::new();
        std::fs::File::open(&self.path)
            .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text))
            .map_err(|e| FileError::Read(self.path.clone(), e))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(FileError::TooLong(self.path.clone()));
        }
        (self.parse)(&text).map_err(|e| FileError::Form(self.path.clone(), e))
    }

    /// Keeps `fleet`'s list as the file says. A file that does not make sense changes nothing: it may be half written.
    pub async fn follow(self, fleet: Arc<Fleet>) {
        let mut last = None;
        loop {
            let now = self.stamp().await;
            if now != last {
                last = now;
                self.apply(&fleet).await;
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn apply(&self, fleet: &Fleet) {
        let file = self.clone();
        let specs = match tokio::task::spawn_blocking(move || file.read()).await {
            Ok(specs) => specs.map_err(BoxError::from),
            Err(error) => Err(error.into()),
        };
        let done = specs.and_then(|specs| Ok(fleet.set_endpoints(&specs)?));
        if let Err(error) = done {
            tracing::warn!(error = %baton_http::with_causes(&*error), "endpoints file; keeping the servers there were");
        }
    }

    /// `None` if it is not there.
    async fn stamp(&self) -> Option<Stamp> {
        let meta = tokio::fs::metadata(&self.path).await.ok()?;
        Some((meta.modified().ok()?, meta.len(), meta.dev(), meta.ino()))
    }
}

/// Reads llm-d's form of the list, YAML or JSON. Entries that make no sense are left out, with a word in the log.
///
/// # Errors
/// A text that is no list at all.
pub fn parse(text: &[u8]) -> Result<Vec<EndpointSpec>, BoxError> {
    #[derive(Deserialize)]
    struct File {
        endpoints: Vec<serde_norway::Value>,
    }
    let file: File = serde_norway::from_slice(text)?;
    let mut specs = Vec::with_capacity(file.endpoints.len());
    for (i, entry) in file.endpoints.into_iter().enumerate() {
        match serde_norway::from_value::<Entry>(entry)
            .map_err(BoxError::from)
            .and_then(Entry::spec)
        {
            Ok(spec) => specs.push(spec),
            Err(error) => tracing::warn!(%error, "endpoints[{i}] is left out"),
        }
    }
    Ok(specs)
}

/// An entry of llm-d's list.
#[derive(Deserialize)]
struct Entry {
    name: String,
    #[serde(default = "default_namespace")]
    namespace: String,
    /// An address or, unlike there, a name.
    address: String,
    port: Port,
    #[serde(default)]
    labels: Option<Labels>,
}

fn default_namespace() -> String {
    "default".to_owned()
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Port {
    Number(u16),
    Text(String),
}

impl Entry {
    fn spec(self) -> Result<EndpointSpec, BoxError> {
        if self.name.is_empty() {
            return Err("it has no name".into());
        }
        let port = match &self.port {
            Port::Number(port) => *port,
            Port::Text(text) => text.parse().map_err(|_| format!("{text:?} is no port"))?,
        };
        Ok(EndpointSpec {
            namespace: self.namespace,
            labels: self.labels.unwrap_or_default(),
            ..EndpointSpec::new(self.name, Address::new(&self.address, port)?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_scheduler::{Policy, PrefixIndex, Role, Scheduler};

    #[test]
    fn the_list_is_read_and_nonsense_in_it_left_out() {
        let text = br#"
endpoints:
- {name: a, address: 10.0.0.1, port: "8000", labels: {llm-d.ai/role: prefill}}
- {name: b, namespace: n, address: "fd00::1", port: 8001}
- {name: c, address: decode.default.svc, port: "80", labels: null, comment: unknown fields are passed over}
- {name: d, address: 10.0.0.1, port: "0"}
- {name: e, address: 10.0.0.1, port: http}
- {name: f, port: "1"}
- {name: "", address: 10.0.0.1, port: "1"}
- 7
"#;
        let specs = parse(text).unwrap();
        let found: Vec<_> = (specs.iter())
            .map(|s| (s.full_name(), s.address.to_string(), s.role()))
            .collect();
        let expected = [
            ("default/a", "10.0.0.1:8000", Role::Prefill),
            ("n/b", "[fd00::1]:8001", Role::Unlabelled),
            ("default/c", "decode.default.svc:80", Role::Unlabelled),
        ];
        assert_eq!(
            found,
            expected.map(|(n, a, r)| (n.to_owned(), a.to_owned(), r))
        );
        assert!(parse(br#"{"endpoints": []}"#).unwrap().is_empty());
        for bad in [
            "",
            "7",
            "endpoints",
            "endpoints: 7",
            "- a",
            "endpoints: [",
            "\u{0}",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_file_is_followed_when_it_is_written_replaced_or_its_link_turned() {
        let folder =
            std::env::temp_dir().join(format!("baton-fleet-follow-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("endpoints.yaml");
        // What a cluster mounts: a link to a link, which is turned at once.
        let turn = |name: &str, list: &str| {
            std::fs::write(folder.join(name), list).unwrap();
            std::os::unix::fs::symlink(name, folder.join("new")).unwrap();
            std::fs::rename(folder.join("new"), folder.join("..data")).unwrap();
        };
        let list =
            |name: &str| format!("endpoints: [{{name: {name}, address: 10.0.0.1, port: 1}}]");
        turn("first", &list("a"));
        std::os::unix::fs::symlink("..data", &path).unwrap();
        let scheduler = Scheduler::new(Policy::default(), PrefixIndex::new(10));
        let fleet = Arc::new(Fleet::new(scheduler, 7));
        let following = EndpointsFile::new(&path, parse).follow(fleet.clone());
        let following = tokio::spawn(following);
        let lists = async |name: &str| {
            while fleet.servers().first().is_none_or(|s| s.name() != name) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let patience = Duration::from_secs(30);
        let watched = async {
            lists("default/a").await;
            turn("second", "endpoints: [");
            turn("third", &list("b"));
            lists("default/b").await;
            std::fs::write(folder.join("third"), list("longer")).unwrap();
            lists("default/longer").await;
            std::fs::remove_file(folder.join("third")).unwrap();
            turn("fourth", &list("d"));
            lists("default/d").await;
        };
        tokio::time::timeout(patience, watched).await.unwrap();
        following.abort();
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_file_has_a_bound() {
        let path = std::env::temp_dir().join(format!("baton-fleet-long-{}", std::process::id()));
        std::fs::write(&path, vec![b' '; MAX_FILE_BYTES as usize + 1]).unwrap();
        let file = EndpointsFile::new(&path, parse);
        assert!(matches!(file.read(), Err(FileError::TooLong(_))));
        std::fs::write(&path, "endpoints: []").unwrap();
        assert!(file.read().unwrap().is_empty());
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(file.read(), Err(FileError::Read(..))));
    }
}
