//! A conversation on its way into the chat template.

use baton_openai::{ApiError, ChatFields, Content, ContentPart, Message};
use baton_text::{ChatInput, ChatTemplate, Ending, TemplateError};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::{clock, rejection};

/// The role that answers.
const ASSISTANT: &str = "assistant";

/// What the two flags of a request mean together.
pub(crate) fn ending(
    add_generation_prompt: Option<bool>,
    continue_final_message: bool,
) -> Result<Ending, ApiError> {
    match (add_generation_prompt, continue_final_message) {
        (Some(true), true) => Err(ApiError::bad_request(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
        )),
        (_, true) => Ok(Ending::WithinLastMessage),
        (Some(false), false) => Ok(Ending::AfterLastMessage),
        (_, false) => Ok(Ending::GenerationPrompt),
    }
}

/// The assistant's last turn, if the answer is to begin with it.
pub(crate) fn echoed_turn(fields: &ChatFields) -> Option<String> {
    let last = fields
        .messages
        .last()
        .filter(|last| fields.echo && last.role == ASSISTANT)?;
    text_of(last).filter(|text| !text.is_empty())
}

/// A conversation in the form that templates know.
#[derive(Debug)]
pub(crate) struct Conversation {
    messages: Value,
    tools: Value,
    kwargs: Value,
    ending: Ending,
}

impl Conversation {
    /// The conversation of a chat request to the model of this name.
    pub(crate) fn of_request(fields: &ChatFields, model: &str) -> Result<Self, ApiError> {
        let ending = ending(fields.add_generation_prompt, fields.continue_final_message)?;
        Ok(Self {
            // Tools come this far only if none may be called; templates may mention them all the same.
            tools: object("tools", fields.tools.as_deref())?,
            kwargs: object(
                "chat_template_kwargs",
                fields.chat_template_kwargs.as_deref(),
            )?,
            ..Self::new(&fields.messages, ending, model)?
        })
    }

    /// Messages without tools.
    pub(crate) fn new(messages: &[Message], ending: Ending, model: &str) -> Result<Self, ApiError> {
        if messages.is_empty() {
            return Err(ApiError::bad_request(
                "Cannot apply chat template to an empty conversation. Provide at least one message.",
            ));
        }
        let messages = messages.iter().map(|message| message_value(message, model));
        Ok(Self {
            messages: Value::Array(messages.collect::<Result<_, _>>()?),
            tools: Value::Null,
            kwargs: Value::Null,
            ending,
        })
    }

    /// About how much there is to render, in bytes.
    pub(crate) fn text_len(&self) -> usize {
        [&self.messages, &self.tools, &self.kwargs]
            .map(text_len)
            .iter()
            .sum()
    }

    /// The text for the model.
    pub(crate) fn render(&self, template: Option<&ChatTemplate>) -> Result<String, ApiError> {
        let template = template.ok_or_else(|| {
            ApiError::bad_request("this model has no chat template; use /v1/completions instead")
        })?;
        let input = ChatInput {
            messages: &self.messages,
            tools: &self.tools,
            ending: self.ending,
            kwargs: &self.kwargs,
            today: &clock::day(clock::unix_seconds()),
        };
        template.render(&input).map_err(|e| refused(&e))
    }
}

/// What a client hears of a failure. Templates fail by themselves only over what a conversation holds, as by adding a
/// number to a text, so that is the client's as well.
fn refused(error: &TemplateError) -> ApiError {
    match error {
        TemplateError::Refused(_) | TemplateError::Failed(_) => {
            ApiError::bad_request(error.to_string())
        }
        TemplateError::Broken(_) => {
            tracing::error!(%error, "the chat template cannot be used");
            rejection::internal()
        }
    }
}

/// Bytes of all texts within a value; other values and every list and object count as one. JSON that was read is not
/// deep.
fn text_len(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => 1 + items.iter().map(text_len).sum::<usize>(),
        Value::Object(entries) => 1 + entries.values().map(text_len).sum::<usize>(),
        _ => 1,
    }
}

fn message_value(message: &Message, model: &str) -> Result<Value, ApiError> {
    let mut object = Map::new();
    object.insert("role".into(), message.role.as_str().into());
    object.insert("content".into(), content(message, model)?);
    if let Some(name) = &message.name {
        object.insert("name".into(), name.as_str().into());
    }
    if let Some(id) = &message.tool_call_id {
        object.insert("tool_call_id".into(), id.as_str().into());
    }
    if let Some(calls) = &message.tool_calls {
        object.insert("tool_calls".into(), tool_calls(calls)?);
    }
    Ok(Value::Object(object))
}

/// A message's content as the request has it. None is the empty text, as in vLLM: many templates add contents to other
/// texts, or would print `None`.
fn content(message: &Message, model: &str) -> Result<Value, ApiError> {
    let parts = match &message.content {
        None => return Ok(Value::from("")),
        Some(Content::Text(text)) => return Ok(text.as_str().into()),
        Some(Content::Parts(parts)) => parts,
    };
    let parts = parts.iter().map(|part| match part {
        ContentPart::Text(text) => Ok(json!({"type": "text", "text": text})),
        ContentPart::Other(_) => Err(ApiError::bad_request(format!(
            "{model} is not a multimodal model"
        ))),
    });
    Ok(Value::Array(parts.collect::<Result<_, _>>()?))
}

/// A message's text; several parts are lines. Nothing if it has none, or more than text.
fn text_of(message: &Message) -> Option<String> {
    match message.content.as_ref()? {
        Content::Text(text) => Some(text.clone()),
        Content::Parts(parts) => {
            let texts = parts.iter().map(|part| match part {
                ContentPart::Text(text) => Some(text.as_str()),
                ContentPart::Other(_) => None,
            });
            Some(texts.collect::<Option<Vec<_>>>()?.join("\n"))
        }
    }
}

/// Templates want the arguments of a call as an object; the API has them as its text.
fn tool_calls(calls: &RawValue) -> Result<Value, ApiError> {
    let mut calls = object("messages.tool_calls", Some(calls))?;
    for call in calls.as_array_mut().into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else {
            continue;
        };
        let parsed = arguments
            .as_str()
            .and_then(|text| serde_json::from_str(text).ok());
        if let Some(parsed) = parsed {
            *arguments = parsed;
        }
    }
    Ok(calls)
}

fn object(name: &str, raw: Option<&RawValue>) -> Result<Value, ApiError> {
    let Some(raw) = raw else {
        return Ok(Value::Null);
    };
    serde_json::from_str(raw.get()).map_err(|e| ApiError::bad_param(name, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_openai::{ChatCompletionRequest, ErrorKind};

    const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}{{ extra }}";

    fn conversation(fields: &str) -> Result<Conversation, ApiError> {
        let body = format!("{{{fields}}}");
        let request = ChatCompletionRequest::from_slice(body.as_bytes()).unwrap();
        Conversation::of_request(&request.fields, "m")
    }

    fn render_with(template: &str, fields: &str) -> Result<String, ApiError> {
        let template = ChatTemplate::new(template, "", "").unwrap();
        conversation(fields)?.render(Some(&template))
    }

    fn render(fields: &str) -> Result<String, ApiError> {
        render_with(TEMPLATE, fields)
    }

    #[test]
    fn parts_are_lines_and_unknown_roles_are_left_to_the_template() {
        let text = render(
            r#""messages":[{"role":"king","content":"x"},{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
            {"role":"assistant"}],"chat_template_kwargs":{"extra":"!"}"#,
        );
        assert_eq!(
            text.unwrap(),
            "<king>x</><user>a\nb</><assistant></><assistant>!"
        );
    }

    #[test]
    fn parts_stay_parts_where_the_template_reads_them_and_null_is_text() {
        let parts = "{% for m in messages %}{% if m.content is string %}<{{ m.role + m.content }}>{% else %}\
            {% for part in m.content %}[{{ part.type }} {{ part.text }}]{% endfor %}{% endif %}{% endfor %}";
        let text = render_with(
            parts,
            r#""messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
            {"role":"assistant","content":null,"tool_calls":[]}]"#,
        );
        assert_eq!(text.unwrap(), "[text a][text b]<assistant>");
    }

    #[test]
    fn the_final_message_can_be_left_open() {
        let messages = r#""messages":[{"role":"user","content":"Hello"},{"role":"assistant","content":"Hello "}]"#;
        let text = render(&format!(r#"{messages},"continue_final_message":true"#));
        assert_eq!(text.unwrap(), "<user>Hello</><assistant>Hello ");
        let text = render(&format!(r#"{messages},"add_generation_prompt":false"#));
        assert_eq!(text.unwrap(), "<user>Hello</><assistant>Hello </>");
        let both = render(&format!(
            r#"{messages},"continue_final_message":true,"add_generation_prompt":true"#
        ));
        assert!(both.is_err());
    }

    #[test]
    fn what_the_template_refuses_or_fails_on_is_the_clients() {
        let messages = r#""messages":[{"role":"user","content":"x"}]"#;
        let refused = render_with("{{ raise_exception('no ' ~ messages[0].role) }}", messages);
        assert_eq!(refused.unwrap_err(), ApiError::bad_request("no user"));
        let failed = render_with("{{ messages[0].content + 1 }}", messages).unwrap_err();
        assert_eq!(failed.kind, ErrorKind::BadRequest);
        assert!(failed.message.starts_with("chat template failed: "));
        let broken = super::refused(&TemplateError::Broken("secret".to_owned()));
        assert_eq!(broken, rejection::internal());
    }

    #[test]
    fn every_text_of_a_conversation_counts_as_work() {
        let long = "x".repeat(1000);
        for fields in [
            format!(r#""messages":[{{"role":"user","content":"{long}"}}]"#),
            format!(
                r#""messages":[{{"role":"user","content":[{{"type":"text","text":"{long}"}}]}}]"#
            ),
            format!(r#""messages":[{{"role":"user"}}],"chat_template_kwargs":{{"a":["{long}"]}}"#),
        ] {
            let len = conversation(&fields).unwrap().text_len();
            assert!((1000..1050).contains(&len), "{len}: {fields}");
        }
    }

    #[test]
    fn arguments_of_calls_become_objects() {
        let raw =
            RawValue::from_string(r#"[{"function":{"name":"f","arguments":"{\"a\":1}"}}]"#.into())
                .unwrap();
        assert_eq!(
            tool_calls(&raw).unwrap().pointer("/0/function/arguments/a"),
            Some(&Value::from(1))
        );
    }

    #[test]
    fn pictures_and_silence_are_refused() {
        assert!(render(r#""messages":[]"#).is_err());
        let error =
            render(r#""messages":[{"role":"user","content":[{"type":"image_url"}]}]"#).unwrap_err();
        assert_eq!(error.message, "m is not a multimodal model");
    }
}
