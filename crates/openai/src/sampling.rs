//! The fields that completions and chat completions have in common.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::lax;

/// What a client says about sampling, stopping and the form of the answer. `None` is absent or `null`.
///
/// Fields that are only looked at for being neutral stay [`RawValue`]: their text costs no tree.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct SamplingFields {
    /// Served name; absent means the first one.
    pub model: Option<String>,
    /// How many completions of each prompt.
    #[serde(deserialize_with = "lax::integer")]
    pub n: Option<i64>,
    /// Most tokens to generate.
    #[serde(deserialize_with = "lax::integer")]
    pub max_tokens: Option<i64>,
    /// Fewest tokens to generate.
    #[serde(deserialize_with = "lax::integer")]
    pub min_tokens: Option<i64>,
    /// 0 is greedy.
    #[serde(deserialize_with = "lax::number")]
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    #[serde(deserialize_with = "lax::number")]
    pub top_p: Option<f64>,
    /// 0 and -1 keep all tokens.
    #[serde(deserialize_with = "lax::integer")]
    pub top_k: Option<i64>,
    /// Least probability relative to the likeliest token.
    #[serde(deserialize_with = "lax::number")]
    pub min_p: Option<f64>,
    /// Bits of the seed; a negative number is its two's complement.
    #[serde(deserialize_with = "lax::seed")]
    pub seed: Option<u64>,
    /// Neutral at 0.
    #[serde(deserialize_with = "lax::number")]
    pub presence_penalty: Option<f64>,
    /// Neutral at 0.
    #[serde(deserialize_with = "lax::number")]
    pub frequency_penalty: Option<f64>,
    /// Neutral at 1.
    #[serde(deserialize_with = "lax::number")]
    pub repetition_penalty: Option<f64>,
    /// Only with beam search.
    #[serde(deserialize_with = "lax::flag")]
    pub use_beam_search: bool,
    /// Texts that end the generation.
    #[serde(deserialize_with = "lax::texts")]
    pub stop: Vec<String>,
    /// Tokens that end the generation.
    #[serde(deserialize_with = "lax::bounded::<_, u32, 16384>")]
    pub stop_token_ids: Vec<u32>,
    /// Keep the stop text in the answer.
    #[serde(deserialize_with = "lax::flag")]
    pub include_stop_str_in_output: bool,
    /// Generate on after end-of-sequence.
    #[serde(deserialize_with = "lax::flag")]
    pub ignore_eos: bool,
    /// Leave special tokens out of the text; absent means yes.
    #[serde(deserialize_with = "lax::boolean")]
    pub skip_special_tokens: Option<bool>,
    /// Add the tokenizer's special tokens; absent means yes for completions, no for chat.
    #[serde(deserialize_with = "lax::boolean")]
    pub add_special_tokens: Option<bool>,
    /// Keep only the last so many prompt tokens; -1 keeps as many as the context holds.
    #[serde(deserialize_with = "lax::integer")]
    pub truncate_prompt_tokens: Option<i64>,
    /// Answer piece by piece.
    #[serde(deserialize_with = "lax::flag")]
    pub stream: bool,
    /// Only with `stream`.
    pub stream_options: Option<StreamOptions>,
    /// Log-probabilities of the prompt's tokens.
    #[serde(deserialize_with = "lax::integer")]
    pub prompt_logprobs: Option<i64>,
    /// Put token ids into the answer.
    #[serde(deserialize_with = "lax::flag")]
    pub return_token_ids: bool,
    /// Write `token_id:N` for the text of tokens in log-probabilities.
    #[serde(deserialize_with = "lax::flag")]
    pub return_tokens_as_token_ids: bool,
    /// Part of the answer's id.
    pub request_id: Option<String>,
    /// Separates prefix caches.
    pub cache_salt: Option<String>,
    /// Neutral if empty.
    pub logit_bias: Option<Box<RawValue>>,
    /// Neutral if empty.
    pub allowed_token_ids: Option<Box<RawValue>>,
    /// Neutral if empty.
    pub bad_words: Option<Box<RawValue>>,
    /// Constrained decoding, OpenAI's form.
    pub response_format: Option<Box<RawValue>>,
    /// Constrained decoding, vLLM's form.
    pub structured_outputs: Option<Box<RawValue>>,
    /// The KV hand-over object, as its text: see the `kv` vocabulary.
    pub kv_transfer_params: Option<Box<RawValue>>,
}

/// How a stream reports usage.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct StreamOptions {
    /// One event with the usage before the end.
    #[serde(deserialize_with = "lax::flag")]
    pub include_usage: bool,
    /// Usage in every event; only together with `include_usage`.
    #[serde(deserialize_with = "lax::flag")]
    pub continuous_usage_stats: bool,
}
