//! What vLLM can do and we cannot (yet): refused by name when it would change the answer, let pass when neutral.

use baton_openai::{ApiError, ChatFields, CompletionFields, SamplingFields};
use serde::Deserialize;
use serde_json::value::RawValue;

/// Checks the fields that both endpoints have.
pub(crate) fn unsupported(fields: &SamplingFields) -> Result<(), ApiError> {
    if fields.stream && fields.prompt_logprobs.is_some() {
        let message = "`prompt_logprobs` are not available when `stream=True`.";
        return Err(ApiError::bad_param("prompt_logprobs", message));
    }
    response_format(fields.response_format.as_deref())?;
    let differs = |value: Option<f64>, neutral| value.is_some_and(|value| value != neutral);
    first_asked(&[
        ("presence_penalty", differs(fields.presence_penalty, 0.0)),
        ("frequency_penalty", differs(fields.frequency_penalty, 0.0)),
        (
            "repetition_penalty",
            differs(fields.repetition_penalty, 1.0),
        ),
        ("logit_bias", is_meant(fields.logit_bias.as_deref())),
        (
            "allowed_token_ids",
            is_meant(fields.allowed_token_ids.as_deref()),
        ),
        ("bad_words", is_meant(fields.bad_words.as_deref())),
        (
            "structured_outputs",
            is_meant(fields.structured_outputs.as_deref()),
        ),
        ("prompt_logprobs", fields.prompt_logprobs.is_some()),
        ("use_beam_search", fields.use_beam_search),
        // Whoever sends a salt relies on caches being separate; ignoring it would betray that.
        (
            "cache_salt",
            fields
                .cache_salt
                .as_deref()
                .is_some_and(|salt| !salt.is_empty()),
        ),
    ])
}

/// Checks the fields that only completions have.
pub(crate) fn unsupported_in_completion(fields: &CompletionFields) -> Result<(), ApiError> {
    first_asked(&[
        (
            "suffix",
            fields
                .suffix
                .as_deref()
                .is_some_and(|suffix| !suffix.is_empty()),
        ),
        ("prompt_embeds", is_meant(fields.prompt_embeds.as_deref())),
    ])
}

/// Checks the fields that only chat has.
pub(crate) fn unsupported_in_chat(fields: &ChatFields) -> Result<(), ApiError> {
    first_asked(&[
        ("chat_template", fields.chat_template.is_some()),
        ("documents", is_meant(fields.documents.as_deref())),
    ])?;
    tools(fields.tools.as_deref(), fields.tool_choice.as_deref())
}

/// Refuses the first of these fields that is asked for.
fn first_asked(fields: &[(&str, bool)]) -> Result<(), ApiError> {
    match fields.iter().find(|(_, is_asked)| *is_asked) {
        Some((name, _)) => Err(refused(name)),
        None => Ok(()),
    }
}

fn refused(name: &str) -> ApiError {
    ApiError::bad_param(
        name,
        format_args!("`{name}` is not supported by this server"),
    )
}

/// Whether a value is something else than null or empty.
pub(crate) fn is_meant(value: Option<&RawValue>) -> bool {
    let is_empty = |raw: &RawValue| {
        let mut text = raw.get().bytes().filter(|b| !b.is_ascii_whitespace());
        let head = [text.next(), text.next(), text.next()];
        matches!(
            head,
            [Some(b'['), Some(b']'), None] | [Some(b'{'), Some(b'}'), None]
        ) || raw.get() == "null"
    };
    value.is_some_and(|raw| !is_empty(raw))
}

fn response_format(value: Option<&RawValue>) -> Result<(), ApiError> {
    #[derive(Deserialize)]
    struct Format {
        #[serde(rename = "type")]
        kind: String,
    }
    let Some(value) = value else { return Ok(()) };
    let place = "body.response_format.type".to_owned();
    let Ok(Format { kind }) = serde_json::from_str(value.get()) else {
        return Err(ApiError::validation(place, "field required"));
    };
    match kind.as_str() {
        "text" => Ok(()),
        "json_object" | "json_schema" | "structural_tag" => Err(refused("response_format")),
        _ => Err(ApiError::validation(
            place,
            "input should be 'text', 'json_object', 'json_schema' or 'structural_tag'",
        )),
    }
}

/// Tools are refused as vLLM refuses them without a tool-call parser.
fn tools(tools: Option<&RawValue>, choice: Option<&RawValue>) -> Result<(), ApiError> {
    let choice = choice.map(RawValue::get).filter(|text| *text != "null");
    match (is_meant(tools), choice) {
        (_, Some(r#""none""#)) | (false, None) => Ok(()),
        (false, Some(_)) => Err(ApiError::bad_param(
            "tool_choice",
            "When using `tool_choice`, `tools` must be set.",
        )),
        (true, Some(choice)) if names_unknown_tool(tools, choice) => Err(ApiError::bad_param(
            "tool_choice",
            "The tool specified in `tool_choice` does not match any of the specified `tools`",
        )),
        (true, _) => Err(ApiError::bad_request(
            "`tools` are not supported by this server unless `tool_choice` is \"none\"",
        )),
    }
}

fn names_unknown_tool(tools: Option<&RawValue>, choice: &str) -> bool {
    #[derive(Deserialize)]
    struct Function {
        name: String,
    }
    #[derive(Deserialize)]
    struct Tool {
        function: Function,
    }
    let Ok(wanted) = serde_json::from_str::<Tool>(choice) else {
        return false;
    };
    let known: Vec<Tool> = tools
        .and_then(|raw| serde_json::from_str(raw.get()).ok())
        .unwrap_or_default();
    known
        .iter()
        .all(|tool| tool.function.name != wanted.function.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_openai::{ChatCompletionRequest, CompletionRequest};

    fn completion(field: &str) -> Option<String> {
        let body = format!(r#"{{"prompt":"x",{field}}}"#);
        let request = CompletionRequest::from_slice(body.as_bytes()).unwrap();
        let checked = unsupported(&request.sampling)
            .and_then(|()| unsupported_in_completion(&request.fields));
        checked.err().map(|e| e.param.unwrap_or_default())
    }

    fn chat(field: &str) -> Option<String> {
        let body = format!(r#"{{"messages":[],{field}}}"#);
        let request = ChatCompletionRequest::from_slice(body.as_bytes()).unwrap();
        let checked =
            unsupported(&request.sampling).and_then(|()| unsupported_in_chat(&request.fields));
        checked.err().map(|e| e.param.unwrap_or_default())
    }

    #[test]
    fn what_would_change_the_answer_is_refused_by_name() {
        for field in [
            r#""presence_penalty":0.5"#,
            r#""frequency_penalty":-1"#,
            r#""repetition_penalty":1.1"#,
            r#""logit_bias":{"5":1}"#,
            r#""allowed_token_ids":[1]"#,
            r#""bad_words":["x"]"#,
            r#""structured_outputs":{"regex":"a"}"#,
            r#""response_format":{"type":"json_object"}"#,
            r#""prompt_logprobs":0"#,
            r#""use_beam_search":true"#,
            r#""cache_salt":"s""#,
            r#""suffix":"x""#,
            r#""prompt_embeds":"x""#,
        ] {
            let name = field.split('"').nth(1).unwrap();
            assert_eq!(completion(field).as_deref(), Some(name), "{field}");
        }
        for field in [r#""chat_template":"x""#, r#""documents":[{}]"#] {
            let name = field.split('"').nth(1).unwrap();
            assert_eq!(chat(field).as_deref(), Some(name), "{field}");
        }
    }

    #[test]
    fn neutral_values_pass() {
        let neutral = r#""presence_penalty":0,"frequency_penalty":0.0,"repetition_penalty":1,"logit_bias":{},
            "allowed_token_ids":[ ],"bad_words":null,"structured_outputs":{ },"response_format":{"type":"text"},
            "prompt_logprobs":null,"use_beam_search":false,"cache_salt":"","suffix":"","best_of":4,"user":"u""#;
        assert_eq!(completion(neutral), None);
        assert_eq!(
            chat(r#""tools":[],"tool_choice":"none","documents":null"#),
            None
        );
    }

    #[test]
    fn tools_are_refused_as_vllm_refuses_them() {
        let tools = r#""tools":[{"type":"function","function":{"name":"f"}}]"#;
        assert_eq!(chat(tools).as_deref(), Some(""));
        assert_eq!(chat(&format!(r#"{tools},"tool_choice":"none""#)), None);
        assert_eq!(
            chat(r#""tool_choice":"auto""#).as_deref(),
            Some("tool_choice")
        );
        let named = |name: &str| {
            format!(r#"{tools},"tool_choice":{{"type":"function","function":{{"name":"{name}"}}}}"#)
        };
        assert_eq!(chat(&named("g")).as_deref(), Some("tool_choice"));
        assert_eq!(chat(&named("f")).as_deref(), Some(""));
    }
}
