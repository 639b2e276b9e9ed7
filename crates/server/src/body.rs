//! Station 1, parse: a request's body as text, or why not.

use axum::body::Body;
use baton_http::BodyError;
use baton_openai::{ApiError, ErrorKind};
use bytes::Bytes;
use http::{HeaderMap, header};

use crate::rejection::Rejection;

/// Reads a JSON body of at most `limit` bytes. What is returned is valid UTF-8; whether it is JSON is not looked at.
pub(crate) async fn read(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
) -> Result<Bytes, Rejection> {
    let bytes = match baton_http::collect(body, limit).await {
        Ok(bytes) => bytes,
        Err(BodyError::TooLarge { limit }) => return Err(too_large(limit).into()),
        Err(BodyError::Stalled | BodyError::Broken(_)) => return Err(Rejection::UNREADABLE),
    };
    if !bytes.is_empty() && !is_json(headers) {
        return Err(wrong_media_type().into());
    }
    match std::str::from_utf8(&bytes) {
        Ok(_) => Ok(bytes),
        Err(_) => Err(Rejection::UNREADABLE),
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let essence = value
        .and_then(|value| value.split(';').next())
        .unwrap_or_default()
        .trim();
    essence.eq_ignore_ascii_case("application/json")
}

fn wrong_media_type() -> ApiError {
    ApiError::new(
        ErrorKind::Validation,
        "1 validation error:\n  Unsupported Media Type: only 'application/json' is allowed",
    )
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(
        ErrorKind::PayloadTooLarge,
        format!("the body is larger than {limit} bytes"),
    )
}
