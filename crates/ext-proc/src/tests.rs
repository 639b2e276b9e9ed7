//! A server on loopback, and a proxy made by hand.

use crate::frames::Frames;
use crate::inbound::Half;
use crate::peer;
use crate::proto::{Answer, ProcessingResponse};
use crate::*;
use baton_http::{Http2Config, Pieces};
use baton_openai::ErrorKind;
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use prost::Message as _;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;

const PROCESS: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";

/// Sends every request to the same endpoint, at once or never; some are given up there after a moment.
#[derive(Default)]
struct Fixed {
    ended: Arc<Mutex<Vec<Ended>>>,
}

struct Going {
    never: bool,
    evicted: Option<Pin<Box<Sleep>>>,
    ended: Arc<Mutex<Vec<Ended>>>,
}

impl Picker for Fixed {
    type Exchange = Going;

    fn begin(&self, head: RequestHead) -> Result<Going, Refusal> {
        Ok(Going {
            never: head.headers.get("never").is_some(),
            evicted: (head.headers.get("evict"))
                .map(|_| Box::pin(tokio::time::sleep(Duration::from_millis(20)))),
            ended: self.ended.clone(),
        })
    }
}

impl Exchange for Going {
    fn poll_decide(&mut self, _: &mut Context<'_>, _: &Pieces) -> Poll<Result<Routed, Refusal>> {
        if self.never {
            return Poll::Pending;
        }
        let endpoint = std::net::SocketAddr::from(([10, 0, 0, 1], 8000));
        Poll::Ready(Ok(Routed::to(endpoint.into())))
    }

    fn poll_evicted(&mut self, cx: &mut Context<'_>) -> Poll<Refusal> {
        let Some(evicted) = &mut self.evicted else {
            return Poll::Pending;
        };
        let refusal = Refusal::new(ErrorKind::TooManyRequests, "make room");
        evicted.as_mut().poll(cx).map(|()| refusal)
    }

    fn ended(&mut self, why: Ended) {
        self.ended.lock().push(why);
    }
}

struct Running {
    connection: http2::SendRequest<Sent>,
    ended: Arc<Mutex<Vec<Ended>>>,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

type Sent = Pin<Box<dyn http_body::Body<Data = Bytes, Error = Infallible> + Send>>;

async fn running(limits: Limits) -> Running {
    let picker = Fixed::default();
    let ended = picker.ended.clone();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let health = Health::new(&["liveness", "readiness"], |name| match name {
        "liveness" => ServingStatus::Serving,
        _ => ServingStatus::NotServing,
    });
    let config = Http2Config::default();
    let serving = serve(
        listener,
        Arc::new(picker),
        limits,
        Some(health),
        config,
        shutdown.clone(),
    );
    let serving = tokio::spawn(serving);
    let stream = TcpStream::connect(address).await.unwrap();
    let (connection, driver) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(driver);
    Running {
        connection,
        ended,
        shutdown,
        serving,
    }
}

fn framed(message: &[u8]) -> Bytes {
    let mut data = BytesMut::new();
    data.put_u8(0);
    data.put_u32(message.len() as u32);
    data.extend_from_slice(message);
    data.freeze()
}

/// One stream of the proxy.
struct Call {
    say: mpsc::UnboundedSender<Bytes>,
    answer: hyper::body::Incoming,
    frames: Frames,
}

impl Running {
    async fn call(&mut self) -> Call {
        let (say, mut said) = mpsc::unbounded_channel();
        let body = StreamBody::new(futures_util::stream::poll_fn(move |cx| {
            said.poll_recv(cx)
                .map(|data| data.map(|data| Ok::<_, Infallible>(Frame::data(data))))
        }));
        let request = Request::post(PROCESS).body(Box::pin(body) as Sent).unwrap();
        let response = self.connection.send_request(request).await.unwrap();
        assert_eq!(response.headers()["content-type"], "application/grpc");
        Call {
            say,
            answer: response.into_body(),
            frames: Frames::new(1 << 20),
        }
    }

    /// One question and its answer; a status other than 0 is the answer too.
    async fn ask(&mut self, path: &str, question: &[u8]) -> Result<Bytes, u16> {
        let body = Box::pin(Full::new(framed(question))) as Sent;
        let request = Request::post(path).body(body).unwrap();
        let response = self.connection.send_request(request).await.unwrap();
        let status = |headers: &HeaderMap| {
            headers
                .get("grpc-status")
                .map(|s| s.to_str().unwrap().parse().unwrap())
        };
        if let Some(status) = status(response.headers()) {
            return Err(status);
        }
        let body = response.into_body().collect().await.unwrap();
        match status(body.trailers().unwrap()).unwrap() {
            0 => Ok(body.to_bytes().slice(5..)),
            status => Err(status),
        }
    }

    async fn eventually_ended(&self, why: &[Ended]) {
        while &self.ended.lock()[..] != why {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Call {
    fn say(&self, message: &peer::Request) {
        let _ = self.say.send(framed(&message.encode_to_vec()));
    }

    /// The next answer, or how the stream ended.
    async fn hear(&mut self) -> Result<Answer, HeaderMap> {
        loop {
            if let Some(message) = self.frames.next().unwrap() {
                return Ok(ProcessingResponse::decode(message).unwrap().answer.unwrap());
            }
            match self.answer.frame().await.unwrap().unwrap().into_data() {
                Ok(data) => self.frames.push(data),
                Err(frame) => return Err(frame.into_trailers().unwrap()),
            }
        }
    }
}

#[tokio::test]
async fn an_exchange_from_its_headers_to_its_end() {
    let mut running = running(Limits::default()).await;
    let mut call = running.call().await;
    call.say(&peer::headers(
        Half::Request,
        &[(":path", "/v1/completions")],
        false,
    ));
    let body: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
    for piece in body.chunks(50_000) {
        call.say(&peer::body(Half::Request, piece, false));
    }
    call.say(&peer::body(Half::Request, b"", true));
    assert!(matches!(call.hear().await, Ok(Answer::RequestHeaders(_))));
    let mut seen = Vec::new();
    loop {
        let Ok(Answer::RequestBody(answer)) = call.hear().await else {
            panic!("no body");
        };
        let streamed = answer
            .response
            .unwrap()
            .body_mutation
            .unwrap()
            .streamed_response
            .unwrap();
        seen.extend_from_slice(&streamed.body);
        if streamed.end_of_stream {
            break;
        }
    }
    assert!(seen == body);
    call.say(&peer::headers(Half::Response, &[(":status", "200")], false));
    assert!(matches!(call.hear().await, Ok(Answer::ResponseHeaders(_))));
    call.say(&peer::body(Half::Response, b"x", true));
    assert!(matches!(call.hear().await, Ok(Answer::ResponseBody(_))));
    running.eventually_ended(&[Ended::Naturally]).await;
    let Call { say, answer, .. } = call;
    drop(say);
    let trailers = answer.collect().await.unwrap().trailers().unwrap().clone();
    assert_eq!(trailers["grpc-status"], "0");
    // Told to stop, the server ends when the last exchange has.
    running.shutdown.cancel();
    running.serving.await.unwrap();
}

#[tokio::test]
async fn a_proxy_that_resets_its_stream_ends_the_exchange() {
    let mut running = running(Limits::default()).await;
    let call = running.call().await;
    call.say(&peer::headers(Half::Request, &[("never", "")], true));
    while Arc::strong_count(&running.ended) < 3 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drop(call);
    running.eventually_ended(&[Ended::Disconnected]).await;
}

#[tokio::test]
async fn a_decision_that_never_comes_and_an_exchange_too_many_are_refused() {
    let mut running = running(Limits {
        max_exchanges: 1,
        decision: Duration::from_millis(20),
        ..Limits::default()
    })
    .await;
    let refused = |heard: Result<Answer, HeaderMap>| match heard {
        Ok(Answer::Immediate(answer)) => answer.status.unwrap().code,
        other => panic!("{other:?}"),
    };
    let mut first = running.call().await;
    let mut second = running.call().await;
    second.say(&peer::headers(Half::Request, &[], true));
    assert_eq!(
        refused(second.hear().await),
        i32::from(StatusCode::SERVICE_UNAVAILABLE.as_u16())
    );
    first.say(&peer::headers(Half::Request, &[("never", "")], true));
    assert_eq!(refused(first.hear().await), 503);
    assert_eq!(first.hear().await.unwrap_err()["grpc-status"], "0");
    running.eventually_ended(&[Ended::Refused]).await;
}

#[tokio::test]
async fn a_request_is_given_up_while_its_endpoint_says_nothing() {
    let mut running = running(Limits::default()).await;
    let mut call = running.call().await;
    call.say(&peer::headers(Half::Request, &[("evict", "")], true));
    assert!(matches!(call.hear().await, Ok(Answer::RequestHeaders(_))));
    let Ok(Answer::Immediate(answer)) = call.hear().await else {
        panic!("it was not given up");
    };
    assert_eq!(answer.status.unwrap().code, 429);
    assert_eq!(call.hear().await.unwrap_err()["grpc-status"], "0");
    running.eventually_ended(&[Ended::Evicted]).await;
}

#[tokio::test]
async fn a_stream_that_makes_no_sense_ends_with_a_status() {
    let mut running = running(Limits {
        max_message: 1000,
        ..Limits::default()
    })
    .await;
    let mut call = running.call().await;
    call.say(&peer::body(Half::Request, &[0; 2000], true));
    assert_eq!(call.hear().await.unwrap_err()["grpc-status"], "8");
    let mut call = running.call().await;
    call.say.send(framed(b"\xff\xff")).unwrap();
    assert_eq!(call.hear().await.unwrap_err()["grpc-status"], "3");
    let mut call = running.call().await;
    call.say(&peer::trailers(Half::Response));
    assert_eq!(
        call.hear().await.unwrap_err()["grpc-message"],
        "response trailers out of place"
    );
    assert!(running.ended.lock().is_empty());
}

#[tokio::test]
async fn health_is_told_and_nothing_else() {
    let mut running = running(Limits::default()).await;
    let health = |method: &str| format!("/grpc.health.v1.Health/{method}");
    assert_eq!(
        running
            .ask(&health("Check"), b"\x0a\x08liveness")
            .await
            .unwrap(),
        &b"\x08\x01"[..]
    );
    assert_eq!(
        running.ask(&health("Check"), b"").await.unwrap(),
        &b"\x08\x02"[..]
    );
    assert_eq!(running.ask(&health("Check"), b"\xff").await, Err(3));
    assert!(
        running
            .ask(&health("List"), b"")
            .await
            .unwrap()
            .windows(9)
            .any(|w| w == b"readiness")
    );
    assert_eq!(running.ask(&health("Watch"), b"").await, Err(12));
    assert_eq!(running.ask("/other.Service/Method", b"").await, Err(12));
}
