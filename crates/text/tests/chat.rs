//! Rendered conversations against transformers'. The fixtures come from `tests/reference/chat_fixtures.py`.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod smollm2;

use baton_text::{ChatInput, ChatTemplate, ContentFormat, Ending, TemplateError};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Fixtures {
    templates: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Value,
    tools: Value,
    ending: String,
    kwargs: Value,
    text: Option<String>,
    refused: Option<String>,
}

impl Case {
    /// What is wrong with our rendering.
    fn complaint(&self, template: &ChatTemplate) -> Option<String> {
        let ending = match self.ending.as_str() {
            "generation" => Ending::GenerationPrompt,
            "open" => Ending::WithinLastMessage,
            _ => Ending::AfterLastMessage,
        };
        let input = ChatInput {
            messages: &self.messages,
            tools: &self.tools,
            ending,
            kwargs: &self.kwargs,
            today: "26 Nov 2025",
        };
        let (name, ours) = (&self.template, template.render(&input));
        let is_right = match &ours {
            Ok(text) => Some(text) == self.text.as_ref(),
            Err(TemplateError::Refused(why)) => Some(why) == self.refused.as_ref(),
            Err(_) => false,
        };
        let theirs = self.text.as_ref().or(self.refused.as_ref());
        (!is_right).then(|| format!("{name} {}\n  {ours:?}\n  {theirs:?}\n", self.ending))
    }
}

#[test]
fn conversations_render_as_with_transformers() {
    let mut fixtures: Fixtures = serde_json::from_str(include_str!("fixtures/chat.json")).unwrap();
    let smollm2 = smollm2::gguf()
        .text("tokenizer.chat_template")
        .unwrap()
        .to_owned();
    fixtures.templates.insert("smollm2".to_owned(), smollm2);
    let templates: BTreeMap<&str, ChatTemplate> = fixtures
        .templates
        .iter()
        .map(|(name, source)| {
            (
                name.as_str(),
                ChatTemplate::new(source, "<s>", "</s>").unwrap(),
            )
        })
        .collect();
    let complaints: String = fixtures
        .cases
        .iter()
        .filter_map(|case| case.complaint(&templates[case.template.as_str()]))
        .collect();
    assert!(complaints.is_empty(), "{complaints}");
    assert_eq!(
        templates["smollm2"].content_format(),
        ContentFormat::Strings
    );
    assert_eq!(templates["parts"].content_format(), ContentFormat::Both);
}
