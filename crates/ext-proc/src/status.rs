//! How a gRPC call ends.

use http::{HeaderMap, HeaderValue};
use std::borrow::Cow;

/// gRPC's codes, as far as they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    Ok = 0,
    InvalidArgument = 3,
    ResourceExhausted = 8,
    Unimplemented = 12,
}

/// A code, and words for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) code: Code,
    pub(crate) message: Cow<'static, str>,
}

impl Status {
    pub(crate) const OK: Self = Self {
        code: Code::Ok,
        message: Cow::Borrowed(""),
    };

    pub(crate) fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// As trailers, or as headers of an answer without a body.
    pub(crate) fn into_headers(self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(2);
        headers.insert("grpc-status", HeaderValue::from(self.code as u16));
        if !self.message.is_empty()
            && let Ok(message) = HeaderValue::from_str(&percent_encoded(&self.message))
        {
            headers.insert("grpc-message", message);
        }
        headers
    }
}

/// As gRPC wants its messages: what is not printable ASCII, and the percent sign, as `%XX`.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_number_and_words_that_fit_into_a_header() {
        let headers = Status::new(Code::InvalidArgument, "5 % ü\n").into_headers();
        assert_eq!(headers["grpc-status"], "3");
        assert_eq!(headers["grpc-message"], "5 %25 %C3%BC%0A");
        let headers = Status::OK.into_headers();
        assert_eq!(
            (headers.len(), &headers["grpc-status"]),
            (1, &HeaderValue::from_static("0"))
        );
    }
}
