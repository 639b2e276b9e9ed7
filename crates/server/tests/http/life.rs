//! How a server lives, fills up and ends.

use std::time::Duration;

use baton_server::{Role, ServerError};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::support::{Reply, Server, Setup, begin};

const COMPLETIONS: &str = "/v1/completions";

/// Asks for an answer that does not end by itself: even a device without an end token draws that token's number at times.
fn long(more: Value) -> Value {
    let mut body = json!({"prompt": "a long answer", "max_tokens": 1900, "temperature": 0, "ignore_eos": true});
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_client_that_hangs_up_frees_its_blocks() {
    let server = Server::start(Setup::role(Role::Both).slow().endless()).await;
    // Streamed: after the first event.
    let mut response = begin(&server, COMPLETIONS, &long(json!({"stream": true}))).await;
    response.frame().await.unwrap().unwrap();
    server
        .until("vllm:kv_cache_usage_perc", |used| used > 0.0)
        .await;
    drop(response);
    server
        .until("vllm:kv_cache_usage_perc", |used| used == 0.0)
        .await;
    // Whole: before any answer.
    let body = long(json!({"n": 3, "temperature": 1}));
    let asking = begin(&server, COMPLETIONS, &body);
    tokio::select! {
        _ = asking => panic!("1900 slow tokens take longer"),
        () = server.until("vllm:num_requests_running", |n| n == 3.0) => {}
    }
    server
        .until("vllm:num_requests_running", |n| n == 0.0)
        .await;
    server
        .until("vllm:kv_cache_usage_perc", |used| used == 0.0)
        .await;
    assert_eq!(
        server.metric("vllm:request_success_total").await,
        4.0,
        "all of them aborted"
    );
}

#[tokio::test]
async fn a_full_queue_turns_clients_away_in_the_common_form() {
    let mut setup = Setup::role(Role::Both).slow().endless();
    (setup.max_num_seqs, setup.max_waiting) = (1, 1);
    let server = Server::start(setup).await;
    let mut running = begin(&server, COMPLETIONS, &long(json!({"stream": true}))).await;
    running.frame().await.unwrap().unwrap();
    let waiting_body = long(json!({}));
    let waiting = begin(&server, COMPLETIONS, &waiting_body);
    let turned_away = async {
        server
            .until("vllm:num_requests_waiting", |n| n == 1.0)
            .await;
        server
            .post(COMPLETIONS, long(json!({"stream": true})))
            .await
    };
    let reply = tokio::select! {
        _ = waiting => panic!("it waits"),
        reply = turned_away => reply,
    };
    assert_eq!(
        (
            reply.status.as_u16(),
            reply.headers["retry-after"].to_str().unwrap()
        ),
        (503, "1")
    );
    let error: Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(error["error"]["type"], "ServiceUnavailableError");
}

#[tokio::test]
async fn a_failed_device_ends_every_answer_and_the_server() {
    let mut setup = Setup::role(Role::Both).slow().endless();
    setup.sim.fail_at = Some(40);
    let mut server = Server::start(setup).await;
    let stream = begin(&server, COMPLETIONS, &long(json!({"stream": true}))).await;
    let whole = server.post(COMPLETIONS, long(json!({})));
    let (stream, whole) = tokio::join!(Reply::read(stream), whole);
    let events = stream.events();
    assert!(
        events.len() > 1 && events.last().unwrap()["error"]["code"] == 500,
        "{events:?}"
    );
    let error: Value = serde_json::from_slice(&whole.body).unwrap();
    assert_eq!(
        (whole.status.as_u16(), &error["error"]["type"]),
        (500, &json!("InternalServerError"))
    );
    let ended = tokio::time::timeout(Duration::from_secs(20), &mut server.task)
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(ended, Err(ServerError::Failed(_))), "{ended:?}");
}

#[tokio::test]
async fn shutdown_lets_answers_end() {
    let mut server = Server::start(Setup::role(Role::Both).slow().endless()).await;
    let body = json!({"prompt": "x", "max_tokens": 50, "stream": true});
    let mut response = begin(&server, COMPLETIONS, &body).await;
    response.frame().await.unwrap().unwrap();
    server.shutdown.cancel();
    let reply = Reply::read(response).await;
    assert!(reply.text().ends_with("data: [DONE]\n\n"));
    let ended = tokio::time::timeout(Duration::from_secs(20), &mut server.task)
        .await
        .unwrap()
        .unwrap();
    assert!(ended.is_ok(), "{ended:?}");
}

#[tokio::test]
async fn shutdown_does_not_wait_for_ever() {
    let mut setup = Setup::role(Role::Both).slow().endless();
    setup.config.http.grace = Duration::from_millis(50);
    let mut server = Server::start(setup).await;
    let mut response = begin(&server, COMPLETIONS, &long(json!({"stream": true}))).await;
    response.frame().await.unwrap().unwrap();
    server.shutdown.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(20), &mut server.task)
        .await
        .unwrap()
        .unwrap();
    assert!(ended.is_ok(), "{ended:?}");
}

#[tokio::test]
async fn the_small_endpoints_answer() {
    let server = Server::start(Setup::role(Role::Both)).await;
    for path in ["/health", "/ping"] {
        let reply = server.get(path).await;
        assert_eq!(
            (reply.status.as_u16(), reply.body.len()),
            (200, 0),
            "{path}"
        );
    }
    assert_eq!(server.get("/load").await.json(), json!({"server_load": 0}));
    assert!(server.get("/version").await.json()["version"].is_string());
    let models = server.get("/v1/models").await.json();
    let names: Vec<_> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].clone())
        .collect();
    assert_eq!(names, ["smollm2", "alias"]);
    assert_eq!(
        models["data"][0]["permission"][0]["object"],
        "model_permission"
    );
    server
        .post(
            COMPLETIONS,
            json!({"prompt": "x", "max_tokens": 5, "ignore_eos": true}),
        )
        .await
        .json();
    for (name, value) in [
        ("vllm:prompt_tokens_total", 1.0),
        ("vllm:generation_tokens_total", 5.0),
        ("vllm:time_to_first_token_seconds_count", 1.0),
        ("vllm:inter_token_latency_seconds_count", 4.0),
        ("vllm:e2e_request_latency_seconds_count", 1.0),
        ("vllm:request_success_total", 1.0),
        ("vllm:cache_config_info", 1.0),
    ] {
        assert_eq!(server.metric(name).await, value, "{name}");
    }
}
