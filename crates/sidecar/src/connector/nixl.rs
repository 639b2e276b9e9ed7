//! `nixlv2`: vLLM's NixlConnector, its TPU connector, and our own servers.
//!
//! Prefill is asked to keep the KV and says where it is; decode is told so in prefill's own words, byte for byte.

use crate::edit::{Edit, Object};
use crate::field::Field;
use crate::route::{Route, one_token};
use crate::target::Target;
use baton_http::Pieces;
use bytes::Bytes;

/// Asks for the KV to be kept. The TPU connector expects these six keys and no more.
const PRODUCE: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null"#;

/// A server that holds part of the prompt's KV already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KvSource {
    pub(crate) id: String,
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl KvSource {
    /// The source at `target`, whose ranks listen for pulls from `ports.0` on, as its sidecars do from `ports.1` on.
    pub(crate) fn at(target: &Target, id: String, ports: (u16, u16), ranks: u16) -> Self {
        let (pull, serve) = ports;
        let rank = target
            .port()
            .checked_sub(serve)
            .filter(|rank| *rank < ranks);
        Self {
            id,
            host: target.host().to_owned(),
            port: pull.saturating_add(rank.unwrap_or(0)),
        }
    }

    pub(crate) fn json(&self) -> String {
        let Self { id, host, port } = self;
        let host = super::quoted(host);
        format!(r#"{{"kv_request_id":"{id}","remote_host":{host},"remote_port":{port}}}"#)
    }
}

/// What prefill is asked.
pub(crate) fn prefill(route: Route, body: &Object, source: Option<&KvSource>) -> Pieces {
    let source = source.map(|s| format!(r#","remote_kv_source":{}"#, s.json()));
    let params = format!("{PRODUCE}{}}}", source.unwrap_or_default());
    one_token(route, Edit::of(body))
        .set(Field::KvTransferParams, params)
        .finish()
}

/// What decode is asked once prefill said `params`.
pub(crate) fn decode(body: &Object, params: Bytes) -> Pieces {
    Edit::of(body).set(Field::KvTransferParams, params).finish()
}

/// What decode is asked if there is no prefill server, but one that holds part of the prompt.
pub(crate) fn pull(body: &Object, source: &KvSource) -> Pieces {
    let params = format!(r#"{{"remote_kv_source":{}}}"#, source.json());
    Edit::of(body).set(Field::KvTransferParams, params).finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(pieces: Pieces) -> String {
        String::from_utf8(pieces.into_bytes().to_vec()).unwrap()
    }

    fn source(address: &str) -> KvSource {
        let target = Target::parse(address).unwrap();
        KvSource::at(&target, "K".to_owned(), (7777, 8000), 4)
    }

    #[test]
    fn prefill_is_asked_for_one_token_and_for_its_kv() {
        let body = Object::parse(r#"{"model":"m", "seed":9007199254740993,"prompt":"<&>"}"#.into())
            .unwrap();
        assert_eq!(
            text(prefill(Route::Completions, &body, None)),
            r#"{"model":"m", "seed":9007199254740993,"prompt":"<&>","stream":false,"max_tokens":1,"max_completion_tokens":1,"min_tokens":1,"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}}"#
        );
        let asked = text(prefill(Route::Completions, &body, Some(&source("h:1"))));
        assert!(asked.ends_with(
            r#","remote_port":null,"remote_kv_source":{"kv_request_id":"K","remote_host":"h","remote_port":7777}}}"#
        ));
    }

    #[test]
    fn decode_is_told_prefills_own_words() {
        let body = Object::parse(r#"{"stream":true ,"max_tokens":64}"#.into()).unwrap();
        let params = r#"{"uuid": 1223960640850184400, "remote_port":"9100"}"#;
        assert_eq!(
            text(decode(&body, Bytes::from_static(params.as_bytes()))),
            format!(r#"{{"stream":true ,"max_tokens":64,"kv_transfer_params":{params}}}"#)
        );
    }

    #[test]
    fn a_source_is_pulled_from_at_the_port_of_its_rank() {
        assert_eq!(source("[fd00::1]:8002").port, 7779);
        assert_eq!(source("[fd00::1]:8002").host, "fd00::1");
        assert_eq!((source("h:8004").port, source("h:7999").port), (7777, 7777));
    }
}
