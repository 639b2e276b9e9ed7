//! Requests that wait for servers with room, and clients that show keys.

use super::*;
use crate::{ApiKey, BandSection, Certificate, DetectorSection, FlowControlConfig, Mode};
use tokio::task::JoinHandle;

/// One request at a time at each server.
fn one_at_a_time() -> FlowControlConfig {
    FlowControlConfig {
        saturation_detector: DetectorSection::Concurrency {
            concurrency_mode: Mode::Requests,
            max_concurrency: 1.0,
            max_token_concurrency: 1e6,
        },
        objectives: [("urgent".to_owned(), 10), ("batch".to_owned(), -1)].into(),
        ..FlowControlConfig::default()
    }
}

async fn with_queue(server: &Running, flow: FlowControlConfig) -> Front {
    let front = gateway(GatewayConfig {
        endpoints: vec![server.config(Role::Decode)],
        flow_control: Some(flow),
        ..GatewayConfig::default()
    })
    .await;
    front.until_healthy(1).await;
    front
}

/// An answer: status, why it was refused, body.
type Answer = (u16, Option<String>, String);

impl Front {
    /// Sends a request by itself; its body says `name`.
    fn spawn(&self, name: &str, headers: &[(&str, &str)]) -> JoinHandle<Answer> {
        let mut req = Request::post(format!("{}/v1/completions", self.url));
        for (name, value) in headers {
            req = req.header(*name, *value);
        }
        let body = format!(r#"{{"model":"m","prompt":"{name}"}}"#);
        let (client, req) = (self.client.clone(), req.body(Full::from(body)).unwrap());
        tokio::spawn(async move {
            let response = client.send(req).await.unwrap();
            let reason = response.headers().get("x-llm-d-request-dropped-reason");
            let reason = reason.map(|v| v.to_str().unwrap().to_owned());
            if reason.is_some() {
                assert_eq!(response.headers()["retry-after"], "1");
                assert_eq!(response.headers()["content-type"], JSON);
            }
            let (status, body) = text(response).await;
            (status.as_u16(), reason, body)
        })
    }

    /// Requests that wait, of all tenants and priorities.
    async fn waiting(&self) -> usize {
        let (_, metrics) = self.get("/metrics").await;
        let sizes = metrics.lines().filter_map(|line| {
            let (series, n) = line.rsplit_once(' ')?;
            series
                .starts_with("llm_d_epp_flow_control_queue_size{")
                .then(|| n.parse::<usize>().unwrap())
        });
        sizes.sum()
    }

    async fn until_waiting(&self, n: usize) {
        eventually(|| async { self.waiting().await == n }).await;
    }
}

/// Occupies the server of `front`, and tells how to end that.
async fn occupy(front: &Front, server: &Running) -> JoinHandle<Answer> {
    *server.fake.act.lock() = Act::Hang;
    let before = server.seen().len();
    let first = front.spawn("first", &[]);
    eventually(|| async { server.seen().len() > before }).await;
    *server.fake.act.lock() = OK;
    first
}

fn names(server: &Running) -> Vec<String> {
    let name = |s: &Seen| {
        let body: serde_json::Value = serde_json::from_slice(&s.body).unwrap();
        body["prompt"].as_str().unwrap().to_owned()
    };
    server.seen().iter().map(name).collect()
}

#[tokio::test]
async fn tenants_take_turns_and_higher_priorities_go_first() {
    let server = Fake::new(OK).start().await;
    let front = with_queue(&server, one_at_a_time()).await;
    let first = occupy(&front, &server).await;
    let mut sent = Vec::new();
    let a = ("x-llm-d-inference-fairness-id", "a");
    let b = ("x-gateway-inference-fairness-id", "b");
    let urgent = ("x-gateway-inference-objective", "urgent");
    for (name, headers) in [
        ("a1", vec![a]),
        ("a2", vec![a]),
        ("a3", vec![a]),
        ("b1", vec![b]),
        ("now", vec![b, urgent]),
    ] {
        sent.push(front.spawn(name, &headers));
        front.until_waiting(sent.len()).await;
    }
    first.abort();
    for request in sent {
        assert_eq!(
            request.await.unwrap(),
            (200, None, r#"{"ok":true}"#.to_owned())
        );
    }
    assert_eq!(names(&server), ["first", "now", "a1", "b1", "a2", "a3"]);
    for seen in server.seen() {
        let ours = |name: &&http::HeaderName| name.as_str().contains("inference");
        assert_eq!(seen.headers.keys().find(ours), None);
    }
    let dispatched = r#"llm_d_epp_flow_control_requests_total{inference_pool="gateway",outcome="Dispatched",priority="0"}"#;
    assert_eq!(front.metric(dispatched).await, 5);
}

#[tokio::test]
async fn a_full_queue_refuses() {
    let server = Fake::new(OK).start().await;
    let flow = FlowControlConfig {
        default_priority_band: BandSection {
            max_requests: 1,
            ..BandSection::default()
        },
        ..one_at_a_time()
    };
    let front = with_queue(&server, flow).await;
    let first = occupy(&front, &server).await;
    let waits = front.spawn("waits", &[]);
    front.until_waiting(1).await;
    let (status, reason, body) = front.spawn("too many", &[]).await.unwrap();
    assert_eq!(
        (status, reason.as_deref()),
        (429, Some("rejected-saturated"))
    );
    assert_eq!(error_of(&body)["type"], "TooManyRequestsError");
    first.abort();
    assert_eq!(waits.await.unwrap().0, 200);
    assert_eq!(names(&server), ["first", "waits"]);
}

#[tokio::test]
async fn who_waits_too_long_is_refused() {
    let server = Fake::new(OK).start().await;
    let flow = FlowControlConfig {
        default_request_ttl_s: 0.05,
        ..one_at_a_time()
    };
    let front = with_queue(&server, flow).await;
    let first = occupy(&front, &server).await;
    let (status, reason, body) = front.spawn("waits", &[]).await.unwrap();
    assert_eq!(
        (status, reason.as_deref()),
        (429, Some("rejected-ttl-expired"))
    );
    assert_eq!(error_of(&body)["code"], 429);
    assert_eq!(names(&server), ["first"]);
    drop(first);
}

#[tokio::test]
async fn without_any_server_requests_wait_for_one_and_not_for_ever() {
    let flow = FlowControlConfig {
        no_endpoint_request_ttl_s: 0.1,
        ..one_at_a_time()
    };
    let nobody = EndpointConfig {
        address: "127.0.0.1:1".to_owned(),
        role: Role::Decode,
        name: None,
    };
    let front = gateway(GatewayConfig {
        endpoints: vec![nobody],
        flow_control: Some(flow),
        ..GatewayConfig::default()
    })
    .await;
    let (status, reason, _) = front.spawn("a", &[]).await.unwrap();
    assert_eq!(
        (status, reason.as_deref()),
        (503, Some("rejected-no-endpoints"))
    );
}

#[tokio::test]
async fn a_request_that_waits_for_the_first_server_is_answered_by_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let front = gateway(GatewayConfig {
        endpoints: vec![EndpointConfig {
            address: address.to_string(),
            role: Role::Decode,
            name: None,
        }],
        flow_control: Some(one_at_a_time()),
        ..GatewayConfig::default()
    })
    .await;
    let waits = front.spawn("a", &[]);
    front.until_waiting(1).await;
    let _server = Fake::new(OK).start_at(&address.to_string()).await;
    assert_eq!(waits.await.unwrap().0, 200);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_the_queue() {
    let server = Fake::new(OK).start().await;
    let front = with_queue(&server, one_at_a_time()).await;
    let _first = occupy(&front, &server).await;
    let waits = front.spawn("waits", &[]);
    front.until_waiting(1).await;
    let size = r#"llm_d_epp_flow_control_queue_size{fairness_id="default-flow",inference_pool="gateway",model_name="m",priority="0",target_model_name="m"}"#;
    assert_eq!(front.metric(size).await, 1);
    waits.abort();
    front.until_waiting(0).await;
    let gone = r#"llm_d_epp_flow_control_requests_total{inference_pool="gateway",outcome="EvictedContextCancelled",priority="0"}"#;
    assert_eq!(front.metric(gone).await, 1);
}

#[tokio::test]
async fn a_gateway_that_ends_tells_those_who_wait() {
    let server = Fake::new(OK).start().await;
    let front = with_queue(&server, one_at_a_time()).await;
    let _first = occupy(&front, &server).await;
    let waits = front.spawn("waits", &[]);
    front.until_waiting(1).await;
    drop(front);
    let (status, reason, _) = waits.await.unwrap();
    assert_eq!(
        (status, reason.as_deref()),
        (503, Some("rejected-shutting-down"))
    );
}

#[tokio::test]
async fn a_stream_holds_its_place_until_its_end() {
    let server = Fake::new(Act::StreamThenHang).start().await;
    let front = with_queue(&server, one_at_a_time()).await;
    let stream = front.send("/v1/completions", &[], &prompt(1)).await;
    *server.fake.act.lock() = OK;
    let waits = front.spawn("waits", &[]);
    front.until_waiting(1).await;
    drop(stream);
    assert_eq!(waits.await.unwrap().0, 200);
}

const BATCH: (&str, &str) = ("x-llm-d-inference-objective", "batch");

fn evicting() -> FlowControlConfig {
    FlowControlConfig {
        eviction: true,
        ..one_at_a_time()
    }
}

#[tokio::test]
async fn what_runs_is_ended_for_what_waits_and_may_come_again() {
    let server = Fake::new(Act::Hang).start().await;
    let front = with_queue(&server, evicting()).await;
    let batch = front.spawn("batch", &[BATCH]);
    eventually(|| async { server.seen().len() == 1 }).await;
    *server.fake.act.lock() = OK;
    // Others of its kind do not end it.
    let more = front.spawn("more", &[BATCH]);
    front.until_waiting(1).await;
    assert!(!batch.is_finished());
    assert_eq!(front.spawn("chat", &[]).await.unwrap().0, 200);
    let (status, reason, body) = batch.await.unwrap();
    assert_eq!((status, reason.as_deref()), (429, Some("evicted")));
    assert_eq!(error_of(&body)["type"], "TooManyRequestsError");
    server.fake.given_up.notified().await;
    assert_eq!(more.await.unwrap().0, 200);
    assert_eq!(names(&server), ["batch", "chat", "more"]);
}

#[tokio::test]
async fn a_stream_that_makes_room_ends_with_an_error() {
    let server = Fake::new(Act::StreamThenHang).start().await;
    let front = with_queue(&server, evicting()).await;
    let stream = front.send("/v1/completions", &[BATCH], &prompt(1)).await;
    *server.fake.act.lock() = OK;
    assert_eq!(front.spawn("chat", &[]).await.unwrap().0, 200);
    let (status, body) = text(stream).await;
    assert_eq!(status, 200);
    let (_, last) = body.split_once("\n\n").unwrap();
    let error = last.strip_prefix("data: ").unwrap();
    let (error, done) = error.split_once("\n\n").unwrap();
    assert_eq!(
        error_of(error)["message"],
        "request evicted by flow control"
    );
    assert_eq!(done, "data: [DONE]\n\n");
}

#[tokio::test]
async fn nothing_is_ended_where_that_was_not_asked_for() {
    let server = Fake::new(Act::Hang).start().await;
    let front = with_queue(&server, one_at_a_time()).await;
    let batch = front.spawn("batch", &[BATCH]);
    eventually(|| async { server.seen().len() == 1 }).await;
    let chat = front.spawn("chat", &[]);
    front.until_waiting(1).await;
    // Whoever would be ended is ended as soon as somebody waits.
    assert!(front.waiting().await == 1 && !batch.is_finished() && !chat.is_finished());
}

#[tokio::test]
async fn what_makes_no_work_does_not_wait() {
    let server = Fake::new(OK).start().await;
    let front = with_queue(&server, one_at_a_time()).await;
    let _first = occupy(&front, &server).await;
    assert_eq!(front.post("/tokenize", r#"{"prompt":"x"}"#).await.0, 200);
    assert_eq!(front.get("/v1/models").await.0, 200);
}

#[tokio::test]
async fn tenants_are_known_by_their_keys_and_keys_stop_here() {
    let server = Fake::new(OK).start().await;
    let key = |tenant: &str, key: &str| ApiKey {
        tenant: tenant.to_owned(),
        key: key.to_owned(),
    };
    let front = gateway(GatewayConfig {
        endpoints: vec![server.config(Role::Decode)],
        flow_control: Some(one_at_a_time()),
        api_keys: vec![key("a", "one"), key("b", "two")],
        ..GatewayConfig::default()
    })
    .await;
    front.until_healthy(1).await;
    for headers in [&[][..], &[("authorization", "Bearer on")]] {
        let (status, _, body) = front.spawn("x", headers).await.unwrap();
        assert_eq!((status, &*body), (401, r#"{"error":"Unauthorized"}"#));
    }
    assert_eq!(front.get("/v1/models").await.0, 401);
    assert_eq!(front.get("/health").await.0, 200);
    assert_eq!(server.seen().len(), 0);
    let headers = [
        ("authorization", "Bearer two"),
        ("x-llm-d-inference-fairness-id", "a"),
    ];
    assert_eq!(front.spawn("x", &headers).await.unwrap().0, 200);
    assert!(!server.seen()[0].headers.contains_key("authorization"));
    let waited = r#"llm_d_epp_flow_control_request_queue_duration_seconds_count{fairness_id="b",inference_pool="gateway",model_name="m",outcome="Dispatched",priority="0",target_model_name="m"}"#;
    assert_eq!(front.metric(waited).await, 1);
}

#[tokio::test]
async fn clients_may_speak_tls() {
    let server = Fake::new(OK).start().await;
    let mut front = gateway(GatewayConfig {
        endpoints: vec![server.config(Role::Decode)],
        tls: Some(Certificate::SelfSigned),
        ..GatewayConfig::default()
    })
    .await;
    let anyone = baton_http::ClientTls::new(&baton_http::Trust::Anyone).unwrap();
    front.client = Client::with_tls(&baton_http::ClientConfig::default(), anyone);
    front.url = front.url.replace("http://", "https://");
    front.until_healthy(1).await;
    assert_eq!(front.complete(&prompt(1)).await.0, 200);
}
