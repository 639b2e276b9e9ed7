//! Answers that the gateway gives itself when no server can: OpenAI's error form, or vLLM's for unknown paths.

use crate::front::ResponseBody;
use baton_openai::{ApiError, ErrorKind};
use baton_scheduler::flow;
use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body_util::{Either, Full};

/// Says why a request was refused by the queue.
const DROPPED_REASON: HeaderName = HeaderName::from_static("x-llm-d-request-dropped-reason");

/// Why the gateway answers with an error of its own.
#[derive(Clone, Debug)]
pub(crate) enum Refusal {
    /// An error that a model server would give as well.
    Api(ApiError),
    /// Servers took the request and failed, one after another.
    ServersFailed,
    /// No server can take it now.
    NoServer,
    /// Too much is in progress.
    Full,
    /// It waited in vain.
    Queue(flow::Refusal),
    /// The client's key is none of ours.
    Unauthorized,
    /// Not a path of ours.
    NoSuchPath,
    /// Not a method of this path; these are.
    NoSuchMethod(&'static str),
}

impl Refusal {
    /// In OpenAI's form; nothing for what vLLM says in another.
    fn error(&self) -> Option<ApiError> {
        let (kind, message) = match self {
            Self::Api(error) => return Some(error.clone()),
            Self::ServersFailed => (
                ErrorKind::BadGateway,
                "the servers failed before the answer was complete",
            ),
            Self::NoServer => (ErrorKind::Unavailable, "no server can answer now"),
            Self::Full => (ErrorKind::Unavailable, "too many requests in progress"),
            Self::Queue(refusal) => (ErrorKind::of_status(refusal.status), refusal.message),
            Self::Unauthorized | Self::NoSuchPath | Self::NoSuchMethod(_) => return None,
        };
        Some(ApiError::new(kind, message))
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::NoSuchPath => StatusCode::NOT_FOUND,
            Self::NoSuchMethod(_) => StatusCode::METHOD_NOT_ALLOWED,
            _ => {
                let status = self.error().map(|error| error.kind.status());
                let status = status.and_then(|status| StatusCode::from_u16(status).ok());
                status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
            }
        }
    }

    fn body(&self) -> Bytes {
        match self {
            Self::Unauthorized => Bytes::from_static(br#"{"error":"Unauthorized"}"#),
            Self::NoSuchPath => Bytes::from_static(br#"{"detail":"Not Found"}"#),
            Self::NoSuchMethod(_) => Bytes::from_static(br#"{"detail":"Method Not Allowed"}"#),
            _ => serde_json::to_vec(&self.error()).unwrap_or_default().into(),
        }
    }

    /// As a response.
    pub(crate) fn into_response(self) -> Response<ResponseBody> {
        let mut response = json(self.status(), self.body());
        match &self {
            Self::NoServer | Self::Full => {
                response
                    .headers_mut()
                    .insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            Self::Queue(refusal) => {
                let headers = response.headers_mut();
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
                let reason = HeaderValue::from_static(refusal.dropped_reason);
                headers.insert(DROPPED_REASON, reason);
            }
            Self::NoSuchMethod(allowed) => {
                response
                    .headers_mut()
                    .insert(ALLOW, HeaderValue::from_static(allowed));
            }
            _ => {}
        }
        response
    }

    /// As the end of a stream that has begun.
    pub(crate) fn into_last_events(self) -> Bytes {
        let mut events = b"data: ".to_vec();
        events.extend_from_slice(&self.body());
        events.extend_from_slice(b"\n\n");
        events.extend_from_slice(baton_openai::sse::DONE);
        events.into()
    }
}

/// A complete JSON answer.
pub(crate) fn json(status: StatusCode, body: Bytes) -> Response<ResponseBody> {
    let mut response = Response::new(Either::Left(Full::new(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
