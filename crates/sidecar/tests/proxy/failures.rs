//! Servers that die or refuse, and clients that forge: what the client gets, and what is given back.

use crate::fake::{ANSWER, Act, Fake, PARAMS, PATH, ask, metric, nobody, post, send, sidecar};
use baton_http::collect;
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio::sync::Notify;

#[tokio::test]
async fn kv_is_given_back_when_decode_does_not_listen() {
    let prefill = Fake::start(Act::Json(PARAMS)).await;
    let sidecar = sidecar(nobody().await, "").await;
    let response = send(post(sidecar.address, Some(prefill.address), "{}")).await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(prefill.nth(1).await.method, "DELETE");
}

#[tokio::test]
async fn kv_is_given_back_when_decode_refuses_the_request_and_prefill_is_not_asked_again() {
    const REFUSAL: &str = r#"{"error":{"message":"too long"}}"#;
    for (act, status) in [
        (Act::Status(StatusCode::BAD_REQUEST, REFUSAL), 400),
        (Act::Status(StatusCode::TOO_MANY_REQUESTS, REFUSAL), 429),
        (Act::Status(StatusCode::INTERNAL_SERVER_ERROR, REFUSAL), 500),
        (Act::Reset, 502),
    ] {
        let prefill = Fake::start(Act::Json(PARAMS)).await;
        let decode = Fake::start(act).await;
        let sidecar = sidecar(decode.address, "--prefill-max-retries=2").await;
        let response = send(post(sidecar.address, Some(prefill.address), "{}")).await;
        assert_eq!(response.status(), status);
        if status != 502 {
            assert_eq!(
                collect(response.into_body(), 1 << 10).await.unwrap(),
                REFUSAL
            );
        }
        assert_eq!(prefill.nth(1).await.method, "DELETE");
        assert_eq!(
            (prefill.asked.borrow().len(), decode.asked.borrow().len()),
            (2, 1)
        );
    }
}

#[tokio::test]
async fn a_prefill_server_that_dies_after_its_answer_is_for_decode_to_notice() {
    let metrics = nobody().await.port();
    let flags = format!("--metrics-port={metrics}");
    for (status, answer) in [
        (StatusCode::OK, ANSWER),
        (StatusCode::INTERNAL_SERVER_ERROR, "{}"),
    ] {
        let go = Arc::new(Notify::new());
        let decode = Fake::start(Act::Held(go.clone(), status, answer)).await;
        let prefill = Fake::start(Act::Json(PARAMS)).await;
        let sidecar = sidecar(decode.address, &flags).await;
        let asked = tokio::spawn(send(post(sidecar.address, Some(prefill.address), "{}")));
        decode.nth(0).await;
        let gone = prefill.address;
        drop(prefill);
        while TcpStream::connect(gone).await.is_ok() {
            tokio::task::yield_now().await;
        }
        go.notify_one();
        let response = asked.await.unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(
            collect(response.into_body(), 1 << 10).await.unwrap(),
            answer
        );
        assert_eq!(decode.asked.borrow().len(), 1);
        let failed = r#"baton_sidecar_releases_total{outcome="failed"}"#;
        let expect = if status.is_success() { "" } else { "1" };
        while metric(metrics, failed).await != expect {
            tokio::task::yield_now().await;
        }
        sidecar.end().await;
    }
}

#[tokio::test]
async fn what_a_client_says_of_kv_reaches_no_server_on_any_route() {
    const FORGED: &str = r#"{"prompt":"x","kv_transfer_params":{"do_remote_prefill":true,"remote_host":"evil"},"bootstrap_host":"evil","bootstrap_port":1,"bootstrap_room":1,"ec_transfer_params":{"h":"evil"},"sampling_params":{"extra_args":{"kv_transfer_params":{"remote_host":"evil"}}},"vllm_xargs":{"kv_transfer_params":"evil"}}"#;
    let prefill = Fake::start(Act::Json(PARAMS)).await;
    let decode = Fake::start(Act::Json(ANSWER)).await;
    for connector in ["nixlv2", "shared-storage", "sglang", "offloading"] {
        let sidecar = sidecar(decode.address, &format!("--kv-connector={connector}")).await;
        for path in [
            PATH,
            "/v1/chat/completions",
            "/v1/responses",
            "/v1/messages",
            "/inference/v1/generate",
        ] {
            for wanted in [Some(prefill.address), None] {
                let mut request: Request<Full<Bytes>> = post(sidecar.address, wanted, FORGED);
                *request.uri_mut() = format!("http://{}{path}", sidecar.address).parse().unwrap();
                let encoders = "evil:1".parse().unwrap();
                request
                    .headers_mut()
                    .insert("x-encoder-hosts-ports", encoders);
                ask(request).await.unwrap();
            }
        }
    }
    let servers = [&prefill, &decode].map(|server| server.asked.borrow().clone());
    let all: Vec<_> = servers
        .iter()
        .flatten()
        .filter(|a| a.method == "POST")
        .collect();
    // With both legs at once, decode's answer may end prefill's leg before it is there.
    assert!(all.len() >= 40 + 10 && servers.iter().all(|asked| !asked.is_empty()));
    for asked in all {
        let body = String::from_utf8_lossy(&asked.body);
        assert!(!body.contains("evil"), "{}: {body}", asked.path);
        assert!(
            !asked.headers.values().any(|v| v == "evil:1"),
            "{}",
            asked.path
        );
    }
}
