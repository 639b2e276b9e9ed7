//! A model's chat template on conversations a client may send. Input: the template, then, after a line `===`, the
//! messages; without them, two of the usual kind.
#![no_main]

use baton_text::{ChatInput, ChatTemplate, Ending};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

fuzz_target!(|text: &str| {
    let (source, messages) = text.split_once("\n===\n").unwrap_or((text, ""));
    let messages: Value = serde_json::from_str(messages).unwrap_or_else(|_| {
        json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    });
    let Ok(template) = ChatTemplate::new(source, "<s>", "</s>") else {
        return;
    };
    for ending in [Ending::GenerationPrompt, Ending::WithinLastMessage] {
        let _ = template.render(&ChatInput {
            messages: &messages,
            tools: &json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]),
            ending,
            kwargs: &json!({"enable_thinking": false, "n": 3}),
            today: "26 Nov 2025",
        });
    }
});
