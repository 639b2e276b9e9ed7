//! A conversation on its way into the chat template.

use baton_openai::{ApiError, ChatFields, Content, ContentPart, Message};
use baton_text::{ChatInput, ChatTemplate, Ending, TemplateError};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::clock;

/// The role that answers.
const ASSISTANT: &str = "assistant";

/// How a rendered conversation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Close {
    /// As the template ends it.
    Template(Ending),
    /// Right after the last message's text, which is to be continued.
    Open,
}

/// What the two flags of a request mean together.
pub(crate) fn ending(
    add_generation_prompt: Option<bool>,
    continue_final_message: bool,
) -> Result<Close, ApiError> {
    match (add_generation_prompt, continue_final_message) {
        (Some(true), true) => Err(ApiError::bad_request(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
        )),
        (_, true) => Ok(Close::Open),
        (Some(false), false) => Ok(Close::Template(Ending::AfterLastMessage)),
        (_, false) => Ok(Close::Template(Ending::GenerationPrompt)),
    }
}

/// The assistant's last turn, if the answer is to begin with it.
pub(crate) fn echoed_turn(fields: &ChatFields) -> Option<String> {
    let last = fields
        .messages
        .last()
        .filter(|last| fields.echo && last.role == ASSISTANT)?;
    text_of(last, "").ok().filter(|text| !text.is_empty())
}

/// A conversation in the form that templates know.
#[derive(Debug)]
pub(crate) struct Conversation {
    messages: Value,
    tools: Value,
    kwargs: Value,
    close: Close,
    last_text: String,
}

impl Conversation {
    /// The conversation of a chat request to the model of this name.
    pub(crate) fn of_request(fields: &ChatFields, model: &str) -> Result<Self, ApiError> {
        let close = ending(fields.add_generation_prompt, fields.continue_final_message)?;
        Ok(Self {
            // Tools come this far only if none may be called; templates may mention them all the same.
            tools: object("tools", fields.tools.as_deref())?,
            kwargs: object(
                "chat_template_kwargs",
                fields.chat_template_kwargs.as_deref(),
            )?,
            ..Self::new(&fields.messages, close, model)?
        })
    }

    /// Messages without tools.
    pub(crate) fn new(messages: &[Message], close: Close, model: &str) -> Result<Self, ApiError> {
        if messages.is_empty() {
            return Err(ApiError::bad_request(
                "Cannot apply chat template to an empty conversation. Provide at least one message.",
            ));
        }
        let last_text = messages
            .last()
            .map_or(Ok(String::new()), |last| text_of(last, model))?;
        let messages = messages.iter().map(|message| message_value(message, model));
        Ok(Self {
            messages: Value::Array(messages.collect::<Result<_, _>>()?),
            tools: Value::Null,
            kwargs: Value::Null,
            close,
            last_text,
        })
    }

    /// About how much there is to render, in bytes.
    pub(crate) fn text_len(&self) -> usize {
        let messages = self.messages.as_array().map_or(&[][..], Vec::as_slice);
        let texts = messages
            .iter()
            .filter_map(|message| message.get("content")?.as_str());
        texts.map(str::len).sum()
    }

    /// The text for the model.
    pub(crate) fn render(&self, template: Option<&ChatTemplate>) -> Result<String, ApiError> {
        let template = template.ok_or_else(|| {
            ApiError::bad_request("this model has no chat template; use /v1/completions instead")
        })?;
        let ending = match self.close {
            Close::Template(ending) => ending,
            Close::Open => Ending::AfterLastMessage,
        };
        let input = ChatInput {
            messages: &self.messages,
            tools: &self.tools,
            ending,
            kwargs: &self.kwargs,
            today: &clock::day(clock::unix_seconds()),
        };
        let text = template.render(&input).map_err(|e| refused(&e))?;
        if self.close == Close::Open {
            self.cut(text)
        } else {
            Ok(text)
        }
    }

    /// Cuts what the template puts after the last message.
    fn cut(&self, mut text: String) -> Result<String, ApiError> {
        let last = self.last_text.trim();
        let at = text.rfind(last).ok_or_else(|| {
            ApiError::bad_request(
                "the chat template changes the final message, so it cannot be continued",
            )
        })?;
        text.truncate(at + last.len());
        Ok(text)
    }
}

fn refused(error: &TemplateError) -> ApiError {
    ApiError::bad_request(error.to_string())
}

fn message_value(message: &Message, model: &str) -> Result<Value, ApiError> {
    let mut object = Map::new();
    object.insert("role".into(), message.role.as_str().into());
    object.insert("content".into(), text_of(message, model)?.into());
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

/// A message's text; several parts are lines.
fn text_of(message: &Message, model: &str) -> Result<String, ApiError> {
    let parts = match &message.content {
        None => return Ok(String::new()),
        Some(Content::Text(text)) => return Ok(text.clone()),
        Some(Content::Parts(parts)) => parts,
    };
    let texts = parts.iter().map(|part| match part {
        ContentPart::Text(text) => Ok(text.as_str()),
        ContentPart::Other(_) => Err(ApiError::bad_request(format!(
            "{model} is not a multimodal model"
        ))),
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
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
    use baton_openai::ChatCompletionRequest;

    const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}{{ extra }}";

    fn render(fields: &str) -> Result<String, ApiError> {
        let body = format!("{{{fields}}}");
        let request = ChatCompletionRequest::from_slice(body.as_bytes()).unwrap();
        let template = ChatTemplate::new(TEMPLATE, "", "").unwrap();
        Conversation::of_request(&request.fields, "m")?.render(Some(&template))
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
    fn the_final_message_can_be_left_open() {
        let messages = r#""messages":[{"role":"user","content":"Hello"},{"role":"assistant","content":"Hello "}]"#;
        let text = render(&format!(r#"{messages},"continue_final_message":true"#));
        assert_eq!(text.unwrap(), "<user>Hello</><assistant>Hello");
        let text = render(&format!(r#"{messages},"add_generation_prompt":false"#));
        assert_eq!(text.unwrap(), "<user>Hello</><assistant>Hello </>");
        let both = render(&format!(
            r#"{messages},"continue_final_message":true,"add_generation_prompt":true"#
        ));
        assert!(both.is_err());
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
