//! Prefill here, decode there: the same text as one server gives, whatever happens on the way.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_server::Role;
use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::{Reply, Server, Setup, streamed_texts, texts};

pub(crate) const COMPLETIONS: &str = "/v1/completions";
pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const HEADER: &str = "x-prefiller-host-port";

pub(crate) struct Fleet {
    pub(crate) prefill: Server,
    pub(crate) decode: Server,
    pub(crate) alone: Server,
}

impl Fleet {
    pub(crate) async fn start() -> Self {
        Self::with(Setup::role(Role::Decode)).await
    }

    pub(crate) async fn with(decode: Setup) -> Self {
        Self {
            prefill: Server::start(Setup::role(Role::Prefill)).await,
            decode: Server::start(decode).await,
            alone: Server::start(Setup::role(Role::Both)).await,
        }
    }

    pub(crate) async fn decode_after(&self, prefiller: &str, path: &str, body: &Value) -> Reply {
        self.decode
            .post_with(path, body.clone(), &[(HEADER, prefiller)])
            .await
    }
}

pub(crate) fn prompt(n: usize) -> String {
    "The capital of France is Paris. "
        .chars()
        .cycle()
        .skip(n % 7)
        .take(20 + n * 13 % 400)
        .chain(n.to_string().chars())
        .collect()
}

/// Prompt tokens computed, found and fetched.
async fn by_source(server: &Server) -> [f64; 3] {
    let of = async |source: &str| {
        let label = format!("source=\"{source}\"");
        let name = "vllm:prompt_tokens_by_source_total";
        server.metric_of(name, &label).await
    };
    [
        of("local_compute").await,
        of("local_cache_hit").await,
        of("external_kv_transfer").await,
    ]
}

#[tokio::test]
async fn a_pair_answers_as_one_server_does() {
    let fleet = Fleet::start().await;
    let prefiller = fleet.prefill.addr.to_string();
    let body = json!({"prompt": prompt(9), "max_tokens": 30, "temperature": 0});
    let expect = fleet.alone.post(COMPLETIONS, body.clone()).await.json();
    assert!(expect["kv_transfer_params"].is_null());
    let answer = fleet
        .decode_after(&prefiller, COMPLETIONS, &body)
        .await
        .json();
    assert_eq!(texts(&answer), texts(&expect));
    assert_eq!(
        answer["usage"]["completion_tokens"],
        expect["usage"]["completion_tokens"]
    );
    let params = answer["kv_transfer_params"].as_object().expect("KV moved");
    let keys: Vec<_> = params.keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        ["remote_block_ids", "remote_host", "remote_port", "uuid"]
    );
    assert!(params["remote_port"].is_string() && params["uuid"].is_u64());
    let blocks = params["remote_block_ids"].as_array().unwrap();
    assert!(blocks.len() > 1, "the blocks are known by the answer's end");
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .unwrap();
    assert!(cached > 100, "{cached} tokens came over");
    assert!(
        fleet
            .decode
            .metric("vllm:external_prefix_cache_hits_total")
            .await
            > 100.0
    );
    assert!(fleet.decode.metric("kvx_transfers_complete_total").await == 1.0);
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    let (came, rest) = (cached as f64, (prompt_tokens - cached) as f64);
    assert_eq!(by_source(&fleet.decode).await, [rest, 0.0, came]);
    // Nothing is left behind.
    fleet.prefill.until("kvx_leases", |n| n == 0.0).await;
    fleet.decode.until("kvx_held", |n| n == 0.0).await;
    fleet
        .decode
        .until("vllm:kv_cache_usage_perc", |n| n == 0.0)
        .await;
}

#[tokio::test]
async fn servers_with_blocks_of_other_sizes_answer_as_one_does() {
    for [prefill, decode] in [[16, 64], [64, 16], [32, 128], [48, 32]] {
        let sized = |role, block_size| {
            let mut setup = Setup::role(role);
            setup.sim.spec.layout.block_size = block_size;
            setup
        };
        let fleet = Fleet {
            prefill: Server::start(sized(Role::Prefill, prefill)).await,
            ..Fleet::with(sized(Role::Decode, decode)).await
        };
        let prefiller = fleet.prefill.addr.to_string();
        for n in 0..12 {
            let body = json!({"prompt": prompt(n), "max_tokens": 12, "temperature": 0});
            let expect = fleet.alone.post(COMPLETIONS, body.clone()).await.json();
            let answer = fleet.decode_after(&prefiller, COMPLETIONS, &body).await;
            assert_eq!(
                texts(&answer.json()),
                texts(&expect),
                "{n}, {prefill} to {decode}"
            );
        }
        let came = fleet
            .decode
            .metric("vllm:external_prefix_cache_hits_total")
            .await;
        assert!(
            came > 500.0,
            "{came} tokens came over, {prefill} to {decode}"
        );
        let failed = fleet.decode.metric("kvx_transfer_failed_total").await;
        assert_eq!(failed, 0.0);
        fleet.prefill.until("kvx_leases", |n| n == 0.0).await;
    }
}

#[tokio::test]
async fn a_prompt_is_handed_over_though_its_first_token_ends_the_text() {
    let ending = |role| {
        let mut setup = Setup::role(role);
        setup.sim.eos = Some((0, 1));
        setup
    };
    let fleet = Fleet {
        prefill: Server::start(ending(Role::Prefill)).await,
        ..Fleet::with(ending(Role::Decode)).await
    };
    let prefiller = fleet.prefill.addr.to_string();
    let body = json!({"prompt": prompt(9), "max_tokens": 30, "temperature": 0});
    let answer = fleet
        .decode_after(&prefiller, COMPLETIONS, &body)
        .await
        .json();
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert!(answer["kv_transfer_params"].is_object(), "KV moved");
    let came = fleet
        .decode
        .metric("vllm:external_prefix_cache_hits_total")
        .await;
    assert!(came > 100.0, "{came} tokens came over");
    fleet.prefill.until("kvx_leases", |n| n == 0.0).await;
}

#[tokio::test]
async fn a_router_can_do_the_two_calls_itself() {
    let fleet = Fleet::start().await;
    let mut body = json!({"prompt": prompt(12), "max_tokens": 20, "temperature": 0});
    let expect = fleet.alone.post(COMPLETIONS, body.clone()).await.json();
    let mut first = body.clone();
    first["max_tokens"] = 1.into();
    first["kv_transfer_params"] = json!({"do_remote_decode": true});
    let prefilled = fleet.prefill.post(COMPLETIONS, first.clone()).await.json();
    let params = prefilled["kv_transfer_params"].clone();
    assert!(params["kvx"]["tok"].is_string(), "{params}");
    assert_eq!(prefilled["choices"][0]["finish_reason"], "length");
    body["kv_transfer_params"] = params.clone();
    let answer = fleet.decode.post(COMPLETIONS, body.clone()).await.json();
    assert_eq!(texts(&answer), texts(&expect));
    assert_eq!(answer["kv_transfer_params"]["uuid"], params["uuid"]);
    assert!(
        answer["kv_transfer_params"].get("kvx").is_none(),
        "the right to fetch stays here"
    );
    let before = by_source(&fleet.decode).await;
    // A second time the lease is gone, but the blocks are here.
    let again = fleet.decode.post(COMPLETIONS, body).await.json();
    assert_eq!(texts(&again), texts(&expect));
    let after = by_source(&fleet.decode).await;
    assert_eq!(before[1], 0.0);
    assert!(after[1] > 100.0, "{after:?}");
    assert_eq!(after[2], before[2]);
    let all: f64 = after.iter().sum();
    assert_eq!(all, fleet.decode.metric("vllm:prompt_tokens_total").await);
    // Several sequences cannot be handed over, nor a stream's.
    first["n"] = 2.into();
    first["temperature"] = 1.into();
    assert!(
        fleet.prefill.post(COMPLETIONS, first.clone()).await.json()["kv_transfer_params"].is_null()
    );
    first["n"] = 1.into();
    first["stream"] = true.into();
    assert!(
        !fleet
            .prefill
            .post(COMPLETIONS, first)
            .await
            .text()
            .contains("remote_block_ids")
    );
}

/// A prefill server whose device stops before its second step, until the sender is used or dropped.
pub(crate) async fn held_up(mut setup: Setup) -> (Server, std::sync::mpsc::Sender<()>) {
    let (go_on, held) = std::sync::mpsc::channel();
    let (held, steps) = (Mutex::new(held), AtomicUsize::new(0));
    setup.pace = Some(Box::new(move |_| {
        if steps.fetch_add(1, Ordering::SeqCst) == 1 {
            let _ = held.lock().unwrap().recv();
        }
    }));
    (Server::start(setup).await, go_on)
}

/// Asks for a prefill and its transfer parameters at once; returns the head's parameters and the rest of the answer.
pub(crate) async fn ask_early(
    prefill: &Server,
    body: &Value,
) -> (Value, http::Response<hyper::body::Incoming>) {
    let mut first = body.clone();
    first["max_tokens"] = 1.into();
    first["kv_transfer_params"] = json!({"do_remote_decode": true});
    let request = prefill.request(COMPLETIONS).header("x-kv-early", "1");
    let body = Full::new(Bytes::from(first.to_string()));
    let answer = prefill.send(request.body(body).unwrap()).await;
    assert_eq!(answer.status(), 200);
    let params = answer.headers()["x-kv-transfer-params"].to_str().unwrap();
    (serde_json::from_str(params).unwrap(), answer)
}

#[tokio::test]
async fn kv_travels_while_the_prompt_is_computed() {
    let fleet = Fleet::start().await;
    let (prefill, go_on) = held_up(Setup::role(Role::Prefill)).await;
    let mut body = json!({"prompt": prompt(30), "max_tokens": 20, "temperature": 0});
    let expect = fleet.alone.post(COMPLETIONS, body.clone()).await.json();
    let (params, rest) = ask_early(&prefill, &body).await;
    assert_eq!(params["remote_block_ids"], json!([]));
    body["kv_transfer_params"] = params;
    let (answer, ()) = tokio::join!(fleet.decode.post(COMPLETIONS, body), async {
        let arrived = "kvx_transfer_bytes_total";
        fleet.decode.until(arrived, |n| n > 0.0).await;
        assert_eq!(prefill.metric("vllm:request_success_total").await, 0.0);
        go_on.send(()).unwrap();
    });
    assert_eq!(texts(&answer.json()), texts(&expect));
    let told = Reply::read(rest).await.json();
    let ids = told["kv_transfer_params"]["remote_block_ids"].as_array();
    assert!(ids.is_some_and(|ids| ids.len() > 1), "{told}");
    assert_eq!(
        fleet.decode.metric("kvx_transfers_complete_total").await,
        1.0
    );
    prefill.until("kvx_leases", |n| n == 0.0).await;
}

#[tokio::test]
async fn a_prefill_that_is_given_up_is_computed_where_its_kv_was_awaited() {
    let fleet = Fleet::start().await;
    let (prefill, go_on) = held_up(Setup::role(Role::Prefill)).await;
    let mut body = json!({"prompt": prompt(30), "max_tokens": 20, "temperature": 0});
    let expect = fleet.alone.post(COMPLETIONS, body.clone()).await.json();
    let (params, rest) = ask_early(&prefill, &body).await;
    body["kv_transfer_params"] = params;
    let (answer, ()) = tokio::join!(fleet.decode.post(COMPLETIONS, body), async {
        let arrived = "kvx_transfer_bytes_total";
        fleet.decode.until(arrived, |n| n > 0.0).await;
        drop(rest);
        drop(go_on);
    });
    assert_eq!(texts(&answer.json()), texts(&expect));
    prefill.until("kvx_leases", |n| n == 0.0).await;
    prefill.until("kvx_lease_bytes", |n| n == 0.0).await;
    let free = "vllm:kv_cache_usage_perc";
    fleet.decode.until(free, |n| n == 0.0).await;
}

/// Ends a lease as a router does.
pub(crate) async fn give_back(prefill: &Server, uuid: &str, token: &str) -> http::StatusCode {
    let path = format!("http://{}/kv/v1/leases/{uuid}", prefill.addr);
    let request = http::Request::delete(path).header("x-kvx-token", token);
    let reply = prefill.send(request.body(Full::default()).unwrap());
    reply.await.status()
}

#[tokio::test]
async fn a_router_gives_back_what_nobody_will_fetch() {
    let prefill = Server::start(Setup::role(Role::Prefill)).await;
    let body = json!({"prompt": prompt(12), "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": true}});
    let params = prefill.post(COMPLETIONS, body).await.json()["kv_transfer_params"].clone();
    let (uuid, token) = (&params["uuid"], params["kvx"]["tok"].as_str().unwrap());
    let delete = async |uuid: &str, token: &str| give_back(&prefill, uuid, token).await;
    let uuid = uuid.to_string();
    assert_eq!(delete(&uuid, "").await, 403);
    assert_eq!(delete(&uuid, &token.replace(&token[..2], "__")).await, 403);
    assert_eq!(delete("1", token).await, 403);
    assert_eq!(delete("x", token).await, 400);
    assert_eq!(prefill.metric("kvx_leases").await, 1.0);
    assert_eq!(delete(&uuid, token).await, 204);
    assert_eq!(delete(&uuid, token).await, 404);
    assert_eq!(prefill.metric("kvx_leases").await, 0.0);
}

#[tokio::test]
async fn streams_and_chats_are_handed_over_too() {
    let fleet = Fleet::start().await;
    let prefiller = fleet.prefill.addr.to_string();
    let messages = json!([{"role": "user", "content": prompt(30)}]);
    let body = json!({"messages": messages, "max_tokens": 20, "temperature": 0});
    let expect = texts(&fleet.alone.post(CHAT, body.clone()).await.json());
    assert_eq!(
        texts(&fleet.decode_after(&prefiller, CHAT, &body).await.json()),
        expect
    );
    let mut streamed = body;
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    let events = fleet
        .decode_after(&prefiller, CHAT, &streamed)
        .await
        .events();
    assert_eq!(streamed_texts(&events, 1), expect);
    assert!(
        events
            .iter()
            .all(|event| event.get("kv_transfer_params").is_none())
    );
}

#[tokio::test]
async fn without_a_prefill_server_the_prompt_is_computed() {
    let fleet = Fleet::start().await;
    let dead = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let live = fleet.prefill.addr.to_string();
    let body = json!({"prompt": prompt(5), "max_tokens": 20, "temperature": 0});
    let expect = texts(&fleet.alone.post(COMPLETIONS, body.clone()).await.json());
    for refused in [
        dead.as_str(),
        "10.255.255.1:80",
        "nonsense",
        &fleet.decode.addr.to_string(),
    ] {
        let answer = fleet.decode_after(refused, COMPLETIONS, &body).await.json();
        assert_eq!(texts(&answer), expect, "{refused}");
        assert!(answer["kv_transfer_params"].is_null(), "{refused}");
    }
    let other = json!({"prompt": prompt(6), "max_tokens": 20, "temperature": 0});
    let answer = fleet
        .decode_after(&format!("{dead},{live}"), COMPLETIONS, &other)
        .await
        .json();
    assert!(
        answer["kv_transfer_params"].is_object(),
        "the next one is asked"
    );
}

#[tokio::test]
async fn parameters_that_lead_nowhere_cost_time_and_nothing_else() {
    let fleet = Fleet::start().await;
    let mut body = json!({"prompt": prompt(8), "max_tokens": 20, "temperature": 0});
    let expect = texts(&fleet.alone.post(COMPLETIONS, body.clone()).await.json());
    let mut first = body.clone();
    first["kv_transfer_params"] = json!({"do_remote_decode": true});
    let good = fleet.prefill.post(COMPLETIONS, first).await.json()["kv_transfer_params"].clone();
    let altered = |key: &str, value: Value| {
        let mut params = good.clone();
        params[key] = value;
        params
    };
    let mut wrong_model = good.clone();
    wrong_model["kvx"]["fp"] = "0123456789abcdef".into();
    for params in [
        altered("uuid", json!(12345)),
        altered("remote_port", json!("1")),
        altered("remote_host", json!("10.255.255.1")),
        altered("kvx", Value::Null),
        wrong_model,
    ] {
        body["kv_transfer_params"] = params.clone();
        let answer = fleet.decode.post(COMPLETIONS, body.clone()).await.json();
        assert_eq!(texts(&answer), expect, "{params}");
        assert!(answer["kv_transfer_params"].is_null(), "{params}");
    }
    // The right parameters for another prompt, longer or just as long.
    let longer = format!("{}, no", prompt(8));
    let as_long = format!("X{}", &prompt(8)[1..]);
    for other in [longer, as_long] {
        let other = json!({"prompt": other, "max_tokens": 20, "temperature": 0});
        let expect = texts(&fleet.alone.post(COMPLETIONS, other.clone()).await.json());
        let mut mixed_up = other;
        mixed_up["kv_transfer_params"] = good.clone();
        let answer = fleet.decode.post(COMPLETIONS, mixed_up).await.json();
        assert_eq!(texts(&answer), expect);
        assert!(answer["kv_transfer_params"].is_null());
    }
    fleet
        .decode
        .until("vllm:kv_cache_usage_perc", |n| n == 0.0)
        .await;
}

#[tokio::test]
async fn a_client_that_hangs_up_during_prefill_is_forgotten_by_both() {
    let mut setup = Setup::role(Role::Prefill).endless();
    setup.pace = Some(Box::new(|_| {
        std::thread::sleep(std::time::Duration::from_millis(40));
    }));
    let prefill = Server::start(setup).await;
    let decode = Server::start(Setup::role(Role::Decode)).await;
    let body = json!({"prompt": vec![65; 2000], "max_tokens": 20, "temperature": 0});
    let named = prefill.addr.to_string();
    let headers = [(HEADER, named.as_str())];
    let asking = decode.post_with(COMPLETIONS, body, &headers);
    tokio::select! {
        _ = asking => panic!("2000 tokens take 30 slow steps"),
        () = prefill.until("vllm:num_requests_running", |n| n == 1.0) => {}
    }
    prefill
        .until("vllm:num_requests_running", |n| n == 0.0)
        .await;
    prefill
        .until("vllm:kv_cache_usage_perc", |n| n == 0.0)
        .await;
    assert_eq!(
        decode.metric("vllm:prompt_tokens_total").await,
        0.0,
        "it never came so far"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_mixed_requests_are_right_at_concurrency_eight() {
    let fleet = std::sync::Arc::new(Fleet::start().await);
    let mut workers = tokio::task::JoinSet::new();
    for worker in 0..8usize {
        let fleet = std::sync::Arc::clone(&fleet);
        workers.spawn(async move {
            for i in (worker..300).step_by(8) {
                one_of_many(&fleet, i).await;
            }
        });
    }
    while let Some(ended) = workers.join_next().await {
        ended.unwrap();
    }
    fleet
        .decode
        .until("vllm:kv_cache_usage_perc", |n| n == 0.0)
        .await;
    fleet
        .prefill
        .until("vllm:kv_cache_usage_perc", |n| n == 0.0)
        .await;
    assert!(fleet.decode.metric("kvx_transfers_complete_total").await > 50.0);
}

async fn one_of_many(fleet: &Fleet, i: usize) {
    let named = if i.is_multiple_of(5) {
        "127.0.0.1:1".to_owned()
    } else {
        fleet.prefill.addr.to_string()
    };
    let mut body = json!({"prompt": prompt(i), "max_tokens": 1 + i % 23, "seed": i});
    if i.is_multiple_of(3) {
        body["temperature"] = 0.into();
    } else if i.is_multiple_of(7) {
        body["n"] = 2.into();
    }
    if i.is_multiple_of(4) {
        body["stop"] = json!(["e", "\u{fffd}\u{fffd}\u{fffd}"]);
    }
    let n = body["n"].as_u64().unwrap_or(1) as usize;
    let expect = texts(&fleet.alone.post(COMPLETIONS, body.clone()).await.json());
    if i.is_multiple_of(2) {
        body["stream"] = true.into();
        let events = fleet
            .decode_after(&named, COMPLETIONS, &body)
            .await
            .events();
        assert_eq!(streamed_texts(&events, n), expect, "{body}");
    } else {
        let answer = fleet.decode_after(&named, COMPLETIONS, &body).await.json();
        assert_eq!(texts(&answer), expect, "{body}");
    }
}
