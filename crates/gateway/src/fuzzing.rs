//! Doors for the fuzz targets, behind the feature `fuzzing`: what the gateway reads of clients and servers. No API.

use crate::config::{ConfigError, EndpointConfig, check_endpoints};
use crate::events::{Ending, Events};
use crate::{exposition, facts, models};
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use std::convert::Infallible;

/// A request's body as it is forwarded; `None` if it is refused.
pub fn forwarded(body: &[u8]) -> Option<Bytes> {
    let facts = facts::read(body).ok()?;
    let body = Bytes::copy_from_slice(body);
    Some(facts::without_foreign_kv(body, &facts.foreign_kv))
}

/// What a client gets of a stream that comes in these pieces and ends. `is_done_due`: it should end with `[DONE]`.
pub fn streamed(pieces: Vec<Bytes>, is_done_due: bool) -> Vec<Bytes> {
    let frames = pieces
        .into_iter()
        .map(|piece| Ok::<_, Infallible>(Frame::data(piece)));
    let ending = if is_done_due {
        Ending::Done
    } else {
        Ending::Own
    };
    let silence = Box::pin(std::future::pending());
    let events = Events::new(StreamBody::new(stream::iter(frames)), silence, ending, ());
    let passed = events
        .into_data_stream()
        .filter_map(async |piece| piece.ok());
    passed.collect().now_or_never().unwrap_or_default()
}

/// Reads a server's metrics; the part of its KV pool that is in use, if it says so.
pub fn kv_usage(text: &[u8]) -> Option<f32> {
    exposition::read(text).kv_usage
}

/// The endpoints of an endpoints file.
pub fn endpoints(text: &[u8]) -> Option<Result<Vec<EndpointConfig>, ConfigError>> {
    let endpoints: Vec<EndpointConfig> = serde_json::from_slice(text).ok()?;
    Some(check_endpoints(&endpoints).map(|()| endpoints))
}

/// Two servers' lists of models as one.
pub fn merged(lists: [&Bytes; 2]) -> Bytes {
    models::merge(&lists)
}
