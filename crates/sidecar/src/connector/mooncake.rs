//! `mooncake`: both servers at once, under a transfer id; prefill's bootstrap server names its engines beforehand.

use crate::edit::{Edit, Object};
use crate::field::Field;
use crate::route::{Route, one_token};
use crate::target::Target;
use baton_http::Pieces;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Most ranks of one server that are believed.
const MAX_RANKS: usize = 1024;

/// A prefill engine: one data-parallel rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Engine {
    pub(crate) rank: u32,
    pub(crate) id: String,
}

/// The engines in a bootstrap server's answer.
pub(crate) fn engines(answer: &[u8]) -> Option<Vec<Engine>> {
    #[derive(Deserialize)]
    struct Rank {
        engine_id: String,
    }
    let ranks: BTreeMap<String, Rank> = serde_json::from_slice(answer).ok()?;
    let engines = ranks.into_iter().take(MAX_RANKS);
    let engines = engines.map(|(rank, Rank { engine_id: id })| {
        Some(Engine {
            rank: rank.parse().ok()?,
            id,
        })
    });
    engines
        .collect::<Option<Vec<_>>>()
        .filter(|e| !e.is_empty())
}

/// Where the bootstrap server of `prefill` listens.
pub(crate) fn bootstrap(prefill: &Target, port: u16) -> String {
    format!("http://{}:{port}", prefill.authority().host())
}

/// What prefill is asked.
pub(crate) fn prefill(route: Route, body: &Object, transfer: &str) -> Pieces {
    let params = format!(
        r#"{{"do_remote_decode":true,"do_remote_prefill":false,"transfer_id":"{transfer}"}}"#
    );
    one_token(route, Edit::of(body))
        .set(Field::KvTransferParams, params)
        .finish()
}

/// What decode is asked: to meet `engine`, which `bootstrap` knows.
pub(crate) fn decode(body: &Object, transfer: &str, bootstrap: &str, engine: &Engine) -> Pieces {
    let (address, id) = (super::quoted(bootstrap), super::quoted(&engine.id));
    let params = format!(
        r#"{{"do_remote_decode":false,"do_remote_prefill":true,"transfer_id":"{transfer}","remote_bootstrap_addr":{address},"remote_engine_id":{id}}}"#
    );
    Edit::of(body).set(Field::KvTransferParams, params).finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_read_by_rank() {
        let found = engines(br#"{"1":{"engine_id":"b","x":0},"0":{"engine_id":"a"}}"#).unwrap();
        let found: Vec<_> = found.iter().map(|e| (e.rank, &*e.id)).collect();
        assert_eq!(found, [(0, "a"), (1, "b")]);
        for bad in [
            &b"{}"[..],
            b"[]",
            br#"{"x":{"engine_id":"a"}}"#,
            br#"{"0":{}}"#,
        ] {
            assert_eq!(engines(bad), None);
        }
    }

    #[test]
    fn decode_is_told_whom_to_meet() {
        let body = Object::parse(r"{}".into()).unwrap();
        let engine = Engine {
            rank: 1,
            id: "e\"1".to_owned(),
        };
        let target = Target::parse("[::1]:8000").unwrap();
        assert_eq!(
            decode(&body, "xfer-1", &bootstrap(&target, 8998), &engine).into_bytes(),
            r#"{"kv_transfer_params":{"do_remote_decode":false,"do_remote_prefill":true,"transfer_id":"xfer-1","remote_bootstrap_addr":"http://[::1]:8998","remote_engine_id":"e\"1"}}"#
        );
    }
}
