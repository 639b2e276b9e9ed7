//! What is told of KV that moved, and what happens when it does not come.

use serde_json::{Value, json};

use crate::handover::{COMPLETIONS, Fleet, prompt};

#[tokio::test]
async fn a_transfer_is_measured_on_both_sides() {
    let fleet = Fleet::start().await;
    let prefiller = fleet.prefill.addr.to_string();
    let body = json!({"prompt": prompt(9), "max_tokens": 3, "temperature": 0});
    let answer = fleet.decode_after(&prefiller, COMPLETIONS, &body).await;
    answer.json();
    let decode = &fleet.decode;
    for phase in ["h2d", "total"] {
        let label = format!("phase=\"{phase}\"");
        let count = decode.metric_of("kvx_transfer_seconds_count", &label);
        assert_eq!(count.await, 1.0, "{phase}");
    }
    for name in ["transfer_time_ms", "megabytes_transferred"] {
        let name = format!("vllm:tpu_kv_{name}_count");
        assert_eq!(decode.metric(&name).await, 1.0, "{name}");
    }
    let copied = "vllm:tpu_d2h_transfer_time_ms_count";
    assert_eq!(fleet.prefill.metric(copied).await, 1.0);
    let bytes = "kvx_transfer_bytes_total";
    let sent = fleet.prefill.metric_of(bytes, "dir=\"out\"").await;
    assert!(sent > 0.0);
    assert_eq!(decode.metric_of(bytes, "dir=\"in\"").await, sent);
    assert_eq!(decode.metric("kvx_recompute_tokens_total").await, 0.0);
    assert_eq!(decode.metric("kvx_transfer_failed_total").await, 0.0);
}

#[tokio::test]
async fn tokens_computed_for_want_of_kv_are_counted_by_reason() {
    let fleet = Fleet::start().await;
    let mut body = json!({"prompt": vec![65; 101], "max_tokens": 2, "temperature": 0});
    body["kv_transfer_params"] =
        json!({"remote_block_ids": [1], "remote_host": "127.0.0.1", "remote_port": "1", "uuid": 7});
    fleet.decode.post(COMPLETIONS, body.clone()).await.json();
    body["prompt"] = vec![66; 51].into();
    body["kv_transfer_params"] = Value::Null;
    let dead = "127.0.0.1:1";
    let answer = fleet.decode_after(dead, COMPLETIONS, &body).await;
    answer.json();
    let expected = [("foreign_producer", 100.0), ("prefiller_unreachable", 50.0)];
    for (reason, n_tokens) in expected {
        let label = format!("reason=\"{reason}\"");
        let counted = fleet.decode.metric_of("kvx_recompute_tokens_total", &label);
        assert_eq!(counted.await, n_tokens, "{reason}");
    }
    // What was never begun is no failed transfer.
    let failed = "kvx_transfer_failed_total";
    assert_eq!(fleet.decode.metric(failed).await, 1.0);
    let foreign = "code=\"foreign_producer\"";
    assert_eq!(fleet.decode.metric_of(failed, foreign).await, 1.0);
}
