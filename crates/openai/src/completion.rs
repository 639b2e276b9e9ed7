//! `/v1/completions`.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{AlwaysNull, ApiError, CompletionLogprobs, Prompt, SamplingFields, StreamUsage, Usage};
use crate::{lax, parse};

/// A request to complete prompts.
#[derive(Clone, Debug, Default)]
pub struct CompletionRequest {
    /// What only completions have.
    pub fields: CompletionFields,
    /// What chat has too.
    pub sampling: SamplingFields,
}

/// The fields that only completions have.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CompletionFields {
    /// What to complete.
    pub prompt: Option<Prompt>,
    /// Put the prompt before the answer.
    #[serde(deserialize_with = "lax::flag")]
    pub echo: bool,
    /// How many likeliest tokens to report.
    #[serde(deserialize_with = "lax::integer")]
    pub logprobs: Option<i64>,
    /// Text after the gap to fill.
    pub suffix: Option<String>,
    /// Embeddings instead of a prompt.
    pub prompt_embeds: Option<Box<RawValue>>,
}

impl CompletionRequest {
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

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// End of sequence, a stop text or a stop token.
    Stop,
    /// The limit of tokens or of the context.
    Length,
}

/// What stopped a choice: absent for end of sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// A stop text.
    Text(String),
    /// A stop token.
    Token(u32),
}

/// A whole answer.
#[derive(Clone, Debug, Serialize)]
pub struct CompletionResponse<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<CompletionChoice>,
    service_tier: AlwaysNull,
    system_fingerprint: &'a str,
    usage: Usage,
    kv_transfer_params: Option<&'a RawValue>,
    ec_transfer_params: AlwaysNull,
    metrics: AlwaysNull,
}

/// What every answer and chunk begins with.
#[derive(Clone, Copy, Debug)]
pub struct AnswerHead<'a> {
    /// The answer's id.
    pub id: &'a str,
    /// Seconds since 1970.
    pub created: u64,
    /// The name that the client used.
    pub model: &'a str,
    /// Of this server's version and configuration.
    pub system_fingerprint: &'a str,
}

impl<'a> CompletionResponse<'a> {
    /// `kv_transfer_params` is the JSON text of the object that moved the prompt's KV.
    #[must_use]
    pub fn new(
        head: AnswerHead<'a>,
        choices: Vec<CompletionChoice>,
        usage: Usage,
        kv_transfer_params: Option<&'a RawValue>,
    ) -> Self {
        Self {
            id: head.id,
            object: "text_completion",
            created: head.created,
            model: head.model,
            choices,
            service_tier: (),
            system_fingerprint: head.system_fingerprint,
            usage,
            kv_transfer_params,
            ec_transfer_params: (),
            metrics: (),
        }
    }
}

/// One completion of one prompt.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CompletionChoice {
    /// Index of the prompt times `n` plus the index of the completion.
    pub index: u32,
    /// The text.
    pub text: String,
    /// If asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// Present in every finished choice.
    pub finish_reason: Option<FinishReason>,
    /// What stopped it.
    pub stop_reason: Option<StopReason>,
    /// If asked for.
    pub token_ids: Option<Vec<u32>>,
    /// Not computed.
    pub prompt_logprobs: AlwaysNull,
    /// If asked for.
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Not reported.
    pub routed_experts: AlwaysNull,
}

/// One event of a streamed answer.
#[derive(Clone, Debug, Serialize)]
pub struct CompletionChunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [CompletionChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<StreamUsage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<&'a str>,
}

impl<'a> CompletionChunk<'a> {
    /// `choices` has one entry, or none in the event that only reports usage. The fingerprint goes out if
    /// `fingerprint` says so: with a choice's last event, or with the usage event if there is one.
    #[must_use]
    pub fn new(
        head: AnswerHead<'a>,
        choices: &'a [CompletionChunkChoice<'a>],
        usage: Option<StreamUsage>,
        fingerprint: Option<&'a str>,
    ) -> Self {
        Self {
            id: head.id,
            object: "text_completion",
            created: head.created,
            model: head.model,
            choices,
            usage,
            system_fingerprint: fingerprint,
        }
    }
}

/// What one event adds to one choice.
#[derive(Clone, Debug, Serialize)]
pub struct CompletionChunkChoice<'a> {
    /// As in [`CompletionChoice`].
    pub index: u32,
    /// The text that is new.
    pub text: &'a str,
    /// Of the tokens that are new.
    pub logprobs: Option<CompletionLogprobs>,
    /// In the choice's last event.
    pub finish_reason: Option<FinishReason>,
    /// In the choice's last event.
    pub stop_reason: Option<&'a StopReason>,
    /// In the choice's first event, if asked for.
    pub prompt_token_ids: Option<&'a [u32]>,
    /// The tokens that are new, if asked for.
    pub token_ids: Option<&'a [u32]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param_of(body: &str) -> String {
        CompletionRequest::from_slice(body.as_bytes())
            .unwrap_err()
            .param
            .unwrap_or_default()
    }

    #[test]
    fn a_request_is_read_with_pydantics_leniency() {
        let body = br#"{"model":"m","prompt":"x","max_tokens":"2","seed":-3,"stop":".","stream":"true",
            "stream_options":{"include_usage":1},"unknown":{"deep":[1,2]},"kv_transfer_params":{"uuid":1125899906842623}}"#;
        let request = CompletionRequest::from_slice(body).unwrap();
        assert_eq!(request.fields.prompt, Some(Prompt::Text("x".into())));
        let sampling = request.sampling;
        assert_eq!(
            (sampling.max_tokens, sampling.seed),
            (Some(2), Some(u64::MAX - 2))
        );
        assert_eq!(sampling.stop, ["."]);
        assert!(sampling.stream && sampling.stream_options.unwrap().include_usage);
        assert_eq!(
            sampling.kv_transfer_params.unwrap().get(),
            r#"{"uuid":1125899906842623}"#
        );
    }

    #[test]
    fn explicit_nulls_are_absence() {
        let body = br#"{"prompt":null,"n":null,"stop":null,"stream":null,"stream_options":null,"logit_bias":null,
            "temperature":null,"stop_token_ids":null,"echo":null,"model":null}"#;
        let request = CompletionRequest::from_slice(body).unwrap();
        assert!(request.fields.prompt.is_none() && !request.sampling.stream);
    }

    #[test]
    fn errors_name_the_place_in_the_body() {
        assert_eq!(param_of(""), "body");
        assert_eq!(param_of("[1,2]"), "body");
        assert_eq!(param_of(r#"{"model": "smollm2", "prompt": "#), "body.31");
        assert_eq!(param_of("[1,"), "body.3");
        assert_eq!(param_of(r#"{"prompt":"x"} x"#), "body.15");
        assert_eq!(param_of("{\"prompt\":\n \"é\" \"b\"}"), "body.16");
        assert_eq!(param_of(r#"{"prompt":5}"#), "body.prompt");
        assert_eq!(param_of(r#"{"prompt":[1,-5]}"#), "body.prompt.1");
        assert_eq!(
            param_of(r#"{"prompt":"x","max_tokens":"abc"}"#),
            "body.max_tokens"
        );
        assert_eq!(
            param_of(r#"{"prompt":"x","stream_options":{"include_usage":"perhaps"}}"#),
            "body.stream_options.include_usage"
        );
        assert_eq!(param_of(r#"{"prompt":"x","stop":["a",1]}"#), "body.stop.1");
        assert_eq!(
            param_of(r#"{"prompt":"x","stop_token_ids":[1,-2]}"#),
            "body.stop_token_ids.1"
        );
    }

    #[test]
    fn half_a_surrogate_pair_is_a_bad_request_without_a_param() {
        for body in [
            r#"{"prompt":"\ud83d"}"#,
            r#"{"prompt":"\ud83dx"}"#,
            r#"{"prompt":"\ude00"}"#,
        ] {
            let error = CompletionRequest::from_slice(body.as_bytes()).unwrap_err();
            assert_eq!(
                (error.kind, error.param),
                (crate::ErrorKind::BadRequest, None),
                "{body}"
            );
        }
    }

    #[test]
    fn a_response_has_vllms_keys_in_vllms_order() {
        let head = AnswerHead {
            id: "cmpl-1",
            created: 7,
            model: "m",
            system_fingerprint: "f",
        };
        let choice = CompletionChoice {
            text: "a".into(),
            finish_reason: Some(FinishReason::Stop),
            stop_reason: Some(StopReason::Token(30)),
            ..CompletionChoice::default()
        };
        let response = CompletionResponse::new(head, vec![choice], Usage::new(5, 1, None), None);
        assert_eq!(
            serde_json::to_string(&response).unwrap(),
            concat!(
                r#"{"id":"cmpl-1","object":"text_completion","created":7,"model":"m","choices":[{"index":0,"text":"a","#,
                r#""logprobs":null,"finish_reason":"stop","stop_reason":30,"token_ids":null,"prompt_logprobs":null,"#,
                r#""prompt_token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"f","#,
                r#""usage":{"prompt_tokens":5,"total_tokens":6,"completion_tokens":1,"prompt_tokens_details":null,"#,
                r#""completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"#
            )
        );
    }

    #[test]
    fn a_chunk_has_vllms_keys_in_vllms_order() {
        let head = AnswerHead {
            id: "cmpl-1",
            created: 7,
            model: "m",
            system_fingerprint: "f",
        };
        let choice = CompletionChunkChoice {
            index: 0,
            text: "a",
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            prompt_token_ids: None,
            token_ids: Some(&[4]),
        };
        let mut buffer = Vec::new();
        crate::sse::write_event(
            &mut buffer,
            &CompletionChunk::new(head, &[choice], None, None),
        );
        assert_eq!(
            String::from_utf8(buffer).unwrap(),
            concat!(
                r#"data: {"id":"cmpl-1","object":"text_completion","created":7,"model":"m","choices":[{"index":0,"text":"a","#,
                r#""logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":[4]}]}"#,
                "\n\n"
            )
        );
    }
}
