//! The roles that are shipped allow what is asked for, and nothing besides.

use crate::machine::Machine;
use crate::pods::Followed;
use baton_k8s::election::Timing;
use baton_k8s::{Access, LeaseName, PoolName, lead};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::sync::watch;

const PICKER: &str = include_str!("../../rbac/picker.yaml");
const LEADER: &str = include_str!("../../rbac/leader.yaml");
const METRICS: &str = include_str!("../../rbac/metrics.yaml");

const TIMING: Timing = Timing {
    lease: Duration::from_secs(3),
    renew_deadline: Duration::from_secs(2),
    retry: Duration::from_millis(200),
};

/// Everything that a role allows, as "VERB GROUP/RESOURCE".
fn allowed(machine: &Machine, kind: &str, name: &str) -> BTreeSet<String> {
    let role = machine.kubectl(&["get", kind, name, "-o", "json"]);
    let role: serde_json::Value = serde_json::from_str(&role).unwrap();
    let words = |rule: &serde_json::Value, key: &str| -> Vec<String> {
        serde_json::from_value(rule[key].clone()).unwrap_or_default()
    };
    let mut all = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        for group in words(rule, "apiGroups") {
            for resource in words(rule, "resources") {
                all.extend(
                    words(rule, "verbs")
                        .iter()
                        .map(|verb| format!("{verb} {group}/{resource}")),
                );
            }
        }
    }
    all
}

fn bind(machine: &Machine, account: &str, role: &str) {
    machine.kubectl(&["create", "serviceaccount", account]);
    let account = format!("{}:{account}", machine.namespace);
    machine.kubectl(&[
        "create",
        "rolebinding",
        role,
        "--role",
        role,
        "--serviceaccount",
        &account,
    ]);
}

#[tokio::test]
#[ignore = "needs a cluster: make test-cluster"]
async fn following_a_pool_uses_its_role_to_the_last_verb() {
    let machine = Machine::new("rights").await;
    machine.apply(PICKER);
    bind(&machine, "picker", "baton-picker");
    machine.pool("m", &[8000]);
    machine.pod("a", "m").await;
    let mut followed = Followed::start(machine.account("picker").await, &machine.namespace);
    followed
        .until("in step", |s| s.synced && s.endpoints.len() == 1)
        .await;
    let role = allowed(&machine, "role", "baton-picker");
    let old = |right: &&String| right.contains("x-k8s.io");
    let until_used = async |wanted: &BTreeSet<String>| {
        let used = async {
            while !machine.used_by("picker").is_superset(wanted) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(60), used).await;
        assert!(
            in_time.is_ok(),
            "{:?} of {wanted:?}",
            machine.used_by("picker")
        );
    };
    until_used(&role.iter().filter(|r| !old(r)).cloned().collect()).await;
    // The older group is asked where the newer one is not served.
    for kind in ["inferenceobjectives", "inferencemodelrewrites"] {
        machine.kubectl(&["delete", "crd", &format!("{kind}.llm-d.ai")]);
    }
    until_used(&role).await;
    assert_eq!(machine.used_by("picker"), role);
}

#[tokio::test]
#[ignore = "needs a cluster: make test-cluster"]
async fn who_may_read_pods_and_pool_alone_does_without_the_rest() {
    let machine = Machine::new("rights-few").await;
    let few = PICKER.split("- apiGroups: [llm-d.ai").next().unwrap();
    machine.apply(few);
    bind(&machine, "picker", "baton-picker");
    machine.pool("m", &[8000]);
    machine.pod("a", "m").await;
    let mut followed = Followed::start(machine.account("picker").await, &machine.namespace);
    followed
        .until("in step", |s| s.synced && s.endpoints.len() == 1)
        .await;
    machine.apply(PICKER);
    machine.apply(
        "{apiVersion: llm-d.ai/v1alpha2, kind: InferenceObjective, metadata: {name: o}, spec: {poolRef: {name: pool}}}",
    );
    followed
        .until("allowed later", |s| s.objectives.contains_key("o"))
        .await;
}

#[tokio::test]
#[ignore = "needs a cluster: make test-cluster"]
async fn of_two_one_leads_and_the_other_when_it_is_killed() {
    let machine = Machine::new("leader").await;
    machine.apply(LEADER);
    bind(&machine, "picker", "baton-picker-leader");
    let stand = async |name: &str| {
        let (sender, leads) = watch::channel(false);
        let (stop, stopped) = watch::channel(false);
        let lease = LeaseName::of(&PoolName::new(&machine.namespace, "pool"), name);
        let task = tokio::spawn(lead(
            machine.account("picker").await,
            lease,
            TIMING,
            sender,
            stopped,
        ));
        (leads, stop, task)
    };
    let until = async |leads: &mut watch::Receiver<bool>| {
        let led =
            tokio::time::timeout(Duration::from_secs(60), leads.wait_for(|leads| *leads)).await;
        led.unwrap().unwrap();
    };
    let (mut a, _stop_a, task_a) = stand("a").await;
    until(&mut a).await;
    let (mut b, stop_b, task_b) = stand("b").await;
    tokio::time::sleep(TIMING.lease * 2).await;
    assert!(*a.borrow() && !*b.borrow());
    task_a.abort();
    until(&mut b).await;
    // It is handed over, not waited for.
    let (mut c, _stop_c, task_c) = stand("c").await;
    stop_b.send_replace(true);
    task_b.await.unwrap();
    until(&mut c).await;
    task_c.abort();
    let holder = machine.kubectl(&[
        "get",
        "leases",
        "-o",
        "jsonpath={.items[*].spec.holderIdentity}",
    ]);
    assert_eq!(holder, "c");
    assert_eq!(
        machine.used_by("picker"),
        allowed(&machine, "role", "baton-picker-leader")
    );
}

#[tokio::test]
#[ignore = "needs a cluster: make test-cluster"]
async fn who_reads_metrics_is_looked_up() {
    let machine = Machine::new("metrics").await;
    machine.apply(METRICS);
    machine.apply(
        "{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: reader}, \
         rules: [{nonResourceURLs: [/metrics], verbs: [get]}]}",
    );
    for (account, role) in [("picker", "baton-picker-metrics"), ("scraper", "reader")] {
        machine.kubectl(&["create", "serviceaccount", account]);
        machine.kubectl(&[
            "delete",
            "clusterrolebinding",
            account,
            "--ignore-not-found",
        ]);
        let subject = format!("{}:{account}", machine.namespace);
        machine.kubectl(&[
            "create",
            "clusterrolebinding",
            account,
            "--clusterrole",
            role,
            "--serviceaccount",
            &subject,
        ]);
    }
    let access = Access::new(machine.account("picker").await);
    let scraper = machine.token("scraper");
    // Bindings take a moment to be known.
    let known = async {
        while !matches!(
            Access::new(machine.account("picker").await)
                .may_get(&scraper, "/metrics")
                .await,
            Ok(true)
        ) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), known)
        .await
        .unwrap();
    assert!(access.may_get(&scraper, "/metrics").await.unwrap());
    assert!(!access.may_get(&scraper, "/debug/decisions").await.unwrap());
    assert!(
        !access
            .may_get(&machine.token("default"), "/metrics")
            .await
            .unwrap()
    );
    assert!(!access.may_get("made up", "/metrics").await.unwrap());
    assert!(!access.may_get("", "/metrics").await.unwrap());
    let role = allowed(&machine, "clusterrole", "baton-picker-metrics");
    assert_eq!(machine.used_by("picker"), role);
}
