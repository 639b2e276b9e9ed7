//! Made-up servers, a sidecar in front of them, and its client.

use baton_http::{Client, ServeConfig, collect, serve};
use baton_sidecar::{Config, Settings, bind, run};
use bytes::Bytes;
use clap::Parser;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use parking_lot::Mutex;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) const PARAMS: &str =
    r#"{"kv_transfer_params":{"uuid":7,"remote_host":"h","kvx":{"v":1,"tok":"a-_9"}}}"#;
pub(crate) const ANSWER: &str = r#"{"id":"decoded"}"#;
pub(crate) const PATH: &str = "/v1/completions";

type Body = BoxBody<Bytes, io::Error>;

/// What a made-up server does.
#[derive(Clone)]
pub(crate) enum Act {
    Json(&'static str),
    Status(StatusCode, &'static str),
    /// As before, once it is told to.
    Held(Arc<Notify>, StatusCode, &'static str),
    /// Never answers.
    Hang,
    /// Hangs up without an answer.
    Reset,
    /// Answers with what the test sends; see [`streaming`].
    Stream(&'static str, Arc<Mutex<Option<mpsc::Receiver<Bytes>>>>),
    /// As the other, with a header more.
    With(&'static str, &'static str, Box<Act>),
    /// One after the other, the last for ever. Requests to give KV back do not count.
    InTurn(Vec<Act>),
}

/// A server's answer of this content type, and where its pieces are put in; it ends when that is dropped.
pub(crate) fn streaming(kind: &'static str) -> (mpsc::Sender<Bytes>, Act) {
    let (pieces, rest) = mpsc::channel(1);
    (pieces, Act::Stream(kind, Arc::new(Mutex::new(Some(rest)))))
}

pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

#[derive(Clone)]
pub(crate) struct Fake {
    act: Act,
    pub(crate) asked: watch::Sender<Vec<Arc<Asked>>>,
    /// How many requests were given up by the one who asked.
    given_up: watch::Sender<usize>,
    pub(crate) address: SocketAddr,
    _stop: Arc<DropGuard>,
}

/// Tells, unless it is disarmed, that an answer was given up.
struct Tell(Option<watch::Sender<usize>>);

impl Tell {
    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for Tell {
    fn drop(&mut self) {
        if let Some(given_up) = &self.0 {
            given_up.send_modify(|n| *n += 1);
        }
    }
}

impl Fake {
    pub(crate) async fn start(act: Act) -> Self {
        Self::serve(act, TcpListener::bind("127.0.0.1:0").await.unwrap(), None)
    }

    pub(crate) fn serve(
        act: Act,
        listener: TcpListener,
        tls: Option<baton_http::Identity>,
    ) -> Self {
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
            async move { fake.answer(req).await }
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

    async fn answer(self, req: Request<Incoming>) -> io::Result<Response<Body>> {
        let (parts, body) = req.into_parts();
        let asked = Asked {
            method: parts.method.to_string(),
            path: parts.uri.path().to_owned(),
            headers: parts.headers,
            body: collect(body, 64 << 20).await.unwrap(),
        };
        let act = match (&self.act, asked.method.as_str()) {
            (_, "DELETE") => Act::Json("{}"),
            (Act::InTurn(acts), _) => {
                let before = self
                    .asked
                    .borrow()
                    .iter()
                    .filter(|a| a.method != "DELETE")
                    .count();
                acts[before.min(acts.len() - 1)].clone()
            }
            (act, _) => act.clone(),
        };
        let tell = Tell(Some(self.given_up));
        self.asked.send_modify(|all| all.push(Arc::new(asked)));
        if let Act::With(name, value, act) = act {
            let mut response = perform(*act, tell).await?;
            let value = HeaderValue::from_static(value);
            response.headers_mut().insert(name, value);
            return Ok(response);
        }
        perform(act, tell).await
    }

    pub(crate) async fn nth(&self, n: usize) -> Arc<Asked> {
        let mut asked = self.asked.subscribe();
        asked.wait_for(|all| all.len() > n).await.unwrap()[n].clone()
    }

    pub(crate) async fn is_given_up(&self) {
        self.given_up
            .subscribe()
            .wait_for(|n| *n > 0)
            .await
            .unwrap();
    }
}

/// Does what is neither one of several acts nor one with a header.
async fn perform(act: Act, mut tell: Tell) -> io::Result<Response<Body>> {
    match act {
        Act::Json(text) => {
            tell.disarm();
            Ok(json(StatusCode::OK, text))
        }
        Act::Status(status, text) => {
            tell.disarm();
            Ok(json(status, text))
        }
        Act::Held(go, status, text) => {
            go.notified().await;
            tell.disarm();
            Ok(json(status, text))
        }
        Act::Stream(kind, rest) => Ok(stream(kind, rest.lock().take().unwrap(), tell)),
        Act::Reset => Err(io::ErrorKind::ConnectionReset.into()),
        Act::Hang | Act::InTurn(_) | Act::With(..) => std::future::pending().await,
    }
}

fn stream(kind: &'static str, mut rest: mpsc::Receiver<Bytes>, mut tell: Tell) -> Response<Body> {
    let frames = futures_util::stream::poll_fn(move |cx| {
        let piece = rest.poll_recv(cx);
        if piece == std::task::Poll::Ready(None) {
            tell.disarm();
        }
        piece.map(|data| data.map(|d| Ok(Frame::data(d))))
    });
    answer(StatusCode::OK, kind, StreamBody::new(frames).boxed())
}

fn json(status: StatusCode, text: &'static str) -> Response<Body> {
    let body = Full::new(Bytes::from_static(text.as_bytes())).map_err(|never| match never {});
    answer(status, "application/json", body.boxed())
}

fn answer(status: StatusCode, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let kind = HeaderValue::from_static(kind);
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
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) stop: CancellationToken,
    pub(crate) ended: JoinHandle<()>,
}

impl Running {
    /// Ends it, and waits for that.
    pub(crate) async fn end(self) {
        self.stop.cancel();
        self.ended.await.unwrap();
    }
}

pub(crate) fn config(flags: &str) -> Config {
    let line = Line::try_parse_from(flags.split_whitespace()).unwrap();
    line.settings.resolve().unwrap().config
}

pub(crate) async fn sidecar(decode: SocketAddr, flags: &str) -> Running {
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
    let bound = bind(config(&format!("{flags} {port} {tls}")))
        .await
        .unwrap();
    let address = bound.address().unwrap();
    let stop = CancellationToken::new();
    let ended = tokio::spawn(run(bound, stop.clone()));
    Running {
        address,
        stop,
        ended,
    }
}

pub(crate) fn post(
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

pub(crate) fn get(to: SocketAddr, path: &str) -> Request<Full<Bytes>> {
    let request = Request::get(format!("http://{to}{path}"));
    request.body(Full::default()).unwrap()
}

/// Sends a request in the background; aborting the task hangs up.
pub(crate) fn ask(request: Request<Full<Bytes>>) -> JoinHandle<Bytes> {
    tokio::spawn(async move {
        let response = Client::default().send(request).await.unwrap();
        collect(response.into_body(), 64 << 20).await.unwrap()
    })
}

/// Two listeners on neighbouring ports.
pub(crate) async fn neighbours() -> (TcpListener, TcpListener) {
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

/// An address at which nobody listens.
pub(crate) async fn nobody() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

/// Sends a request and waits for the head of its answer.
pub(crate) async fn send(request: Request<Full<Bytes>>) -> Response<Incoming> {
    Client::default().send(request).await.unwrap()
}

/// The value of a metric, served at `port`.
pub(crate) async fn metric(port: u16, series: &str) -> String {
    let uri = format!("http://127.0.0.1:{port}/metrics");
    let (_, text) = Client::<Full<Bytes>>::default()
        .get(&uri, 1 << 20)
        .await
        .unwrap();
    let text = String::from_utf8(text.to_vec()).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(series));
    line.unwrap_or_default().trim().to_owned()
}
