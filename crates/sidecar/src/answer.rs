//! What prefill's answer says that matters.

use crate::early::PARAMS;
use crate::edit::{NotAnObject, Object};
use crate::field::Field;
use bytes::Bytes;
use http::HeaderMap;
use std::fmt;

/// Prefill's answer, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prefilled {
    /// `kv_transfer_params` as prefill wrote them; `null` if it hands nothing over.
    pub(crate) params: Bytes,
    /// Tokens of the prompt that it had cached, a JSON number.
    pub(crate) cached: Bytes,
    /// How to give back what is held for us.
    pub(crate) lease: Option<Lease>,
}

/// KV that one of our own prefill servers holds until somebody takes it.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) uuid: u64,
    /// Entitles to it.
    pub(crate) token: String,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({}, ***)", self.uuid)
    }
}

/// Longest token that is passed on.
const MAX_TOKEN: usize = 256;

/// Reads prefill's answer.
pub(crate) fn read(answer: Bytes) -> Result<Prefilled, NotAnObject> {
    let answer = Object::parse(answer)?;
    let params = answer.value(Field::KvTransferParams);
    let lease = answer
        .object(Field::KvTransferParams)
        .and_then(|p| lease(&p));
    Ok(Prefilled {
        params: params.unwrap_or(Bytes::from_static(b"null")),
        cached: cached(&answer).unwrap_or(Bytes::from_static(b"0")),
        lease,
    })
}

/// What the head of an answer promises that is still being computed.
pub(crate) fn promised(head: &HeaderMap) -> Option<Prefilled> {
    let params = Bytes::copy_from_slice(head.get(PARAMS)?.as_bytes());
    let lease = lease(&Object::parse(params.clone()).ok()?);
    Some(Prefilled {
        params,
        cached: Bytes::from_static(b"0"),
        lease,
    })
}

fn cached(answer: &Object) -> Option<Bytes> {
    let details = answer
        .object(Field::Usage)?
        .object(Field::PromptTokensDetails)?;
    let is_count = |v: &Bytes| v.iter().all(u8::is_ascii_digit);
    details.value(Field::CachedTokens).filter(is_count)
}

/// Only our own servers give a token, and know what to do with it.
fn lease(params: &Object) -> Option<Lease> {
    let uuid = params.value(Field::Uuid)?;
    let token = params.object(Field::Kvx)?.value(Field::Tok)?;
    let token: String = serde_json::from_slice(&token).ok()?;
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    let fine = !token.is_empty() && token.len() <= MAX_TOKEN && token.bytes().all(is_plain);
    let uuid = serde_json::from_slice(&uuid).ok()?;
    fine.then_some(Lease { uuid, token })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefilled(answer: &str) -> Prefilled {
        read(Bytes::copy_from_slice(answer.as_bytes())).unwrap()
    }

    #[test]
    fn params_are_taken_word_for_word() {
        let params = r#"{ "uuid":1223960640850184400, "remote_port" : "9100" }"#;
        let read = prefilled(&format!(r#"{{"kv_transfer_params":{params},"id":"x"}}"#));
        assert_eq!((read.params, read.lease), (params.into(), None));
        assert_eq!(prefilled(r#"{"kv_transfer_params":{}}"#).params, "{}");
        assert_eq!(prefilled(r#"{"kv_transfer_params":null}"#).params, "null");
        assert_eq!(prefilled("{}").params, "null");
    }

    #[test]
    fn the_count_of_cached_tokens_is_exact_or_zero() {
        let cached = |details: &str| {
            prefilled(&format!(
                r#"{{"usage":{{"prompt_tokens_details":{details}}}}}"#
            ))
            .cached
        };
        assert_eq!(
            cached(r#"{"cached_tokens":9007199254740993}"#),
            "9007199254740993"
        );
        for none in [
            "null",
            "{}",
            r#"{"cached_tokens":null}"#,
            r#"{"cached_tokens":-1}"#,
        ] {
            assert_eq!(cached(none), "0");
        }
    }

    #[test]
    fn a_lease_needs_a_token_of_ours() {
        let lease =
            |params: &str| prefilled(&format!(r#"{{"kv_transfer_params":{params}}}"#)).lease;
        let found = lease(r#"{"uuid":7,"kvx":{"v":1,"tok":"a-_9"}}"#).unwrap();
        assert_eq!((found.uuid, &*found.token), (7, "a-_9"));
        for none in [
            r#"{"uuid":7}"#,
            r#"{"uuid":7.5,"kvx":{"tok":"a"}}"#,
            r#"{"uuid":7,"kvx":{"tok":"a\r\nb"}}"#,
        ] {
            assert_eq!(lease(none), None);
        }
    }
}
