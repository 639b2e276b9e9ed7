//! The two forms a message's content may have, a string or a list of parts, and which of them a template can read.

use crate::TemplateError;
use serde_json::{Value, json};
use std::borrow::Cow;

/// What forms of content a template reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFormat {
    /// Strings only: text parts are joined, a line each.
    Strings,
    /// Lists of parts only: a string becomes a list of one part.
    Parts,
    /// Both, each in its own form.
    Both,
}

/// Text that no template writes by itself.
const PROBE: &str = "baton0probe0text";
/// A kind of part that nobody knows; seen in the output if a template prints a list instead of reading it.
const PROBE_KEY: &str = "baton0probe0key";

impl ContentFormat {
    /// Tries both forms. A template that fails with both (it may want more than one message) is taken to read strings.
    pub(super) fn detect(render: impl Fn(&Value) -> Result<String, TemplateError>) -> Self {
        let shows = |content: Value| {
            let out = render(&json!([{"role": "user", "content": content}]));
            out.is_ok_and(|out| out.contains(PROBE) && !out.contains(PROBE_KEY))
        };
        let strings = shows(json!(PROBE));
        match shows(json!([{"type": "text", "text": PROBE, PROBE_KEY: 1}])) {
            true if strings => Self::Both,
            true => Self::Parts,
            false => Self::Strings,
        }
    }

    /// The conversation with every content in a form that the template reads.
    pub(super) fn shape(self, messages: &Value) -> Result<Cow<'_, Value>, TemplateError> {
        let list = messages.as_array().map_or(&[][..], Vec::as_slice);
        if list.iter().all(|message| self.reads(&message["content"])) {
            return Ok(Cow::Borrowed(messages));
        }
        let mut messages = messages.clone();
        for message in messages.as_array_mut().into_iter().flatten() {
            if let Some(content) = message
                .get_mut("content")
                .filter(|content| !self.reads(content))
            {
                *content = match &*content {
                    Value::Array(parts) => Value::String(joined(parts)?),
                    text => json!([{"type": "text", "text": text}]),
                };
            }
        }
        Ok(Cow::Owned(messages))
    }

    fn reads(self, content: &Value) -> bool {
        match content {
            Value::Array(_) => self != Self::Strings,
            Value::String(_) => self != Self::Parts,
            _ => true,
        }
    }
}

/// Text parts, a line each.
fn joined(parts: &[Value]) -> Result<String, TemplateError> {
    let texts = parts
        .iter()
        .map(|part| part.as_str().or_else(|| part["text"].as_str()));
    let texts: Option<Vec<&str>> = texts.collect();
    let refused =
        || TemplateError::Refused("this model's chat template reads text only".to_owned());
    Ok(texts.ok_or_else(refused)?.join("\n"))
}

/// Put after the text to be continued; the space at its end shows whether the template trims.
const MARK: &str = "baton0continue0here ";

/// The conversation with a mark after its last text.
pub(super) fn marked(messages: &Value) -> Result<Value, TemplateError> {
    let refused = || {
        TemplateError::Refused("the final message has no text that could be continued".to_owned())
    };
    let mut messages = messages.clone();
    let last = messages
        .as_array_mut()
        .and_then(|list| list.last_mut())
        .ok_or_else(refused)?;
    let text = match last.get_mut("content") {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => {
            parts
                .iter_mut()
                .rev()
                .find_map(|part| match part.get_mut("text") {
                    Some(Value::String(text)) => Some(text),
                    _ => None,
                })
        }
        _ => None,
    };
    text.ok_or_else(refused)?.push_str(MARK);
    Ok(messages)
}

/// A rendered conversation up to the mark. Where the template trims, the white space before the mark goes as well.
pub(super) fn cut_at_mark(mut rendered: String) -> Result<String, TemplateError> {
    let at = rendered.rfind(MARK.trim_end()).ok_or_else(|| {
        TemplateError::Refused(
            "the chat template changes the final message, so it cannot be continued".to_owned(),
        )
    })?;
    let is_spacing_kept = rendered[at..].starts_with(MARK);
    rendered.truncate(at);
    if !is_spacing_kept {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}
