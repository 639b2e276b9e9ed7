//! Dependencies between our crates point downwards, and what a floor must not touch it does not reach, even through
//! another crate.

use anyhow::Context as _;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Each crate's floor. A crate may depend on lower floors only, and on its own floor where [`SAME_FLOOR`] says so.
const FLOORS: &[(&str, u8)] = &[
    ("baton-openai", 0),
    ("baton-kv", 0),
    ("baton-graph", 1),
    ("baton-model", 1),
    ("baton-text", 1),
    ("baton-engine", 1),
    ("baton-scheduler", 1),
    ("baton-metrics", 1),
    ("baton-pjrt", 2),
    ("baton-checkpoint", 2),
    ("baton-runner", 2),
    ("baton-cpu", 2),
    ("baton-shm", 2),
    ("baton-kv-events", 2),
    ("baton-kv-transfer", 2),
    ("baton-http", 2),
    ("baton-fleet", 2),
    ("baton-ext-proc", 2),
    ("baton-k8s", 2),
    ("baton-peers", 2),
    ("baton-telemetry", 2),
    ("baton-sim", 2),
    ("baton-server", 3),
    ("baton-gateway", 3),
    ("baton-epp", 3),
    ("baton-sidecar", 3),
    ("baton-simulate", 3),
    ("baton", 4),
    ("xtask", 4),
];

/// Edges inside a floor, each with its reason.
const SAME_FLOOR: &[(&str, &str)] = &[
    ("baton-model", "baton-graph"),     // a model is a graph
    ("baton-runner", "baton-pjrt"),     // the runner is a graph on PJRT
    ("baton-ext-proc", "baton-http"),   // gRPC is HTTP/2 and a few bytes
    ("baton-kv-transfer", "baton-shm"), // on one machine KV lies where both sides see it
    ("baton-fleet", "baton-http"),      // servers are asked over HTTP how they are
    ("baton-k8s", "baton-fleet"),       // pods become its endpoints
    ("baton-peers", "baton-fleet"),     // what each sent is told, and counted
    ("baton-peers", "baton-http"),      // TLS
    ("baton-telemetry", "baton-http"),  // spans travel over it
];

const EFFECTS: &[&str] = &[
    "tokio",
    "hyper",
    "axum",
    "reqwest",
    "tracing",
    "rand",
    "getrandom",
    "libloading",
    "socket2",
];

/// Crates that must not be reached by ordinary dependencies, however indirectly.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("baton-openai", EFFECTS),
    ("baton-kv", EFFECTS),
    ("baton-graph", EFFECTS),
    ("baton-model", EFFECTS),
    ("baton-engine", EFFECTS),
    ("baton-scheduler", EFFECTS),
    // tokenizers brings rand and getrandom for training, which we do not call.
    (
        "baton-text",
        &[
            "tokio",
            "hyper",
            "axum",
            "reqwest",
            "tracing",
            "libloading",
            "socket2",
        ],
    ),
    (
        "baton-server",
        &["baton-pjrt", "baton-runner", "libloading"],
    ),
    (
        "baton-gateway",
        &["baton-pjrt", "baton-engine", "baton-text", "kube"],
    ),
    (
        "baton-fleet",
        &["baton-pjrt", "baton-engine", "baton-text", "kube", "tonic"],
    ),
    ("baton-runner", &["tokio", "hyper"]),
];

type Edges = BTreeMap<String, BTreeSet<String>>;

/// Reads the workspace's dependencies and returns one line for each that breaks a rule.
pub(crate) fn check() -> anyhow::Result<Vec<String>> {
    let out = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--locked"])
        .output()?;
    anyhow::ensure!(
        out.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    let edges = edges(&serde_json::from_slice(&out.stdout)?)
        .context("unexpected form of cargo metadata")?;
    Ok(complaints(&edges))
}

/// Ordinary and build dependencies of every package in the resolved graph, by package name.
fn edges(metadata: &Value) -> Option<Edges> {
    let names: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()?
        .iter()
        .map(|p| Some((p["id"].as_str()?, p["name"].as_str()?)))
        .collect::<Option<_>>()?;
    let mut edges = Edges::new();
    for node in metadata["resolve"]["nodes"].as_array()? {
        let from = edges
            .entry((*names.get(node["id"].as_str()?)?).to_owned())
            .or_default();
        for dep in node["deps"].as_array()? {
            let kinds = dep["dep_kinds"].as_array()?;
            if kinds.iter().any(|k| k["kind"].as_str() != Some("dev")) {
                from.insert((*names.get(dep["pkg"].as_str()?)?).to_owned());
            }
        }
    }
    Some(edges)
}

fn complaints(edges: &Edges) -> Vec<String> {
    let floors: BTreeMap<&str, u8> = FLOORS.iter().copied().collect();
    let ours = |name: &str| name == "xtask" || name == "baton" || name.starts_with("baton-");
    let mut out = Vec::new();
    for (from, deps) in edges.iter().filter(|(name, _)| ours(name)) {
        let Some(&floor) = floors.get(from.as_str()) else {
            out.push(format!(
                "{from} stands on no floor: add it to xtask/src/layers.rs and ARCHITECTURE.md"
            ));
            continue;
        };
        for to in deps.iter().filter(|name| ours(name)) {
            let allowed = floors.get(to.as_str()).is_some_and(|&below| below < floor)
                || SAME_FLOOR.contains(&(from.as_str(), to.as_str()));
            if !allowed {
                out.push(format!(
                    "{from} depends on {to}, which does not lie below it"
                ));
            }
        }
    }
    for (from, forbidden) in FORBIDDEN {
        let reached = reachable(edges, from);
        out.extend(
            forbidden
                .iter()
                .filter(|to| reached.contains(**to))
                .map(|to| format!("{from} reaches {to}, which it must not")),
        );
    }
    out
}

fn reachable<'a>(edges: &'a Edges, from: &'a str) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(name) = open.pop() {
        for dep in edges.get(name).into_iter().flatten() {
            if seen.insert(dep.as_str()) {
                open.push(dep);
            }
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(pairs: &[(&str, &str)]) -> Edges {
        let mut edges = Edges::new();
        for (from, to) in pairs {
            edges.entry((*to).to_owned()).or_default();
            edges
                .entry((*from).to_owned())
                .or_default()
                .insert((*to).to_owned());
        }
        edges
    }

    #[test]
    fn a_downward_edge_is_fine() {
        assert!(
            complaints(&graph(&[
                ("baton-server", "baton-engine"),
                ("baton-engine", "baton-kv")
            ]))
            .is_empty()
        );
    }

    #[test]
    fn an_upward_edge_is_refused() {
        let found = complaints(&graph(&[("baton-engine", "baton-server")]));
        assert_eq!(
            found,
            ["baton-engine depends on baton-server, which does not lie below it"]
        );
    }

    #[test]
    fn services_may_not_depend_on_each_other() {
        assert_eq!(
            complaints(&graph(&[("baton-gateway", "baton-server")])).len(),
            1
        );
    }

    #[test]
    fn a_forbidden_crate_is_found_behind_another() {
        let found = complaints(&graph(&[
            ("baton-engine", "innocent"),
            ("innocent", "tokio"),
        ]));
        assert_eq!(found, ["baton-engine reaches tokio, which it must not"]);
    }

    #[test]
    fn an_unknown_crate_must_be_given_a_floor() {
        assert!(
            complaints(&graph(&[("baton-new", "serde")]))[0]
                .starts_with("baton-new stands on no floor")
        );
    }

    #[test]
    fn dev_dependencies_do_not_count() {
        let metadata = serde_json::json!({
            "packages": [{"id": "a", "name": "baton-engine"}, {"id": "b", "name": "tokio"}],
            "resolve": {"nodes": [
                {"id": "a", "deps": [{"pkg": "b", "dep_kinds": [{"kind": "dev"}]}]},
                {"id": "b", "deps": []}]}});
        assert!(complaints(&edges(&metadata).unwrap()).is_empty());
    }
}
