//! The server: which call is for whom, and how many there may be.

use crate::frames::Frames;
use crate::health::{self, Health};
use crate::outbox::Outgoing;
use crate::picker::{Ended, Exchange, Picker, RequestHead, Routed};
use crate::refusal::Refusal;
use crate::status::{Code, Status};
use crate::stream::{Stream, StreamLimits};
use baton_http::{Budget, Http2Config, Pieces, serve_h2};
use bytes::{BufMut, Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::service::service_fn;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// Path of the exchanges.
const PROCESS: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
/// Longest question about health.
const MAX_QUESTION: usize = 4096;

/// What a proxy may take of a picker.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest message, in bytes; also bounds what one stream holds of an unfinished one.
    pub max_message: usize,
    /// Longest body of a request, in bytes; 413 beyond.
    pub max_body: usize,
    /// Bytes of request bodies held at a time, all requests together; 503 beyond.
    pub max_held: usize,
    /// Most exchanges at a time; 503 beyond.
    pub max_exchanges: usize,
    /// Longest wait for a decision, counted from the end of the request's body; see [`Exchange::overdue`].
    pub decision: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message: 4 << 20,
            max_body: 64 << 20,
            max_held: 1 << 30,
            max_exchanges: 40_000,
            decision: Duration::from_secs(10),
        }
    }
}

/// Serves `picker` on `listener` until `shutdown`, then lets exchanges in progress end within the grace of `config`.
/// With `health`, questions about it are answered on the same port.
pub async fn serve<P: Picker>(
    listener: TcpListener,
    picker: Arc<P>,
    limits: Limits,
    health: Option<Health>,
    config: Http2Config,
    shutdown: CancellationToken,
) {
    let server = Arc::new(Server {
        picker,
        full: Arc::new(Full),
        limits: StreamLimits {
            message: limits.max_message,
            body: limits.max_body,
            decision: limits.decision,
        },
        budget: Budget::new(limits.max_held),
        places: Arc::new(Semaphore::new(
            limits.max_exchanges.min(Semaphore::MAX_PERMITS),
        )),
        health,
    });
    let service = service_fn(move |request| {
        let answer = server.answer(request);
        async move { Ok::<_, Infallible>(answer) }
    });
    serve_h2(listener, service, config, shutdown).await;
}

/// Serves `health` alone.
pub async fn serve_health(
    listener: TcpListener,
    health: Health,
    config: Http2Config,
    shutdown: CancellationToken,
) {
    let service = service_fn(move |request| {
        let answer = answer_health(Some(&health), request);
        async move { Ok::<_, Infallible>(answer) }
    });
    serve_h2(listener, service, config, shutdown).await;
}

struct Server<P> {
    picker: Arc<P>,
    full: Arc<Full>,
    limits: StreamLimits,
    budget: Budget,
    places: Arc<Semaphore>,
    health: Option<Health>,
}

impl<P: Picker> Server<P> {
    fn answer(&self, request: Request<Incoming>) -> Response<Answer<P>> {
        if request.method() != Method::POST || request.uri().path() != PROCESS {
            return answer_health(self.health.as_ref(), request).map(Answer::Other);
        }
        let (account, limits) = (self.budget.account(), self.limits);
        let incoming = request.into_body();
        grpc(match self.places.clone().try_acquire_owned() {
            Ok(place) => {
                let picker = self.picker.clone();
                Answer::Exchange(Box::new(Stream::new(
                    picker, incoming, account, limits, place,
                )))
            }
            Err(_) => {
                tracing::warn!("too many exchanges");
                let picker = self.full.clone();
                Answer::Full(Box::new(Stream::new(picker, incoming, account, limits, ())))
            }
        })
    }
}

/// Refuses everybody, in the protocol's own way: a stream that just fails would be up to the proxy's settings.
struct Full;

impl Picker for Full {
    type Exchange = Nobody;

    fn begin(&self, _: RequestHead) -> Result<Nobody, Refusal> {
        Err(Refusal::full())
    }
}

/// No exchange.
enum Nobody {}

impl Exchange for Nobody {
    fn poll_decide(&mut self, _: &mut Context<'_>, _: &Pieces) -> Poll<Result<Routed, Refusal>> {
        match *self {}
    }

    fn ended(&mut self, _: Ended) {
        match *self {}
    }
}

fn grpc<B>(body: B) -> Response<B> {
    let mut response = Response::new(body);
    let grpc = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, grpc);
    response
}

/// Answers what is not an exchange: questions about health if there is somebody who knows, and nothing else.
fn answer_health(health: Option<&Health>, request: Request<Incoming>) -> Response<Other> {
    let question = match (request.uri().path(), health) {
        (health::CHECK, Some(health)) => Some((health, false)),
        (health::LIST, Some(health)) => Some((health, true)),
        _ => None,
    };
    if let Some((health, all)) = question {
        return grpc(Other::Question(Question {
            health: health.clone(),
            all,
            incoming: request.into_body(),
            frames: Frames::new(MAX_QUESTION),
            said: false,
        }));
    }
    let mut response = grpc(Other::Nothing);
    let status = Status::new(Code::Unimplemented, "no such method");
    response.headers_mut().extend(status.into_headers());
    response
}

/// The body of an answer of the picker's port.
enum Answer<P: Picker> {
    Exchange(Box<Stream<P, Incoming, OwnedSemaphorePermit>>),
    Full(Box<Stream<Full, Incoming, ()>>),
    Other(Other),
}

impl<P: Picker> Body for Answer<P> {
    type Data = Outgoing;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Outgoing>, Infallible>>> {
        match self.get_mut() {
            Self::Exchange(stream) => Pin::new(&mut **stream).poll_frame(cx),
            Self::Full(stream) => Pin::new(&mut **stream).poll_frame(cx),
            Self::Other(other) => Pin::new(other).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Other(Other::Nothing))
    }
}

/// The body of an answer that is no exchange.
enum Other {
    Nothing,
    Question(Question),
}

/// A question about health, and its answer.
struct Question {
    health: Health,
    /// About all services.
    all: bool,
    incoming: Incoming,
    frames: Frames,
    /// Whether the answer was given; then only the status follows.
    said: bool,
}

impl Question {
    /// The answer once the whole question is there, as gRPC frames it.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Status>> {
        let no_question = |why| Status::new(Code::InvalidArgument, why);
        loop {
            if let Some(question) = self.frames.next()? {
                let answer = match self.all {
                    true => Some(self.health.list()),
                    false => self.health.check(question),
                };
                let answer = answer.ok_or_else(|| no_question("not a question about health"))?;
                let mut framed = BytesMut::with_capacity(crate::frames::HEAD + answer.len());
                framed.put_u8(0);
                framed.put_u32(u32::try_from(answer.len()).unwrap_or(u32::MAX));
                framed.extend_from_slice(&answer);
                return Poll::Ready(Ok(framed.freeze()));
            }
            match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.frames.push(data);
                    }
                }
                Some(Err(_)) | None => return Poll::Ready(Err(no_question("no question came"))),
            }
        }
    }
}

impl Body for Other {
    type Data = Outgoing;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Outgoing>, Infallible>>> {
        let this = self.get_mut();
        let Self::Question(question) = this else {
            return Poll::Ready(None);
        };
        let status = if question.said {
            Status::OK
        } else {
            match ready!(question.poll_answer(cx)) {
                Ok(answer) => {
                    question.said = true;
                    return Poll::Ready(Some(Ok(Frame::data(Outgoing::bare(answer)))));
                }
                Err(status) => status,
            }
        };
        *this = Self::Nothing;
        Poll::Ready(Some(Ok(Frame::trailers(status.into_headers()))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Nothing)
    }
}
