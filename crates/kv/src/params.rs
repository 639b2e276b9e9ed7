//! `kv_transfer_params`: the object that tells a decode server where a prompt's KV lies.
//!
//! The first four keys are vLLM's TPU connector's, in its JSON types, so that routers which know only those carry
//! the object unharmed; `kvx` holds what our own transport needs besides. Parsing never goes through floating
//! point: the numbers are handles, and a handle that is off by one is another request's KV.
//! Not here: what a lease is, and how its bytes travel.

use sha2::{Digest as _, Sha256};
use std::fmt;

use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// `uuid` stays below this, so that it survives a router which holds numbers as IEEE doubles.
pub const UUID_LIMIT: u64 = 1 << 50;

/// Block ids accepted in one object; at 16 tokens a block this is sixteen million tokens.
const MAX_BLOCK_IDS: usize = 1 << 20;

/// Where KV lies, and what entitles its holder to fetch it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KvTransferParams {
    /// Ids of the blocks in the producer's pool, in the order of the prompt. They mean nothing elsewhere.
    pub remote_block_ids: Vec<u32>,
    /// Host name or address of the producer.
    pub remote_host: String,
    /// Port of the producer's transfer server; a decimal string in JSON, a number is accepted too.
    #[serde(serialize_with = "port_as_string")]
    pub remote_port: u16,
    /// The lease, below [`UUID_LIMIT`].
    pub uuid: u64,
    /// What our own transport needs; absent from other producers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kvx: Option<Kvx>,
}

impl KvTransferParams {
    /// The four keys that a client may see: without the token there is nothing to fetch with.
    #[must_use]
    pub fn client_view(&self) -> Self {
        Self {
            kvx: None,
            ..self.clone()
        }
    }
}

/// The extension that our transport adds to the four keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kvx {
    /// Version of this object: 1.
    pub v: u32,
    /// Entitles to one transfer of the lease.
    pub tok: LeaseToken,
    /// Tokens whose KV is valid; the last block may be filled in part.
    pub n: u32,
    /// Tokens in a block.
    pub bs: u32,
    /// Tensor-parallel size of the producer; the bytes do not depend on it.
    pub tp: u32,
    /// The KV heads that the producer has, from the first on and up to the second; absent if it has all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hd: Option<(u32, u32)>,
    /// Element type, as [`DType::name`](crate::DType::name) spells it. A name nobody knows is a mismatch, not a syntax error.
    pub dt: String,
    /// Fingerprint of model and cache shape.
    pub fp: Fingerprint,
    /// Life of the lease without heartbeats, in milliseconds.
    pub ttl_ms: u32,
    /// Which prompt the KV was computed from, as [`Fingerprint::of_tokens`] tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ph: Option<Fingerprint>,
    /// Whether the KV is still being computed; the block ids are not known then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub early: bool,
    /// Whether the producer's connections are encrypted. A consumer that does otherwise need not ask.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tls: bool,
}

/// A capability for one lease: 16 bytes of nonce, 16 of authentication code; base64url without padding in JSON.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LeaseToken(pub [u8; 32]);

impl fmt::Debug for LeaseToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseToken(***)")
    }
}

impl Serialize for LeaseToken {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&base64url(&self.0))
    }
}

impl<'de> Deserialize<'de> for LeaseToken {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_text(&text).ok_or_else(|| D::Error::custom("tok is not 32 bytes in base64url"))
    }
}

impl LeaseToken {
    /// Reads it as it is written in JSON, without the quotes; `None` for anything else.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        // Whatever is longer is none, and not worth decoding.
        let bytes = from_base64url(text.get(..64).unwrap_or(text))?;
        bytes.try_into().ok().map(Self)
    }
}

/// Tells models and cache shapes apart; 16 hexadecimal digits in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub u64);

impl Fingerprint {
    /// Of token ids: the first eight bytes of the SHA-256 over them, little-endian. Keeps KV from being used with another
    /// prompt by mistake.
    pub fn of_tokens(tokens: &[u32]) -> Self {
        let mut sha = Sha256::new();
        for token in tokens {
            sha.update(token.to_le_bytes());
        }
        let digest: [u8; 32] = sha.finalize().into();
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        Self(u64::from_be_bytes(first))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let is_hex = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let value = u64::from_str_radix(&text, 16).ok().filter(|_| is_hex);
        value
            .map(Self)
            .ok_or_else(|| D::Error::custom("fp is not 16 hexadecimal digits"))
    }
}

/// What a request's `kv_transfer_params` asks of the server that receives it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KvTransferRequest {
    /// Nothing: absent, `null`, `{}`, or every flag off.
    #[default]
    None,
    /// Prefill, keep the KV and answer with [`KvTransferParams`] (`do_remote_decode`).
    Produce,
    /// Fetch the prompt's KV from a producer.
    Consume(KvTransferParams),
}

/// A `kv_transfer_params` that cannot be meant; the request deserves status 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid kv_transfer_params: {reason}")]
pub struct ParamsError {
    /// What is wrong, naming the key.
    pub reason: String,
}

impl KvTransferRequest {
    /// Parses the JSON text of the value of `kv_transfer_params`.
    ///
    /// # Errors
    /// When a known key has a wrong type or an impossible value, or only some of the four keys are there.
    pub fn from_json(text: &str) -> Result<Self, ParamsError> {
        serde_json::from_str(text).map_err(|e| ParamsError {
            reason: e.to_string(),
        })
    }
}

impl<'de> Deserialize<'de> for KvTransferRequest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Some(keys) = Option::<Keys>::deserialize(deserializer)? else {
            return Ok(Self::None);
        };
        keys.classify().map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for KvTransferParams {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match KvTransferRequest::deserialize(deserializer)? {
            KvTransferRequest::Consume(params) => Ok(params),
            _ => Err(D::Error::custom("names no remote blocks")),
        }
    }
}

/// The known keys as they came; `null` and absent are the same.
#[derive(Default)]
struct Keys {
    do_remote_decode: Option<bool>,
    do_remote_prefill: Option<bool>,
    remote_block_ids: Option<BlockIds>,
    remote_host: Option<String>,
    remote_port: Option<Port>,
    uuid: Option<u64>,
    kvx: Option<Kvx>,
}

impl Keys {
    fn classify(self) -> Result<KvTransferRequest, String> {
        match (self.do_remote_decode, self.do_remote_prefill) {
            (Some(true), Some(true)) => {
                Err("do_remote_decode and do_remote_prefill exclude each other".into())
            }
            (Some(true), _) => Ok(KvTransferRequest::Produce),
            (_, Some(false)) => Ok(KvTransferRequest::None),
            (_, Some(true)) => self.consume(),
            (_, None) if self.names_nothing() => Ok(KvTransferRequest::None),
            (_, None) => self.consume(),
        }
    }

    fn names_nothing(&self) -> bool {
        self.remote_block_ids.is_none()
            && self.remote_host.is_none()
            && self.remote_port.is_none()
            && self.uuid.is_none()
            && self.kvx.is_none()
    }

    fn consume(self) -> Result<KvTransferRequest, String> {
        let missing = |key: &str| format!("{key} is missing");
        let uuid = self.uuid.ok_or_else(|| missing("uuid"))?;
        if uuid >= UUID_LIMIT {
            return Err(format!("uuid {uuid} is not below 2^50"));
        }
        Ok(KvTransferRequest::Consume(KvTransferParams {
            remote_block_ids: self
                .remote_block_ids
                .ok_or_else(|| missing("remote_block_ids"))?
                .0,
            remote_host: self.remote_host.ok_or_else(|| missing("remote_host"))?,
            remote_port: self.remote_port.ok_or_else(|| missing("remote_port"))?.0,
            uuid,
            kvx: self.kvx,
        }))
    }
}

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(KeysVisitor)
    }
}

struct KeysVisitor;

impl<'de> Visitor<'de> for KeysVisitor {
    type Value = Keys;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or null")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
        let mut keys = Keys::default();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "do_remote_decode" => keys.do_remote_decode = value(&mut map, &key)?,
                "do_remote_prefill" => keys.do_remote_prefill = value(&mut map, &key)?,
                "remote_block_ids" => keys.remote_block_ids = value(&mut map, &key)?,
                "remote_host" => keys.remote_host = value(&mut map, &key)?,
                "remote_port" => keys.remote_port = value(&mut map, &key)?,
                "uuid" => keys.uuid = value(&mut map, &key)?,
                "kvx" => keys.kvx = value(&mut map, &key)?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(keys)
    }
}

/// The next value of `map`, with `key` named in the error.
fn value<'de, A, T>(map: &mut A, key: &str) -> Result<Option<T>, A::Error>
where
    A: MapAccess<'de>,
    T: Deserialize<'de>,
{
    map.next_value()
        .map_err(|e| A::Error::custom(format_args!("{key}: {e}")))
}

/// Block ids, flat or one list per cache group; nested lists are joined in order.
struct BlockIds(Vec<u32>);

impl<'de> Deserialize<'de> for BlockIds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "expected a list of integers, or a list of such lists"
        )]
        enum Shape {
            Flat(Vec<u32>),
            Nested(Vec<Vec<u32>>),
        }
        let ids = match Shape::deserialize(deserializer)? {
            Shape::Flat(ids) => ids,
            Shape::Nested(groups) => groups.concat(),
        };
        if ids.len() > MAX_BLOCK_IDS {
            return Err(D::Error::custom(format_args!(
                "more than {MAX_BLOCK_IDS} ids"
            )));
        }
        Ok(Self(ids))
    }
}

/// A port, written as a string or as a number; 0 is no port.
struct Port(u16);

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "expected a port number, as a string or an integer"
        )]
        enum Shape {
            Text(String),
            Number(u16),
        }
        let port = match Shape::deserialize(deserializer)? {
            Shape::Text(text) => text.parse().ok(),
            Shape::Number(port) => Some(port),
        };
        port.filter(|&p| p != 0)
            .map(Self)
            .ok_or_else(|| D::Error::custom("not a port number from 1 to 65535"))
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde calls"
)]
fn port_as_string<S: Serializer>(port: &u16, serializer: S) -> Result<S::Ok, S::Error> {
    if *port == 0 {
        return Err(S::Error::custom("remote_port is 0"));
    }
    serializer.collect_str(port)
}

const BASE64URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// RFC 4648 §5 without padding.
fn base64url(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word =
            group.iter().fold(0u32, |w, &b| w << 8 | u32::from(b)) << (8 * (3 - group.len()));
        for i in 0..=group.len() {
            text.push(char::from(BASE64URL[(word >> (18 - 6 * i)) as usize & 63]));
        }
    }
    text
}

/// The inverse of [`base64url`]; `None` for anything it could not have written.
fn from_base64url(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for group in text.as_bytes().chunks(4) {
        let mut digits = group.iter().map(|c| BASE64URL.iter().position(|d| d == c));
        let word = digits.try_fold(0u32, |w, d| Some(w << 6 | u32::try_from(d?).ok()?))?;
        let word = word << (6 * (4 - group.len()));
        bytes.extend_from_slice(&word.to_be_bytes()[1..group.len()]);
    }
    (base64url(&bytes) == text).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> KvTransferParams {
        KvTransferParams {
            remote_block_ids: vec![5, 6, 9],
            remote_host: "10.52.5.4".into(),
            remote_port: 9100,
            uuid: UUID_LIMIT - 1,
            kvx: Some(Kvx {
                v: 1,
                tok: LeaseToken(std::array::from_fn(|i| i as u8 * 7)),
                n: 187,
                bs: 64,
                tp: 8,
                hd: Some((0, 4)),
                dt: "bf16".into(),
                fp: Fingerprint(0x00ab_cdef_0123_4567),
                ttl_ms: 15_000,
                ph: Some(Fingerprint::of_tokens(&[1, 2, 3])),
                early: false,
                tls: true,
            }),
        }
    }

    #[test]
    fn params_survive_a_round_trip_through_json() {
        let text = serde_json::to_string(&params()).unwrap();
        assert_eq!(
            KvTransferRequest::from_json(&text),
            Ok(KvTransferRequest::Consume(params()))
        );
        assert_eq!(
            serde_json::from_str::<KvTransferParams>(&text).unwrap(),
            params()
        );
    }

    #[test]
    fn the_client_sees_four_keys_in_the_types_of_the_guide_and_no_token() {
        let text = serde_json::to_string(&params().client_view()).unwrap();
        assert_eq!(
            text,
            r#"{"remote_block_ids":[5,6,9],"remote_host":"10.52.5.4","remote_port":"9100","uuid":1125899906842623}"#
        );
    }

    #[test]
    fn what_asks_for_nothing_is_none() {
        for text in [
            "null",
            "{}",
            r#"{"do_remote_decode":false}"#,
            r#"{"do_remote_decode":null,"uuid":null}"#,
            r#"{"do_remote_prefill":false,"do_remote_decode":false,"remote_block_ids":[1]}"#,
            r#"{"somebody_elses_key":[1.5,{}]}"#,
        ] {
            assert_eq!(
                KvTransferRequest::from_json(text),
                Ok(KvTransferRequest::None),
                "{text}"
            );
        }
    }

    #[test]
    fn a_routers_prefill_request_asks_to_produce() {
        let text = r#"{"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null}"#;
        assert_eq!(
            KvTransferRequest::from_json(text),
            Ok(KvTransferRequest::Produce)
        );
    }

    #[test]
    fn numeric_ports_nested_ids_and_unknown_keys_are_accepted() {
        let text = r#"{"remote_block_ids":[[1,2],[3]],"remote_host":"h","remote_port":9100,"uuid":7,
            "tp_size":8,"do_remote_prefill":true}"#;
        let KvTransferRequest::Consume(params) = KvTransferRequest::from_json(text).unwrap() else {
            panic!("not a request to consume")
        };
        assert_eq!(
            (params.remote_block_ids, params.remote_port),
            (vec![1, 2, 3], 9100)
        );
    }

    #[test]
    fn wrong_values_are_refused_by_the_name_of_their_key() {
        let four = |change: &str, to: &str| {
            let text = r#"{"remote_block_ids":[1],"remote_host":"h","remote_port":"1","uuid":7}"#;
            assert!(text.contains(change));
            KvTransferRequest::from_json(&text.replace(change, to))
                .unwrap_err()
                .reason
        };
        assert!(four(r#""uuid":7"#, r#""uuid":7.0"#).starts_with("uuid: "));
        assert!(four(r#""uuid":7"#, r#""uuid":-7"#).starts_with("uuid: "));
        assert!(four(r#""uuid":7"#, r#""uuid":1125899906842624"#).contains("2^50"));
        assert!(four(r#""uuid":7"#, r#""x":7"#).starts_with("uuid is missing"));
        assert!(four(r#""1""#, r#""65536""#).starts_with("remote_port: "));
        assert!(four(r#""1""#, "0").starts_with("remote_port: "));
        assert!(four("[1]", r#"["1"]"#).starts_with("remote_block_ids: "));
        assert!(four(r#""h""#, "[]").starts_with("remote_host: "));
        assert!(four(r#""uuid""#, r#""kvx":{"v":1},"uuid""#).starts_with("kvx: "));
        assert!(four(r#"{"#, r#"{"do_remote_decode":"yes","#).starts_with("do_remote_decode: "));
        assert!(KvTransferRequest::from_json("[]").is_err());
        assert!(KvTransferRequest::from_json("7").is_err());
        assert!(
            KvTransferRequest::from_json(r#"{"do_remote_decode":true,"do_remote_prefill":true}"#)
                .is_err()
        );
    }

    #[test]
    fn base64url_is_the_rfcs_and_has_one_spelling() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg"),
            ("fo", "Zm8"),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64url(bytes.as_bytes()), text);
            assert_eq!(from_base64url(text).unwrap(), bytes.as_bytes());
        }
        assert_eq!(base64url(&[0xfb, 0xff]), "-_8");
        for bad in ["Z", "Zh", "Zg==", "Z+", "Zm9vY"] {
            assert_eq!(from_base64url(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_token_is_not_shown_by_debug() {
        let shown = format!("{:?}", LeaseToken([7; 32]));
        assert_eq!(shown, "LeaseToken(***)");
    }
}
