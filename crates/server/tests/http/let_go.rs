//! KV is not kept for requests that nobody will answer, and not computed where it cannot be kept.

use baton_server::Role;
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::handover::{CHAT, COMPLETIONS, Fleet, ask_early, give_back, held_up, prompt};
use crate::support::{Reply, Server, Setup, begin, texts};

const EXPORT: &str = "x-kv-export";

fn with(mut body: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    body
}

/// A request for the KV of a prompt.
fn export(prompt: impl Into<Value>) -> Value {
    let produce = json!({"do_remote_decode": true});
    json!({"prompt": prompt.into(), "max_tokens": 1, "temperature": 0, "kv_transfer_params": produce})
}

/// The body of a request to take over KV that is kept for it.
async fn kept(prefill: &Server, prompt: &str) -> Value {
    let told = prefill.post(COMPLETIONS, export(prompt)).await.json();
    assert_eq!(prefill.metric("kvx_leases").await, 1.0);
    let params = told["kv_transfer_params"].clone();
    json!({"prompt": prompt, "max_tokens": 20, "temperature": 0, "kv_transfer_params": params})
}

/// Nothing is kept any more, and not because its time was over.
async fn assert_let_go(prefill: &Server) {
    assert_let_go_but(prefill, 0.0).await;
}

async fn assert_let_go_but(prefill: &Server, n_kept: f64) {
    prefill.until("kvx_leases", |n| n == n_kept).await;
    assert_eq!(prefill.metric("kvx_lease_expired_total").await, 0.0);
}

#[tokio::test]
async fn a_refused_request_frees_the_kv_that_was_kept_for_it() {
    let fleet = Fleet::start().await;
    let long_text = "no ".repeat(100_000);
    for (status, wrong) in [
        (400, json!({"temperature": -1})),
        (400, json!({"temperature": "hot"})),
        (400, json!({"n": 10_000})),
        (400, json!({"max_tokens": -5})),
        (400, json!({"prompt": ""})),
        (400, json!({"prompt": [1_000_000]})),
        (400, json!({"prompt": vec![65; 3000]})),
        (400, json!({"prompt": long_text})),
        (400, json!({"logit_bias": {"1": 1}})),
        (404, json!({"model": "another"})),
    ] {
        let body = with(kept(&fleet.prefill, &prompt(12)).await, wrong.clone());
        let refused = fleet.decode.post(COMPLETIONS, body).await;
        assert_eq!(refused.status, status, "{wrong}: {}", refused.text());
        assert_let_go(&fleet.prefill).await;
    }
    let body = kept(&fleet.prefill, &prompt(12)).await;
    let refused = fleet.decode.post(CHAT, body).await;
    assert_eq!(refused.status, 400, "a chat has messages");
    assert_let_go(&fleet.prefill).await;
}

#[tokio::test]
async fn so_does_one_refused_for_its_headers() {
    let fleet = Fleet::start().await;
    for wrong in [
        ("x-data-parallel-rank", "3"),
        ("x-kv-failure-policy", "perhaps"),
    ] {
        let body = kept(&fleet.prefill, &prompt(12)).await;
        let refused = fleet.decode.post_with(COMPLETIONS, body, &[wrong]).await;
        assert_eq!(refused.status, 400, "{wrong:?}");
        assert_let_go(&fleet.prefill).await;
    }
}

#[tokio::test]
async fn so_does_one_for_which_there_is_no_place() {
    let mut decode = Setup::role(Role::Decode).slow().endless();
    (decode.max_num_seqs, decode.max_waiting) = (1, 1);
    let fleet = Fleet::with(decode).await;
    let long =
        json!({"prompt": "a long answer", "max_tokens": 1900, "ignore_eos": true, "stream": true});
    let mut running = begin(&fleet.decode, COMPLETIONS, &long).await;
    running.frame().await.unwrap().unwrap();
    let waiting = begin(&fleet.decode, COMPLETIONS, &long);
    let turned_away = async {
        let n_waiting = "vllm:num_requests_waiting";
        fleet.decode.until(n_waiting, |n| n == 1.0).await;
        let body = kept(&fleet.prefill, &prompt(12)).await;
        fleet.decode.post(COMPLETIONS, body).await
    };
    let reply = tokio::select! {
        _ = waiting => panic!("it waits"),
        reply = turned_away => reply,
    };
    assert_eq!(reply.status, 503);
    assert!(!reply.headers.contains_key(EXPORT), "it asked for no KV");
    assert_let_go(&fleet.prefill).await;
}

#[tokio::test]
async fn so_does_one_of_several_sequences_which_are_computed() {
    let fleet = Fleet::start().await;
    let body = kept(&fleet.prefill, &prompt(12)).await;
    let body = with(body, json!({"n": 2, "temperature": 1, "seed": 7}));
    let answer = fleet.decode.post(COMPLETIONS, body).await.json();
    assert_eq!(texts(&answer).len(), 2);
    assert_let_go(&fleet.prefill).await;
}

#[track_caller]
fn assert_busy(reply: &Reply, kind: &str) {
    assert_eq!(reply.status, 503, "{}", reply.text());
    assert_eq!(reply.headers[EXPORT], "busy");
    assert_eq!(reply.headers["retry-after"], "1");
    let error: Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(error["error"]["type"], kind);
}

/// 101 tokens are 7 blocks of 2 KiB each.
fn prompt_of_7_blocks(token: u32) -> Vec<u32> {
    vec![token; 101]
}

fn room_for_blocks(n: u64) -> Setup {
    let mut setup = Setup::role(Role::Prefill);
    // Leases hold whole pages.
    setup.config.kv_host_pool = (n * 2048).next_multiple_of(4096);
    setup
}

#[tokio::test]
async fn kv_for_which_there_is_no_room_is_not_computed() {
    let prefill = Server::start(room_for_blocks(16)).await;
    let ask = async |token| {
        prefill
            .post(COMPLETIONS, export(prompt_of_7_blocks(token)))
            .await
    };
    let mut kept = Vec::new();
    for token in [65, 66] {
        let told = ask(token).await.json();
        kept.push(told["kv_transfer_params"].clone());
    }
    assert!(kept.iter().all(Value::is_object));
    assert_busy(&ask(67).await, "kv_export_busy");
    let n_computed = prefill.metric("vllm:prompt_tokens_total").await;
    assert_eq!(n_computed, 202.0);
    // Whoever asks for an answer only gets one.
    let plain = json!({"prompt": prompt_of_7_blocks(68), "max_tokens": 1});
    prefill.post(COMPLETIONS, plain).await.json();
    let (uuid, token) = (kept[0]["uuid"].to_string(), &kept[0]["kvx"]["tok"]);
    give_back(&prefill, &uuid, token.as_str().unwrap()).await;
    prefill.until("kvx_leases", |n| n == 1.0).await;
    assert!(ask(67).await.json()["kv_transfer_params"].is_object());
    // Nor is there ever room for this.
    let reply = prefill.post(COMPLETIONS, export(vec![65; 2000])).await;
    assert_busy(&reply, "kv_export_busy");
}

#[tokio::test]
async fn room_is_promised_before_the_prompt_is_computed() {
    let (prefill, go_on) = held_up(room_for_blocks(10)).await;
    let (_, computing) = ask_early(&prefill, &export(prompt_of_7_blocks(65))).await;
    let another = export(prompt_of_7_blocks(66));
    let reply = prefill.post(COMPLETIONS, another.clone()).await;
    assert_busy(&reply, "kv_export_busy");
    // What is given up is not promised any more.
    drop(computing);
    prefill.until_idle().await;
    drop(go_on);
    prefill.until("kvx_leases", |n| n == 0.0).await;
    let reply = prefill.post(COMPLETIONS, another).await;
    assert!(reply.json()["kv_transfer_params"].is_object());
    assert_let_go_but(&prefill, 1.0).await;
}

#[tokio::test]
async fn a_full_queue_tells_a_router_to_ask_elsewhere() {
    let mut setup = Setup::role(Role::Prefill).slow().endless();
    (setup.max_num_seqs, setup.max_waiting) = (1, 1);
    let server = Server::start(setup).await;
    let long =
        json!({"prompt": "a long answer", "max_tokens": 1900, "ignore_eos": true, "stream": true});
    let mut running = begin(&server, COMPLETIONS, &long).await;
    running.frame().await.unwrap().unwrap();
    let waiting = begin(&server, COMPLETIONS, &long);
    let turned_away = async {
        let n_waiting = "vllm:num_requests_waiting";
        server.until(n_waiting, |n| n == 1.0).await;
        server.post(COMPLETIONS, export("x")).await
    };
    let reply = tokio::select! {
        _ = waiting => panic!("it waits"),
        reply = turned_away => reply,
    };
    assert_busy(&reply, "ServiceUnavailableError");
    assert_eq!(server.metric("kvx_leases").await, 0.0);
    // What is wrong with a request is wrong everywhere.
    let wrong = with(export("x"), json!({"temperature": -1}));
    let reply = server.post(COMPLETIONS, wrong).await;
    assert!(reply.status == 400 && !reply.headers.contains_key(EXPORT));
}

#[tokio::test]
async fn a_prefill_server_without_room_costs_a_computation_elsewhere() {
    let mut fleet = Fleet::start().await;
    fleet.prefill = Server::start(room_for_blocks(2)).await;
    let body = json!({"prompt": prompt(30), "max_tokens": 20, "temperature": 0});
    let expect = fleet.alone.post(COMPLETIONS, body.clone()).await.json();
    let named = fleet.prefill.addr.to_string();
    let answer = fleet.decode_after(&named, COMPLETIONS, &body).await.json();
    assert_eq!(texts(&answer), texts(&expect));
    let busy = "reason=\"prefiller_busy\"";
    let recomputed = fleet.decode.metric_of("kvx_recompute_tokens_total", busy);
    assert_eq!(recomputed.await, 411.0);
    assert_eq!(fleet.prefill.metric("vllm:prompt_tokens_total").await, 0.0);
}
