//! Beside an API server in memory.

use crate::fake::{Fake, LEASES, OBJECTIVES, PODS, POOLS};
use crate::picker::{NOT_SERVING, Picker, SERVING};
use serde_json::{Value, json};

const OPEN: &str = "--metrics-endpoint-auth=false";

fn kubeconfig(fake: &Fake) -> String {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": fake.url()}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]
    });
    config.to_string()
}

fn pool() -> Value {
    json!({"spec": {"selector": {"matchLabels": {"app": "m"}}, "targetPorts": [{"number": 8000}, {"number": 8001}]}})
}

fn pod() -> Value {
    json!({
        "metadata": {"labels": {"app": "m", "llm-d.ai/role": "decode"}},
        "status": {"podIP": "127.0.0.9", "conditions": [{"type": "Ready", "status": "True"}]}
    })
}

fn objective(priority: i32) -> Value {
    json!({"spec": {"priority": priority, "poolRef": {"name": "pool"}}})
}

#[tokio::test]
async fn a_pool_makes_it_ready_and_its_pods_are_the_endpoints() {
    let fake = Fake::start(&[POOLS, PODS, OBJECTIVES]).await;
    let picker = Picker::start(&kubeconfig(&fake), "ns", &[OPEN]).await;
    assert_eq!(picker.status("").await, NOT_SERVING);
    assert_eq!(picker.status("liveness").await, SERVING);
    fake.put(POOLS, "pool", pool());
    picker.until_status(SERVING).await;
    fake.put(PODS, "a", pod());
    for name in ["\"a-rank-0\"", "\"a-rank-1\""] {
        picker
            .until_metric(None, &["llm_d_epp_inflight_requests{", name, "\"ns\""])
            .await;
    }
    fake.put(OBJECTIVES, "low", objective(-7));
    picker
        .until("the priority of the objective", async || {
            picker.request("low").await;
            let page = picker.page(None).await;
            page.contains("priority=\"-7\"").then_some(())
        })
        .await;
    fake.delete(PODS, "a");
    picker
        .until("no endpoint", async || {
            (!picker.page(None).await.contains("a-rank-")).then_some(())
        })
        .await;
    assert_eq!(picker.status("").await, SERVING);
    fake.delete(POOLS, "pool");
    picker.until_status(NOT_SERVING).await;
    picker.stop().await;
}

#[tokio::test]
async fn who_may_not_read_objectives_does_without() {
    let fake = Fake::start(&[POOLS, PODS, OBJECTIVES]).await;
    fake.refuse("list", OBJECTIVES, Some(403));
    fake.put(POOLS, "pool", pool());
    fake.put(PODS, "a", pod());
    let picker = Picker::start(&kubeconfig(&fake), "ns", &[OPEN]).await;
    picker.until_status(SERVING).await;
    picker
        .until_metric(None, &["llm_d_epp_inflight_requests{", "a-rank-0"])
        .await;
    picker.stop().await;
}

#[tokio::test]
async fn of_two_the_one_that_leads_is_ready_and_the_other_follows_it() {
    let fake = Fake::start(&[POOLS, PODS, LEASES]).await;
    fake.put(POOLS, "pool", pool());
    fake.put(PODS, "a", pod());
    let flags = [OPEN, "--ha-enable-leader-election"];
    let first = Picker::start(&kubeconfig(&fake), "ns", &flags).await;
    first.until_status(SERVING).await;
    let second = Picker::start(&kubeconfig(&fake), "ns", &flags).await;
    // It knows the endpoints, and is alive, but not ready.
    second
        .until_metric(None, &["llm_d_epp_inflight_requests{", "a-rank-0"])
        .await;
    assert_eq!(second.status("readiness").await, NOT_SERVING);
    assert_eq!(second.status("liveness").await, SERVING);
    first.stop().await;
    let lease = fake.get(LEASES, "epp-ns-pool.llm-d.ai").unwrap();
    assert_eq!(lease["spec"]["holderIdentity"], "");
    second.until_status(SERVING).await;
    second.stop().await;
}

#[tokio::test]
async fn metrics_are_for_who_may_read_them() {
    let fake = Fake::start(&[POOLS, PODS]).await;
    let picker = Picker::start(&kubeconfig(&fake), "ns", &[]).await;
    let page = picker.page(None).await;
    assert!(
        page.starts_with("HTTP/1.1 401") && !page.contains("llm_d_epp"),
        "{page}"
    );
    // This API server knows no tokens, so nobody is let in.
    let page = picker.page(Some("t")).await;
    assert!(
        page.starts_with("HTTP/1.1 500") && !page.contains("llm_d_epp"),
        "{page}"
    );
    picker.stop().await;
}
