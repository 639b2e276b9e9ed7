//! Answers that the picker has the proxy give in its place, in OpenAI's error form.

use crate::outbox::set_header;
use crate::proto::{HeaderMutation, HttpStatus, ImmediateResponse};
use bytes::Bytes;
use http::StatusCode;
use std::borrow::Cow;

/// Says why a request was dropped, in llm-d's words.
const DROPPED: &str = "x-llm-d-request-dropped-reason";

/// Why a request goes to no endpoint, and what its client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Of the answer.
    pub status: StatusCode,
    /// For people.
    pub message: Cow<'static, str>,
    /// The field at fault, if it is one.
    pub param: Option<Cow<'static, str>>,
    /// After how many seconds the client may come again.
    pub retry_after: Option<u32>,
    /// llm-d's word for the reason, if it has one: `rejected-saturated` and the like.
    pub dropped: Option<&'static str>,
}

impl Refusal {
    /// With what is usual for `status`: whoever is refused for want of room may come again after a second.
    #[must_use]
    pub fn new(status: StatusCode, message: impl Into<Cow<'static, str>>) -> Self {
        let again = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        );
        Self {
            status,
            message: message.into(),
            param: None,
            retry_after: again.then_some(1),
            dropped: None,
        }
    }

    /// The same, with llm-d's word for the reason.
    #[must_use]
    pub fn dropped(mut self, reason: &'static str) -> Self {
        self.dropped = Some(reason);
        self
    }

    /// There is no endpoint to choose, or the proxy allows none.
    #[must_use]
    pub fn no_endpoint() -> Self {
        let message = "no server can answer now";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message).dropped("rejected-no-endpoints")
    }

    pub(crate) fn overdue() -> Self {
        let message = "no server was chosen in time";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("body is longer than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }

    pub(crate) fn full() -> Self {
        let message = "too many requests in progress";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message).dropped("rejected-saturated")
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::BAD_REQUEST => "BadRequestError",
            StatusCode::UNAUTHORIZED => "AuthenticationError",
            StatusCode::FORBIDDEN => "PermissionDeniedError",
            StatusCode::NOT_FOUND => "NotFoundError",
            StatusCode::PRECONDITION_FAILED => "PreconditionFailedError",
            StatusCode::PAYLOAD_TOO_LARGE => "PayloadTooLargeError",
            StatusCode::TOO_MANY_REQUESTS => "TooManyRequestsError",
            StatusCode::BAD_GATEWAY => "BadGatewayError",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
            StatusCode::GATEWAY_TIMEOUT => "GatewayTimeoutError",
            _ if self.status.is_client_error() => "BadRequestError",
            _ => "InternalServerError",
        }
    }

    /// The body of the answer.
    fn body(&self) -> Bytes {
        let error = serde_json::json!({
            "message": self.message, "type": self.kind(), "param": self.param, "code": self.status.as_u16(),
        });
        serde_json::json!({ "error": error }).to_string().into()
    }

    pub(crate) fn into_message(self) -> ImmediateResponse {
        let mut set_headers = vec![set_header(
            "content-type",
            Bytes::from_static(b"application/json"),
        )];
        if let Some(seconds) = self.retry_after {
            set_headers.push(set_header("retry-after", seconds.to_string().into()));
        }
        if let Some(reason) = self.dropped {
            set_headers.push(set_header(DROPPED, Bytes::from_static(reason.as_bytes())));
        }
        ImmediateResponse {
            status: Some(HttpStatus {
                code: i32::from(self.status.as_u16()),
            }),
            headers: Some(HeaderMutation {
                set_headers,
                remove_headers: Vec::new(),
            }),
            body: self.body(),
            // The proxy's log shows it; blanks are not allowed there.
            details: Bytes::from_static(self.dropped.unwrap_or("picker_refused").as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_openais_error_and_says_when_to_come_again() {
        let message = Refusal::full().into_message();
        let body: serde_json::Value = serde_json::from_slice(&message.body).unwrap();
        assert_eq!(body["error"]["type"], "ServiceUnavailableError");
        assert_eq!(body["error"]["code"], 503);
        assert!(body["error"]["param"].is_null());
        let headers = message.headers.unwrap().set_headers;
        let headers = headers.into_iter().map(|h| h.header.unwrap());
        let headers: Vec<_> = headers.map(|h| (h.key, h.raw_value)).collect();
        assert_eq!(
            headers,
            [
                ("content-type".into(), "application/json".into()),
                ("retry-after".into(), "1".into()),
                (DROPPED.into(), "rejected-saturated".into()),
            ]
        );
        let message = Refusal::too_large(7).into_message();
        assert_eq!(message.status.unwrap().code, 413);
        assert_eq!(message.headers.unwrap().set_headers.len(), 1);
    }
}
