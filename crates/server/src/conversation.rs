//! A conversation on its way into the chat template.

use baton_openai::{ApiError, ChatFields, Content, ContentPart, Message};
use baton_text::{ChatTemplate, Conversation, TemplateError};

use crate::{clock, rejection};

/// The role that answers.
const ASSISTANT: &str = "assistant";

/// The assistant's last turn, if the answer is to begin with it.
pub(crate) fn echoed_turn(fields: &ChatFields) -> Option<String> {
    let last = fields
        .messages
        .last()
        .filter(|last| fields.echo && last.role == ASSISTANT)?;
    text_of(last).filter(|text| !text.is_empty())
}

/// The text for the model.
pub(crate) fn render(
    conversation: &Conversation,
    template: Option<&ChatTemplate>,
) -> Result<String, ApiError> {
    let template = template.ok_or_else(|| {
        ApiError::bad_request("this model has no chat template; use /v1/completions instead")
    })?;
    let today = baton_text::day(clock::unix_seconds());
    let rendered = template.render(&conversation.input(&today));
    rendered.map_err(|e| refused(&e))
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

    fn rendered_with(template: &str, fields: &str) -> Result<String, ApiError> {
        let template = ChatTemplate::new(template, "", "").unwrap();
        render(&conversation(fields)?, Some(&template))
    }

    fn rendered(fields: &str) -> Result<String, ApiError> {
        rendered_with(TEMPLATE, fields)
    }

    #[test]
    fn parts_are_lines_and_unknown_roles_are_left_to_the_template() {
        let text = rendered(
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
        let text = rendered_with(
            parts,
            r#""messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
            {"role":"assistant","content":null,"tool_calls":[]}]"#,
        );
        assert_eq!(text.unwrap(), "[text a][text b]<assistant>");
    }

    #[test]
    fn the_final_message_can_be_left_open() {
        let messages = r#""messages":[{"role":"user","content":"Hello"},{"role":"assistant","content":"Hello "}]"#;
        let text = rendered(&format!(r#"{messages},"continue_final_message":true"#));
        assert_eq!(text.unwrap(), "<user>Hello</><assistant>Hello ");
        let text = rendered(&format!(r#"{messages},"add_generation_prompt":false"#));
        assert_eq!(text.unwrap(), "<user>Hello</><assistant>Hello </>");
        let both = rendered(&format!(
            r#"{messages},"continue_final_message":true,"add_generation_prompt":true"#
        ));
        assert!(both.is_err());
    }

    #[test]
    fn what_the_template_refuses_or_fails_on_is_the_clients() {
        let messages = r#""messages":[{"role":"user","content":"x"}]"#;
        let refused = rendered_with("{{ raise_exception('no ' ~ messages[0].role) }}", messages);
        assert_eq!(refused.unwrap_err(), ApiError::bad_request("no user"));
        let failed = rendered_with("{{ messages[0].content + 1 }}", messages).unwrap_err();
        assert_eq!(failed.kind, ErrorKind::BadRequest);
        assert!(failed.message.starts_with("chat template failed: "));
        let broken = super::refused(&TemplateError::Broken("secret".to_owned()));
        assert_eq!(broken, rejection::internal());
    }

    #[test]
    fn pictures_and_silence_are_refused() {
        assert!(rendered(r#""messages":[]"#).is_err());
        let error = rendered(r#""messages":[{"role":"user","content":[{"type":"image_url"}]}]"#)
            .unwrap_err();
        assert_eq!(error.message, "m is not a multimodal model");
    }
}
