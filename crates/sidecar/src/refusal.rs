//! Answers that the sidecar gives itself, in OpenAI's error form.

use crate::answer_body::Answer;
use baton_http::{BodyError, Pieces, ReadError};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};

/// Why a request gets no server's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The body is not one JSON object.
    Json(String),
    /// The body did not come whole.
    Body(String),
    /// The body is longer than this many bytes.
    TooLarge(usize),
    /// Bodies of other requests take all the room there is.
    Full,
    /// The prefill server is not on the allow-list.
    NotAllowed,
    /// No rank has the address that the request names.
    UnknownRank,
    /// No prefill server could be asked, or none answered well.
    PrefillFailed,
    /// Prefill failed, and the prompt is too long for decode.
    TooLongAlone,
    /// The decode server does not listen.
    DecodeDown,
    /// The decode server failed before it answered.
    DecodeFailed,
}

impl Refusal {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Json(_) | Self::Body(_) | Self::UnknownRank => StatusCode::BAD_REQUEST,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NotAllowed => StatusCode::FORBIDDEN,
            Self::PrefillFailed | Self::DecodeFailed => StatusCode::BAD_GATEWAY,
            Self::Full | Self::TooLongAlone | Self::DecodeDown => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    fn kind(&self) -> &'static str {
        match self.status() {
            StatusCode::BAD_REQUEST => "BadRequestError",
            StatusCode::PAYLOAD_TOO_LARGE => "PayloadTooLargeError",
            StatusCode::FORBIDDEN => "PermissionDeniedError",
            StatusCode::BAD_GATEWAY => "BadGatewayError",
            _ => "ServiceUnavailableError",
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Json(why) | Self::Body(why) => why.clone(),
            Self::TooLarge(limit) => format!("body is longer than {limit} bytes"),
            Self::Full => "too many requests in progress".to_owned(),
            Self::NotAllowed => "the prefill server is not allowed".to_owned(),
            Self::UnknownRank => "no data-parallel rank has this address".to_owned(),
            Self::PrefillFailed => "the prefill server failed".to_owned(),
            Self::TooLongAlone => {
                "prefill failed, and the prompt is too long for the decode server".to_owned()
            }
            Self::DecodeDown => "the decode server is not ready".to_owned(),
            Self::DecodeFailed => "the decode server failed before it answered".to_owned(),
        }
    }

    pub(crate) fn into_response(self) -> Response<Answer> {
        let status = self.status();
        let error = serde_json::json!({"message": self.message(), "type": self.kind(), "param": null, "code": status.as_u16()});
        let body = serde_json::json!({ "error": error }).to_string();
        let mut response = Response::new(Answer::whole(Pieces::from(Bytes::from(body))));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<ReadError> for Refusal {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Full => Self::Full,
            ReadError::Body(BodyError::TooLarge { limit }) => Self::TooLarge(limit),
            ReadError::Body(error) => Self::Body(error.to_string()),
        }
    }
}

impl From<crate::edit::NotAnObject> for Refusal {
    fn from(error: crate::edit::NotAnObject) -> Self {
        Self::Json(error.to_string())
    }
}
