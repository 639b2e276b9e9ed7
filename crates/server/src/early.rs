//! An answer whose head leaves before the prompt is computed.
//!
//! A prefill server knows how its KV can be fetched as soon as it has taken a request, and who fetches can begin while it
//! computes. Who wants that says so in a header; the head of the answer then holds the transfer parameters, and the body
//! follows when it is there. Without the header nothing changes, so other routers see an ordinary server.

use std::convert::Infallible;
use std::future::Future;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use baton_kv::{KvTransferParams, KvTransferRequest};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};

use crate::rejection::Rejection;

/// In a request for KV: asks for the head at once. In an answer that came whole: it could have been asked for. Any value.
pub(crate) const WANTED: &str = "x-kv-early";
/// The transfer parameters in the head, as the body's `kv_transfer_params` would say them.
pub(crate) const PARAMS: &str = "x-kv-transfer-params";

/// The head now, the body of `answer` when it is there. What fails after the head is told by the body, and by the lease,
/// which ends.
pub(crate) fn respond(
    params: &KvTransferParams,
    answer: impl Future<Output = Result<Response, Rejection>> + Send + 'static,
) -> Result<Response, Rejection> {
    let params = serde_json::to_string(params).unwrap_or_default();
    let params = HeaderValue::try_from(params).ok();
    let body = async move {
        let answer = answer.await.unwrap_or_else(|e| e.into_response());
        let bytes = axum::body::to_bytes(answer.into_body(), usize::MAX).await;
        Ok::<Bytes, Infallible>(bytes.unwrap_or_default())
    };
    let body = Body::from_stream(futures_util::stream::once(body));
    let mut response = ([(header::CONTENT_TYPE, "application/json")], body).into_response();
    params.map(|params| response.headers_mut().insert(PARAMS, params));
    Ok(response)
}

/// Lets whoever asked for KV know that its head could come at once.
pub(crate) fn offer(mut response: Response) -> Response {
    let yes = HeaderValue::from_static("1");
    response.headers_mut().insert(WANTED, yes);
    response
}

/// The parameters in an answer's head.
pub(crate) fn params(headers: &HeaderMap) -> Option<KvTransferParams> {
    let text = headers.get(PARAMS)?.to_str().ok()?;
    match KvTransferRequest::from_json(text) {
        Ok(KvTransferRequest::Consume(params)) => Some(params),
        _ => None,
    }
}
