//! The error envelope, `{"error":{"message","type","param","code"}}`.

use serde::ser::{Serialize, SerializeStruct, Serializer};

/// What went wrong, as a client sees it: it decides status and `type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The body has not the form of a request.
    Validation,
    /// The request has the right form and cannot be done.
    BadRequest,
    /// The model is not served here.
    NotFound,
    /// The body is larger than this server reads.
    PayloadTooLarge,
    /// The client may come again: the queue is full.
    TooManyRequests,
    /// The server is full, draining, or not working.
    Unavailable,
    /// The prompt's KV did not come from the server that had it, and computing the prompt here is too much.
    KvTransferFailed,
    /// There is no room for KV that another server is to fetch.
    KvExportBusy,
    /// Our fault.
    Internal,
}

impl ErrorKind {
    /// HTTP status code.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::Validation | Self::BadRequest => 400,
            Self::NotFound => 404,
            Self::PayloadTooLarge => 413,
            Self::TooManyRequests => 429,
            Self::Unavailable | Self::KvTransferFailed | Self::KvExportBusy => 503,
            Self::Internal => 500,
        }
    }

    /// The value of `type`. vLLM writes the form errors of pydantic with a blank and its own without.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Validation => "Bad Request",
            Self::BadRequest => "BadRequestError",
            Self::NotFound => "NotFoundError",
            Self::PayloadTooLarge => "PayloadTooLargeError",
            Self::TooManyRequests => "TooManyRequestsError",
            Self::Unavailable => "ServiceUnavailableError",
            Self::KvTransferFailed => "kv_transfer_failed",
            Self::KvExportBusy => "kv_export_busy",
            Self::Internal => "InternalServerError",
        }
    }
}

/// An error in the form a client reads. Serializes as the whole envelope.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Status and `type`.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
    /// The field at fault, if it is one.
    pub param: Option<String>,
}

impl ApiError {
    /// An error that no single field is to blame for.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            param: None,
        }
    }

    /// A request that cannot be done because of `param`; the name is appended to the message as vLLM does.
    #[must_use]
    pub fn bad_param(param: &str, message: impl std::fmt::Display) -> Self {
        Self {
            kind: ErrorKind::BadRequest,
            message: format!("{message} (parameter={param})"),
            param: Some(param.to_owned()),
        }
    }

    /// A request that cannot be done, whoever is to blame.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadRequest, message)
    }

    /// A body that has not the form of a request; `location` is a dotted path that begins with `body`.
    #[must_use]
    pub fn validation(location: String, reason: &str) -> Self {
        Self {
            kind: ErrorKind::Validation,
            message: format!("1 validation error:\n  {location}: {reason}"),
            param: Some(location),
        }
    }
}

impl Serialize for ApiError {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        struct Inner<'a>(&'a ApiError);
        impl Serialize for Inner<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                let mut s = serializer.serialize_struct("error", 4)?;
                s.serialize_field("message", &self.0.message)?;
                s.serialize_field("type", self.0.kind.name())?;
                s.serialize_field("param", &self.0.param)?;
                s.serialize_field("code", &self.0.kind.status())?;
                s.end()
            }
        }
        let mut s = serializer.serialize_struct("envelope", 1)?;
        s.serialize_field("error", &Inner(self))?;
        s.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_envelope_has_four_keys_in_vllms_order() {
        let error = ApiError::bad_param("n", "no");
        assert_eq!(
            serde_json::to_string(&error).unwrap(),
            r#"{"error":{"message":"no (parameter=n)","type":"BadRequestError","param":"n","code":400}}"#
        );
        let error = ApiError::new(ErrorKind::Internal, "x");
        assert_eq!(
            serde_json::to_string(&error).unwrap(),
            r#"{"error":{"message":"x","type":"InternalServerError","param":null,"code":500}}"#
        );
    }
}
