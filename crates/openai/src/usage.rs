//! Token counts.

use crate::AlwaysNull;
use serde::Serialize;

/// Counts of a whole answer, with explicit nulls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Both together.
    pub total_tokens: u64,
    /// Tokens of all choices.
    pub completion_tokens: u64,
    /// Where the prompt's KV came from, if the server tells.
    pub prompt_tokens_details: Option<PromptTokensDetails>,
    completion_tokens_details: AlwaysNull,
}

impl Usage {
    /// Counts; `cached_tokens` only if the server tells.
    #[must_use]
    pub fn new(prompt_tokens: u64, completion_tokens: u64, cached_tokens: Option<u64>) -> Self {
        Self {
            prompt_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            completion_tokens,
            prompt_tokens_details: cached_tokens.map(PromptTokensDetails::new),
            completion_tokens_details: (),
        }
    }
}

/// Where the prompt's KV came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PromptTokensDetails {
    /// Prompt tokens that were not computed for this answer.
    pub cached_tokens: u64,
    created_cache_tokens: AlwaysNull,
    multimodal_tokens: AlwaysNull,
}

impl PromptTokensDetails {
    fn new(cached_tokens: u64) -> Self {
        Self {
            cached_tokens,
            created_cache_tokens: (),
            multimodal_tokens: (),
        }
    }
}

/// Counts in a stream: absent instead of null.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StreamUsage {
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Both together.
    pub total_tokens: u64,
    /// Tokens so far.
    pub completion_tokens: u64,
    /// Only in the last event, if the server tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<StreamPromptTokensDetails>,
}

impl StreamUsage {
    /// Counts; `cached_tokens` only if the server tells.
    #[must_use]
    pub fn new(prompt_tokens: u64, completion_tokens: u64, cached_tokens: Option<u64>) -> Self {
        Self {
            prompt_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            completion_tokens,
            prompt_tokens_details: cached_tokens
                .map(|cached_tokens| StreamPromptTokensDetails { cached_tokens }),
        }
    }
}

/// Where the prompt's KV came from, in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StreamPromptTokensDetails {
    /// Prompt tokens that were not computed for this answer.
    pub cached_tokens: u64,
}
