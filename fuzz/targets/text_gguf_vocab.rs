//! The vocabulary of a GGUF file, then a text through it. Input: lines; the first says what kind it is, the second how
//! text is split, the others are tokens (`kind` and text) or, if they begin with a space, merges.
#![no_main]

mod library_panics;

use baton_text::{AddSpecial, GgufVocab, SpecialTokens, TokenKind, Tokenizer, VocabModel};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: library_panics::tolerate(), |text: &str| {
    let mut lines = text.split('\n');
    let model = match lines.next() {
        Some("llama") => VocabModel::Llama,
        _ => VocabModel::Gpt2,
    };
    let mut vocab = GgufVocab {
        model,
        pre: lines.next().unwrap_or_default().to_owned(),
        bos: Some(1),
        unknown: Some(0),
        ..GgufVocab::default()
    };
    for line in lines {
        if let Some(merge) = line.strip_prefix(' ') {
            vocab.merges.push(merge.to_owned());
            continue;
        }
        let mut chars = line.chars();
        vocab.kinds.push(match chars.next() {
            Some('u') => TokenKind::Unknown,
            Some('c') => TokenKind::Control,
            Some('d') => TokenKind::UserDefined,
            Some('b') => TokenKind::Byte,
            _ => TokenKind::Normal,
        });
        vocab.tokens.push(chars.as_str().to_owned());
        vocab.scores.push(-(vocab.scores.len() as f32));
    }
    if let Ok(tokenizer) = Tokenizer::from_gguf(&vocab) {
        for text in ["Hello, hello  world\n 12", "Größe 日本<s>"] {
            if let Ok(ids) = tokenizer.encode(text, AddSpecial::Yes) {
                assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                let _ = tokenizer.decode(&ids, SpecialTokens::Skip);
            }
        }
    }
});
