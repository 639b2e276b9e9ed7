//! The one place that turns a refusal into HTTP: OpenAI's envelope, and vLLM's three exceptions from it.

use axum::response::{IntoResponse, Response};
use baton_openai::{ApiError, ErrorKind};
use http::{HeaderName, HeaderValue, StatusCode, header};

use crate::inbox::Lost;

/// Seconds after which a client that was turned away may come again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// Tells a router that a prompt's KV is not to be had here for now.
const EXPORT: HeaderName = HeaderName::from_static("x-kv-export");
const EXPORT_BUSY: HeaderValue = HeaderValue::from_static("busy");

/// Why a request gets no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Rejection {
    /// In OpenAI's envelope.
    Api(ApiError),
    /// As that, to a router that asked for KV and may ask another server.
    Export(ApiError),
    /// The router's form, `{"detail":...}`.
    Detail(StatusCode, &'static str),
    /// The form of the authentication layer, `{"error":"Unauthorized"}`.
    Unauthorized,
}

impl Rejection {
    pub(crate) const NOT_FOUND: Self = Self::Detail(StatusCode::NOT_FOUND, "Not Found");
    pub(crate) const METHOD: Self =
        Self::Detail(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
    pub(crate) const UNREADABLE: Self = Self::Detail(
        StatusCode::BAD_REQUEST,
        "There was an error parsing the body",
    );
}

impl From<ApiError> for Rejection {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        match self {
            Self::Api(error) => envelope(&error),
            Self::Export(error) => export_envelope(&error),
            Self::Detail(status, text) => json(status, format!(r#"{{"detail":"{text}"}}"#).into()),
            Self::Unauthorized => json(
                StatusCode::UNAUTHORIZED,
                br#"{"error":"Unauthorized"}"#.to_vec(),
            ),
        }
    }
}

fn envelope(error: &ApiError) -> Response {
    let status =
        StatusCode::from_u16(error.kind.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(status, serde_json::to_vec(error).unwrap_or_default());
    if may_come_again(status) {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, RETRY_AFTER);
    }
    response
}

fn export_envelope(error: &ApiError) -> Response {
    let mut response = envelope(error);
    if may_come_again(response.status()) {
        response.headers_mut().insert(EXPORT, EXPORT_BUSY);
    }
    response
}

/// Whether a status speaks of this moment and not of the request.
fn may_come_again(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    )
}

/// A JSON answer.
pub(crate) fn json(status: StatusCode, body: Vec<u8>) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// What a client hears when the engine is gone.
pub(crate) fn engine_dead() -> ApiError {
    ApiError::new(
        ErrorKind::Internal,
        "the engine has failed; this server is going down",
    )
}

/// What a client hears of a bug.
pub(crate) fn internal() -> ApiError {
    ApiError::new(ErrorKind::Internal, "internal server error")
}

/// What a client hears when the server is full.
pub(crate) fn queue_full() -> ApiError {
    ApiError::new(
        ErrorKind::Unavailable,
        "too many requests are waiting; try again later",
    )
}

/// What a router hears when KV that waits to be fetched leaves no room.
pub(crate) fn export_busy() -> ApiError {
    ApiError::new(
        ErrorKind::KvExportBusy,
        "KV that waits to be fetched leaves no room for this prompt's; ask another server, or later",
    )
}

/// What a client hears whose prompt's KV did not come and is too long to be computed here.
pub(crate) fn kv_lost(lost: Lost, missing: usize) -> ApiError {
    let Lost(reason) = lost;
    let message = format!(
        "the KV of {missing} prompt tokens did not come from the prefill server ({reason}), and computing them here is \
         more than this server or the request allows; try again"
    );
    ApiError::new(ErrorKind::KvTransferFailed, message)
}

/// What a client hears after shutdown was asked for.
pub(crate) fn draining() -> ApiError {
    ApiError::new(ErrorKind::Unavailable, "this server is shutting down")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_come_again_is_told_when() {
        for busy in [queue_full(), kv_lost(Lost("expired"), 5000)] {
            let response = Rejection::from(busy).into_response();
            assert!(response.headers().contains_key("retry-after"));
        }
        assert!(
            !Rejection::NOT_FOUND
                .into_response()
                .headers()
                .contains_key("retry-after")
        );
    }
}
