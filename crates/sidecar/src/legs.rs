//! Requests to the servers: how a leg is sent, and what came of it.

use crate::answer::{self, Prefilled};
use crate::config::{Config, StageTls};
use crate::early::Early;
use crate::fallback::Failure;
use crate::target::Target;
use baton_http::{
    BodyError, Client, ClientConfig, ClientError, ClientTls, Pieces, TlsError, Trust, collect,
};
use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_LENGTH};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// Longest wait for a connection. One lost packet costs a second.
const CONNECT: Duration = Duration::from_secs(2);

/// The body of a request to a server.
#[derive(Debug)]
pub(crate) enum Payload {
    Edited(Pieces),
    /// As the client sends it.
    Passed(Incoming),
}

impl Body for Payload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Edited(pieces) => {
                let polled = Pin::new(pieces).poll_frame(cx);
                polled.map(|frame| frame.map(|f| f.map_err(|never| match never {})))
            }
            Self::Passed(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Edited(pieces) => pieces.is_end_stream(),
            Self::Passed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Edited(pieces) => pieces.size_hint(),
            Self::Passed(body) => body.size_hint(),
        }
    }
}

/// What all legs of one request have in common.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) method: Method,
    pub(crate) path: PathAndQuery,
    pub(crate) headers: HeaderMap,
}

impl Head {
    /// As it goes to a server whose answer is read: uncompressed.
    pub(crate) fn read_here(&self) -> Self {
        let mut head = self.clone();
        head.headers.remove(ACCEPT_ENCODING);
        head
    }
}

/// Servers of one kind: how they are spoken to.
#[derive(Clone, Debug)]
pub(crate) struct Stage {
    client: Client<Payload>,
    scheme: Scheme,
}

impl Stage {
    pub(crate) fn new(tls: StageTls, config: &Config) -> Result<Self, TlsError> {
        let client = ClientConfig {
            connect_timeout: CONNECT,
            max_idle_per_host: config.max_idle,
            ..ClientConfig::default()
        };
        if tls == StageTls::Plain {
            return Ok(Self {
                client: Client::new(&client),
                scheme: Scheme::HTTP,
            });
        }
        Ok(Self {
            client: over_tls(tls, &client)?,
            scheme: Scheme::HTTPS,
        })
    }

    /// Sends a request and returns once the head of an answer is there. Cancel safe: dropping it takes the request back.
    pub(crate) async fn send(
        &self,
        to: &Authority,
        head: &Head,
        body: Payload,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(self.scheme.clone());
        uri.authority = Some(to.clone());
        uri.path_and_query = Some(head.path.clone());
        let mut request = Request::new(body);
        *request.method_mut() = head.method.clone();
        // All three parts are there, which is all that can be wrong with them.
        *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
        *request.headers_mut() = head.headers.clone();
        self.client.send(request).await
    }
}

fn over_tls(tls: StageTls, config: &ClientConfig) -> Result<Client<Payload>, TlsError> {
    let trust = match tls {
        StageTls::Unverified => Trust::Anyone,
        StageTls::Verified | StageTls::Plain => Trust::System,
    };
    let tls = ClientTls::new(&trust)?;
    Ok(Client::with_tls(config, tls))
}

/// What is made of prefill's answer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reading<'a> {
    /// It says where the KV is; at most this long. Who can say so early is noted.
    Params(usize, &'a Early),
    /// Only its end matters.
    End,
}

/// What a prefill server said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) prefilled: Prefilled,
    /// The rest of its answer, if it still computes.
    pub(crate) rest: Option<Incoming>,
}

/// A prefill that failed, and what the server said if it said something.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) failure: Failure,
    pub(crate) said: Option<Response<Bytes>>,
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            said: None,
        }
    }
}

/// Asks a prefill server and reads its answer to the end, or as far as it says where the KV will be.
pub(crate) async fn prefill(
    stage: &Stage,
    to: &Target,
    head: &Head,
    body: Pieces,
    reading: Reading<'_>,
) -> Result<Option<Said>, Failed> {
    let sent = stage
        .send(to.authority(), head, Payload::Edited(body))
        .await;
    let response = sent.map_err(|error| {
        tracing::debug!(server = %to, %error, "no answer");
        match error {
            ClientError::Connect(_) => Failure::Unreachable,
            ClientError::Sent(_) => Failure::Lost,
        }
    })?;
    let status = response.status();
    if !status.is_success() {
        return Err(refused(response, status).await);
    }
    let Reading::Params(limit, early) = reading else {
        return drain(response.into_body()).await.map(|()| None);
    };
    early.learn(to, response.headers());
    if let Some(prefilled) = answer::promised(response.headers()) {
        let rest = Some(response.into_body());
        return Ok(Some(Said { prefilled, rest }));
    }
    let prefilled = whole(response.into_body(), limit).await?;
    Ok(Some(Said {
        prefilled,
        rest: None,
    }))
}

/// Reads the rest of an answer.
pub(crate) async fn whole(body: Incoming, limit: usize) -> Result<Prefilled, Failure> {
    let answer = collect(body, limit).await.map_err(|e| broke_off(&e))?;
    answer::read(answer).map_err(|_| Failure::Malformed)
}

/// Longest error that is passed on.
const MAX_ERROR: usize = 1 << 20;

async fn refused(response: Response<Incoming>, status: StatusCode) -> Failed {
    let (mut parts, body) = response.into_parts();
    match collect(body, MAX_ERROR).await {
        Ok(body) => {
            baton_http::strip_hop_by_hop(&mut parts.headers);
            parts.headers.remove(CONTENT_LENGTH);
            Failed {
                failure: Failure::Status(status),
                said: Some(Response::from_parts(parts, body)),
            }
        }
        Err(error) => broke_off(&error).into(),
    }
}

fn broke_off(error: &BodyError) -> Failure {
    tracing::debug!(%error, "prefill's answer broke off");
    Failure::BrokeOff
}

/// Reads a body to its end without keeping it.
async fn drain(mut body: Incoming) -> Result<(), Failed> {
    while let Some(frame) = body.frame().await {
        if frame.is_err() {
            return Err(Failure::BrokeOff.into());
        }
    }
    Ok(())
}
