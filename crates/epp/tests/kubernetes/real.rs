//! Beside a real control plane, with the rights of the manifests and no others.

use crate::machine::{Machine, tool};
use crate::picker::{NOT_SERVING, Picker, SERVING};
use serde_json::{Value, json};

const RIGHTS: [&str; 3] = [
    include_str!("../../../k8s/rbac/picker.yaml"),
    include_str!("../../../k8s/rbac/leader.yaml"),
    include_str!("../../../k8s/rbac/metrics.yaml"),
];

/// A service account with what a picker may do, and its kubeconfig.
fn account(machine: &Machine) -> String {
    RIGHTS.iter().for_each(|rights| machine.apply(rights));
    let namespace = &machine.namespace;
    machine.kubectl(&["create", "serviceaccount", "picker"]);
    let subject = json!([{"kind": "ServiceAccount", "name": "picker", "namespace": namespace}]);
    for (kind, binding, name) in [
        ("Role", "RoleBinding", "baton-picker"),
        ("Role", "RoleBinding", "baton-picker-leader"),
        ("ClusterRole", "ClusterRoleBinding", "baton-picker-metrics"),
    ] {
        let role = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name});
        let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": binding,
                             "metadata": {"name": name}, "roleRef": role, "subjects": subject});
        machine.apply(&binding.to_string());
    }
    let file = std::fs::read(tool(&["kubeconfig"]).trim()).unwrap();
    let mut config: Value = serde_json::from_slice(&file).unwrap();
    config["users"][0]["user"] = json!({"token": machine.token("picker")});
    config.to_string()
}

/// The token of an account that may get `/metrics`.
fn reader(machine: &Machine) -> String {
    machine.apply(
        "{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: epp-reader}, \
         rules: [{nonResourceURLs: [/metrics], verbs: [get]}]}",
    );
    machine.kubectl(&["create", "serviceaccount", "scraper"]);
    let subject = format!("{}:scraper", machine.namespace);
    let name = "epp-reader";
    machine.kubectl(&["delete", "clusterrolebinding", name, "--ignore-not-found"]);
    machine.kubectl(&[
        "create",
        "clusterrolebinding",
        name,
        "--clusterrole",
        name,
        "--serviceaccount",
        &subject,
    ]);
    machine.token("scraper")
}

#[tokio::test]
#[ignore = "needs a cluster: make test-cluster"]
async fn a_picker_with_the_rights_of_its_manifests_does_all_it_can() {
    let machine = Machine::new("epp").await;
    let kubeconfig = account(&machine);
    let scraper = reader(&machine);
    let picker = Picker::start(
        &kubeconfig,
        &machine.namespace,
        &["--ha-enable-leader-election"],
    )
    .await;
    assert_eq!(picker.status("").await, NOT_SERVING);
    machine.pool("m", &[8000]);
    picker.until_status(SERVING).await;
    machine.pod("a", "m").await;
    let token = Some(&*scraper);
    picker
        .until_metric(token, &["llm_d_epp_inflight_requests{", "\"a-rank-0\""])
        .await;
    machine.apply(
        "{apiVersion: llm-d.ai/v1alpha2, kind: InferenceObjective, metadata: {name: low}, \
         spec: {priority: -7, poolRef: {name: pool}}}",
    );
    picker
        .until("the priority of the objective", async || {
            picker.request("low").await;
            picker
                .page(token)
                .await
                .contains("priority=\"-7\"")
                .then_some(())
        })
        .await;
    assert!(picker.page(None).await.starts_with("HTTP/1.1 401"));
    let other = machine.token("picker");
    assert!(picker.page(Some(&other)).await.starts_with("HTTP/1.1 403"));
    picker.stop().await;
    let lease = format!("epp-{}-pool.llm-d.ai", machine.namespace);
    let holder = machine.kubectl(&[
        "get",
        "lease",
        &lease,
        "-o",
        "jsonpath={.spec.holderIdentity}",
    ]);
    assert_eq!(holder, "");
}
