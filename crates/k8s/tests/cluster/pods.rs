//! A pool and its pods, followed on a real API server.

use crate::machine::{Machine, tool, works};
use baton_k8s::{Pace, PoolName, PoolState, follow};
use kube::Client;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

pub(crate) const PACE: Pace = Pace {
    retry_first: Duration::from_millis(50),
    retry_most: Duration::from_millis(500),
    recheck: Duration::from_millis(500),
};

/// The snapshots of a pool that is followed in the background.
pub(crate) struct Followed(watch::Receiver<Arc<PoolState>>, tokio::task::JoinHandle<()>);

impl Followed {
    pub(crate) fn start(client: Client, namespace: &str) -> Self {
        let (sender, receiver) = watch::channel(Arc::default());
        let task = tokio::spawn(follow(
            client,
            PoolName::new(namespace, "pool"),
            None,
            PACE,
            sender,
        ));
        Self(receiver, task)
    }

    pub(crate) async fn until(
        &mut self,
        what: &str,
        wanted: impl Fn(&PoolState) -> bool,
    ) -> Arc<PoolState> {
        let found = self.0.wait_for(|state| wanted(state));
        let found = tokio::time::timeout(Duration::from_secs(120), found).await;
        let found = found.ok().map(|state| state.unwrap().clone());
        found.unwrap_or_else(|| panic!("never: {what}; now {:?}", self.0.borrow()))
    }

    async fn until_count(&mut self, count: usize) {
        self.until(&format!("{count} endpoints"), |s| {
            s.synced && s.endpoints.len() == count
        })
        .await;
    }

    /// Fails when an endpoint that should stay is gone for a moment.
    fn keeps(&self, name: &'static str) -> tokio::task::JoinHandle<()> {
        let mut states = self.0.clone();
        tokio::spawn(async move {
            while states.changed().await.is_ok() {
                let state = states.borrow_and_update().clone();
                assert!(
                    state.synced && state.endpoints.iter().any(|e| e.name == name),
                    "{state:?}"
                );
            }
        })
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.1.abort();
    }
}

#[tokio::test]
#[ignore = "needs a cluster: make test-cluster"]
async fn pods_and_pool_change_under_load() {
    let machine = Machine::new("under-load").await;
    let mut followed = Followed::start(machine.client.clone(), &machine.namespace);
    machine.pool("m", &[8000]);
    followed.until_count(0).await;
    for n in 0..60 {
        machine.pod(&format!("p{n}"), "m").await;
    }
    machine.pod("other", "n").await;
    followed.until_count(60).await;
    for n in 0..60 {
        match n % 3 {
            0 => machine.remove(&format!("p{n}")).await,
            1 => machine.ready(&format!("p{n}"), false).await,
            _ => {}
        }
    }
    followed.until_count(20).await;
    machine.pool("m", &[8000, 8001]);
    followed.until_count(40).await;
    machine.kubectl(&["annotate", "pod", "p2", "llm-d.ai/active-ports=8001"]);
    followed.until_count(39).await;
    machine.kubectl(&["label", "pod", "p5", "app=n", "--overwrite"]);
    followed.until_count(37).await;
    machine.pool("n", &[8000]);
    followed.until_count(2).await;
    machine.kubectl(&["delete", "inferencepool", "pool"]);
    followed
        .until("no pool", |s| {
            s.pool.is_none() && !s.synced && s.endpoints.is_empty()
        })
        .await;
}

#[tokio::test]
#[ignore = "needs a cluster: make test-cluster"]
async fn a_restarted_api_server_is_found_again_without_a_flap() {
    let machine = Machine::new("restarted").await;
    machine.pool("m", &[8000]);
    machine.pod("stays", "m").await;
    let mut followed = Followed::start(machine.client.clone(), &machine.namespace);
    followed.until_count(1).await;
    let guard = followed.keeps("stays-rank-0");
    for (round, how) in ["stop", "kill"].into_iter().enumerate() {
        tool(&[how, "kube-apiserver"]);
        tokio::time::sleep(Duration::from_secs(2)).await;
        tool(&["start", "kube-apiserver"]);
        let ready = async {
            while !works(&["exec", "kubectl", "get", "--raw", "/readyz"]) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(120), ready)
            .await
            .unwrap();
        machine.pod(&format!("late{round}"), "m").await;
        followed.until_count(round + 2).await;
    }
    drop(followed);
    guard.await.unwrap();
}

#[tokio::test]
#[ignore = "needs a cluster: make test-cluster"]
async fn definitions_may_be_missing_and_come_later() {
    let machine = Machine::new("definitions").await;
    let definitions = [
        "inferenceobjectives.llm-d.ai",
        "inferenceobjectives.inference.networking.x-k8s.io",
    ];
    for definition in definitions {
        machine.kubectl(&["delete", "crd", definition, "--ignore-not-found"]);
    }
    machine.pool("m", &[8000]);
    let mut followed = Followed::start(machine.client.clone(), &machine.namespace);
    followed.until_count(0).await;
    for (set, group, priority) in [
        ("inference", "inference.networking.x-k8s.io", 1),
        ("llm-d", "llm-d.ai", 2),
    ] {
        tool(&["define", set]);
        let objective = format!(
            "{{apiVersion: {group}/v1alpha2, kind: InferenceObjective, metadata: {{name: o}}, \
             spec: {{priority: {priority}, poolRef: {{name: pool}}}}}}"
        );
        machine.apply(&objective);
        followed
            .until(group, |s| {
                s.objectives
                    .get("o")
                    .is_some_and(|o| o.priority == priority)
            })
            .await;
    }
}
