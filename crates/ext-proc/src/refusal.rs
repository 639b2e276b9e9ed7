//! Answers that the picker has the proxy give in its place, in OpenAI's error form.

use crate::outbox::set_header;
use crate::proto::{HeaderMutation, HttpStatus, ImmediateResponse};
use baton_openai::{ApiError, ErrorKind};
use bytes::Bytes;

/// Says why a request was dropped, in llm-d's words.
const DROPPED: &str = "x-llm-d-request-dropped-reason";

/// Why a request goes to no endpoint, and what its client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the client reads.
    pub error: ApiError,
    /// After how many seconds the client may come again.
    pub retry_after: Option<u32>,
    /// llm-d's word for the reason, if it has one: `rejected-saturated` and the like.
    pub dropped: Option<&'static str>,
}

impl Refusal {
    /// With what is usual for `kind`: whoever is refused for want of room may come again after a second.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        ApiError::new(kind, message).into()
    }

    /// The same, with llm-d's word for the reason.
    #[must_use]
    pub fn dropped(mut self, reason: &'static str) -> Self {
        self.dropped = Some(reason);
        self
    }

    /// The status of the answer.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.error.kind.status()
    }

    /// There is no endpoint to choose, or the proxy allows none.
    #[must_use]
    pub fn no_endpoint() -> Self {
        let message = "no server can answer now";
        Self::new(ErrorKind::Unavailable, message).dropped("rejected-no-endpoints")
    }

    pub(crate) fn overdue() -> Self {
        Self::new(ErrorKind::Unavailable, "no server was chosen in time")
    }

    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("body is longer than {limit} bytes");
        Self::new(ErrorKind::PayloadTooLarge, message)
    }

    pub(crate) fn full() -> Self {
        let message = "too many requests in progress";
        Self::new(ErrorKind::Unavailable, message).dropped("rejected-saturated")
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
                code: i32::from(self.status()),
            }),
            headers: Some(HeaderMutation {
                set_headers,
                remove_headers: Vec::new(),
            }),
            body: serde_json::to_vec(&self.error).unwrap_or_default().into(),
            // The proxy's log shows it; blanks are not allowed there.
            details: Bytes::from_static(self.dropped.unwrap_or("picker_refused").as_bytes()),
        }
    }
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        let again = matches!(error.kind.status(), 429 | 503);
        Self {
            error,
            retry_after: again.then_some(1),
            dropped: None,
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
