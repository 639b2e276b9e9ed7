//! What is told of KV that moved, and what happens when it does not come.

use baton_server::Role;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};

use crate::handover::{COMPLETIONS, Fleet, HEADER, ask_early, give_back, held_up, prompt};
use crate::support::{Reply, Server, Setup, begin, texts};

/// Nobody listens there.
const DEAD: &str = "127.0.0.1:1";

/// A decode server that computes so many tokens of a prompt whose KV does not come.
async fn fleet_of_patience(recompute_max: u32) -> Fleet {
    let mut decode = Setup::role(Role::Decode).slow();
    decode.config.recompute_max = recompute_max;
    Fleet::with(decode).await
}

/// An answer that flows, and goes on for as long as any of these tests takes.
async fn flowing(server: &Server) -> http::Response<Incoming> {
    let body = json!({"prompt": "long", "max_tokens": 2000, "ignore_eos": true, "stream": true});
    let mut response = begin(server, COMPLETIONS, &body).await;
    response.frame().await.unwrap().unwrap();
    response
}

#[track_caller]
fn assert_given_up(reply: &Reply) {
    assert_eq!(reply.status, 503, "{}", reply.text());
    assert_eq!(reply.headers["retry-after"], "1");
    let error: Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(error["error"]["type"], "kv_transfer_failed");
}

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
    let answer = fleet.decode_after(DEAD, COMPLETIONS, &body).await;
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

#[tokio::test]
async fn a_long_prompt_whose_kv_does_not_come_is_refused_while_others_are_answered() {
    let fleet = fleet_of_patience(99).await;
    let other = flowing(&fleet.decode).await;
    let ask = async |n_tokens: u32, more: Value, policy: &[(&str, &str)]| {
        let mut body = json!({"prompt": vec![n_tokens % 250; n_tokens as usize], "max_tokens": 3});
        let more = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(more);
        let headers = [&[(HEADER, DEAD)], policy].concat();
        fleet.decode.post_with(COMPLETIONS, body, &headers).await
    };
    // Of a prompt the last token is computed in any case.
    ask(100, json!({}), &[]).await.json();
    for stream in [false, true] {
        let more = json!({"stream": stream});
        assert_given_up(&ask(101, more, &[]).await);
    }
    let policy = "x-kv-failure-policy";
    assert_given_up(&ask(20, json!({}), &[(policy, "fail")]).await);
    ask(500, json!({}), &[(policy, "recompute")]).await.json();
    let unclear = ask(20, json!({}), &[(policy, "perhaps")]).await;
    assert_eq!(unclear.status, 400);
    drop(other);
    let free = "vllm:kv_cache_usage_perc";
    fleet.decode.until(free, |n| n == 0.0).await;
    ask(102, json!({}), &[]).await.json();
    assert_given_up(&ask(21, json!({}), &[(policy, "fail")]).await);
    fleet.decode.until(free, |n| n == 0.0).await;
    assert_eq!(fleet.decode.metric("vllm:num_requests_running").await, 0.0);
}

#[tokio::test]
async fn what_is_here_already_does_not_try_the_patience() {
    let fleet = fleet_of_patience(20).await;
    let body = json!({"prompt": vec![7; 101], "max_tokens": 3, "temperature": 0});
    let _other = flowing(&fleet.decode).await;
    let lost = async || fleet.decode_after(DEAD, COMPLETIONS, &body).await;
    assert_given_up(&lost().await);
    let expect = fleet.decode.post(COMPLETIONS, body.clone()).await.json();
    assert_eq!(texts(&lost().await.json()), texts(&expect));
}

/// Of 412 tokens, 64 come before the lease is taken back; the last is computed in any case.
#[tokio::test]
async fn only_what_did_not_come_counts() {
    let body = json!({"prompt": prompt(30), "max_tokens": 20, "temperature": 0});
    for (recompute_max, is_beside, is_answered) in
        [(347, true, true), (346, true, false), (346, false, true)]
    {
        let fleet = fleet_of_patience(recompute_max).await;
        let other = match is_beside {
            true => Some(flowing(&fleet.decode).await),
            false => None,
        };
        let (prefill, go_on) = held_up(Setup::role(Role::Prefill)).await;
        let (params, rest) = ask_early(&prefill, &body).await;
        let mut asked = body.clone();
        asked["kv_transfer_params"] = params.clone();
        let (reply, ()) = tokio::join!(fleet.decode.post(COMPLETIONS, asked), async {
            let arrived = "vllm:external_prefix_cache_hits_total";
            fleet.decode.until(arrived, |n| n == 64.0).await;
            let (uuid, token) = (params["uuid"].to_string(), params["kvx"]["tok"].as_str());
            let ended = give_back(&prefill, &uuid, token.unwrap()).await;
            assert_eq!(ended, 204);
        });
        drop((rest, go_on, other));
        if is_answered {
            let expect = fleet.alone.post(COMPLETIONS, body.clone()).await.json();
            assert_eq!(texts(&reply.json()), texts(&expect));
        } else {
            assert_given_up(&reply);
            let failed = fleet
                .decode
                .metric_of("vllm:request_success_total", "error");
            assert_eq!(failed.await, 1.0);
        }
        prefill.until("kvx_leases", |n| n == 0.0).await;
        let free = "vllm:kv_cache_usage_perc";
        fleet.decode.until(free, |n| n == 0.0).await;
    }
}
