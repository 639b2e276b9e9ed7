//! Log-probabilities in their two forms: parallel lists for completions, a list of objects for chat.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

/// What JSON can hold of a log-probability: `-9999` stands for minus infinity, as in vLLM.
#[must_use]
pub fn json_logprob(value: f32) -> f64 {
    f64::from(value).max(-9999.0)
}

/// Parallel lists, one entry a token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CompletionLogprobs {
    /// Where each token's text begins, in characters from the start of the answer.
    pub text_offset: Vec<u64>,
    /// Of the sampled token.
    pub token_logprobs: Vec<f64>,
    /// Text of the sampled token.
    pub tokens: Vec<String>,
    /// The sampled token first, then the likeliest.
    pub top_logprobs: Vec<TopLogprobs>,
}

/// Texts and log-probabilities as one JSON object, in this order. Texts must differ.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopLogprobs(pub Vec<(String, f64)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (text, logprob) in &self.0 {
            map.serialize_entry(text, logprob)?;
        }
        map.end()
    }
}

/// A choice's log-probabilities in chat form.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ChatLogprobs {
    /// One entry a token.
    pub content: Vec<ChatTokenLogprob>,
}

/// The sampled token and its rivals.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatTokenLogprob {
    /// Its text.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// What it stands for; the text's UTF-8 unless it is part of a character.
    pub bytes: Vec<u8>,
    /// As many as the client asked for.
    pub top_logprobs: Vec<ChatTopLogprob>,
}

/// One rival.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatTopLogprob {
    /// Its text.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// What it stands for; the text's UTF-8 unless it is part of a character.
    pub bytes: Vec<u8>,
}
