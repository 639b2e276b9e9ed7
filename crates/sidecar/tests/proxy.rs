//! What a transcript cannot show: who hangs up when, long bodies, ranks, TLS, the end.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use baton_http::{Client, ServeConfig, collect, serve};
use baton_sidecar::{Bound, Settings, bind, run};
use bytes::Bytes;
use clap::Parser;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

const PARAMS: &str =
    r#"{"kv_transfer_params":{"uuid":7,"remote_host":"h","kvx":{"v":1,"tok":"a-_9"}}}"#;
const ANSWER: &str = r#"{"id":"decoded"}"#;
const PATH: &str = "/v1/completions";

type Body = BoxBody<Bytes, io::Error>;

/// What a made-up server does.
#[derive(Clone)]
enum Act {
    Json(&'static str),
    /// Never answers.
    Hang,
    /// Answers with one event and then nothing, for ever.
    StreamThenHang,
}

struct Asked {
    method: String,
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

#[derive(Clone)]
struct Fake {
    act: Act,
    asked: watch::Sender<Vec<Arc<Asked>>>,
    /// How many requests were given up by the one who asked.
    given_up: watch::Sender<usize>,
    address: SocketAddr,
    _stop: Arc<DropGuard>,
}

/// Tells, unless it is disarmed, that an answer was given up.
struct Tell(Option<watch::Sender<usize>>);

impl Drop for Tell {
    fn drop(&mut self) {
        if let Some(given_up) = &self.0 {
            given_up.send_modify(|n| *n += 1);
        }
    }
}

impl Fake {
    async fn start(act: Act) -> Self {
        Self::serve(act, TcpListener::bind("127.0.0.1:0").await.unwrap(), None)
    }

    fn serve(act: Act, listener: TcpListener, tls: Option<baton_http::Identity>) -> Self {
        let stop = CancellationToken::new();
        let fake = Self {
            act,
            asked: watch::Sender::default(),
            given_up: watch::Sender::default(),
            address: listener.local_addr().unwrap(),
            _stop: Arc::new(stop.clone().drop_guard()),
        };
        let answering = fake.clone_without_guard();
        let service = service_fn(move |req| {
            let fake = answering.clone();
            async move { Ok::<_, Infallible>(fake.answer(req).await) }
        });
        let config = ServeConfig {
            grace: std::time::Duration::ZERO,
            tls,
            ..ServeConfig::default()
        };
        tokio::spawn(serve(listener, service, config, stop));
        fake
    }

    /// The server's own copy must not keep it running.
    fn clone_without_guard(&self) -> Self {
        Self {
            _stop: Arc::new(CancellationToken::new().drop_guard()),
            ..self.clone()
        }
    }

    async fn answer(self, req: Request<Incoming>) -> Response<Body> {
        let (parts, body) = req.into_parts();
        let asked = Asked {
            method: parts.method.to_string(),
            path: parts.uri.path().to_owned(),
            headers: parts.headers,
            body: collect(body, 64 << 20).await.unwrap(),
        };
        let releases = asked.method == "DELETE";
        self.asked.send_modify(|all| all.push(Arc::new(asked)));
        let mut tell = Tell(Some(self.given_up));
        match self.act {
            _ if releases => json("{}"),
            Act::Json(text) => {
                tell.0 = None;
                json(text)
            }
            Act::Hang => {
                std::future::pending::<()>().await;
                drop(tell);
                json("")
            }
            Act::StreamThenHang => {
                let (more, mut rest) = mpsc::channel::<Bytes>(1);
                more.send(Bytes::from_static(b"data: {}\n\n"))
                    .await
                    .unwrap();
                let stream = futures_stream(move |cx| {
                    let _held = (&tell, &more);
                    rest.poll_recv(cx)
                });
                let mut response = Response::new(StreamBody::new(stream).boxed());
                let kind = http::HeaderValue::from_static("text/event-stream");
                response.headers_mut().insert("content-type", kind);
                response
            }
        }
    }

    async fn nth(&self, n: usize) -> Arc<Asked> {
        let mut asked = self.asked.subscribe();
        asked.wait_for(|all| all.len() > n).await.unwrap()[n].clone()
    }

    async fn is_given_up(&self) {
        self.given_up
            .subscribe()
            .wait_for(|n| *n > 0)
            .await
            .unwrap();
    }
}

/// A stream of frames from a poll function.
fn futures_stream(
    mut poll: impl FnMut(&mut std::task::Context<'_>) -> std::task::Poll<Option<Bytes>> + Send + Sync,
) -> impl futures_util::Stream<Item = Result<Frame<Bytes>, io::Error>> + Send + Sync {
    futures_util::stream::poll_fn(move |cx| poll(cx).map(|data| data.map(|d| Ok(Frame::data(d)))))
}

fn json(text: &'static str) -> Response<Body> {
    let body = Full::new(Bytes::from_static(text.as_bytes())).map_err(|never| match never {});
    let mut response = Response::new(body.boxed());
    let kind = http::HeaderValue::from_static("application/json");
    response.headers_mut().insert("content-type", kind);
    response
}

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

/// A sidecar in front of `decode`, and how to end it.
struct Running {
    address: SocketAddr,
    stop: CancellationToken,
    ended: JoinHandle<()>,
}

async fn bound(flags: &str) -> Bound {
    let settings = Line::try_parse_from(flags.split_whitespace())
        .unwrap()
        .settings;
    bind(settings.resolve().unwrap().config).await.unwrap()
}

async fn sidecar(decode: SocketAddr, flags: &str) -> Running {
    let flags = format!(
        "--host=127.0.0.1 --model-server-port={} {flags}",
        decode.port()
    );
    let port = if flags.contains("--port=") {
        ""
    } else {
        "--port=0"
    };
    let tls = if flags.contains("--secure-proxy") {
        ""
    } else {
        "--secure-proxy=false"
    };
    let bound = bound(&format!("{flags} {port} {tls}")).await;
    let address = bound.address().unwrap();
    let stop = CancellationToken::new();
    let ended = tokio::spawn(run(bound, stop.clone()));
    Running {
        address,
        stop,
        ended,
    }
}

fn post(
    to: SocketAddr,
    prefill: Option<SocketAddr>,
    body: impl Into<Bytes>,
) -> Request<Full<Bytes>> {
    let mut request = Request::post(format!("http://{to}{PATH}"));
    if let Some(prefill) = prefill {
        request = request.header("x-prefiller-host-port", prefill.to_string());
    }
    request.body(Full::new(body.into())).unwrap()
}

/// Sends a request in the background; aborting the task hangs up.
fn ask(request: Request<Full<Bytes>>) -> JoinHandle<Bytes> {
    tokio::spawn(async move {
        let response = Client::default().send(request).await.unwrap();
        collect(response.into_body(), 64 << 20).await.unwrap()
    })
}

#[tokio::test]
async fn a_client_that_hangs_up_during_prefill_ends_prefill() {
    let (prefill, decode) = (
        Fake::start(Act::Hang).await,
        Fake::start(Act::Json(ANSWER)).await,
    );
    let sidecar = sidecar(decode.address, "").await;
    let asked = ask(post(sidecar.address, Some(prefill.address), "{}"));
    prefill.nth(0).await;
    asked.abort();
    prefill.is_given_up().await;
    assert!(decode.asked.borrow().is_empty());
}

#[tokio::test]
async fn a_client_that_hangs_up_before_decode_answers_has_its_kv_given_back() {
    let (prefill, decode) = (
        Fake::start(Act::Json(PARAMS)).await,
        Fake::start(Act::Hang).await,
    );
    let sidecar = sidecar(decode.address, "").await;
    let asked = ask(post(sidecar.address, Some(prefill.address), "{}"));
    decode.nth(0).await;
    asked.abort();
    decode.is_given_up().await;
    let release = prefill.nth(1).await;
    assert_eq!(
        (&*release.method, &*release.path),
        ("DELETE", "/kv/v1/leases/7")
    );
    assert_eq!(release.headers["x-kvx-token"], "a-_9");
}

#[tokio::test]
async fn kv_is_given_back_when_decode_does_not_listen() {
    let prefill = Fake::start(Act::Json(PARAMS)).await;
    let nobody = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let sidecar = sidecar(nobody, "").await;
    let response = Client::default()
        .send(post(sidecar.address, Some(prefill.address), "{}"))
        .await
        .unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(prefill.nth(1).await.method, "DELETE");
}

#[tokio::test]
async fn a_client_that_hangs_up_in_a_stream_ends_decode_which_has_the_kv_by_then() {
    let (prefill, decode) = (
        Fake::start(Act::Json(PARAMS)).await,
        Fake::start(Act::StreamThenHang).await,
    );
    let sidecar = sidecar(decode.address, "").await;
    let request = post(sidecar.address, Some(prefill.address), r#"{"stream":true}"#);
    let response = Client::default().send(request).await.unwrap();
    let mut body = response.into_body();
    // The first event is here although the stream has not ended.
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, "data: {}\n\n");
    drop(body);
    decode.is_given_up().await;
    assert_eq!(prefill.asked.borrow().len(), 1);
}

#[tokio::test]
async fn when_both_legs_run_at_once_a_client_that_hangs_up_ends_both() {
    let (prefill, decode) = (Fake::start(Act::Hang).await, Fake::start(Act::Hang).await);
    let sidecar = sidecar(decode.address, "--kv-connector=sglang").await;
    let asked = ask(post(sidecar.address, Some(prefill.address), "{}"));
    prefill.nth(0).await;
    decode.nth(0).await;
    asked.abort();
    prefill.is_given_up().await;
    decode.is_given_up().await;
}

#[tokio::test]
async fn a_body_of_twenty_megabytes_reaches_both_servers_and_a_longer_one_neither() {
    let (prefill, decode) = (
        Fake::start(Act::Json(PARAMS)).await,
        Fake::start(Act::Json(ANSWER)).await,
    );
    let sidecar = sidecar(decode.address, "--max-body-bytes=25000000").await;
    let body = format!(r#"{{"prompt":"{}","n":1}}"#, "x".repeat(20_000_000));
    let request = post(sidecar.address, Some(prefill.address), body.clone());
    assert_eq!(ask(request).await.unwrap(), ANSWER);
    let said = String::from_utf8(decode.nth(0).await.body.to_vec()).unwrap();
    let params = r#"{"uuid":7,"remote_host":"h","kvx":{"v":1,"tok":"a-_9"}}"#;
    assert!(said.replace(&format!(r#","kv_transfer_params":{params}"#), "") == body);
    let asked = prefill.nth(0).await.body.len();
    assert!((20_000_000..20_001_000).contains(&asked));

    let long = post(
        sidecar.address,
        Some(prefill.address),
        "x".repeat(25_000_001),
    );
    let response = Client::default().send(long).await.unwrap();
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(prefill.asked.borrow().len(), 1);
}

/// Two listeners on neighbouring ports.
async fn neighbours() -> (TcpListener, TcpListener) {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = first.local_addr().unwrap().port();
        let Some(next) = port.checked_add(1) else {
            continue;
        };
        if let Ok(second) = TcpListener::bind(("127.0.0.1", next)).await {
            return (first, second);
        }
    }
}

#[tokio::test]
async fn every_rank_has_a_port_and_rank_zero_takes_requests_for_all() {
    let (first, second) = neighbours().await;
    let rank0 = Fake::serve(Act::Json(r#"{"rank":0}"#), first, None);
    let rank1 = Fake::serve(Act::Json(r#"{"rank":1}"#), second, None);
    let prefill = Fake::start(Act::Json(PARAMS)).await;
    let (first, second) = neighbours().await;
    let port = first.local_addr().unwrap().port();
    drop((first, second));
    let sidecar = sidecar(
        rank0.address,
        &format!("--data-parallel-size=2 --port={port}"),
    )
    .await;
    let at = |rank| SocketAddr::from(([127, 0, 0, 1], port + rank));
    assert_eq!(sidecar.address, at(0));
    assert_eq!(ask(post(at(0), None, "{}")).await.unwrap(), r#"{"rank":0}"#);
    assert_eq!(
        ask(post(at(1), Some(prefill.address), "{}")).await.unwrap(),
        r#"{"rank":1}"#
    );
    let named = |name: String| {
        let mut request = post(at(0), Some(prefill.address), "{}");
        request
            .headers_mut()
            .insert("x-data-parallel-host-port", name.parse().unwrap());
        request
    };
    assert_eq!(
        ask(named(at(1).to_string())).await.unwrap(),
        r#"{"rank":1}"#
    );
    assert_eq!(
        rank1.nth(1).await.headers["x-data-parallel-host-port"],
        at(1).to_string()
    );
    let before = prefill.asked.borrow().len();
    let unknown = Client::default()
        .send(named(format!("127.0.0.1:{}", port - 1)))
        .await
        .unwrap();
    assert_eq!(unknown.status(), StatusCode::BAD_REQUEST);
    assert_eq!(prefill.asked.borrow().len(), before);
}

#[tokio::test]
async fn each_leg_speaks_tls_if_told_to() {
    use baton_http::{ClientConfig, ClientTls, Identity, Trust};
    let listen = || async { TcpListener::bind("127.0.0.1:0").await.unwrap() };
    let identity = || Some(Identity::self_signed().unwrap());
    let prefill = Fake::serve(Act::Json(PARAMS), listen().await, identity());
    let decode = Fake::serve(Act::Json(ANSWER), listen().await, identity());
    let anyone = ClientTls::new(&Trust::Anyone).unwrap();
    let client = Client::<Full<Bytes>>::with_tls(&ClientConfig::default(), anyone);
    let send = async |to: SocketAddr| {
        let mut request = post(to, Some(prefill.address), "{}");
        *request.uri_mut() = format!("https://{to}{PATH}").parse().unwrap();
        let response = client.send(request).await.unwrap();
        (
            response.status(),
            collect(response.into_body(), 1 << 20).await.unwrap(),
        )
    };
    let trusting = "--secure-proxy --enable-tls=prefiller,decoder --tls-insecure-skip-verify=decoder,prefiller";
    let running = sidecar(decode.address, trusting).await;
    assert_eq!(send(running.address).await, (StatusCode::OK, ANSWER.into()));
    assert_eq!(prefill.asked.borrow().len(), 1);
    // Nobody vouches for prefill: it is as good as not there.
    let wary = "--secure-proxy --enable-tls=prefiller,decoder --tls-insecure-skip-verify=decoder";
    if ClientTls::new(&Trust::System).is_ok() {
        let running = sidecar(decode.address, wary).await;
        assert_eq!(send(running.address).await, (StatusCode::OK, ANSWER.into()));
        assert_eq!(prefill.asked.borrow().len(), 1);
    }
    // Plain HTTP gets no answer from a port that speaks TLS.
    assert!(
        Client::default()
            .send(post(running.address, None, "{}"))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn servers_that_are_not_listed_are_not_asked() {
    let (prefill, decode) = (
        Fake::start(Act::Json(PARAMS)).await,
        Fake::start(Act::Json(ANSWER)).await,
    );
    let file = std::env::temp_dir().join(format!("baton-sidecar-{}", std::process::id()));
    std::fs::write(&file, "10.0.0.1:*\n").unwrap();
    let flags = format!("--enable-ssrf-protection --allow-list={}", file.display());
    let sidecar = sidecar(decode.address, &flags).await;
    std::fs::remove_file(&file).unwrap();
    let response = Client::default()
        .send(post(sidecar.address, Some(prefill.address), "{}"))
        .await
        .unwrap();
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    assert_eq!(
        ask(post(sidecar.address, None, "{}")).await.unwrap(),
        ANSWER
    );
    assert!(prefill.asked.borrow().is_empty());
}

#[tokio::test]
async fn requests_in_progress_are_finished_and_new_ones_refused_when_it_is_told_to_end() {
    let (prefill, decode) = (
        Fake::start(Act::Json(PARAMS)).await,
        Fake::start(Act::StreamThenHang).await,
    );
    let sidecar = sidecar(decode.address, "--shutdown-timeout=50ms").await;
    let request = post(sidecar.address, Some(prefill.address), "{}");
    let mut body = Client::default().send(request).await.unwrap().into_body();
    assert!(body.frame().await.unwrap().is_ok());
    sidecar.stop.cancel();
    while Client::default()
        .send(post(sidecar.address, None, "{}"))
        .await
        .is_ok()
    {}
    // It does not end by itself, so that the grace ends it.
    sidecar.ended.await.unwrap();
    assert!(body.frame().await.unwrap().is_err());
}

#[tokio::test]
async fn what_happened_can_be_read_from_its_metrics() {
    let decode = Fake::start(Act::Json(ANSWER)).await;
    let nobody = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let port = nobody.port();
    let flags =
        format!("--metrics-port={port} --prefill-max-retries=1 --prefill-retry-backoff=1ms");
    let sidecar = sidecar(decode.address, &flags).await;
    let gone = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    ask(post(sidecar.address, Some(gone), "{}")).await.unwrap();
    let get = Client::<Full<Bytes>>::default();
    let (status, text) = get
        .get(&format!("http://127.0.0.1:{port}/metrics"), 1 << 20)
        .await
        .unwrap();
    let text = String::from_utf8(text.to_vec()).unwrap();
    assert_eq!(status, StatusCode::OK);
    for line in [
        r#"baton_sidecar_requests_total{code="200",route="/v1/completions"} 1"#,
        r#"baton_sidecar_prefills_total{outcome="unreachable"} 2"#,
        r#"baton_sidecar_prefill_retries_total{server="same"} 1"#,
        r#"baton_sidecar_fallbacks_total{reason="unreachable"} 1"#,
    ] {
        assert!(text.contains(line), "{line} not in\n{text}");
    }
    let (status, _) = get
        .get(&format!("http://127.0.0.1:{port}/"), 1 << 20)
        .await
        .unwrap();
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_port_in_use_is_an_error_at_start() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let flags = format!(
        "--host=127.0.0.1 --secure-proxy=false --port={}",
        taken.local_addr().unwrap().port()
    );
    let settings = Line::try_parse_from(flags.split_whitespace())
        .unwrap()
        .settings;
    assert!(bind(settings.resolve().unwrap().config).await.is_err());
}
