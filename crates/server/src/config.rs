//! What a server is told before it starts. Plain data: nothing here reads flags, files or the environment.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use baton_engine::{EngineConfig, Runner};
use baton_kv_events::{Feed, Publisher};
use baton_kv_transfer::{KvClient, KvServer};
use baton_text::{ChatTemplate, Tokenizer};

/// Which halves of a request this server is meant for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Prompts only: answers hand their KV over.
    Prefill,
    /// Generation: takes KV over, also by asking a prefill server itself.
    Decode,
    /// Either.
    #[default]
    Both,
}

impl Role {
    /// Whether answers may hand KV over.
    #[must_use]
    pub const fn exports(self) -> bool {
        matches!(self, Self::Prefill | Self::Both)
    }

    /// Whether requests may take KV over.
    #[must_use]
    pub const fn imports(self) -> bool {
        matches!(self, Self::Decode | Self::Both)
    }
}

/// A key that a client must show. `Debug` does not show it.
#[derive(Clone)]
pub struct ApiKey(Box<str>);

impl ApiKey {
    /// Wraps a key.
    #[must_use]
    pub fn new(key: impl Into<Box<str>>) -> Self {
        Self(key.into())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(***)")
    }
}

/// Which prefill servers a request header may name. Whoever may name any address makes this server a port scanner.
#[derive(Clone)]
pub struct PrefillerPolicy(Arc<HostCheck>);

/// Decides on a host and a port.
type HostCheck = dyn Fn(&str, u16) -> bool + Send + Sync;

impl PrefillerPolicy {
    /// Only literal loopback addresses and `localhost`.
    #[must_use]
    pub fn loopback() -> Self {
        Self::new(|host, _| {
            host == "localhost"
                || host
                    .parse::<IpAddr>()
                    .is_ok_and(|address| address.is_loopback())
        })
    }

    /// Whatever `allows` says about a host, without brackets, and a port.
    #[must_use]
    pub fn new(allows: impl Fn(&str, u16) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(allows))
    }

    pub(crate) fn allows(&self, host: &str, port: u16) -> bool {
        (self.0)(host, port)
    }
}

impl std::fmt::Debug for PrefillerPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrefillerPolicy")
    }
}

/// How a server behaves. [`ServerConfig::default`] is safe on a machine of one's own.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// What it is for.
    pub role: Role,
    /// Keys of which a client must show one; none: everybody may ask.
    pub api_keys: Vec<ApiKey>,
    /// What clients may take: connections, time and bytes of a request's head, and how long requests may go on
    /// after shutdown was asked for.
    pub http: baton_http::ServeConfig,
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// Bytes of all request bodies that are being answered.
    pub max_bodies_bytes: usize,
    /// Most commands that wait for the engine thread.
    pub inbox: usize,
    /// Most sequences that one request may ask for, prompts times `n`.
    pub max_sequences_per_request: usize,
    /// Most log-probabilities a token.
    pub max_logprobs: u32,
    /// Report cached tokens in usage.
    pub prompt_tokens_details: bool,
    /// Every stream reports usage in every event.
    pub force_include_usage: bool,
    /// Answers carry `x-request-id`.
    pub request_id_headers: bool,
    /// How long a prefill server may take to answer.
    pub prefill_timeout: Duration,
    /// Which prefill servers a request may name.
    pub prefillers: PrefillerPolicy,
    /// Most tokens of a prompt that are computed here, beside other requests, when its KV does not come; a request with more
    /// is answered 503. 0: none, ever.
    pub recompute_max: u32,
    /// Host memory for KV that others will fetch, in bytes: that of the [`KvServer`]. Prompts whose KV does not fit are
    /// refused, if KV is what was asked for.
    pub kv_host_pool: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            role: Role::default(),
            api_keys: Vec::new(),
            http: baton_http::ServeConfig::default(),
            max_body_bytes: 64 << 20,
            max_bodies_bytes: 1 << 30,
            inbox: 1024,
            max_sequences_per_request: 1024,
            max_logprobs: 20,
            prompt_tokens_details: false,
            force_include_usage: false,
            request_id_headers: false,
            prefill_timeout: Duration::from_secs(300),
            prefillers: PrefillerPolicy::loopback(),
            recompute_max: 2048,
            kv_host_pool: 1 << 30,
        }
    }
}

/// What the server tells about its model, and what it assumes when a client says nothing.
#[derive(Clone, Debug)]
pub struct ModelCard {
    /// Names that clients may use; the first is the one in metrics and the default. Never empty.
    pub served_names: Vec<String>,
    /// Where the model came from.
    pub root: String,
    /// Longest sequence, prompt and answer together.
    pub max_model_len: u32,
    /// Tokens that end a sequence.
    pub eos: Box<[u32]>,
    /// The model's own sampling parameters.
    pub defaults: GenerationDefaults,
}

/// Sampling parameters for requests that do not say. `None` leaves the API's own default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// API default 1.
    pub temperature: Option<f32>,
    /// API default 1.
    pub top_p: Option<f32>,
    /// API default 0: all.
    pub top_k: Option<u32>,
    /// API default 0.
    pub min_p: Option<f32>,
    /// Most new tokens of a chat answer; API default: what the context holds.
    pub max_tokens: Option<u32>,
}

/// What a server is made of.
pub struct Parts {
    /// The device.
    pub runner: Box<dyn Runner>,
    /// How sequences are batched.
    pub engine: EngineConfig,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Conversations to text; without it chat is refused.
    pub chat_template: Option<ChatTemplate>,
    /// The model's names and limits.
    pub card: ModelCard,
    /// Where answers hand their KV over; without it they never do.
    pub kv_server: Option<KvServer>,
    /// How requests take KV over; without it they compute.
    pub kv_client: Option<KvClient>,
    /// Who is told what the prefix cache holds, and the way there; without it nobody is.
    pub kv_events: Option<(Publisher, Feed)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_may_be_a_prefiller_by_default() {
        let policy = PrefillerPolicy::loopback();
        for host in ["127.0.0.1", "127.3.2.1", "::1", "localhost"] {
            assert!(policy.allows(host, 80), "{host}");
        }
        for host in [
            "10.0.0.1",
            "169.254.169.254",
            "localhost.example",
            "0.0.0.0",
            "",
            "::ffff:127.0.0.1",
        ] {
            assert!(!policy.allows(host, 80), "{host}");
        }
    }

    #[test]
    fn keys_are_not_shown() {
        assert_eq!(format!("{:?}", ApiKey::new("secret")), "ApiKey(***)");
    }
}
