//! Tables for `rules`.

use super::*;
use serde_json::{Value, json};

fn pool(spec: Value) -> Pool {
    Pool::read(&serde_json::from_value(spec).unwrap())
}

fn two_ports() -> Pool {
    pool(
        json!({"selector": {"matchLabels": {"app": "m", "tier": "1"}}, "targetPorts": [{"number": 8000}, {"number": 8001}]}),
    )
}

/// A pod that can serve, changed by `change`.
fn pod(change: impl FnOnce(&mut Value)) -> Option<Pod> {
    let mut pod = json!({
        "metadata": {"name": "p", "labels": {"app": "m", "tier": "1", "llm-d.ai/role": "decode"}, "annotations": {}},
        "spec": {"containers": []},
        "status": {"podIP": "10.1.2.3", "phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}]}
    });
    change(&mut pod);
    Pod::read(serde_json::from_value(pod).unwrap())
}

fn names(pool: &Pool, pod: &Pod) -> Vec<String> {
    pool.endpoints("ns", "p", pod)
        .map(|e| format!("{} {}", e.name, e.address))
        .collect()
}

#[test]
fn a_ready_pod_is_an_endpoint_on_each_port() {
    let pod = pod(|_| {}).unwrap();
    let pool = two_ports();
    assert!(pool.selects(&pod));
    assert_eq!(
        names(&pool, &pod),
        ["p-rank-0 10.1.2.3:8000", "p-rank-1 10.1.2.3:8001"]
    );
    let first = pool.endpoints("ns", "p", &pod).next().unwrap();
    assert_eq!((first.namespace.as_str(), first.rank), ("ns", 0));
    assert_eq!(first.labels["llm-d.ai/role"], "decode");
}

#[test]
fn a_pod_serves_only_while_it_can() {
    type Change = fn(&mut Value);
    let table: [(&str, Change); 7] = [
        ("not ready", |p| {
            p["status"]["conditions"][1]["status"] = json!("False");
        }),
        ("readiness unknown", |p| {
            p["status"]["conditions"][1]["status"] = json!("Unknown");
        }),
        ("no conditions", |p| p["status"]["conditions"] = json!([])),
        ("going", |p| {
            p["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }),
        ("no address", |p| p["status"]["podIP"] = Value::Null),
        ("no true address", |p| p["status"]["podIP"] = json!("here")),
        ("no status", |p| p["status"] = json!({})),
    ];
    for (why, change) in table {
        assert_eq!(pod(change), None, "{why}");
    }
}

#[test]
fn a_selector_wants_all_of_its_labels() {
    let pool = two_ports();
    for (labels, selected) in [
        (json!({"app": "m", "tier": "1"}), true),
        (json!({"app": "m", "tier": "1", "more": ""}), true),
        (json!({"app": "m", "tier": "2"}), false),
        (json!({"app": "m"}), false),
        (json!({}), false),
    ] {
        let pod = pod(|p| p["metadata"]["labels"] = labels.clone()).unwrap();
        assert_eq!(pool.selects(&pod), selected, "{labels}");
    }
    assert_eq!(pool.label_selector().unwrap(), "app=m,tier=1");
    // Kubernetes would let an empty selector select everything in the namespace, which nobody means here.
    let none = Pool {
        members: Members::Labels(BTreeMap::new()),
        ..pool
    };
    assert_eq!(none.label_selector(), None);
    assert!(!none.selects(&pod(|_| {}).unwrap()));
}

#[test]
fn annotations_say_which_ports_are_in_use() {
    let pool = two_ports();
    let both = ["p-rank-0 10.1.2.3:8000", "p-rank-1 10.1.2.3:8001"];
    for (annotations, wanted) in [
        (json!({}), &both[..]),
        (json!({"llm-d.ai/active-ports": "8001"}), &both[1..]),
        (
            json!({"inference.networking.k8s.io/active-ports": "8000"}),
            &both[..1],
        ),
        (
            json!({"llm-d.ai/active-ports": "8000", "inference.networking.k8s.io/active-ports": "8001"}),
            &both[..1],
        ),
        (
            json!({"llm-d.ai/active-ports": " 8001 , 8000,9000"}),
            &both[..],
        ),
        (json!({"llm-d.ai/active-ports": "9000,x,"}), &[]),
        (json!({"llm-d.ai/active-ports": ""}), &[]),
    ] {
        let pod = pod(|p| p["metadata"]["annotations"] = annotations.clone()).unwrap();
        assert_eq!(names(&pool, &pod), wanted, "{annotations}");
    }
}

#[test]
fn a_pool_is_read_in_both_versions() {
    let new = two_ports();
    assert_eq!(new.target_ports, [8000, 8001]);
    assert_eq!(new.app_protocol, AppProtocol::Http);
    let old = pool(json!({"selector": {"app": "m", "tier": "1"}, "targetPortNumber": 8000}));
    assert_eq!(
        (&old.members, &old.target_ports[..]),
        (&new.members, &[8000][..])
    );
    for (word, protocol) in [
        ("http", AppProtocol::Http),
        ("kubernetes.io/h2c", AppProtocol::H2c),
        ("x", AppProtocol::Other("x".into())),
    ] {
        let pool = pool(json!({"selector": {"matchLabels": {}}, "appProtocol": word}));
        assert_eq!(pool.app_protocol, protocol);
    }
    assert_eq!(
        pool(json!({"targetPorts": [{"number": 0}, {"number": 70000}, {"number": -1}]}))
            .target_ports,
        [0u16; 0]
    );
    let none = pool(json!({"selector": {}})).members;
    assert_eq!(none, Members::Labels(BTreeMap::new()));
}

#[test]
fn an_address_of_version_six_is_an_address() {
    let pod = pod(|p| p["status"]["podIP"] = json!("fd00::7")).unwrap();
    assert_eq!(names(&two_ports(), &pod)[0], "p-rank-0 [fd00::7]:8000");
}

#[test]
fn objectives_and_rewrites_belong_to_one_pool() {
    let mine = PoolName::new("ns", "mine");
    for (reference, belongs) in [
        (json!({"name": "mine"}), true),
        (
            json!({"name": "mine", "group": "inference.networking.k8s.io", "kind": "InferencePool"}),
            true,
        ),
        (json!({"name": "mine", "group": "", "kind": ""}), true),
        (json!({"name": "other"}), false),
        (
            json!({"name": "mine", "group": "inference.networking.x-k8s.io"}),
            false,
        ),
        (json!({"name": "mine", "kind": "Service"}), false),
        (json!({}), false),
    ] {
        let spec = serde_json::from_value(json!({"priority": -3, "poolRef": reference})).unwrap();
        assert_eq!(
            read_objective(&mine, &spec),
            belongs.then_some(Objective { priority: -3 }),
            "{reference}"
        );
    }
    let unset = serde_json::from_value(json!({"poolRef": {"name": "mine"}})).unwrap();
    assert_eq!(
        read_objective(&mine, &unset),
        Some(Objective { priority: 0 })
    );
}

#[test]
fn a_rewrite_keeps_its_rules_in_order() {
    let object = json!({
        "metadata": {"name": "r", "creationTimestamp": "2026-01-02T03:04:05Z"},
        "spec": {"poolRef": {"name": "mine"}, "rules": [
            {"matches": [{"model": {"type": "Exact", "value": "a"}}, {"model": {"value": "b"}}],
             "targets": [{"modelRewrite": "c", "weight": 3}, {"modelRewrite": "d"}]},
            {"targets": [{"modelRewrite": "e"}]}]}
    });
    let rewrite = read_rewrite(
        &PoolName::new("ns", "mine"),
        serde_json::from_value(object).unwrap(),
    )
    .unwrap();
    assert_eq!(
        (rewrite.name.as_str(), rewrite.created),
        ("r", 1_767_323_045)
    );
    assert_eq!(rewrite.rules[0].models, ["a", "b"]);
    let target = |model: &str, weight| RewriteTarget {
        model: model.into(),
        weight,
    };
    assert_eq!(
        rewrite.rules[0].targets,
        [target("c", Some(3)), target("d", None)]
    );
    assert_eq!(
        (
            rewrite.rules[1].models.len(),
            rewrite.rules[1].targets.len()
        ),
        (0, 1)
    );
}
