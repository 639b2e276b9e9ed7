//! Chat templates: Jinja as Hugging Face renders it.
//!
//! A rendering is bounded in steps, in depth and in what it writes, so that no template holds a thread forever. Templates
//! come with a model and are trusted as much: one that doubles a string in a loop still takes memory.

mod content;
mod python;
mod value;

pub use content::ContentFormat;

use minijinja::{Environment, Template, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use python::{Day, Raised};
use std::error::Error as _;
use std::io;

/// Instructions that one rendering may take; a long conversation takes some ten thousand.
const FUEL: u64 = 20_000_000;
/// Calls within calls. Each takes stack, of which threads have two megabytes.
const MAX_DEPTH: usize = 100;
/// Bytes that one rendering may write.
const MAX_OUTPUT: usize = 64 << 20;
const NAME: &str = "chat";

/// A model's chat template, parsed.
pub struct ChatTemplate {
    env: Environment<'static>,
    bos_token: String,
    eos_token: String,
    content_format: ContentFormat,
}

/// What a template renders.
#[derive(Clone, Debug)]
pub struct ChatInput<'a> {
    /// The conversation, as the request has it. A content is a string, null or a list of parts; where the template reads
    /// strings only, text parts become lines.
    pub messages: &'a serde_json::Value,
    /// Tools, as the request has them; null for none.
    pub tools: &'a serde_json::Value,
    /// How the prompt ends.
    pub ending: Ending,
    /// Further variables (`chat_template_kwargs`), an object or null. They win over the special tokens, not over the
    /// fields above.
    pub kwargs: &'a serde_json::Value,
    /// Today for `strftime_now`, as `26 Nov 2025` or `2025-11-26`; the caller knows the time.
    pub today: &'a str,
}

/// How a rendered prompt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With the beginning of an answer.
    GenerationPrompt,
    /// After the last message.
    AfterLastMessage,
    /// Within the last message, right after its text (`continue_final_message`).
    WithinLastMessage,
}

/// Why nothing was rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template does not parse.
    #[error("chat template: {0}")]
    Broken(String),
    /// The template refused the conversation by `raise_exception`, or cannot take it; the client should know.
    #[error("{0}")]
    Refused(String),
    /// It failed while rendering this conversation.
    #[error("chat template failed: {0}")]
    Failed(String),
}

impl ChatTemplate {
    /// Parses a template and tries what forms of content it reads. The tokens are what `bos_token` and `eos_token` stand
    /// for in it; empty if the model has none.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TemplateError> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(MAX_DEPTH);
        env.set_unknown_method_callback(unknown_method_callback);
        env.set_formatter(value::print);
        env.add_function("raise_exception", python::raise_exception);
        env.add_filter("tojson", python::to_json);
        env.add_test("iterable", python::is_iterable);
        env.add_test("sequence", python::is_sequence);
        env.add_template_owned(NAME, python::without_generation_tags(source))
            .map_err(|e| TemplateError::Broken(describe(&e)))?;
        let mut template = Self {
            env,
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
            content_format: ContentFormat::Both,
        };
        template.content_format =
            ContentFormat::detect(|messages| template.render(&probe(messages)));
        Ok(template)
    }

    /// What forms of content the template reads. [`ChatTemplate::render`] takes all of them.
    pub fn content_format(&self) -> ContentFormat {
        self.content_format
    }

    /// The prompt of a conversation.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, TemplateError> {
        let messages = self.content_format.shape(input.messages)?;
        if input.ending == Ending::WithinLastMessage {
            let marked = content::marked(&messages)?;
            return content::cut_at_mark(self.fill(&marked, input)?);
        }
        self.fill(&messages, input)
    }

    fn fill(
        &self,
        messages: &serde_json::Value,
        input: &ChatInput<'_>,
    ) -> Result<String, TemplateError> {
        let template = self
            .env
            .get_template(NAME)
            .map_err(|e| TemplateError::Broken(describe(&e)))?;
        let today = input.today.to_owned();
        let strftime_now = move |format: &str| match Day::parse(&today) {
            Some(day) => day.format(format),
            None => today.clone(),
        };
        let tokens = context! {
            documents => (),
            bos_token => self.bos_token,
            eos_token => self.eos_token,
            strftime_now => Value::from_function(strftime_now),
        };
        let kwargs = if input.kwargs.is_object() {
            value::of_json(input.kwargs)
        } else {
            context! {}
        };
        let own = context! {
            messages => value::of_json(messages),
            tools => value::of_json(input.tools),
            add_generation_prompt => input.ending == Ending::GenerationPrompt,
        };
        write(&template, context! { ..own, ..kwargs, ..tokens }).map_err(|error| failure(&error))
    }
}

/// One message and nothing else.
fn probe(messages: &serde_json::Value) -> ChatInput<'_> {
    ChatInput {
        messages,
        tools: &serde_json::Value::Null,
        ending: Ending::GenerationPrompt,
        kwargs: &serde_json::Value::Null,
        today: "26 Nov 2025",
    }
}

fn write(template: &Template<'_, '_>, variables: Value) -> Result<String, minijinja::Error> {
    let mut out = Bounded(Vec::new());
    template.render_captured_to(variables, &mut out)?;
    // The renderer writes nothing but strings.
    Ok(String::from_utf8(out.0).unwrap_or_default())
}

/// Takes at most [`MAX_OUTPUT`] bytes.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_OUTPUT - self.0.len() {
            return Err(io::Error::other("the prompt grew too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn failure(error: &minijinja::Error) -> TemplateError {
    // In a macro, the error lies within others.
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return TemplateError::Refused(message.clone());
        }
        cause = inner.source();
    }
    TemplateError::Failed(describe(error))
}

/// One line: what, where and why.
fn describe(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    if let Some(cause) = error.source() {
        text = format!("{text}: {cause}");
    }
    text.replace('\n', " ")
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
            kwargs: &json!({"shout": true, "bos_token": "chosen", "messages": []}),
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
    fn pythons_methods_and_values_work() {
        let source = "{{ messages[0].content.strip().upper() }} {{ messages[0] | tojson }} {{ bos_token }} {{ shout }} \
            {{ strftime_now('%d %b %Y') }}{% for k, v in messages[0].items() %} {{ k }}{% endfor %} {{ none }} {{ eos_token }}";
        let out = render(source, &json!([{"role": "ü<", "content": " a "}])).unwrap();
        let message = r#"{"role": "ü<", "content": " a "}"#;
        assert_eq!(
            out,
            format!("A {message} chosen True 26 Nov 2025 role content None </s>")
        );
    }

    #[test]
    fn json_is_laid_out_as_python_lays_it_out() {
        let messages = json!([{"b": [1, {"c": []}, 1e20], "a": "é😀\n"}]);
        for (arguments, expected) in [
            ("", r#"{"b": [1, {"c": []}, 1e+20], "a": "é😀\n"}"#),
            (
                "ensure_ascii=true",
                r#"{"b": [1, {"c": []}, 1e+20], "a": "\u00e9\ud83d\ude00\n"}"#,
            ),
            (
                "sort_keys=true, separators=(',', ':')",
                r#"{"a":"é😀\n","b":[1,{"c":[]},1e+20]}"#,
            ),
            (
                "indent=2",
                "{\n  \"b\": [\n    1,\n    {\n      \"c\": []\n    },\n    1e+20\n  ],\n  \"a\": \"é😀\\n\"\n}",
            ),
        ] {
            let out = render(
                &format!("{{{{ messages[0] | tojson({arguments}) }}}}"),
                &messages,
            );
            assert_eq!(out.unwrap(), expected);
        }
    }

    #[test]
    fn contents_take_the_form_that_the_template_reads() {
        let strings = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}";
        let parts =
            "{% for m in messages %}{% for c in m.content %}[{{ c.text }}]{% endfor %}{% endfor %}";
        let both = "{% for m in messages %}{% if m.content is string %}[{{ m.content }}]{% else %}\
            {% for c in m.content %}[{{ c['text'] }}]{% endfor %}{% endif %}{% endfor %}";
        let messages = json!([{"content": "a"}, {"content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
            {"content": null, "role": "assistant"}]);
        for (source, format, expected) in [
            (strings, ContentFormat::Strings, "[a][b\nc][]"),
            (parts, ContentFormat::Parts, "[a][b][c]"),
            (both, ContentFormat::Both, "[a][b][c]"),
        ] {
            let template = ChatTemplate::new(source, "", "").unwrap();
            assert_eq!(template.content_format(), format);
            let out = template
                .render(&probe(&messages))
                .unwrap_or_else(|e| e.to_string());
            assert_eq!(out.replace("None", ""), expected);
        }
        let image = json!([{"content": [{"type": "image_url", "image_url": {}}]}]);
        assert!(matches!(
            render(strings, &image),
            Err(TemplateError::Refused(_))
        ));
    }

    #[test]
    fn the_last_message_can_be_left_open() {
        let open = |source: &str, content: serde_json::Value| {
            let messages = json!([{"role": "user", "content": "x y"}, {"role": "assistant", "content": content}]);
            let template = ChatTemplate::new(source, "", "")?;
            template.render(&ChatInput {
                ending: Ending::WithinLastMessage,
                ..probe(&messages)
            })
        };
        let kept = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}";
        assert_eq!(open(kept, json!(" x ")).unwrap(), "<x y>< x ");
        assert_eq!(
            open(kept, json!([{"type": "text", "text": "x"}])).unwrap(),
            "<x y><x"
        );
        let trimmed = "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}";
        assert_eq!(open(trimmed, json!(" x ")).unwrap(), "<x y><x");
        let dropped = "{% for m in messages[:1] %}<{{ m.content }}>{% endfor %}";
        assert!(matches!(
            open(dropped, json!("x")),
            Err(TemplateError::Refused(_))
        ));
        assert!(matches!(
            open(kept, json!(null)),
            Err(TemplateError::Refused(_))
        ));
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
    fn a_refusal_within_macros_is_one() {
        let source = "{% macro f() %}{% if messages[0].content != 'ok' %}{{ raise_exception('no: ' ~ 1) }}{% endif %}{% endmacro %}\
            {% macro g() %}{{ f() }}{% endmacro %}{% set x = g() %}{{ x }}";
        let refused = render(source, &json!([{"content": "?"}]));
        assert!(
            matches!(&refused, Err(TemplateError::Refused(m)) if m == "no: 1"),
            "{refused:?}"
        );
    }

    #[test]
    fn an_endless_template_is_stopped() {
        for source in [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}",
            "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
            "{% for a in range(9999) %}{{ 'a' * 99999 }}{% endfor %}",
        ] {
            let out = render(source, &json!([]));
            assert!(matches!(out, Err(TemplateError::Failed(_))), "{source}");
        }
    }

    #[test]
    fn a_template_nested_without_end_does_not_parse() {
        for source in [
            "(".repeat(100_000),
            "{% if a %}".repeat(100_000),
            "[".repeat(100_000),
        ] {
            let out = render(&format!("{{{{ {source} }}}}"), &json!([]));
            assert!(matches!(out, Err(TemplateError::Broken(_))));
        }
        let blocks = "{% if true %}".repeat(100_000);
        assert!(matches!(
            render(&blocks, &json!([])),
            Err(TemplateError::Broken(_))
        ));
    }
}
