//! `/v1/chat/completions`.

use std::fmt;

use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::completion::AnswerHead;
use crate::{
    AlwaysNull, ApiError, ChatLogprobs, FinishReason, SamplingFields, StopReason, StreamUsage,
    Usage,
};
use crate::{lax, parse};

/// A request to continue a conversation.
#[derive(Clone, Debug)]
pub struct ChatCompletionRequest {
    /// What only chat has.
    pub fields: ChatFields,
    /// What completions have too.
    pub sampling: SamplingFields,
}

/// The fields that only chat has.
#[derive(Clone, Debug, Deserialize)]
pub struct ChatFields {
    /// The conversation.
    #[serde(deserialize_with = "lax::bounded::<_, Message, 65536>")]
    pub messages: Vec<Message>,
    /// Report log-probabilities.
    #[serde(default, deserialize_with = "lax::flag")]
    pub logprobs: bool,
    /// How many likeliest tokens to report.
    #[serde(default, deserialize_with = "lax::integer")]
    pub top_logprobs: Option<i64>,
    /// Newer name of `max_tokens`, and the stronger one.
    #[serde(default, deserialize_with = "lax::integer")]
    pub max_completion_tokens: Option<i64>,
    /// Put the last message before the answer, if it is the assistant's.
    #[serde(default, deserialize_with = "lax::flag")]
    pub echo: bool,
    /// Open the assistant's turn; absent means yes.
    #[serde(default, deserialize_with = "lax::boolean")]
    pub add_generation_prompt: Option<bool>,
    /// Continue the last message instead of answering it.
    #[serde(default, deserialize_with = "lax::flag")]
    pub continue_final_message: bool,
    /// Functions the model may call.
    #[serde(default)]
    pub tools: Option<Box<RawValue>>,
    /// Which of them it shall call.
    #[serde(default)]
    pub tool_choice: Option<Box<RawValue>>,
    /// Documents for the template.
    #[serde(default)]
    pub documents: Option<Box<RawValue>>,
    /// A template of the client's own.
    #[serde(default)]
    pub chat_template: Option<String>,
    /// Variables for the template.
    #[serde(default)]
    pub chat_template_kwargs: Option<Box<RawValue>>,
}

impl ChatCompletionRequest {
    /// Reads a JSON body.
    ///
    /// # Errors
    /// With the dotted path of the field at fault as `param`.
    pub fn from_slice(body: &[u8]) -> Result<Self, ApiError> {
        Ok(Self {
            fields: parse::from_slice(body)?,
            sampling: parse::from_slice(body)?,
        })
    }
}

/// One turn of a conversation. Any role is accepted and left to the template.
#[derive(Clone, Debug, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: String,
    /// What is said.
    #[serde(default)]
    pub content: Option<Content>,
    /// Name of the speaker.
    #[serde(default)]
    pub name: Option<String>,
    /// Which call a tool answers.
    #[serde(default)]
    pub tool_call_id: Option<String>,
    /// Calls that the assistant made, as their text.
    #[serde(default)]
    pub tool_calls: Option<Box<RawValue>>,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// A list of parts.
    Parts(Vec<ContentPart>),
}

/// One part of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContentPart {
    /// Text.
    Text(String),
    /// Something a text model cannot read; its type's name.
    Other(String),
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }
            fn visit_string<E: Error>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Content, A::Error> {
                let seq = serde::de::value::SeqAccessDeserializer::new(seq);
                lax::bounded::<_, _, 65536>(seq).map(Content::Parts)
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

impl<'de> Deserialize<'de> for ContentPart {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Part {
            #[serde(rename = "type")]
            kind: String,
            #[serde(default)]
            text: Option<String>,
        }
        let part = Part::deserialize(deserializer)?;
        match (part.kind.as_str(), part.text) {
            ("text" | "input_text" | "output_text" | "refusal", Some(text)) => Ok(Self::Text(text)),
            ("text", None) => Err(D::Error::missing_field("text")),
            _ => Ok(Self::Other(part.kind)),
        }
    }
}

/// Who gives the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ChatRole {
    /// The model.
    Assistant,
}

/// A whole answer.
#[derive(Clone, Debug, Serialize)]
pub struct ChatResponse<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ChatChoice>,
    service_tier: AlwaysNull,
    system_fingerprint: &'a str,
    usage: Usage,
    prompt_logprobs: AlwaysNull,
    prompt_token_ids: Option<&'a [u32]>,
    prompt_text: AlwaysNull,
    kv_transfer_params: Option<&'a RawValue>,
    ec_transfer_params: AlwaysNull,
    metrics: AlwaysNull,
}

impl<'a> ChatResponse<'a> {
    /// `prompt_token_ids` if asked for; `kv_transfer_params` is the JSON text of the object that moved the prompt's KV.
    #[must_use]
    pub fn new(
        head: AnswerHead<'a>,
        choices: Vec<ChatChoice>,
        usage: Usage,
        prompt_token_ids: Option<&'a [u32]>,
        kv_transfer_params: Option<&'a RawValue>,
    ) -> Self {
        Self {
            id: head.id,
            object: "chat.completion",
            created: head.created,
            model: head.model,
            choices,
            service_tier: (),
            system_fingerprint: head.system_fingerprint,
            usage,
            prompt_logprobs: (),
            prompt_token_ids,
            prompt_text: (),
            kv_transfer_params,
            ec_transfer_params: (),
            metrics: (),
        }
    }
}

/// One answer of several.
#[derive(Clone, Debug, Serialize)]
pub struct ChatChoice {
    /// From 0 to `n - 1`.
    pub index: u32,
    /// The answer.
    pub message: ResponseMessage,
    /// If asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: Option<FinishReason>,
    /// What stopped it.
    pub stop_reason: Option<StopReason>,
    /// If asked for.
    pub token_ids: Option<Vec<u32>>,
    /// Not reported.
    pub routed_experts: AlwaysNull,
}

impl ChatChoice {
    /// A choice whose optional parts are absent.
    #[must_use]
    pub fn new(index: u32, text: String) -> Self {
        Self {
            index,
            message: ResponseMessage::new(text),
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
            routed_experts: (),
        }
    }
}

/// The assistant's turn.
#[derive(Clone, Debug, Serialize)]
pub struct ResponseMessage {
    role: ChatRole,
    content: String,
    refusal: AlwaysNull,
    annotations: AlwaysNull,
    audio: AlwaysNull,
    function_call: AlwaysNull,
    reasoning: AlwaysNull,
}

impl ResponseMessage {
    fn new(content: String) -> Self {
        Self {
            role: ChatRole::Assistant,
            content,
            refusal: (),
            annotations: (),
            audio: (),
            function_call: (),
            reasoning: (),
        }
    }
}

/// One event of a streamed answer.
#[derive(Clone, Debug, Serialize)]
pub struct ChatChunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChatChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<StreamUsage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Option<&'a [u32]>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_text: Option<AlwaysNull>,
}

impl<'a> ChatChunk<'a> {
    /// An event that adds to a choice, or, without `choices`, only reports usage.
    #[must_use]
    pub fn new(
        head: AnswerHead<'a>,
        choices: &'a [ChatChunkChoice<'a>],
        usage: Option<StreamUsage>,
        fingerprint: Option<&'a str>,
    ) -> Self {
        Self {
            id: head.id,
            object: "chat.completion.chunk",
            created: head.created,
            model: head.model,
            choices,
            usage,
            system_fingerprint: fingerprint,
            prompt_token_ids: None,
            prompt_text: None,
        }
    }

    /// The event that opens a choice; `prompt_token_ids` if asked for.
    #[must_use]
    pub fn opening(
        head: AnswerHead<'a>,
        choices: &'a [ChatChunkChoice<'a>],
        usage: Option<StreamUsage>,
        prompt_token_ids: Option<&'a [u32]>,
    ) -> Self {
        Self {
            prompt_token_ids: Some(prompt_token_ids),
            prompt_text: Some(()),
            ..Self::new(head, choices, usage, None)
        }
    }
}

/// What one event adds to one choice.
#[derive(Clone, Debug, Serialize)]
pub struct ChatChunkChoice<'a> {
    /// From 0 to `n - 1`.
    pub index: u32,
    /// What is new.
    pub delta: Delta<'a>,
    /// Of the tokens that are new.
    pub logprobs: Option<ChatLogprobs>,
    /// In the choice's last event.
    pub finish_reason: Option<FinishReason>,
    /// Outer: written at all (only in the choice's last event).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<Option<&'a StopReason>>,
    /// Outer: written at all (not in the opening event). Inner: the tokens that are new, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Option<&'a [u32]>>,
}

/// What is new in a message.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Delta<'a> {
    /// In the opening event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<ChatRole>,
    /// Text; empty in the opening event.
    pub content: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param_of(body: &str) -> String {
        ChatCompletionRequest::from_slice(body.as_bytes())
            .unwrap_err()
            .param
            .unwrap_or_default()
    }

    #[test]
    fn contents_are_texts_or_parts_and_roles_are_free() {
        let body = br#"{"messages":[{"role":"king","content":"x"},{"role":"user","content":[{"type":"text","text":"a"},
            {"type":"image_url","image_url":{"url":"u"}}]},{"role":"assistant","content":null,"tool_calls":[{"id":"1"}]}],
            "tools":[],"max_completion_tokens":3}"#;
        let request = ChatCompletionRequest::from_slice(body).unwrap();
        let messages = request.fields.messages;
        assert_eq!(messages[0].content, Some(Content::Text("x".into())));
        let parts = vec![
            ContentPart::Text("a".into()),
            ContentPart::Other("image_url".into()),
        ];
        assert_eq!(messages[1].content, Some(Content::Parts(parts)));
        assert_eq!(
            messages[2].tool_calls.as_ref().unwrap().get(),
            r#"[{"id":"1"}]"#
        );
        assert_eq!(request.fields.tools.unwrap().get(), "[]");
    }

    #[test]
    fn errors_name_the_place_in_the_body() {
        assert_eq!(param_of(r#"{"max_tokens":2}"#), "body.messages");
        assert_eq!(param_of(r#"{"messages":3}"#), "body.messages");
        assert_eq!(
            param_of(r#"{"messages":[{"content":"x"}]}"#),
            "body.messages.0.role"
        );
        assert_eq!(
            param_of(r#"{"messages":[{"role":"u","content":[{"text":"x"}]}]}"#),
            "body.messages.0.content.0.type"
        );
        assert_eq!(
            param_of(r#"{"messages":[{"role":"u","content":5}]}"#),
            "body.messages.0.content"
        );
    }

    #[test]
    fn chunks_have_vllms_keys_in_vllms_order() {
        let head = AnswerHead {
            id: "i",
            created: 7,
            model: "m",
            system_fingerprint: "f",
        };
        let mut choice = ChatChunkChoice {
            index: 0,
            delta: Delta {
                role: Some(ChatRole::Assistant),
                content: "",
            },
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
        };
        let opening = serde_json::to_string(&ChatChunk::opening(
            head,
            std::slice::from_ref(&choice),
            None,
            None,
        ));
        assert_eq!(
            opening.unwrap(),
            concat!(
                r#"{"id":"i","object":"chat.completion.chunk","created":7,"model":"m","choices":[{"index":0,"#,
                r#""delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"#,
                r#""prompt_token_ids":null,"prompt_text":null}"#
            )
        );
        choice.delta = Delta {
            role: None,
            content: "!",
        };
        choice.finish_reason = Some(FinishReason::Length);
        choice.stop_reason = Some(None);
        choice.token_ids = Some(None);
        let last = serde_json::to_string(&ChatChunk::new(head, &[choice], None, Some("f")));
        assert_eq!(
            last.unwrap(),
            concat!(
                r#"{"id":"i","object":"chat.completion.chunk","created":7,"model":"m","choices":[{"index":0,"#,
                r#""delta":{"content":"!"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}],"#,
                r#""system_fingerprint":"f"}"#
            )
        );
    }

    #[test]
    fn a_response_has_vllms_keys_in_vllms_order() {
        let head = AnswerHead {
            id: "i",
            created: 7,
            model: "m",
            system_fingerprint: "f",
        };
        let response = ChatResponse::new(
            head,
            vec![ChatChoice::new(0, "a".into())],
            Usage::new(1, 1, Some(0)),
            None,
            None,
        );
        assert_eq!(
            serde_json::to_string(&response).unwrap(),
            concat!(
                r#"{"id":"i","object":"chat.completion","created":7,"model":"m","choices":[{"index":0,"message":"#,
                r#"{"role":"assistant","content":"a","refusal":null,"annotations":null,"audio":null,"function_call":null,"#,
                r#""reasoning":null},"logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":null,"#,
                r#""routed_experts":null}],"service_tier":null,"system_fingerprint":"f","usage":{"prompt_tokens":1,"#,
                r#""total_tokens":2,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":0,"#,
                r#""created_cache_tokens":null,"multimodal_tokens":null},"completion_tokens_details":null},"#,
                r#""prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"#,
                r#""ec_transfer_params":null,"metrics":null}"#
            )
        );
    }
}
