//! Sends spans to a collector: some at a time, again if it does not answer, and never more than fit.

use crate::proto::{
    Attribute, Export, Resource, ResourceSpans, Scope, ScopeSpans, Span, attribute,
};
use crate::settings::{Collector, Protocol, Settings};
use crate::tracer::{Ids, State, Tracer};
use baton_http::{Client, ClientConfig, ClientTls, TlsError, Trust, once_h2, with_causes};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, TE};
use http::{Request, StatusCode, Uri, Version};
use http_body_util::{BodyExt as _, Full, Limited};
use prost::Message as _;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

/// Longest answer of a collector.
const MAX_ANSWER: usize = 1 << 16;
/// Before a collector that did not answer is tried again: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Longest wait for the last spans to be taken, when the process ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why no exporter can be made.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The roots cannot be read.
    #[error("OTEL_EXPORTER_OTLP_CERTIFICATE")]
    Roots(#[source] std::io::Error),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// There is no randomness.
    #[error("the system gives no random numbers")]
    Random,
}

/// Takes spans from a [`Tracer`] and sends them.
#[derive(Debug)]
pub struct Exporter {
    spans: mpsc::Receiver<Span>,
    state: Arc<State>,
    most_at_once: usize,
    delay: Duration,
    resource: Vec<Attribute>,
    line: Line,
}

/// How the collector is spoken to.
#[derive(Debug)]
struct Line {
    /// For HTTP/1.1.
    client: Client,
    /// For gRPC.
    tls: Option<ClientTls>,
    collector: Collector,
}

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
enum Sent {
    Taken,
    /// It is not wanted, and will not be later.
    Refused(String),
    /// Nobody took it: later, perhaps.
    Lost(String),
}

impl Exporter {
    /// What `settings` want, and who begins spans for it. Nothing is sent before [`run`](Self::run).
    ///
    /// # Errors
    /// See [`ExportError`].
    pub fn new(settings: &Settings) -> Result<(Tracer, Self), ExportError> {
        let key = getrandom::u64().map_err(|_| ExportError::Random)?;
        let (sender, spans) = mpsc::channel(settings.most_waiting);
        let tracer = Tracer::new(settings.sampler, Ids::new(key), sender);
        let resource = settings.resource.iter();
        let exporter = Self {
            spans,
            state: tracer.state.clone(),
            most_at_once: settings.most_at_once,
            delay: settings.delay,
            resource: resource.map(|(k, v)| attribute(k, v.as_str())).collect(),
            line: Line::new(&settings.collector)?,
        };
        Ok((tracer, exporter))
    }

    /// Sends until `shutdown`, and then what is left.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut batch = Vec::new();
        let mut wait = RETRY.0;
        while self.gather(&mut batch, &shutdown).await {
            let message = self.message(std::mem::take(&mut batch));
            loop {
                let sent = self.line.send(message.clone()).await;
                self.note(&sent);
                if !matches!(sent, Sent::Lost(_)) {
                    wait = RETRY.0;
                    break;
                }
                tokio::select! {
                    () = sleep(wait) => wait = (wait * 2).min(RETRY.1),
                    () = shutdown.cancelled() => return,
                }
            }
        }
        while let Ok(span) = self.spans.try_recv() {
            batch.push(span);
        }
        if !batch.is_empty() {
            let message = self.message(batch);
            // Whoever ends does not wait for a collector that is gone.
            let _ = timeout(FAREWELL, self.line.send(message)).await;
        }
    }

    /// Fills `batch`, from the first span on for as long as spans may wait. Says whether to go on.
    async fn gather(&mut self, batch: &mut Vec<Span>, shutdown: &CancellationToken) -> bool {
        let most = self.most_at_once;
        let gathering = async {
            if self.spans.recv_many(batch, most).await == 0 {
                return false;
            }
            let end = Instant::now() + self.delay;
            while batch.len() < most {
                let left = most - batch.len();
                match timeout_at(end, self.spans.recv_many(batch, left)).await {
                    Ok(0) | Err(_) => break,
                    Ok(_) => {}
                }
            }
            true
        };
        tokio::select! {
            more = gathering => more,
            () = shutdown.cancelled() => false,
        }
    }

    fn message(&self, spans: Vec<Span>) -> Bytes {
        let scope = Scope {
            name: "baton".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let export = Export {
            resource_spans: vec![ResourceSpans {
                resource: Some(Resource {
                    attributes: self.resource.clone(),
                }),
                scope_spans: vec![ScopeSpans {
                    scope: Some(scope),
                    spans,
                }],
            }],
        };
        export.encode_to_vec().into()
    }

    /// Remembers whether there is a collector, and says so once whenever that changes.
    fn note(&self, sent: &Sent) {
        let deaf = matches!(sent, Sent::Lost(_));
        let was = self.state.deaf.swap(deaf, Relaxed);
        match sent {
            Sent::Taken if was => self.note_answer(),
            Sent::Lost(why) if !was => self.note_silence(why),
            Sent::Refused(why) => tracing::warn!(why, "the collector refuses traces"),
            Sent::Taken | Sent::Lost(_) => {}
        }
    }

    fn note_answer(&self) {
        let lost = self.state.lost.swap(0, Relaxed);
        tracing::info!(lost, "the collector of traces answers again");
    }

    fn note_silence(&self, why: &str) {
        let collector = &self.line.collector.uri;
        tracing::warn!(%collector, why, "no traces until their collector answers");
    }
}

impl Line {
    fn new(collector: &Collector) -> Result<Self, ExportError> {
        let config = ClientConfig::default();
        let secure = collector.uri.scheme_str() == Some("https");
        let tls = match &collector.roots {
            _ if !secure => None,
            None => Some(ClientTls::new(&Trust::System)?),
            Some(path) => {
                let roots = std::fs::read(path).map_err(ExportError::Roots)?;
                Some(ClientTls::new(&Trust::Roots(roots))?)
            }
        };
        Ok(Self {
            client: match &tls {
                Some(tls) => Client::with_tls(&config, tls.clone()),
                None => Client::new(&config),
            },
            tls,
            collector: collector.clone(),
        })
    }

    async fn send(&self, message: Bytes) -> Sent {
        let asking = self.ask(message);
        let answered = timeout(self.collector.timeout, asking).await;
        answered.unwrap_or_else(|_| Sent::Lost("no answer".to_owned()))
    }

    async fn ask(&self, message: Bytes) -> Sent {
        let request = match self.request(message) {
            Ok(request) => request,
            Err(error) => return Sent::Refused(error.to_string()),
        };
        let response = match self.collector.protocol {
            Protocol::Http => self.client.send(request).await.map_err(|e| with_causes(&e)),
            Protocol::Grpc => {
                let sent = once_h2(request, self.tls.as_ref()).await;
                sent.map_err(|e| with_causes(&e))
            }
        };
        let response = match response {
            Ok(response) => response,
            Err(why) => return Sent::Lost(why),
        };
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await;
        let trailers = match body {
            Ok(body) => body.trailers().cloned().unwrap_or_default(),
            Err(error) => return Sent::Lost(error.to_string()),
        };
        match self.collector.protocol {
            Protocol::Http => by_http(head.status),
            Protocol::Grpc if head.status != StatusCode::OK => by_http(head.status),
            Protocol::Grpc => by_grpc(&head.headers, &trailers),
        }
    }

    fn request(&self, message: Bytes) -> Result<Request<Full<Bytes>>, http::Error> {
        let uri: Uri = self.collector.uri.clone();
        let mut request = match self.collector.protocol {
            Protocol::Http => Request::post(uri)
                .header(CONTENT_TYPE, "application/x-protobuf")
                .body(Full::new(message))?,
            Protocol::Grpc => Request::post(uri)
                .version(Version::HTTP_2)
                .header(CONTENT_TYPE, "application/grpc")
                .header(TE, "trailers")
                .body(Full::new(framed(&message)))?,
        };
        for (name, value) in &self.collector.headers {
            request.headers_mut().insert(name, value.clone());
        }
        Ok(request)
    }
}

/// A message of gRPC: not compressed, so long.
fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(message.len() + 5);
    frame.put_u8(0);
    // A batch of spans is far below four gigabytes.
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(message);
    frame.freeze()
}

fn by_http(status: StatusCode) -> Sent {
    match status.as_u16() {
        200..=299 => Sent::Taken,
        429 | 502..=504 => Sent::Lost(format!("status {status}")),
        _ => Sent::Refused(format!("status {status}")),
    }
}

/// The status stands in the trailers, or, if there is nothing else, in the head.
fn by_grpc(head: &HeaderMap, trailers: &HeaderMap) -> Sent {
    let find = |name| trailers.get(name).or_else(|| head.get(name));
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let status = find("grpc-status").map(text);
    let said = find("grpc-message").map(text).unwrap_or_default();
    let why = |code: &str| format!("gRPC status {code} {said}");
    match status.as_deref() {
        Some("0") => Sent::Taken,
        // Cancelled, deadline exceeded, resource exhausted, aborted, out of range, unavailable, data loss.
        Some(code @ ("1" | "4" | "8" | "10" | "11" | "14" | "15")) => Sent::Lost(why(code)),
        Some(code) => Sent::Refused(why(code)),
        None => Sent::Lost("no status of gRPC".to_owned()),
    }
}

#[cfg(test)]
mod tests;
