//! A chat request's conversation in the form that templates know. Whoever renders one gets the same prompt: the server
//! that answers, and the picker that looks for the server which has it cached.

use crate::{ChatInput, Ending};
use baton_openai::{ApiError, ChatFields, Content, ContentPart, Message};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

/// A conversation in the form that templates know.
#[derive(Debug)]
pub struct Conversation {
    messages: Value,
    tools: Value,
    kwargs: Value,
    ending: Ending,
}

impl Conversation {
    /// The conversation of a chat request to the model of this name.
    ///
    /// # Errors
    /// For the client: flags that exclude each other, messages that are no text.
    pub fn of_request(fields: &ChatFields, model: &str) -> Result<Self, ApiError> {
        let ending = Ending::of_flags(fields.add_generation_prompt, fields.continue_final_message)?;
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
    ///
    /// # Errors
    /// For the client: no messages, or some that are no text.
    pub fn new(messages: &[Message], ending: Ending, model: &str) -> Result<Self, ApiError> {
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
    #[must_use]
    pub fn text_len(&self) -> usize {
        [&self.messages, &self.tools, &self.kwargs]
            .map(text_len)
            .iter()
            .sum()
    }

    /// What a template renders; `today` as [`crate::day`] has it.
    #[must_use]
    pub fn input<'a>(&'a self, today: &'a str) -> ChatInput<'a> {
        ChatInput {
            messages: &self.messages,
            tools: &self.tools,
            ending: self.ending,
            kwargs: &self.kwargs,
            today,
        }
    }
}

impl Ending {
    /// What the two flags of a request mean together.
    ///
    /// # Errors
    /// For the client, if they exclude each other.
    pub fn of_flags(
        add_generation_prompt: Option<bool>,
        continue_final_message: bool,
    ) -> Result<Self, ApiError> {
        match (add_generation_prompt, continue_final_message) {
            (Some(true), true) => Err(ApiError::bad_request(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            )),
            (_, true) => Ok(Self::WithinLastMessage),
            (Some(false), false) => Ok(Self::AfterLastMessage),
            (_, false) => Ok(Self::GenerationPrompt),
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

    fn conversation(fields: &str) -> Result<Conversation, ApiError> {
        let body = format!("{{{fields}}}");
        let request = ChatCompletionRequest::from_slice(body.as_bytes()).unwrap();
        Conversation::of_request(&request.fields, "m")
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
}
