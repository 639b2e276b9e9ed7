//! The gateway in front of small made-up servers, on loopback.

use crate::{EndpointConfig, GatewayConfig, Limits, run};
use baton_http::{Client, ServeConfig, collect, serve};
use baton_scheduler::Role;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use parking_lot::Mutex;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

mod flow;

type Body = BoxBody<Bytes, io::Error>;

/// What a made-up server does with a completion.
#[derive(Clone, Copy)]
enum Act {
    Json(u16, &'static str),
    /// Answers with these pieces of a body and then breaks the connection.
    Cut(&'static str, &'static [&'static str]),
    /// Answers with these pieces and ends well.
    Whole(&'static str, &'static [&'static str]),
    /// Answers with one event and then nothing, for ever.
    StreamThenHang,
    /// Never answers.
    Hang,
}

const SSE: &str = "text/event-stream; charset=utf-8";
const JSON: &str = "application/json";
const OK: Act = Act::Json(200, r#"{"ok":true}"#);

#[derive(Clone)]
struct Seen {
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

#[derive(Clone)]
struct Fake {
    act: Arc<Mutex<Act>>,
    models: &'static str,
    metrics: &'static str,
    seen: Arc<Mutex<Vec<Seen>>>,
    /// Notified when an answer that hangs is given up.
    given_up: Arc<Notify>,
}

struct Running {
    fake: Fake,
    address: SocketAddr,
    stop: CancellationToken,
    _guard: DropGuard,
}

struct Tell(Arc<Notify>);

impl Drop for Tell {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Fake {
    fn new(act: Act) -> Self {
        Self {
            act: Arc::new(Mutex::new(act)),
            models: r#"{"object":"list","data":[{"id":"m"}]}"#,
            metrics: "vllm:num_requests_waiting 0\nvllm:num_requests_running 0\nvllm:kv_cache_usage_perc 0\n",
            seen: Arc::default(),
            given_up: Arc::default(),
        }
    }

    async fn start(self) -> Running {
        self.start_at("127.0.0.1:0").await
    }

    async fn start_at(self, address: &str) -> Running {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let fake = self.clone();
        let service = service_fn(move |req| {
            let fake = fake.clone();
            async move { Ok::<_, Infallible>(fake.answer(req).await) }
        });
        let config = ServeConfig {
            grace: Duration::ZERO,
            ..ServeConfig::default()
        };
        tokio::spawn(serve(listener, service, config, stop.clone()));
        Running {
            fake: self,
            address,
            _guard: stop.clone().drop_guard(),
            stop,
        }
    }

    async fn answer(self, req: Request<Incoming>) -> Response<Body> {
        match req.uri().path() {
            "/health" => return whole(200, JSON, ""),
            "/metrics" => return whole(200, "text/plain", self.metrics),
            "/v1/models" => return whole(200, JSON, self.models),
            _ => {}
        }
        let (parts, body) = req.into_parts();
        let body = collect(body, 1 << 20).await.unwrap();
        self.seen.lock().push(Seen {
            path: parts.uri.to_string(),
            headers: parts.headers,
            body,
        });
        let act = *self.act.lock();
        let tell = Tell(self.given_up);
        match act {
            Act::Json(status, body) => whole(status, JSON, body),
            Act::Whole(kind, pieces) => {
                response(200, kind, stream::iter(pieces.iter().map(|p| Ok(frame(p)))))
            }
            Act::Cut(kind, pieces) => {
                let end = stream::once(async {
                    // What came before is written while this one waits.
                    tokio::task::yield_now().await;
                    Err(io::Error::from(io::ErrorKind::ConnectionReset))
                });
                response(
                    200,
                    kind,
                    stream::iter(pieces.iter().map(|p| Ok(frame(p)))).chain(end),
                )
            }
            Act::StreamThenHang => {
                let hang = stream::once(async move {
                    let _tell = tell;
                    std::future::pending().await
                });
                response(
                    200,
                    SSE,
                    stream::iter([Ok(frame("data: 1\n\n"))]).chain(hang),
                )
            }
            Act::Hang => {
                let _tell = tell;
                std::future::pending().await
            }
        }
    }
}

fn frame(text: &'static str) -> Frame<Bytes> {
    Frame::data(Bytes::from_static(text.as_bytes()))
}

fn response(
    status: u16,
    kind: &str,
    frames: impl stream::Stream<Item = io::Result<Frame<Bytes>>> + Send + Sync + 'static,
) -> Response<Body> {
    Response::builder()
        .status(status)
        .header("content-type", kind)
        .body(BodyExt::boxed(StreamBody::new(frames)))
        .unwrap()
}

fn whole(status: u16, kind: &str, body: &'static str) -> Response<Body> {
    let body = Full::new(Bytes::from_static(body.as_bytes())).map_err(|never| match never {});
    Response::builder()
        .status(status)
        .header("content-type", kind)
        .body(body.boxed())
        .unwrap()
}

impl Running {
    fn seen(&self) -> Vec<Seen> {
        self.fake.seen.lock().clone()
    }

    fn config(&self, role: Role) -> EndpointConfig {
        EndpointConfig {
            address: self.address.to_string(),
            role,
            name: None,
        }
    }
}

struct Front {
    url: String,
    client: Client,
    _guard: DropGuard,
}

async fn gateway(config: GatewayConfig) -> Front {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let shutdown = CancellationToken::new();
    let guard = shutdown.clone().drop_guard();
    tokio::spawn(async move { run(listener, config, shutdown).await.unwrap() });
    Front {
        url,
        client: Client::default(),
        _guard: guard,
    }
}

/// A gateway before `servers`, once it has found them all healthy.
async fn before(servers: &[(&Running, Role)]) -> Front {
    let endpoints = servers.iter().map(|(s, role)| s.config(*role)).collect();
    let front = gateway(GatewayConfig {
        endpoints,
        ..GatewayConfig::default()
    })
    .await;
    front.until_healthy(servers.len()).await;
    front
}

/// Waits for a condition that becomes true by itself, not for a time.
async fn eventually<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition().await {
        assert!(Instant::now() < deadline, "never happened");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl Front {
    async fn send(&self, path: &str, headers: &[(&str, &str)], body: &str) -> Response<Incoming> {
        let mut req = Request::post(format!("{}{path}", self.url)).header("content-type", JSON);
        for (name, value) in headers {
            req = req.header(*name, *value);
        }
        self.client
            .send(req.body(Full::from(body.to_owned())).unwrap())
            .await
            .unwrap()
    }

    async fn post(&self, path: &str, body: &str) -> (StatusCode, String) {
        text(self.send(path, &[], body).await).await
    }

    async fn complete(&self, body: &str) -> (StatusCode, String) {
        self.post("/v1/completions", body).await
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        let req = Request::get(format!("{}{path}", self.url))
            .body(Full::default())
            .unwrap();
        text(self.client.send(req).await.unwrap()).await
    }

    async fn metric(&self, series: &str) -> u64 {
        let (_, metrics) = self.get("/metrics").await;
        let line = metrics
            .lines()
            .find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0, |value| value.parse().unwrap())
    }

    async fn until_healthy(&self, n: usize) {
        eventually(|| async {
            let (_, metrics) = self.get("/metrics").await;
            let healthy = metrics
                .lines()
                .filter(|l| l.contains(r#"health="healthy""#));
            healthy
                .map(|l| l.rsplit(' ').next().unwrap().parse::<usize>().unwrap())
                .sum::<usize>()
                == n
        })
        .await;
    }
}

async fn text(response: Response<Incoming>) -> (StatusCode, String) {
    let status = response.status();
    (
        status,
        String::from_utf8(
            collect(response.into_body(), 1 << 20)
                .await
                .unwrap()
                .to_vec(),
        )
        .unwrap(),
    )
}

fn prompt(tokens: usize) -> String {
    format!(r#"{{"model":"m","prompt":"{}"}}"#, "word".repeat(tokens))
}

fn error_of(body: &str) -> serde_json::Value {
    serde_json::from_str::<serde_json::Value>(body).unwrap()["error"].clone()
}

#[tokio::test]
async fn a_long_prompt_names_a_prefill_server_and_a_short_one_none() {
    let (decode, prefill) = (Fake::new(OK).start().await, Fake::new(OK).start().await);
    let front = before(&[(&decode, Role::Decode), (&prefill, Role::Prefill)]).await;
    assert_eq!(front.complete(&prompt(500)).await.0, 200);
    assert_eq!(front.complete(&prompt(501)).await.0, 200);
    assert_eq!(front.complete(&prompt(3)).await.0, 200);
    let chosen: Vec<Option<String>> = decode
        .seen()
        .iter()
        .map(|s| header(s, "x-prefiller-host-port"))
        .collect();
    assert_eq!(chosen, [Some(prefill.address.to_string()), None, None]);
    assert!(prefill.seen().is_empty());
    assert_eq!(
        front
            .metric(r#"baton_gateway_pd_decisions_total{decision="prefill-decode"}"#)
            .await,
        1
    );
    assert_eq!(
        front
            .metric(r#"baton_gateway_pd_decisions_total{decision="decode-only"}"#)
            .await,
        2
    );
}

fn header(seen: &Seen, name: &str) -> Option<String> {
    seen.headers
        .get(name)
        .map(|v| v.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn what_a_client_may_not_say_does_not_reach_a_server() {
    let decode = Fake::new(OK).start().await;
    let front = before(&[(&decode, Role::Decode)]).await;
    let headers = [
        ("x-prefiller-host-port", "169.254.169.254:80"),
        ("x-gateway-destination-endpoint", "10.0.0.1:22"),
        ("x-request-id", "mine"),
        ("authorization", "Bearer key"),
    ];
    let body =
        r#"{"model":"m",  "prompt":"é","kv_transfer_params":{"remote_host":"evil"},"n":1.0}"#;
    let response = front.send("/v1/completions?x=1", &headers, body).await;
    assert_eq!(response.headers()["x-request-id"], "mine");
    let seen = decode.seen().remove(0);
    assert_eq!(seen.path, "/v1/completions?x=1");
    assert_eq!(
        seen.body,
        r#"{"model":"m",  "prompt":"é","kv_transfer_params":null,"n":1.0}"#
    );
    assert_eq!(header(&seen, "x-prefiller-host-port"), None);
    assert_eq!(header(&seen, "x-gateway-destination-endpoint"), None);
    assert_eq!(header(&seen, "x-request-id").as_deref(), Some("mine"));
    assert_eq!(
        header(&seen, "authorization").as_deref(),
        Some("Bearer key")
    );
    assert_eq!(header(&seen, "host"), Some(decode.address.to_string()));
}

#[tokio::test]
async fn a_server_that_dies_in_the_middle_of_a_whole_answer_is_replaced() {
    let bad = Fake::new(Act::Cut(JSON, &[r#"{"half"#])).start().await;
    let good = Fake::new(OK).start().await;
    let front = before(&[(&bad, Role::Decode), (&good, Role::Decode)]).await;
    for i in 0..4 {
        let body = format!(r#"{{"model":"m","prompt":"{i}"}}"#);
        assert_eq!(
            front.complete(&body).await,
            (StatusCode::OK, r#"{"ok":true}"#.to_owned())
        );
    }
    let lost = front
        .metric(r#"baton_gateway_retries_total{reason="lost"}"#)
        .await;
    assert!(lost >= 1 && lost == bad.seen().len() as u64 && good.seen().len() == 4);
}

#[tokio::test]
async fn when_nobody_else_is_left_the_answer_is_an_openai_error() {
    let bad = Fake::new(Act::Cut(JSON, &[r#"{"half"#])).start().await;
    let front = before(&[(&bad, Role::Decode)]).await;
    let (status, body) = front.complete(&prompt(1)).await;
    assert_eq!(
        (status.as_u16(), error_of(&body)["code"].as_u64()),
        (502, Some(502))
    );
}

#[tokio::test]
async fn a_full_server_sends_requests_to_another_and_its_own_words_come_last() {
    let full = Fake::new(Act::Json(503, r#"{"error":"full"}"#))
        .start()
        .await;
    let good = Fake::new(OK).start().await;
    let front = before(&[(&full, Role::Decode), (&good, Role::Both)]).await;
    for i in 0..4 {
        assert_eq!(
            front.complete(&format!(r#"{{"prompt":"{i}"}}"#)).await.0,
            200
        );
    }
    assert!(!full.seen().is_empty());
    *good.fake.act.lock() = Act::Json(429, r#"{"error":"full"}"#);
    let (status, body) = front.complete(&prompt(1)).await;
    assert!(matches!(status.as_u16(), 429 | 503));
    assert_eq!(body, r#"{"error":"full"}"#);
}

#[tokio::test]
async fn a_servers_own_error_is_passed_on_and_not_tried_again() {
    let decode = [
        Fake::new(Act::Json(500, r#"{"error":1}"#)).start().await,
        Fake::new(Act::Json(500, r#"{"error":1}"#)).start().await,
    ];
    let front = before(&[(&decode[0], Role::Decode), (&decode[1], Role::Decode)]).await;
    assert_eq!(
        front.complete(&prompt(1)).await,
        (
            StatusCode::INTERNAL_SERVER_ERROR,
            r#"{"error":1}"#.to_owned()
        )
    );
    assert_eq!(decode[0].seen().len() + decode[1].seen().len(), 1);
}

#[tokio::test]
async fn a_stopped_server_costs_no_request_and_is_used_again_when_it_is_back() {
    let (a, b) = (Fake::new(OK).start().await, Fake::new(OK).start().await);
    let front = before(&[(&a, Role::Decode), (&b, Role::Decode)]).await;
    a.stop.cancel();
    for i in 0..6 {
        assert_eq!(
            front.complete(&format!(r#"{{"prompt":"{i}"}}"#)).await.0,
            200
        );
    }
    front.until_healthy(1).await;
    let again = Fake::new(OK).start_at(&a.address.to_string()).await;
    front.until_healthy(2).await;
    for i in 0..6 {
        assert_eq!(
            front.complete(&format!(r#"{{"prompt":"{i}"}}"#)).await.0,
            200
        );
    }
    assert!(!again.seen().is_empty());
}

#[tokio::test]
async fn a_stream_passes_and_a_lost_one_ends_with_an_error_event() {
    let decode = Fake::new(Act::Whole(SSE, &["data: 1\n\n", "data: [DONE]\n\n"]))
        .start()
        .await;
    let front = before(&[(&decode, Role::Decode)]).await;
    let response = front
        .send(
            "/v1/chat/completions",
            &[],
            r#"{"messages":[],"stream":true}"#,
        )
        .await;
    assert_eq!(response.headers()["content-type"], SSE);
    assert_eq!(text(response).await.1, "data: 1\n\ndata: [DONE]\n\n");

    *decode.fake.act.lock() = Act::Cut(SSE, &["data: 1\n\n", "data: {\"ha"]);
    let (status, body) = front.complete(&prompt(1)).await;
    let events: Vec<&str> = body.split_terminator("\n\n").collect();
    assert_eq!(
        (status.as_u16(), events[0], events[2], events.len()),
        (200, "data: 1", "data: [DONE]", 3)
    );
    assert_eq!(
        error_of(events[1].strip_prefix("data: ").unwrap())["type"],
        "BadGatewayError"
    );
}

#[tokio::test]
async fn a_client_that_hangs_up_is_felt_by_the_server() {
    let decode = Fake::new(Act::StreamThenHang).start().await;
    let front = before(&[(&decode, Role::Decode)]).await;
    let mut response = front.send("/v1/completions", &[], &prompt(1)).await;
    assert_eq!(
        response
            .body_mut()
            .frame()
            .await
            .unwrap()
            .unwrap()
            .into_data()
            .unwrap(),
        "data: 1\n\n"
    );
    drop(response);
    decode.fake.given_up.notified().await;

    *decode.fake.act.lock() = Act::Hang;
    {
        let pending = front.send("/v1/completions", &[], r#"{"prompt":"another"}"#);
        tokio::select! {
            _ = pending => panic!("it hangs"),
            () = eventually(|| async { decode.seen().len() == 2 }) => {}
        }
    }
    decode.fake.given_up.notified().await;
    eventually(|| async { front.metric("baton_gateway_requests_in_progress").await == 1 }).await;
}

#[tokio::test]
async fn models_of_all_servers_are_listed_once_and_requests_go_where_their_model_is() {
    let mut two = Fake::new(OK);
    two.models = r#"{"object":"list","data":[{"id":"m"},{"id":"other"}]}"#;
    let (one, two) = (Fake::new(OK).start().await, two.start().await);
    let front = before(&[(&one, Role::Decode), (&two, Role::Decode)]).await;
    let (status, body) = front.get("/v1/models").await;
    assert_eq!(
        (status.as_u16(), body.as_str()),
        (
            200,
            r#"{"object":"list","data":[{"id":"m"},{"id":"other"}]}"#
        )
    );
    for _ in 0..3 {
        assert_eq!(
            front.complete(r#"{"model":"other","prompt":"x"}"#).await.0,
            200
        );
    }
    assert_eq!((one.seen().len(), two.seen().len()), (0, 3));
    let (status, body) = front.complete(r#"{"model":"none","prompt":"x"}"#).await;
    let error = error_of(&body);
    assert_eq!(
        (
            status.as_u16(),
            error["type"].as_str(),
            error["param"].as_str()
        ),
        (404, Some("NotFoundError"), Some("model"))
    );
    assert_eq!(
        error["message"],
        "The model `none` does not exist. Valid aliases: m, other."
    );
}

#[tokio::test]
async fn requests_keep_away_from_busy_servers() {
    let mut busy = Fake::new(OK);
    busy.metrics =
        "vllm:num_requests_waiting 40\nvllm:num_requests_running 8\nvllm:kv_cache_usage_perc 0.9\n";
    let (busy, idle) = (busy.start().await, Fake::new(OK).start().await);
    let front = before(&[(&busy, Role::Decode), (&idle, Role::Decode)]).await;
    for i in 0..4 {
        front.complete(&format!(r#"{{"prompt":"{i}"}}"#)).await;
    }
    assert_eq!((busy.seen().len(), idle.seen().len()), (0, 4));
}

#[tokio::test]
async fn without_a_server_that_generates_nothing_is_promised() {
    let prefill = Fake::new(OK).start().await;
    let front = before(&[(&prefill, Role::Prefill)]).await;
    for path in ["/v1/completions", "/tokenize"] {
        let response = front.send(path, &[], &prompt(1)).await;
        assert_eq!(response.headers()["retry-after"], "1");
        let (status, body) = text(response).await;
        assert_eq!(
            (status.as_u16(), error_of(&body)["type"].as_str()),
            (503, Some("ServiceUnavailableError"))
        );
    }
    assert_eq!(front.get("/health").await.0, 503);
    assert_eq!(front.get("/v1/models").await.0, 503);
}

#[tokio::test]
async fn paths_and_methods_are_refused_as_vllm_does() {
    let decode = Fake::new(OK).start().await;
    let front = before(&[(&decode, Role::Decode)]).await;
    assert_eq!(front.get("/health").await, (StatusCode::OK, String::new()));
    assert!(front.get("/version").await.1.starts_with(r#"{"version":""#));
    for path in ["/", "/v1", "/V1/completions", "/metrics/../v1/models"] {
        assert_eq!(
            front.get(path).await,
            (
                StatusCode::NOT_FOUND,
                r#"{"detail":"Not Found"}"#.to_owned()
            )
        );
    }
    let response = front.send("/health", &[], "{}").await;
    assert_eq!(
        (
            response.status().as_u16(),
            response.headers()["allow"].to_str().unwrap()
        ),
        (405, "GET")
    );
    assert_eq!(
        front.get("/tokenize").await,
        (
            StatusCode::METHOD_NOT_ALLOWED,
            r#"{"detail":"Method Not Allowed"}"#.to_owned()
        )
    );
    assert_eq!(front.get("/v1/responses/7").await.0, 200);
    assert_eq!(front.post("/v1/responses/7/cancel", "").await.0, 200);
}

#[tokio::test]
async fn bodies_too_long_or_not_json_are_refused_in_openais_form() {
    let decode = Fake::new(OK).start().await;
    let limits = Limits {
        max_request_bytes: 100,
        max_response_bytes: 20,
        ..Limits::default()
    };
    let endpoints = vec![decode.config(Role::Both)];
    let front = gateway(GatewayConfig {
        endpoints,
        limits,
        ..GatewayConfig::default()
    })
    .await;
    front.until_healthy(1).await;
    for tokens in [30, 3000] {
        let (status, body) = front.complete(&prompt(tokens)).await;
        assert_eq!(
            (status.as_u16(), error_of(&body)["code"].as_u64()),
            (413, Some(413))
        );
    }
    let (status, body) = front.complete("{nonsense").await;
    assert_eq!(
        (status.as_u16(), error_of(&body)["type"].as_str()),
        (400, Some("Bad Request"))
    );
    assert!(decode.seen().is_empty());
    *decode.fake.act.lock() = Act::Json(200, "{\"much\":\"too much for this gateway\"}");
    assert_eq!(front.complete("{}").await.0, 502);
}

#[tokio::test]
async fn bodies_beyond_the_budget_are_refused_for_now() {
    let decode = Fake::new(OK).start().await;
    let limits = Limits {
        max_buffered_bytes: 10_240,
        ..Limits::default()
    };
    let endpoints = vec![decode.config(Role::Both)];
    let front = gateway(GatewayConfig {
        endpoints,
        limits,
        ..GatewayConfig::default()
    })
    .await;
    front.until_healthy(1).await;
    assert_eq!(front.complete(&prompt(4000)).await.0, 503);
    assert_eq!(front.complete(&prompt(2000)).await.0, 200);
}

#[tokio::test]
async fn more_requests_than_allowed_are_refused() {
    let decode = Fake::new(Act::StreamThenHang).start().await;
    let limits = Limits {
        max_in_flight: 1,
        ..Limits::default()
    };
    let endpoints = vec![decode.config(Role::Both)];
    let front = gateway(GatewayConfig {
        endpoints,
        limits,
        ..GatewayConfig::default()
    })
    .await;
    front.until_healthy(1).await;
    let held = front.send("/v1/completions", &[], &prompt(1)).await;
    assert_eq!(front.complete(&prompt(1)).await.0, 503);
    drop(held);
    *decode.fake.act.lock() = OK;
    eventually(|| async { front.complete(&prompt(1)).await.0 == 200 }).await;
}

#[tokio::test]
async fn the_endpoints_file_is_followed_and_nonsense_in_it_changes_nothing() {
    let (one, two) = (Fake::new(OK).start().await, Fake::new(OK).start().await);
    let folder = std::env::temp_dir().join(format!("baton-gateway-test-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("endpoints.json");
    let write = |text: &str| {
        std::fs::write(folder.join("new"), text).unwrap();
        std::fs::rename(folder.join("new"), &path).unwrap();
    };
    let list = |servers: &[&Running]| {
        serde_json::to_string(
            &servers
                .iter()
                .map(|s| s.config(Role::Decode))
                .collect::<Vec<_>>(),
        )
        .unwrap()
    };
    write(&list(&[&one]));
    let front = gateway(GatewayConfig {
        endpoints_file: Some(path.clone()),
        ..GatewayConfig::default()
    })
    .await;
    front.until_healthy(1).await;
    write("[{");
    write(&list(&[&one, &two]));
    front.until_healthy(2).await;
    write(&list(&[&two]));
    front.until_healthy(1).await;
    assert_eq!(front.complete(&prompt(1)).await.0, 200);
    assert_eq!((one.seen().len(), two.seen().len()), (0, 1));
    std::fs::remove_dir_all(&folder).unwrap();
}
