//! Private parsers, shown to the fuzz targets.

use crate::connector::nixl;
use crate::edit::Object;
use crate::field::Field;
use crate::route::Route;
use crate::usage::{Patch, StreamPatch, WholePatch};
use crate::{answer, foreign};
use baton_http::Pieces;
use bytes::Bytes;

/// A client's body as decode and prefill get it after `answer` came from prefill; nothing if it is refused.
#[must_use]
pub fn legs(route: u8, body: &[u8], params: &[u8]) -> Option<(Bytes, Bytes, Bytes)> {
    let route = Route::ALL[usize::from(route) % Route::ALL.len()];
    let body = Object::parse(Bytes::copy_from_slice(body)).ok()?;
    let body = foreign::strip(body).ok()?;
    let prefilled = answer::read(Bytes::copy_from_slice(params)).ok()?;
    let decode = nixl::decode(&body, prefilled.params).into_bytes();
    let prefill = nixl::prefill(route, &body, None).into_bytes();
    Some((body.text().clone(), prefill, decode))
}

/// `body` without its `kv_transfer_params`.
#[must_use]
pub fn without_params(body: Bytes) -> Option<Bytes> {
    let body = Object::parse(body).ok()?;
    let edit = crate::edit::Edit::of(&body).remove(Field::KvTransferParams);
    Some(edit.finish().into_bytes())
}

/// An answer, in pieces that end at `cuts`, as the client gets it: read as a stream, and as one document.
#[must_use]
pub fn patched(answer: &[u8], cuts: &[u8]) -> [Bytes; 2] {
    let number = Bytes::from_static(b"12");
    [
        Patch::Stream(StreamPatch::new(number.clone().into())),
        Patch::Whole(WholePatch::new(number.into())),
    ]
    .map(|mut patch| {
        let mut out = Pieces::default();
        let mut rest = Bytes::copy_from_slice(answer);
        for &cut in cuts {
            let piece = rest.split_to(usize::from(cut).min(rest.len()));
            out.append(patch.push(piece));
        }
        out.append(patch.push(rest));
        out.append(patch.finish());
        out.into_bytes()
    })
}
