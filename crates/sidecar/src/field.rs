//! The fields of requests and answers that the sidecar knows by name.

use serde::de::{Deserialize, Deserializer, Visitor};
use std::fmt;

macro_rules! fields {
    ($($variant:ident = $name:literal,)*) => {
        /// A field that is read or edited somewhere.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Field { $($variant,)* }

        impl Field {
            /// The field called `name`.
            fn named(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// What it is called.
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

fields! {
    BestOf = "best_of",
    BootstrapHost = "bootstrap_host",
    BootstrapPort = "bootstrap_port",
    BootstrapRoom = "bootstrap_room",
    CacheHitThreshold = "cache_hit_threshold",
    CachedTokens = "cached_tokens",
    Echo = "echo",
    EcTransferParams = "ec_transfer_params",
    ExtraArgs = "extra_args",
    KvTransferParams = "kv_transfer_params",
    Kvx = "kvx",
    Logprobs = "logprobs",
    MaxCompletionTokens = "max_completion_tokens",
    MaxOutputTokens = "max_output_tokens",
    MaxTokens = "max_tokens",
    MinTokens = "min_tokens",
    N = "n",
    Prompt = "prompt",
    PromptLogprobs = "prompt_logprobs",
    PromptTokensDetails = "prompt_tokens_details",
    SamplingParams = "sampling_params",
    Stream = "stream",
    StreamOptions = "stream_options",
    Tok = "tok",
    Usage = "usage",
    Uuid = "uuid",
    VllmXargs = "vllm_xargs",
}

/// A member's name: one of ours, or any other.
pub(crate) struct Name(pub(crate) Option<Field>);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Name;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }
            fn visit_str<E>(self, name: &str) -> Result<Name, E> {
                Ok(Name(Field::named(name)))
            }
        }
        deserializer.deserialize_str(Text)
    }
}
