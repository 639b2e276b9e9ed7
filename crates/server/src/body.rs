//! Station 1, parse: a request's body as text, or why not.
//!
//! All bodies together have a bound too: many clients with large bodies are turned away, not stored.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Body;
use baton_http::BodyError;
use baton_openai::{ApiError, ErrorKind};
use bytes::Bytes;
use http::{HeaderMap, header};

use crate::rejection::{self, Rejection};

/// How much of bodies may be in memory.
#[derive(Clone, Debug)]
pub(crate) struct BodyLimits {
    /// Bytes of one.
    each: usize,
    /// Bytes of all.
    total: usize,
    used: Arc<AtomicUsize>,
}

/// A body, counted against the limit of all until dropped. Valid UTF-8; whether it is JSON was not looked at.
#[derive(Debug)]
pub(crate) struct Received {
    bytes: Bytes,
    _charge: Charge,
}

impl Deref for Received {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl BodyLimits {
    pub(crate) fn new(each: usize, total: usize) -> Self {
        Self {
            each,
            total,
            used: Arc::default(),
        }
    }

    /// Reads a JSON body.
    pub(crate) async fn read(
        &self,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<Received, Rejection> {
        let mut charge = Charge {
            used: Arc::clone(&self.used),
            bytes: 0,
        };
        let pay = |n| charge.add(n, self.total);
        let bytes = baton_http::collect_charged(body, self.each, pay).await?;
        if !bytes.is_empty() && !is_json(headers) {
            return Err(wrong_media_type().into());
        }
        match std::str::from_utf8(&bytes) {
            Ok(_) => Ok(Received {
                bytes,
                _charge: charge,
            }),
            Err(_) => Err(Rejection::UNREADABLE),
        }
    }
}

/// Bytes that are counted until dropped.
#[derive(Debug)]
struct Charge {
    used: Arc<AtomicUsize>,
    bytes: usize,
}

impl Charge {
    /// Counts `n` more unless that is more than `total`.
    fn add(&mut self, n: usize, total: usize) -> Result<(), Rejection> {
        let before = self.used.fetch_add(n, Ordering::Relaxed);
        self.bytes += n;
        if before.saturating_add(n) > total {
            return Err(rejection::queue_full().into());
        }
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl From<BodyError> for Rejection {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::TooLarge { limit } => too_large(limit).into(),
            BodyError::Stalled | BodyError::Broken(_) => Self::UNREADABLE,
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[tokio::test]
    async fn all_bodies_together_have_a_bound_that_dropped_ones_give_back() {
        let mut headers = HeaderMap::new();
        headers.insert(
            "content-type",
            HeaderValue::from_static("Application/JSON; charset=utf-8"),
        );
        let limits = BodyLimits::new(10, 15);
        let read = || limits.read(&headers, Body::from("{}        "));
        let first = read().await.unwrap();
        assert_eq!(&*first, b"{}        ");
        assert_eq!(read().await.unwrap_err(), rejection::queue_full().into());
        drop(first);
        assert!(read().await.is_ok());
        let large = limits
            .read(&headers, Body::from("{}         "))
            .await
            .unwrap_err();
        assert_eq!(large, too_large(10).into());
    }
}
