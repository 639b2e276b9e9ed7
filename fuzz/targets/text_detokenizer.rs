//! Prompts and generated ids: a text comes back as it went in, and a stream's pieces are the whole's text.
#![no_main]

use baton_text::{AddSpecial, Detokenizer, IncludeStop, SpecialTokens, StopStrings, Tokenizer};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let json = include_bytes!("../seeds/text_tokenizer/byte_level.json");
    Tokenizer::from_json(json).expect("a whole tokenizer")
});

fuzz_target!(|bytes: &[u8]| {
    let tokenizer = &*TOKENIZER;
    if let Ok(text) = std::str::from_utf8(bytes) {
        let ids = tokenizer.encode(text, AddSpecial::No).expect("any text");
        assert_eq!(tokenizer.decode(&ids, SpecialTokens::Keep), text);
    }
    let ids: Vec<u32> = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) + u32::from(pair.len() > 1 && pair[1] & 7 == 0) * 8)
        .collect();
    for special in [SpecialTokens::Keep, SpecialTokens::Skip] {
        let mut detokenizer = Detokenizer::of_whole_text(special);
        let mut stops =
            StopStrings::new(["he".to_owned(), "\u{fffd}l".to_owned()], IncludeStop::Yes);
        let (mut streamed, mut shown, mut is_stopped) = (String::new(), String::new(), false);
        for &id in &ids {
            let mut piece = String::new();
            detokenizer.push(tokenizer, id, &mut piece);
            is_stopped = is_stopped || stops.push(&piece, &mut shown).is_some();
            streamed.push_str(&piece);
        }
        let mut tail = String::new();
        detokenizer.finish(&mut tail);
        streamed.push_str(&tail);
        assert_eq!(streamed, tokenizer.decode(&ids, special));
        assert!(streamed.starts_with(&shown));
        assert!(!is_stopped || shown.ends_with("he") || shown.ends_with("\u{fffd}l"));
    }
});
