//! What the objects mean: which pods are endpoints, which objectives and rewrites are the pool's.

use crate::PoolName;
use crate::kinds::{
    self, Nothing, Object, ObjectiveSpec, PodStatus, PoolSpec, RewriteSpec, Selector,
};
use baton_fleet::{Address, EndpointSpec};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Names the ports of a pod that are in use, the current name first: data-parallel ranks come and go by it.
const ACTIVE_PORTS: [&str; 2] = [
    "llm-d.ai/active-ports",
    "inference.networking.k8s.io/active-ports",
];

/// What a pool says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Which pods are its.
    pub members: Members,
    /// Each is an endpoint on each pod; the place in this list is its rank.
    pub target_ports: Vec<u16>,
    /// What the endpoints speak.
    pub app_protocol: AppProtocol,
}

/// Which pods belong to a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Members {
    /// Those that have all of these labels, with these values.
    Labels(BTreeMap<String, String>),
    /// Those that the API server finds by this selector, in any of its forms.
    Query(String),
}

/// What endpoints speak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppProtocol {
    /// HTTP/1.1, unless told otherwise.
    Http,
    /// HTTP/2 without TLS.
    H2c,
    /// A word that is not known here.
    Other(String),
}

/// How important requests are that name this objective.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Objective {
    /// More is more important; below zero, requests may be shed.
    pub priority: i32,
}

/// Other names for models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// The object's name.
    pub name: String,
    /// When it was made, in seconds since 1970; of two that match, the older one counts.
    pub created: i64,
    /// In the order in which they are tried.
    pub rules: Vec<RewriteRule>,
}

/// What becomes of some models' names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RewriteRule {
    /// Names this rule is for; none means all that no other rule names.
    pub models: Vec<String>,
    /// One of these is drawn.
    pub targets: Vec<RewriteTarget>,
}

/// A name that a model's name may become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RewriteTarget {
    /// The new name.
    pub model: String,
    /// How often, compared with the others.
    pub weight: Option<u32>,
}

/// A pod that can serve, in as few words as the rules need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    ip: IpAddr,
    labels: BTreeMap<String, String>,
    /// Of the target ports, those in use; `None` means all.
    active: Option<Vec<u16>>,
}

impl Pool {
    /// Reads a pool of either version. Ports that cannot be are left out; the API server lets none through.
    pub(crate) fn read(spec: &PoolSpec) -> Self {
        let selector = match &spec.selector {
            Selector::Named { match_labels } => match_labels.clone(),
            Selector::Bare(labels) => labels.clone(),
        };
        let numbers = spec.target_ports.iter().map(|p| p.number);
        let ports = numbers.chain(spec.target_port_number);
        Self {
            members: Members::Labels(selector),
            target_ports: ports
                .filter_map(|p| u16::try_from(p).ok().filter(|p| *p != 0))
                .collect(),
            app_protocol: match spec.app_protocol.as_deref() {
                None | Some("" | "http") => AppProtocol::Http,
                Some("kubernetes.io/h2c") => AppProtocol::H2c,
                Some(other) => AppProtocol::Other(other.to_owned()),
            },
        }
    }

    /// The selector as the API server takes it. `None` for an empty one, which selects nothing here.
    pub(crate) fn label_selector(&self) -> Option<String> {
        match &self.members {
            Members::Query(selector) => Some(selector.clone()),
            Members::Labels(labels) => {
                let terms: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
                (!terms.is_empty()).then(|| terms.join(","))
            }
        }
    }

    /// Whether the pod is a member.
    pub(crate) fn selects(&self, pod: &Pod) -> bool {
        match &self.members {
            // What was found is never asked for by anything else.
            Members::Query(_) => true,
            Members::Labels(labels) => {
                !labels.is_empty() && labels.iter().all(|(k, v)| pod.labels.get(k) == Some(v))
            }
        }
    }

    /// The endpoints on this pod of the pool.
    pub(crate) fn endpoints<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
        pod: &'a Pod,
    ) -> impl Iterator<Item = EndpointSpec> + 'a {
        let used = move |port: &u16| {
            pod.active
                .as_ref()
                .is_none_or(|active| active.contains(port))
        };
        (0..)
            .zip(&self.target_ports)
            .filter(move |(_, port)| used(port))
            .map(move |(rank, port)| EndpointSpec {
                namespace: namespace.to_owned(),
                name: format!("{name}-rank-{rank}"),
                address: Address::from(SocketAddr::new(pod.ip, *port)),
                metrics: None,
                rank,
                labels: pod.labels.clone(),
            })
    }
}

impl Pod {
    /// Reads a pod; `None` while it cannot serve: not ready, on its way out, or without an address.
    pub(crate) fn read(object: Object<Nothing, PodStatus>) -> Option<Self> {
        let ready = object
            .status
            .conditions
            .iter()
            .any(|c| c.kind == "Ready" && c.status == "True");
        if !ready || object.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let annotations = object.metadata.annotations.unwrap_or_default();
        let active = ACTIVE_PORTS.iter().find_map(|name| annotations.get(*name));
        Some(Self {
            ip: object.status.pod_ip?.parse().ok()?,
            labels: object.metadata.labels.unwrap_or_default(),
            active: active.map(|ports| {
                ports
                    .split(',')
                    .filter_map(|p| p.trim().parse().ok())
                    .collect()
            }),
        })
    }
}

/// Reads an objective; `None` if it is for another pool.
pub(crate) fn read_objective(pool: &PoolName, spec: &ObjectiveSpec) -> Option<Objective> {
    is_for(pool, &spec.pool_ref).then(|| Objective {
        priority: spec.priority.unwrap_or(0),
    })
}

/// Reads a rewrite; `None` if it is for another pool.
pub(crate) fn read_rewrite(pool: &PoolName, object: Object<RewriteSpec>) -> Option<Rewrite> {
    let rule = |rule: kinds::RuleSpec| RewriteRule {
        models: rule.matches.into_iter().map(|m| m.model.value).collect(),
        targets: rule
            .targets
            .into_iter()
            .map(|t| RewriteTarget {
                model: t.model_rewrite,
                weight: t.weight,
            })
            .collect(),
    };
    is_for(pool, &object.spec.pool_ref).then(|| Rewrite {
        name: object.metadata.name.unwrap_or_default(),
        created: object
            .metadata
            .creation_timestamp
            .map_or(0, |t| t.0.as_second()),
        rules: object.spec.rules.into_iter().map(rule).collect(),
    })
}

fn is_for(pool: &PoolName, reference: &kinds::PoolRef) -> bool {
    let group = reference.group.as_deref().filter(|g| !g.is_empty());
    let kind = reference.kind.as_deref().filter(|k| !k.is_empty());
    reference.name == pool.name
        && group.unwrap_or(kinds::POOL_GROUP) == pool.group
        && kind.unwrap_or(kinds::POOLS.kind) == kinds::POOLS.kind
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
