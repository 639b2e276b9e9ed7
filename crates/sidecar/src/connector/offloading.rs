//! `offloading`: both servers at once; decode pulls from prefill under an id that both are given.

use super::nixl::KvSource;
use crate::edit::{Edit, Object};
use crate::field::Field;
use crate::route::{Route, one_token};
use baton_http::Pieces;

/// What prefill is asked; `id` is the common one.
pub(crate) fn prefill(route: Route, body: &Object, id: &str, source: Option<&KvSource>) -> Pieces {
    let source = source.map(|s| format!(r#","remote_kv_source":{}"#, s.json()));
    let source = source.unwrap_or_default();
    let params = format!(r#"{{"remote_decoder":{{"kv_request_id":"{id}"}}{source}}}"#);
    one_token(route, Edit::of(body))
        .set(Field::KvTransferParams, params)
        .finish()
}

/// What decode is asked: to pull from `prefill`, whose id is the common one.
pub(crate) fn decode(body: &Object, prefill: &KvSource) -> Pieces {
    let params = format!(r#"{{"remote_prefiller":{}}}"#, prefill.json());
    Edit::of(body).set(Field::KvTransferParams, params).finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_servers_get_the_same_id() {
        let body = Object::parse(r#"{"input":"x"}"#.into()).unwrap();
        assert_eq!(
            prefill(Route::Responses, &body, "K", None).into_bytes(),
            r#"{"input":"x","stream":false,"max_output_tokens":1,"kv_transfer_params":{"remote_decoder":{"kv_request_id":"K"}}}"#
        );
        let at = KvSource {
            id: "K".to_owned(),
            host: "10.0.0.1".to_owned(),
            port: 7777,
        };
        assert_eq!(
            decode(&body, &at).into_bytes(),
            r#"{"input":"x","kv_transfer_params":{"remote_prefiller":{"kv_request_id":"K","remote_host":"10.0.0.1","remote_port":7777}}}"#
        );
    }
}
