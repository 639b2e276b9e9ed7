//! Doors for the fuzz targets, behind the feature `fuzzing`: what the gateway reads of clients and servers. No API.

use crate::config::read_list;
use crate::events::{Ending, Events};
use crate::models;
use crate::outgoing::without_foreign_kv;
use baton_openai::facts::Facts;
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use std::convert::Infallible;

/// A request's body as it is forwarded; `None` if it is refused.
pub fn forwarded(body: &[u8]) -> Option<Bytes> {
    let facts = Facts::read(&[body]).ok()?;
    let body = Bytes::copy_from_slice(body);
    Some(without_foreign_kv(body, &facts))
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

/// The addresses of an endpoints file.
pub fn endpoints(text: &[u8]) -> Option<Vec<String>> {
    let specs = read_list(text).ok()?;
    Some(specs.iter().map(|s| s.address.to_string()).collect())
}

/// Two servers' lists of models as one.
pub fn merged(lists: [&Bytes; 2]) -> Bytes {
    models::merge(&lists)
}
