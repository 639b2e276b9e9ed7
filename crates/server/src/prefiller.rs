//! Asks a prefill server for a prompt's KV, as the routing sidecar does (llm-d's connector `nixlv2`): the client's own
//! body, one token, no stream. Its token is dropped; what counts is its `kv_transfer_params`.
//!
//! Every failure means the same to the caller: the KV is lost.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use baton_http::{Client, ClientError};
use baton_kv::{KvTransferParams, KvTransferRequest, ParamsError};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::value::RawValue;

use crate::inbox::Lost;
use crate::{PrefillerPolicy, early};

/// The header that names prefill servers.
pub(crate) const HEADER: &str = "x-prefiller-host-port";
/// Headers of the client that go along.
const FORWARDED: [HeaderName; 3] = [
    header::AUTHORIZATION,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
];
/// Most servers tried from one header.
const MAX_CANDIDATES: usize = 4;

/// How long the end of an answer may take once its KV is here.
const TELLING: Duration = Duration::from_secs(1);

const FALSE: &str = "false";
const ONE: &str = "1";
const PRODUCE: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

/// Why a prefill server gave no KV.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrefillError {
    #[error("the header names no server that may be asked")]
    NoCandidate,
    #[error("the request cannot be passed on: {0}")]
    Body(#[from] serde_json::Error),
    #[error("the request cannot be passed on: {0}")]
    Head(#[from] http::Error),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("status {0}")]
    Status(StatusCode),
    #[error("its answer cannot be read: {0}")]
    Answer(#[from] baton_http::BodyError),
    #[error("{0}")]
    Params(#[from] ParamsError),
    #[error("it hands nothing over")]
    Nothing,
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
}

impl PrefillError {
    /// The error in a word.
    pub(crate) fn lost(&self) -> Lost {
        Lost(match self {
            Self::NoCandidate => "no_prefiller",
            Self::Body(_) | Self::Head(_) => "not_passed_on",
            Self::Client(_) => "prefiller_unreachable",
            Self::Status(StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) => {
                "prefiller_busy"
            }
            Self::Status(_) => "prefiller_refused",
            Self::Answer(_) | Self::Params(_) => "prefiller_unreadable",
            Self::Nothing => "nothing_offered",
            Self::TimedOut(_) => "prefiller_timed_out",
        })
    }
}

/// A prefill that was asked for.
#[derive(Debug)]
pub(crate) struct Asked {
    /// How its KV can be fetched.
    pub(crate) params: KvTransferParams,
    /// Present while it is being computed.
    pub(crate) running: Option<Running>,
}

impl From<KvTransferParams> for Asked {
    /// One that is done.
    fn from(params: KvTransferParams) -> Self {
        Self {
            params,
            running: None,
        }
    }
}

/// A prefill that is being computed elsewhere. Dropping it takes the question back: the connection closes.
#[derive(Debug)]
pub(crate) struct Running(tokio::task::JoinHandle<Option<KvTransferParams>>);

impl Running {
    /// Reads the rest of the answer.
    fn wait_for(body: Incoming, limit: usize) -> Self {
        Self(tokio::spawn(async move {
            let answer = baton_http::collect(body, limit).await;
            let told = answer
                .map_err(Into::into)
                .and_then(|answer| params(&answer));
            told.inspect_err(|error| tracing::warn!(%error, "the prefill was cut off"))
                .ok()
        }))
    }

    /// The parameters of the whole answer, which name the blocks too. The answer ends when the last block is there, so
    /// whoever has them all waits for it a moment at most.
    pub(crate) async fn told(mut self) -> Option<KvTransferParams> {
        let ended = tokio::time::timeout(TELLING, &mut self.0).await;
        ended.ok()?.ok()?
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Where prompts may be sent, and for how long.
#[derive(Clone, Debug)]
pub(crate) struct Prefillers {
    pub(crate) client: Client,
    pub(crate) policy: PrefillerPolicy,
    pub(crate) timeout: Duration,
    /// Largest answer: it may echo the prompt.
    pub(crate) max_answer_bytes: usize,
}

/// A request that a prefill server is to see too.
#[derive(Clone, Debug)]
pub(crate) struct Errand<'a> {
    pub(crate) path: &'a str,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: &'a [u8],
    /// Goes out as `x-request-id`.
    pub(crate) id: &'a str,
}

impl Prefillers {
    /// Asks the servers named by `named` in turn until one can be reached. Dropping the future takes the question
    /// back: the connection closes.
    pub(crate) async fn ask(&self, named: &str, errand: Errand<'_>) -> Result<Asked, PrefillError> {
        let body = Bytes::from(prefill_body(errand.body, errand.path)?);
        let asked = async {
            let mut last = PrefillError::NoCandidate;
            for authority in candidates(named, &self.policy) {
                match self.ask_one(&authority, &errand, body.clone()).await {
                    Err(PrefillError::Client(error @ ClientError::Connect(_))) => {
                        last = error.into();
                    }
                    ended => return ended,
                }
            }
            Err(last)
        };
        tokio::time::timeout(self.timeout, asked)
            .await
            .unwrap_or(Err(PrefillError::TimedOut(self.timeout)))
    }

    async fn ask_one(
        &self,
        authority: &str,
        errand: &Errand<'_>,
        body: Bytes,
    ) -> Result<Asked, PrefillError> {
        let request = request(authority, errand, body)?;
        let response = self.client.send(request).await?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(PrefillError::Status(status));
        }
        let limit = self.max_answer_bytes;
        if let Some(params) = early::params(response.headers()) {
            let running = Some(Running::wait_for(response.into_body(), limit));
            return Ok(Asked { params, running });
        }
        let answer = baton_http::collect(response.into_body(), limit).await?;
        Ok(params(&answer)?.into())
    }
}

/// The transfer parameters of a prefill server's answer.
fn params(answer: &[u8]) -> Result<KvTransferParams, PrefillError> {
    #[derive(serde::Deserialize)]
    struct Answer<'a> {
        #[serde(borrow, default)]
        kv_transfer_params: Option<&'a RawValue>,
    }
    let answer: Answer<'_> = serde_json::from_slice(answer)?;
    let text = answer.kv_transfer_params.map_or("null", RawValue::get);
    match KvTransferRequest::from_json(text)? {
        KvTransferRequest::Consume(params) => Ok(params),
        _ => Err(PrefillError::Nothing),
    }
}

fn request(
    authority: &str,
    errand: &Errand<'_>,
    body: Bytes,
) -> Result<Request<Full<Bytes>>, http::Error> {
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://{authority}{}", errand.path))
        .header(header::CONTENT_TYPE, "application/json")
        .header(early::WANTED, "1");
    if let Ok(id) = HeaderValue::from_str(errand.id) {
        request = request.header("x-request-id", id);
    }
    for name in &FORWARDED {
        if let Some(value) = errand.headers.get(name) {
            request = request.header(name, value);
        }
    }
    request.body(Full::new(body))
}

/// `host:port` of every server in a header that the policy allows, in its order.
fn candidates(named: &str, policy: &PrefillerPolicy) -> Vec<String> {
    let authority = |text: &str| {
        let text = text.trim();
        let text = text.strip_prefix("http://").unwrap_or(text);
        let (host, port) = text.rsplit_once(':')?;
        let port: u16 = port.parse().ok().filter(|&port| port != 0)?;
        let bare = host
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
            .unwrap_or(host);
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
        let is_host = !bare.is_empty() && bare.chars().all(is_name);
        (is_host && policy.allows(bare, port)).then(|| format!("{host}:{port}"))
    };
    named
        .split(',')
        .take(MAX_CANDIDATES)
        .filter_map(authority)
        .collect()
}

/// The client's body, asking for one token and for its KV to be kept. All other fields pass byte for byte.
fn prefill_body(body: &[u8], path: &str) -> serde_json::Result<Vec<u8>> {
    let mut object: RawObject<'_> = serde_json::from_slice(body)?;
    object.0.retain(|(name, _)| name != "stream_options");
    object.set("max_tokens", ONE)?;
    if path.ends_with("/chat/completions") {
        object.set("max_completion_tokens", ONE)?;
    }
    object.set("stream", FALSE)?;
    object.set("kv_transfer_params", PRODUCE)?;
    serde_json::to_vec(&object)
}

/// A JSON object whose values are left as they were written.
struct RawObject<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl RawObject<'_> {
    fn set(&mut self, name: &'static str, value: &'static str) -> serde_json::Result<()> {
        let value: &'static RawValue = serde_json::from_str(value)?;
        match self.0.iter_mut().find(|(key, _)| key == name) {
            Some(entry) => entry.1 = value,
            None => self.0.push((Cow::Borrowed(name), value)),
        }
        Ok(())
    }
}

impl Serialize for RawObject<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for RawObject<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawObject<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawObject<'de>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(RawObject(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edited(body: &str, path: &str) -> String {
        String::from_utf8(prefill_body(body.as_bytes(), path).unwrap()).unwrap()
    }

    #[test]
    fn all_but_six_fields_pass_byte_for_byte() {
        let body = r#"{"prompt": "a\u0041", "seed":18446744073709551615,"stream":true,"stream_options":{"include_usage":true},
            "temperature":0.10,"max_tokens":64,"extra":{"z":1,"a":1e400},"kv_transfer_params":{"uuid":1}}"#;
        assert_eq!(
            edited(body, "/v1/completions"),
            format!(
                r#"{{"prompt":"a\u0041","seed":18446744073709551615,"stream":false,"temperature":0.10,"max_tokens":1,"extra":{{"z":1,"a":1e400}},"kv_transfer_params":{PRODUCE}}}"#
            )
        );
    }

    #[test]
    fn chat_has_its_newer_limit_too() {
        let expect = format!(
            r#"{{"messages":[],"max_tokens":1,"max_completion_tokens":1,"stream":false,"kv_transfer_params":{PRODUCE}}}"#
        );
        assert_eq!(edited(r#"{"messages":[]}"#, "/v1/chat/completions"), expect);
    }

    #[test]
    fn only_allowed_hosts_are_candidates() {
        let policy = PrefillerPolicy::loopback();
        let named =
            "http://127.0.0.1:80, [::1]:81,10.0.0.1:82,localhost:0,localhost:x,localhost:83";
        assert_eq!(candidates(named, &policy), ["127.0.0.1:80", "[::1]:81"]);
        let all = PrefillerPolicy::new(|_, _| true);
        for bad in [
            "",
            "host",
            "ho/st:1",
            "user@host:1",
            "host:1/path",
            ":1",
            "a b:1",
        ] {
            assert!(candidates(bad, &all).is_empty(), "{bad}");
        }
        assert_eq!(candidates("pod-1.ns.svc:8000", &all), ["pod-1.ns.svc:8000"]);
    }

    #[test]
    fn an_answer_without_params_hands_nothing_over() {
        assert!(matches!(
            params(br#"{"id":"x","kv_transfer_params":null}"#),
            Err(PrefillError::Nothing)
        ));
        assert!(matches!(
            params(br#"{"id":"x"}"#),
            Err(PrefillError::Nothing)
        ));
        assert!(matches!(params(b"oops"), Err(PrefillError::Body(_))));
        assert!(matches!(
            params(br#"{"kv_transfer_params":{"uuid":1.5}}"#),
            Err(PrefillError::Params(_))
        ));
        let text = br#"{"kv_transfer_params":{"remote_block_ids":[5],"remote_host":"h","remote_port":"1","uuid":7}}"#;
        assert_eq!(params(text).unwrap().uuid, 7);
    }
}
