//! Which prefill servers may be asked, whatever a header says.
//!
//! The list is a file's, one `host:port` or `host:*` a line, or an InferencePool's. It is read again now and then, a
//! pool also when an address is missing. A file that cannot be read at start is an error; until a pool was read nobody
//! is allowed. What breaks later leaves the list as it was.

use crate::config::Allowed;
use crate::pool::{Follower, PoolError};
use crate::target::Target;
use arc_swap::ArcSwapOption;
use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

/// Longest file that is read.
const MAX_FILE: u64 = 16 << 20;
/// How often the file is looked at.
const PERIOD: Duration = Duration::from_secs(2);
/// How often a pool is.
const POOL_PERIOD: Duration = Duration::from_secs(10);
/// Shortest time between two readings of a pool.
const AT_MOST_EVERY: Duration = Duration::from_secs(1);

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
    /// The pool cannot be followed.
    #[error("--inference-pool: {0}")]
    Pool(#[from] PoolError),
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
        let entry = |(at, line): (usize, &str)| -> Result<_, AllowError> {
            let any = line.strip_suffix(":*");
            let address = any.map_or_else(|| line.to_owned(), |host| format!("{host}:1"));
            let target = Target::parse(&address).ok_or(AllowError::Line(at))?;
            Ok((name(&target), any.is_none().then(|| target.port())))
        };
        let lines = lines.filter(|(_, line)| !line.is_empty());
        Ok(Self(lines.map(entry).collect::<Result<_, _>>()?))
    }

    pub(crate) fn has(&self, target: &Target) -> bool {
        let name = name(target);
        [Some(target.port()), None]
            .into_iter()
            .any(|port| self.0.contains(&(name.clone(), port)))
    }
}

impl FromIterator<(IpAddr, u16)> for Servers {
    fn from_iter<I: IntoIterator<Item = (IpAddr, u16)>>(servers: I) -> Self {
        let named = |(ip, port): (IpAddr, u16)| (ip.to_canonical().to_string(), Some(port));
        Self(servers.into_iter().map(named).collect())
    }
}

/// Addresses have many spellings; names only differ in case.
fn name(target: &Target) -> String {
    let host = target.host();
    host.parse::<IpAddr>().map_or_else(
        |_| host.to_ascii_lowercase(),
        |ip| ip.to_canonical().to_string(),
    )
}

/// The list in force; none allows everyone.
#[derive(Debug)]
pub(crate) struct AllowList {
    servers: ArcSwapOption<Servers>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Nothing,
    File(PathBuf),
    Pool {
        follower: Box<Follower>,
        /// When it was read last; held while it is read.
        read: Mutex<Option<Instant>>,
    },
}

impl AllowList {
    pub(crate) fn new(allowed: &Allowed) -> Result<Self, AllowError> {
        let (servers, source) = match allowed {
            Allowed::Anyone => (None, Source::Nothing),
            Allowed::File(path) => {
                let servers = Servers::parse(&read(path)?)?;
                (Some(servers), Source::File(path.clone()))
            }
            Allowed::Pool(pool, cluster) => {
                let follower = Box::new(Follower::new(pool.clone(), cluster.clone())?);
                let read = Mutex::new(None);
                (Some(Servers::default()), Source::Pool { follower, read })
            }
        };
        Ok(Self {
            servers: ArcSwapOption::new(servers.map(Arc::new)),
            source,
        })
    }

    pub(crate) fn allows(&self, target: &Target) -> bool {
        self.servers.load().as_ref().is_none_or(|s| s.has(target))
    }

    /// Reads a pool again, because an address is missing that may be new. Whether that was done: not twice in a
    /// second, whatever clients ask for.
    pub(crate) async fn look_again(&self) -> bool {
        let Source::Pool { follower, read } = &self.source else {
            return false;
        };
        let asked = Instant::now();
        let mut last = read.lock().await;
        if last.is_some_and(|last| last > asked) {
            // Somebody else has, while this one waited.
            return true;
        }
        if last.is_some_and(|last| last.elapsed() < AT_MOST_EVERY) {
            return false;
        }
        match follower.servers().await {
            Ok(servers) => self.servers.store(Some(Arc::new(servers))),
            Err(error) => tracing::warn!(%error, "the allow-list stays as it was"),
        }
        *last = Some(Instant::now());
        true
    }

    /// Follows the file or the pool for ever.
    pub(crate) async fn follow(&self) {
        match &self.source {
            Source::Nothing => {}
            Source::File(path) => self.follow_file(path).await,
            Source::Pool { .. } => loop {
                self.look_again().await;
                tokio::time::sleep(POOL_PERIOD).await;
            },
        }
    }

    async fn follow_file(&self, path: &Path) {
        let mut seen = String::new();
        loop {
            tokio::time::sleep(PERIOD).await;
            let from = path.to_owned();
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

    /// An API server with one pool and one pod; says what it was asked.
    async fn api_server(
        identity: baton_http::Identity,
    ) -> (std::net::SocketAddr, Arc<parking_lot::Mutex<Vec<String>>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::<parking_lot::Mutex<Vec<String>>>::default();
        let log = asked.clone();
        let service = hyper::service::service_fn(
            move |req: http::Request<hyper::body::Incoming>| {
                let token = req.headers()[http::header::AUTHORIZATION].to_str().unwrap();
                log.lock().push(format!("{} {token}", req.uri()));
                let body = match req.uri().path().ends_with("/pods") {
                    false => {
                        r#"{"spec":{"selector":{"matchLabels":{"app":"x"}},"targetPorts":[{"number":8000}]}}"#
                    }
                    true => {
                        r#"{"items":[{"metadata":{"labels":{"llm-d.ai/role":"prefill"}},"status":{"podIP":"10.0.0.1","conditions":[{"type":"Ready","status":"True"}]}}]}"#
                    }
                };
                let body = http_body_util::Full::new(bytes::Bytes::from_static(body.as_bytes()));
                async move { Ok::<_, std::convert::Infallible>(http::Response::new(body)) }
            },
        );
        let config = baton_http::ServeConfig {
            tls: Some(identity),
            ..baton_http::ServeConfig::default()
        };
        tokio::spawn(baton_http::serve(
            listener,
            service,
            config,
            Default::default(),
        ));
        (address, asked)
    }

    #[tokio::test]
    async fn a_pool_is_read_when_an_address_is_missing_but_not_as_often_as_clients_like() {
        use crate::pool::{Cluster, PoolRef, PoolVersion};
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let (cert, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let identity = baton_http::Identity::from_pem(cert.as_bytes(), key.as_bytes()).unwrap();
        let (address, asked) = api_server(identity).await;
        let account = std::env::temp_dir().join(format!("baton-account-{}", std::process::id()));
        std::fs::create_dir_all(&account).unwrap();
        std::fs::write(account.join("ca.crt"), cert).unwrap();
        std::fs::write(account.join("token"), "secret\n").unwrap();
        let cluster = Cluster {
            address: address.to_string(),
            account: account.clone(),
        };
        let pool = PoolRef {
            namespace: "ns".to_owned(),
            name: "p".to_owned(),
            version: PoolVersion::V1,
        };
        let list = AllowList::new(&Allowed::Pool(pool, Some(cluster))).unwrap();
        let target = Target::parse("10.0.0.1:8000").unwrap();
        assert!(!list.allows(&target));
        assert!(list.look_again().await);
        assert!(list.allows(&target) && !list.allows(&Target::parse("10.0.0.1:22").unwrap()));
        assert!(!list.look_again().await);
        std::fs::remove_dir_all(account).unwrap();
        assert_eq!(
            *asked.lock(),
            [
                "/apis/inference.networking.k8s.io/v1/namespaces/ns/inferencepools/p Bearer secret",
                "/api/v1/namespaces/ns/pods?labelSelector=app%3Dx&resourceVersion=0 Bearer secret"
            ]
        );
    }
}
