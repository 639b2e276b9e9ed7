//! `/tokenize` and `/detokenize`.

use serde::{Deserialize, Serialize};

use crate::{ApiError, Message, lax, parse};

/// A request to count or show the tokens of a text or of a conversation.
#[derive(Clone, Debug)]
pub struct TokenizeRequest {
    /// Served name.
    pub model: Option<String>,
    /// What to tokenize.
    pub input: TokenizeInput,
    /// Add the tokenizer's special tokens; absent means yes for a text, no for a conversation.
    pub add_special_tokens: Option<bool>,
    /// Show the tokens as the vocabulary spells them.
    pub return_token_strs: bool,
}

/// What to tokenize.
#[derive(Clone, Debug)]
pub enum TokenizeInput {
    /// A text.
    Prompt(String),
    /// A conversation, through the chat template.
    Chat {
        /// The conversation.
        messages: Vec<Message>,
        /// Open the assistant's turn; absent means yes.
        add_generation_prompt: Option<bool>,
    },
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Fields {
    model: Option<String>,
    prompt: Option<String>,
    #[serde(deserialize_with = "optional_messages")]
    messages: Option<Vec<Message>>,
    #[serde(deserialize_with = "lax::boolean")]
    add_generation_prompt: Option<bool>,
    #[serde(deserialize_with = "lax::boolean")]
    add_special_tokens: Option<bool>,
    #[serde(deserialize_with = "lax::flag")]
    return_token_strs: bool,
}

fn optional_messages<'de, D: serde::Deserializer<'de>>(
    d: D,
) -> Result<Option<Vec<Message>>, D::Error> {
    lax::bounded::<_, _, 65536>(d).map(Some)
}

impl TokenizeRequest {
    /// Reads a JSON body.
    ///
    /// # Errors
    /// With the dotted path of the field at fault as `param`.
    pub fn from_slice(body: &[u8]) -> Result<Self, ApiError> {
        let fields: Fields = parse::from_slice(body)?;
        let input = match (fields.prompt, fields.messages) {
            (Some(prompt), _) => TokenizeInput::Prompt(prompt),
            (None, Some(messages)) => TokenizeInput::Chat {
                messages,
                add_generation_prompt: fields.add_generation_prompt,
            },
            (None, None) => {
                return Err(ApiError::validation("body.prompt".into(), "field required"));
            }
        };
        Ok(Self {
            model: fields.model,
            input,
            add_special_tokens: fields.add_special_tokens,
            return_token_strs: fields.return_token_strs,
        })
    }
}

/// The tokens.
#[derive(Clone, Debug, Serialize)]
pub struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// How many the context holds.
    pub max_model_len: u32,
    /// Their ids.
    pub tokens: Vec<u32>,
    /// Their spelling in the vocabulary, if asked for.
    pub token_strs: Option<Vec<String>>,
}

/// A request to turn tokens into text.
#[derive(Clone, Debug, Deserialize)]
pub struct DetokenizeRequest {
    /// Served name.
    #[serde(default)]
    pub model: Option<String>,
    /// The tokens; ids beyond the vocabulary have no text.
    pub tokens: Vec<u32>,
}

impl DetokenizeRequest {
    /// Reads a JSON body.
    ///
    /// # Errors
    /// With the dotted path of the field at fault as `param`.
    pub fn from_slice(body: &[u8]) -> Result<Self, ApiError> {
        parse::from_slice(body)
    }
}

/// The text.
#[derive(Clone, Debug, Serialize)]
pub struct DetokenizeResponse {
    /// The text of the tokens.
    pub prompt: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_inputs_are_named() {
        let param = |e: ApiError| e.param.unwrap();
        assert_eq!(
            TokenizeRequest::from_slice(b"{}")
                .map_err(param)
                .unwrap_err(),
            "body.prompt"
        );
        assert_eq!(
            DetokenizeRequest::from_slice(b"{}")
                .map_err(param)
                .unwrap_err(),
            "body.tokens"
        );
    }

    #[test]
    fn a_conversation_is_told_from_a_text() {
        let body = br#"{"messages":[{"role":"user","content":"x"}],"add_generation_prompt":false}"#;
        let request = TokenizeRequest::from_slice(body).unwrap();
        assert!(matches!(
            request.input,
            TokenizeInput::Chat {
                add_generation_prompt: Some(false),
                ..
            }
        ));
        let request =
            TokenizeRequest::from_slice(br#"{"prompt":"x","return_token_strs":true}"#).unwrap();
        assert!(matches!(request.input, TokenizeInput::Prompt(_)) && request.return_token_strs);
    }
}
