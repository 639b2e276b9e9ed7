//! The error envelope, `{"error":{"message","type","param","code"}}`.

use serde::ser::{Serialize, SerializeStruct, Serializer};

/// What went wrong, as a client sees it: it decides status and `type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The body has not the form of a request.
    Validation,
    /// The request has the right form and cannot be done.
    BadRequest,
    /// The client does not say who it is.
    Unauthorized,
    /// The client may not do this.
    Forbidden,
    /// The model is not served here.
    NotFound,
    /// What the client made a condition does not hold.
    PreconditionFailed,
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
    /// The fault of a server behind this one.
    BadGateway,
    /// A server behind this one did not answer in time.
    GatewayTimeout,
}

impl ErrorKind {
    /// HTTP status code.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::Validation | Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::PreconditionFailed => 412,
            Self::PayloadTooLarge => 413,
            Self::TooManyRequests => 429,
            Self::Unavailable | Self::KvTransferFailed | Self::KvExportBusy => 503,
            Self::Internal => 500,
            Self::BadGateway => 502,
            Self::GatewayTimeout => 504,
        }
    }

    /// The plainest kind with this status; for statuses that none has, whose fault it is.
    #[must_use]
    pub const fn of_status(status: u16) -> Self {
        match status {
            401 => Self::Unauthorized,
            403 => Self::Forbidden,
            404 => Self::NotFound,
            412 => Self::PreconditionFailed,
            413 => Self::PayloadTooLarge,
            429 => Self::TooManyRequests,
            502 => Self::BadGateway,
            503 => Self::Unavailable,
            504 => Self::GatewayTimeout,
            400..500 => Self::BadRequest,
            _ => Self::Internal,
        }
    }

    /// The value of `type`. vLLM writes the form errors of pydantic with a blank and its own without.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Validation => "Bad Request",
            Self::BadRequest => "BadRequestError",
            Self::Unauthorized => "AuthenticationError",
            Self::Forbidden => "PermissionDeniedError",
            Self::NotFound => "NotFoundError",
            Self::PreconditionFailed => "PreconditionFailedError",
            Self::PayloadTooLarge => "PayloadTooLargeError",
            Self::TooManyRequests => "TooManyRequestsError",
            Self::Unavailable => "ServiceUnavailableError",
            Self::KvTransferFailed => "kv_transfer_failed",
            Self::KvExportBusy => "kv_export_busy",
            Self::Internal => "InternalServerError",
            Self::BadGateway => "BadGatewayError",
            Self::GatewayTimeout => "GatewayTimeoutError",
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
    fn a_status_has_a_kind_of_that_status_or_one_of_its_class() {
        for status in [400, 401, 403, 404, 412, 413, 429, 500, 502, 503, 504] {
            assert_eq!(ErrorKind::of_status(status).status(), status);
        }
        assert_eq!(ErrorKind::of_status(418), ErrorKind::BadRequest);
        assert_eq!(ErrorKind::of_status(507), ErrorKind::Internal);
    }

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
