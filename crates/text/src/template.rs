//! Chat templates: Jinja as Hugging Face renders it, bounded in steps.

use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::ser::Formatter;

/// Instructions that one rendering may take; a long conversation takes some ten thousand.
const FUEL: u64 = 20_000_000;
/// Said by `raise_exception`, to tell the template's own refusal from a broken template.
const RAISED: &str = "raised by the chat template: ";
const NAME: &str = "chat";

/// A model's chat template, parsed.
pub struct ChatTemplate {
    env: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// What a template renders.
#[derive(Clone, Debug)]
pub struct ChatInput<'a> {
    /// The conversation, as the request has it.
    pub messages: &'a serde_json::Value,
    /// Tools, as the request has them; null for none.
    pub tools: &'a serde_json::Value,
    /// How the prompt ends.
    pub ending: Ending,
    /// Further variables (`chat_template_kwargs`), an object or null.
    pub kwargs: &'a serde_json::Value,
    /// Today, as `strftime_now` would print it by default (`26 Nov 2025`); the caller knows the time.
    pub today: &'a str,
}

/// How a rendered prompt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With the beginning of an answer.
    GenerationPrompt,
    /// After the last message.
    AfterLastMessage,
}

/// Why nothing was rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template does not parse.
    #[error("chat template: {0}")]
    Broken(String),
    /// The template refused the conversation by `raise_exception`; the client should know.
    #[error("{0}")]
    Refused(String),
    /// It failed while rendering this conversation.
    #[error("chat template failed: {0}")]
    Failed(String),
}

impl ChatTemplate {
    /// Parses a template. The tokens are what `bos_token` and `eos_token` stand for in it; empty if the model has none.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TemplateError> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_fuel(Some(FUEL));
        env.set_unknown_method_callback(unknown_method_callback);
        env.add_function("raise_exception", raise_exception);
        env.add_filter("tojson", to_json);
        env.add_template_owned(NAME, source.to_owned())
            .map_err(|e| TemplateError::Broken(describe(&e)))?;
        Ok(Self {
            env,
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        })
    }

    /// The prompt of a conversation.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, TemplateError> {
        let template = self
            .env
            .get_template(NAME)
            .map_err(|e| TemplateError::Broken(describe(&e)))?;
        let today = input.today.to_owned();
        let strftime_now = Value::from_function(move |_format: String| today.clone());
        let tools = if input.tools.is_null() {
            Value::from(())
        } else {
            Value::from_serialize(input.tools)
        };
        let own = context! {
            messages => Value::from_serialize(input.messages),
            tools => tools,
            documents => (),
            add_generation_prompt => input.ending == Ending::GenerationPrompt,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
            strftime_now => strftime_now,
        };
        let kwargs = if input.kwargs.is_object() {
            Value::from_serialize(input.kwargs)
        } else {
            context! {}
        };
        // The template's own variables win over the request's.
        template
            .render(context! { ..own, ..kwargs })
            .map_err(|error| failure(&error))
    }
}

fn failure(error: &minijinja::Error) -> TemplateError {
    match error
        .detail()
        .and_then(|detail| detail.strip_prefix(RAISED))
    {
        Some(message) => TemplateError::Refused(message.to_owned()),
        None => TemplateError::Failed(describe(error)),
    }
}

/// One line: what and where.
fn describe(error: &minijinja::Error) -> String {
    let place = error
        .line()
        .map(|line| format!(" (line {line})"))
        .unwrap_or_default();
    format!("{error}{place}").replace('\n', " ")
}

fn raise_exception(message: &str) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(
        ErrorKind::InvalidOperation,
        format!("{RAISED}{message}"),
    ))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands filters their keyword arguments by value"
)]
fn to_json(value: &Value, kwargs: minijinja::value::Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    kwargs.assert_all_used()?;
    let bad =
        |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut out = Vec::new();
    match indent {
        None => value
            .serialize(&mut serde_json::Serializer::with_formatter(
                &mut out,
                PythonSpacing,
            ))
            .map_err(bad)?,
        Some(n) => {
            let spaces = vec![b' '; n.min(16)];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value
                .serialize(&mut serde_json::Serializer::with_formatter(
                    &mut out, pretty,
                ))
                .map_err(bad)?;
        }
    }
    Ok(Value::from_safe_string(
        String::from_utf8_lossy(&out).into_owned(),
    ))
}

/// `", "` between items and `": "` after keys.
struct PythonSpacing;

impl Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &serde_json::Value) -> Result<String, TemplateError> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(&ChatInput {
            messages,
            tools: &serde_json::Value::Null,
            ending: Ending::GenerationPrompt,
            kwargs: &json!({"shout": true, "bos_token": "ignored"}),
            today: "26 Nov 2025",
        })
    }

    #[test]
    fn chatml_renders_as_hugging_face_does() {
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
            {{ '<|im_start|>system\nYou are X<|im_end|>\n' }}{% endif %}\
            {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
            {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let out = render(
            source,
            &json!([{"role": "user", "content": "a <b> & \"c\""}]),
        )
        .unwrap();
        assert_eq!(
            out,
            "<|im_start|>system\nYou are X<|im_end|>\n<|im_start|>user\na <b> & \"c\"<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn blocks_take_their_line_with_them() {
        let source = "{%- for m in messages %}\n    {% if true %}\n{{ m.content | trim }}\n    {% endif %}\n{% endfor %}end";
        assert_eq!(
            render(source, &json!([{"content": " x "}, {"content": "y"}])).unwrap(),
            "x\ny\nend"
        );
    }

    #[test]
    fn pythons_methods_and_json_work() {
        let source = "{{ messages[0].content.strip().upper() }} {{ messages[0] | tojson }} {{ bos_token }} {{ shout }} \
            {{ strftime_now('%d %b %Y') }}{% for k, v in messages[0].items() %} {{ k }}{% endfor %}";
        let out = render(source, &json!([{"role": "ü<", "content": " a "}])).unwrap();
        assert_eq!(
            out,
            "A {\"role\": \"ü<\", \"content\": \" a \"} <s> True 26 Nov 2025 role content"
        );
    }

    #[test]
    fn a_templates_own_refusal_is_told_from_its_failure() {
        let refused = render("{{ raise_exception('roles must alternate') }}", &json!([]));
        assert!(matches!(refused, Err(TemplateError::Refused(m)) if m == "roles must alternate"));
        assert!(matches!(
            render("{{ messages[0].x.y.z }}", &json!([])),
            Err(TemplateError::Failed(_))
        ));
        assert!(matches!(
            render("{% if %}", &json!([])),
            Err(TemplateError::Broken(_))
        ));
    }

    #[test]
    fn an_endless_template_is_stopped() {
        let source = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}";
        assert!(matches!(
            render(source, &json!([])),
            Err(TemplateError::Failed(_))
        ));
    }
}
