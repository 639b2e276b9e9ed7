//! The servers of a Kubernetes InferencePool, read from the API server: the addresses that the allow-list is made of.
//!
//! The pool says which pods and ports, the pods say who is ready. Listed every few seconds and when an address is
//! missing, from the API server's cache; a sidecar needs no more than to know new pods within moments.
//! Needs `get` on `inferencepools` and `list` on `pods` in the pool's namespace.

use crate::allow::Servers;
use baton_http::{Client, ClientConfig, ClientTls, TlsError, Trust, collect};
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION};
use http::{HeaderValue, Request};
use http_body_util::Full;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Longest answer of the API server.
const MAX_ANSWER: usize = 64 << 20;
/// Longest wait for one.
const LIMIT: Duration = Duration::from_secs(5);
/// Says what a pod of a pool does.
const ROLE: &str = "llm-d.ai/role";

/// Which pool, and how its API group writes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolRef {
    /// The pool's and its pods'.
    pub namespace: String,
    /// The pool's.
    pub name: String,
    /// `v1` of `inference.networking.k8s.io`, or `v1alpha2` of `inference.networking.x-k8s.io`.
    pub version: PoolVersion,
}

/// A form in which pools are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolVersion {
    /// Labels under `matchLabels`, several ports.
    V1,
    /// Labels right under `selector`, one port.
    V1Alpha2,
}

impl PoolVersion {
    /// The version of an API group that is known.
    #[must_use]
    pub fn of_group(group: &str) -> Option<Self> {
        match group {
            "inference.networking.k8s.io" => Some(Self::V1),
            "inference.networking.x-k8s.io" => Some(Self::V1Alpha2),
            _ => None,
        }
    }

    fn api(self) -> &'static str {
        match self {
            Self::V1 => "inference.networking.k8s.io/v1",
            Self::V1Alpha2 => "inference.networking.x-k8s.io/v1alpha2",
        }
    }
}

/// Why a pool's servers are not known.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// This is no pod, or it has no service account.
    #[error("no API server: {0}")]
    NoCluster(String),
    /// Its certificate authority is not usable.
    #[error("the API server's certificate authority: {0}")]
    Tls(#[from] TlsError),
    /// It did not answer, or not well.
    #[error("{path}: {reason}")]
    Answer {
        /// What was asked for.
        path: String,
        /// What came instead.
        reason: String,
    },
}

/// What a pool says that matters.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pool {
    labels: BTreeMap<String, String>,
    ports: Vec<u16>,
}

#[derive(Deserialize)]
struct V1 {
    spec: V1Spec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct V1Spec {
    selector: V1Selector,
    target_ports: Vec<V1Port>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct V1Selector {
    match_labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct V1Port {
    number: u16,
}

#[derive(Deserialize)]
struct V1Alpha2 {
    spec: V1Alpha2Spec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct V1Alpha2Spec {
    selector: BTreeMap<String, String>,
    target_port_number: u16,
}

/// Reads a pool.
fn pool(version: PoolVersion, text: &[u8]) -> serde_json::Result<Pool> {
    Ok(match version {
        PoolVersion::V1 => {
            let V1 { spec } = serde_json::from_slice(text)?;
            Pool {
                labels: spec.selector.match_labels,
                ports: spec.target_ports.into_iter().map(|p| p.number).collect(),
            }
        }
        PoolVersion::V1Alpha2 => {
            let V1Alpha2 { spec } = serde_json::from_slice(text)?;
            Pool {
                labels: spec.selector,
                ports: vec![spec.target_port_number],
            }
        }
    })
}

#[derive(Deserialize)]
struct Pods {
    items: Vec<Pod>,
}

#[derive(Deserialize)]
struct Pod {
    metadata: Metadata,
    #[serde(default)]
    status: Status,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    deletion_timestamp: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
    conditions: Vec<Condition>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: String,
}

#[derive(Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

impl Pod {
    fn is_allowed(&self) -> bool {
        let ready = |c: &Condition| c.kind == "Ready" && c.status == "True";
        let role = self.metadata.labels.get(ROLE).map(String::as_str);
        let role = role.unwrap_or_default();
        let computes_for_others = role == "both"
            || role
                .split('-')
                .any(|part| part == "prefill" || part == "encode");
        computes_for_others
            && self.metadata.deletion_timestamp.is_none()
            && self.status.conditions.iter().any(ready)
    }

    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let all = self.status.pod_ips.iter().map(|p| &p.ip);
        all.chain(&self.status.pod_ip)
            .filter_map(|ip| ip.parse().ok())
    }
}

/// The servers among `text`'s pods, at the ports of `pool`.
fn servers(pool: &Pool, text: &[u8]) -> serde_json::Result<Servers> {
    let pods: Pods = serde_json::from_slice(text)?;
    let allowed = pods.items.iter().filter(|pod| pod.is_allowed());
    let addresses = allowed.flat_map(Pod::addresses);
    Ok(addresses
        .flat_map(|ip| pool.ports.iter().map(move |&port| (ip, port)))
        .collect())
}

/// `k=v,k=v`, as part of a query.
fn label_selector(labels: &BTreeMap<String, String>) -> String {
    let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    let encoded = pairs
        .join(",")
        .into_bytes()
        .into_iter()
        .map(|b| match plain(b) {
            true => char::from(b).to_string(),
            false => format!("%{b:02X}"),
        });
    encoded.collect()
}

/// Where the API server is, and who asks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// `host:port`.
    pub address: String,
    /// The service account's folder: `token` and `ca.crt`.
    pub account: PathBuf,
}

/// A pool, followed.
#[derive(Debug)]
pub(crate) struct Follower {
    of: PoolRef,
    cluster: Cluster,
    client: Client,
}

impl Follower {
    pub(crate) fn new(of: PoolRef, cluster: Option<Cluster>) -> Result<Self, PoolError> {
        let no_cluster = |why: String| PoolError::NoCluster(why);
        let cluster =
            cluster.ok_or_else(|| no_cluster("KUBERNETES_SERVICE_HOST is not set".to_owned()))?;
        let authority = cluster.account.join("ca.crt");
        let authority = std::fs::read(&authority)
            .map_err(|e| no_cluster(format!("{}: {e}", authority.display())))?;
        let tls = ClientTls::new(&Trust::Roots(authority))?;
        Ok(Self {
            of,
            cluster,
            client: Client::with_tls(&ClientConfig::default(), tls),
        })
    }

    /// The pool's servers now.
    pub(crate) async fn servers(&self) -> Result<Servers, PoolError> {
        let PoolRef {
            namespace,
            name,
            version,
        } = &self.of;
        let api = version.api();
        let path = format!("/apis/{api}/namespaces/{namespace}/inferencepools/{name}");
        let text = self.get(&path).await?;
        let pool = pool(*version, &text).map_err(|e| wrong(&path, &e))?;
        let selector = label_selector(&pool.labels);
        let path = format!(
            "/api/v1/namespaces/{namespace}/pods?labelSelector={selector}&resourceVersion=0"
        );
        let text = self.get(&path).await?;
        servers(&pool, &text).map_err(|e| wrong(&path, &e))
    }

    async fn get(&self, path: &str) -> Result<Bytes, PoolError> {
        let wrong = |reason: &dyn std::fmt::Display| wrong(path, reason);
        // Read each time: tokens are short-lived.
        let token = tokio::fs::read_to_string(self.cluster.account.join("token")).await;
        let token = token.map_err(|e| wrong(&e))?;
        let mut token =
            HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|e| wrong(&e))?;
        token.set_sensitive(true);
        let request = Request::get(format!("https://{}{path}", self.cluster.address))
            .header(AUTHORIZATION, token)
            .header(ACCEPT, "application/json")
            .body(Full::default())
            .map_err(|e| wrong(&e))?;
        let asked = async {
            let response = self.client.send(request).await.map_err(|e| wrong(&e))?;
            if !response.status().is_success() {
                return Err(wrong(&response.status()));
            }
            collect(response.into_body(), MAX_ANSWER)
                .await
                .map_err(|e| wrong(&e))
        };
        tokio::time::timeout(LIMIT, asked)
            .await
            .map_err(|e| wrong(&e))?
    }
}

fn wrong(path: &str, reason: &dyn std::fmt::Display) -> PoolError {
    PoolError::Answer {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Target;

    const PODS: &str = r#"{"items":[
        {"metadata":{"labels":{"llm-d.ai/role":"prefill"}},
         "status":{"podIP":"10.0.0.1","podIPs":[{"ip":"10.0.0.1"},{"ip":"fd00::1"}],"conditions":[{"type":"Ready","status":"True"}]}},
        {"metadata":{"labels":{"llm-d.ai/role":"decode"}},
         "status":{"podIP":"10.0.0.2","conditions":[{"type":"Ready","status":"True"}]}},
        {"metadata":{"labels":{"llm-d.ai/role":"prefill"}},
         "status":{"podIP":"10.0.0.3","conditions":[{"type":"Ready","status":"False"}]}},
        {"metadata":{"labels":{"llm-d.ai/role":"prefill"},"deletionTimestamp":"2026-01-01T00:00:00Z"},
         "status":{"podIP":"10.0.0.4","conditions":[{"type":"Ready","status":"True"}]}},
        {"metadata":{"labels":{"llm-d.ai/role":"encode-prefill"}},
         "status":{"podIP":"10.0.0.5","conditions":[{"type":"Ready","status":"True"}]}},
        {"metadata":{}}]}"#;

    fn v1() -> Pool {
        let text = br#"{"spec":{"selector":{"matchLabels":{"app":"x","llm-d.ai/y":"a b"}},"targetPorts":[{"number":8000},{"number":8001}],"endpointPickerRef":{"name":"epp"}}}"#;
        pool(PoolVersion::V1, text).unwrap()
    }

    #[test]
    fn both_forms_of_a_pool_are_read() {
        assert_eq!((v1().labels.len(), v1().ports), (2, vec![8000, 8001]));
        let old = br#"{"spec":{"selector":{"app":"x"},"targetPortNumber":8000}}"#;
        let old = pool(PoolVersion::V1Alpha2, old).unwrap();
        assert_eq!((old.labels["app"].as_str(), old.ports), ("x", vec![8000]));
        assert!(pool(PoolVersion::V1, br#"{"spec":{"selector":{"app":"x"}}}"#).is_err());
        assert_eq!(
            label_selector(&v1().labels),
            "app%3Dx%2Cllm-d.ai%2Fy%3Da%20b"
        );
    }

    #[test]
    fn only_ready_pods_that_prefill_are_servers_and_only_at_the_pools_ports() {
        let servers = servers(&v1(), PODS.as_bytes()).unwrap();
        for (address, expect) in [
            ("10.0.0.1:8000", true),
            ("[fd00::1]:8001", true),
            ("10.0.0.1:22", false),
            ("10.0.0.2:8000", false),
            ("10.0.0.3:8000", false),
            ("10.0.0.4:8000", false),
            ("10.0.0.5:8000", true),
        ] {
            assert_eq!(
                servers.has(&Target::parse(address).unwrap()),
                expect,
                "{address}"
            );
        }
    }
}
