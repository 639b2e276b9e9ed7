//! What a client must not say to servers, and the request without it.
//!
//! A client that could name the KV to be read could read another's, or have a server connect to any address.

use crate::edit::{Edit, NotAnObject, Object};
use crate::field::Field;
use http::{HeaderMap, HeaderName};

/// Fields by which routers steer servers.
const FIELDS: [Field; 5] = [
    Field::KvTransferParams,
    Field::EcTransferParams,
    Field::BootstrapHost,
    Field::BootstrapPort,
    Field::BootstrapRoom,
];

/// Where servers look for `kv_transfer_params` too.
const NESTED: [&[Field]; 3] = [
    &[Field::SamplingParams, Field::ExtraArgs],
    &[Field::ExtraArgs],
    &[Field::VllmXargs],
];

/// The chosen prefill servers; several headers or one list.
pub(crate) const PREFILLER: HeaderName = HeaderName::from_static("x-prefiller-host-port");
/// The encode servers.
pub(crate) const ENCODERS: HeaderName = HeaderName::from_static("x-encoder-hosts-ports");
/// The server whose cache holds part of the prompt.
pub(crate) const KV_SOURCE: HeaderName = HeaderName::from_static("x-kv-cache-source-host-port");
/// The data-parallel rank, as its sidecar's address.
pub(crate) const RANK: HeaderName = HeaderName::from_static("x-data-parallel-host-port");
/// The first generation's prefill header.
const PREFILLER_URL: HeaderName = HeaderName::from_static("x-prefiller-url");

/// Takes the headers that are meant for the sidecar out; they reach no server.
pub(crate) fn strip_headers(headers: &mut HeaderMap) {
    for name in [PREFILLER, ENCODERS, KV_SOURCE, PREFILLER_URL] {
        headers.remove(name);
    }
}

/// `body` without foreign fields; itself if it has none.
pub(crate) fn strip(body: Object) -> Result<Object, NotAnObject> {
    let mut edit = Edit::of(&body);
    let mut found = false;
    for field in FIELDS {
        found |= body.has(field);
        edit = edit.remove(field);
    }
    for path in NESTED {
        let Some((first, rest)) = path.split_first() else {
            continue;
        };
        if let Some(inner) = body.object(*first)
            && let Some(stripped) = without_params(&inner, rest)
        {
            found = true;
            edit = edit.set(*first, stripped);
        }
    }
    match found {
        true => Object::parse(edit.finish().into_bytes()),
        false => Ok(body),
    }
}

/// `object` without the `kv_transfer_params` at the end of `path`; nothing if there are none.
fn without_params(object: &Object, path: &[Field]) -> Option<baton_http::Pieces> {
    match path.split_first() {
        None if object.has(Field::KvTransferParams) => {
            Some(Edit::of(object).remove(Field::KvTransferParams).finish())
        }
        None => None,
        Some((first, rest)) => {
            let inner = without_params(&object.object(*first)?, rest)?;
            Some(Edit::of(object).set(*first, inner).finish())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn stripped(text: &str) -> String {
        let body = Object::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap();
        String::from_utf8(strip(body).unwrap().text().to_vec()).unwrap()
    }

    #[test]
    fn what_steers_servers_is_taken_out_wherever_they_look_for_it() {
        for (before, after) in [
            (
                r#"{"a":1.50,"kv_transfer_params":{"remote_host":"evil"},"bootstrap_host":"evil" , "bootstrap_room":1}"#,
                r#"{"a":1.50}"#,
            ),
            (
                r#"{"kv_transfer_par\u0061ms":1,"sampling_params":{"n":1,"extra_args":{"x":0,"kv_transfer_params":{}}}}"#,
                r#"{"sampling_params":{"n":1,"extra_args":{"x":0}}}"#,
            ),
            (
                r#"{"vllm_xargs":{"kv_transfer_params":{}}}"#,
                r#"{"vllm_xargs":{}}"#,
            ),
        ] {
            assert_eq!(stripped(before), after);
        }
    }

    #[test]
    fn a_request_that_says_nothing_of_it_stays_as_it_is() {
        let body =
            r#"{"metadata":{"kv_transfer_params":1}, "sampling_params": {"extra_args":{ }}}"#;
        assert_eq!(stripped(body), body);
    }
}
