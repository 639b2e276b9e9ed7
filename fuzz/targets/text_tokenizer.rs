//! A downloaded `tokenizer.json`, then texts through it there and back.
#![no_main]

mod library_panics;

use baton_text::{AddSpecial, Detokenizer, SpecialTokens, Tokenizer};
use libfuzzer_sys::fuzz_target;

const TEXTS: [&str; 3] = [
    "",
    "Hello, hello  world\n\n 123 it's",
    "Größe 日本 🥇<s> </s>",
];

fuzz_target!(init: library_panics::tolerate(), |json: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_json(json) else {
        return;
    };
    for text in TEXTS {
        if let Ok(ids) = tokenizer.encode(text, AddSpecial::Yes) {
            let mut detokenizer = Detokenizer::of_whole_text(SpecialTokens::Keep);
            let mut streamed = String::new();
            for &id in &ids {
                detokenizer.push(&tokenizer, id, &mut streamed);
            }
            detokenizer.finish(&mut streamed);
            assert_eq!(streamed, tokenizer.decode(&ids, SpecialTokens::Keep));
        }
    }
});
