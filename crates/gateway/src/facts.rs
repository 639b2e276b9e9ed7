//! What the gateway needs to know of a request's body, found in one pass without copying it; and the one thing it
//! changes.
//!
//! A client must not point a server at another server's KV, so every top-level `kv_transfer_params` of a body has its
//! value replaced by `null`, in place; all other bytes are forwarded as they came. A body that is not exactly one JSON
//! object is refused here: a server that reads JSON more leniently could find in it what we did not.

use baton_openai::{ApiError, ErrorKind};
use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::ops::Range;

/// What a body says.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Facts<'a> {
    /// The model, if it is named.
    pub(crate) model: Option<Cow<'a, str>>,
    /// The JSON texts that make up the prompt, in the order in which a chat template would use them.
    pub(crate) prompt: Vec<&'a [u8]>,
    /// The prompt's length, if it is given as token ids.
    pub(crate) tokens: Option<u32>,
    /// Where the values of `kv_transfer_params` are, in order.
    pub(crate) foreign_kv: Vec<Range<usize>>,
}

/// The values of the fields that matter; the last of a repeated one, as Python takes it.
#[derive(Default)]
struct Fields<'a> {
    model: Option<&'a RawValue>,
    cache_salt: Option<&'a RawValue>,
    tools: Option<&'a RawValue>,
    instructions: Option<&'a RawValue>,
    text: Option<&'a RawValue>,
    kv_transfer_params: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Model,
    CacheSalt,
    Tools,
    Instructions,
    System,
    Prompt,
    Messages,
    Input,
    KvTransferParams,
    #[serde(other)]
    Other,
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Fields::default();
                while let Some(field) = map.next_key::<Field>()? {
                    let value: &RawValue = map.next_value()?;
                    match field {
                        Field::Model => fields.model = Some(value),
                        Field::CacheSalt => fields.cache_salt = Some(value),
                        Field::Tools => fields.tools = Some(value),
                        Field::Instructions | Field::System => fields.instructions = Some(value),
                        Field::Prompt | Field::Messages | Field::Input => fields.text = Some(value),
                        Field::KvTransferParams => fields.kv_transfer_params.push(value),
                        Field::Other => {}
                    }
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// Reads `body`.
///
/// # Errors
/// vLLM's error for a body that is not JSON, or no object.
pub(crate) fn read(body: &[u8]) -> Result<Facts<'_>, ApiError> {
    let fields: Fields<'_> = serde_json::from_slice(body).map_err(|e| not_an_object(body, &e))?;
    let pieces = [
        fields.cache_salt,
        fields.tools,
        fields.instructions,
        fields.text,
    ];
    Ok(Facts {
        model: fields
            .model
            .and_then(|m| serde_json::from_str(m.get()).ok()),
        prompt: pieces
            .into_iter()
            .flatten()
            .map(|v| v.get().as_bytes())
            .collect(),
        tokens: fields.text.and_then(|t| count_token_ids(t.get())),
        foreign_kv: fields
            .kv_transfer_params
            .iter()
            .filter(|v| v.get() != "null")
            .map(|v| span(body, v))
            .collect(),
    })
}

/// `body` with the values at `foreign_kv`, which are in order, replaced by `null`.
pub(crate) fn without_foreign_kv(body: Bytes, foreign_kv: &[Range<usize>]) -> Bytes {
    if foreign_kv.is_empty() {
        return body;
    }
    let mut out = BytesMut::with_capacity(body.len() + 4 * foreign_kv.len());
    let mut copied = 0;
    for value in foreign_kv {
        out.extend_from_slice(&body[copied..value.start]);
        out.extend_from_slice(b"null");
        copied = value.end;
    }
    out.extend_from_slice(&body[copied..]);
    out.freeze()
}

/// Where `value`, which was borrowed from `body`, lies in it.
fn span(body: &[u8], value: &RawValue) -> Range<usize> {
    let start = value.get().as_ptr().addr() - body.as_ptr().addr();
    start..start + value.get().len()
}

/// Length of a flat list of numbers; nothing for other forms of prompt.
fn count_token_ids(prompt: &str) -> Option<u32> {
    let inside = prompt.strip_prefix('[')?.trim_ascii_start();
    if !inside.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    u32::try_from(inside.bytes().filter(|&b| b == b',').count() + 1).ok()
}

fn not_an_object(body: &[u8], error: &serde_json::Error) -> ApiError {
    if body.trim_ascii().is_empty() {
        return ApiError::validation("body".to_owned(), "field required");
    }
    if error.is_data() {
        return ApiError::validation("body".to_owned(), "input should be a valid object");
    }
    let reason = format!("not valid JSON: {error}");
    ApiError {
        kind: ErrorKind::Validation,
        message: format!("1 validation error:\n  body: {reason}"),
        param: Some("body".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cleaned(body: &str) -> String {
        let facts = read(body.as_bytes()).unwrap();
        let body = Bytes::copy_from_slice(body.as_bytes());
        String::from_utf8(without_foreign_kv(body, &facts.foreign_kv).to_vec()).unwrap()
    }

    #[test]
    fn model_and_prompt_are_found_wherever_they_are() {
        let facts = read(br#" {"n":1, "messages":[{"role":"user","content":"hi"}],"tools":[1],"model":"a\u0062"} "#).unwrap();
        assert_eq!(facts.model.as_deref(), Some("ab"));
        assert_eq!(
            facts.prompt,
            [&b"[1]"[..], br#"[{"role":"user","content":"hi"}]"#]
        );
        assert!(facts.foreign_kv.is_empty() && facts.tokens.is_none());
        assert_eq!(read(br#"{"prompt":[1, 22,333]}"#).unwrap().tokens, Some(3));
        assert_eq!(read(br#"{"prompt":["a,b"]}"#).unwrap().tokens, None);
        assert_eq!(read(br#"{"model":7}"#).unwrap().model, None);
    }

    #[test]
    fn kv_transfer_params_become_null_and_every_other_byte_stays() {
        assert_eq!(
            cleaned(
                r#"{"big": 12345678901234567890.0, "kv_transfer_params" : {"remote_host":"evil"} ,"x":"<&>" }"#
            ),
            r#"{"big": 12345678901234567890.0, "kv_transfer_params" : null ,"x":"<&>" }"#
        );
        assert_eq!(
            cleaned(r#"{"kv_transfer_params":null}"#),
            r#"{"kv_transfer_params":null}"#
        );
    }

    #[test]
    fn a_hidden_or_repeated_name_is_found_too() {
        assert_eq!(
            cleaned(
                r#"{"kv_transfer_params":1,"kv_transfer_par\u0061ms":{"a":[]},"kv_transfer_params":null}"#
            ),
            r#"{"kv_transfer_params":null,"kv_transfer_par\u0061ms":null,"kv_transfer_params":null}"#
        );
        let nested = r#"{"metadata":{"kv_transfer_params":1}}"#;
        assert_eq!(cleaned(nested), nested);
    }

    #[test]
    fn what_is_not_one_json_object_is_refused() {
        for body in [
            "",
            "  ",
            "[]",
            "\"x\"",
            "{",
            "{}{}",
            "{\"x\":NaN}",
            "{\"x\":1,}",
            "{\"kv_transfer_params\":Infinity}",
        ] {
            let error = read(body.as_bytes()).unwrap_err();
            assert_eq!(
                (error.kind, error.param.as_deref()),
                (ErrorKind::Validation, Some("body")),
                "{body}"
            );
        }
        assert!(read(b"{\"x\":\"\xff\"}").is_err());
        assert!(read("[".repeat(1_000_000).as_bytes()).is_err());
        assert!(read(format!("{{\"x\":{}", "[".repeat(1_000_000)).as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn whatever_the_params_are_they_are_null_afterwards(
            before in "[a-z\"\\\\ ]{0,10}", params in "[a-z{}\\[\\],:\"0-9\\\\]{0,20}", n in 0usize..3
        ) {
            let member = format!("\"kv_transfer_params\":{}", serde_json::to_string(&params).unwrap());
            let mut body = format!("{{\"p\":{}", serde_json::to_string(&before).unwrap());
            for _ in 0..n { body.push(','); body.push_str(&member); }
            body.push('}');
            let value: serde_json::Value = serde_json::from_str(&cleaned(&body)).unwrap();
            prop_assert!(value.get("kv_transfer_params").is_none_or(serde_json::Value::is_null));
            prop_assert_eq!(value["p"].as_str(), Some(before.as_str()));
        }
    }
}
