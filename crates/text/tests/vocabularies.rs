//! Real vocabularies against other people's tokenizers. The fixtures come from `tests/reference/tokenizer_fixtures.py`.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod smollm2;

use baton_text::{
    AddSpecial, Detokenizer, GgufVocab, SpecialTokens, TokenKind, Tokenizer, VocabModel,
};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::LazyLock;

#[derive(Deserialize)]
struct Bytes {
    /// By pre-tokenizer.
    encode: BTreeMap<String, Vec<(String, Vec<u32>)>>,
    /// Ids, their text with special tokens, and without.
    decode: Vec<(Vec<u32>, String, String)>,
}

#[derive(Deserialize)]
struct Pieces {
    tokens: Vec<String>,
    scores: Vec<f32>,
    kinds: Vec<i64>,
    encode: Vec<(String, Vec<u32>)>,
}

static SMOLLM2: LazyLock<GgufVocab> = LazyLock::new(smollm2_vocab);
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_gguf(&SMOLLM2).unwrap());
static BYTES: LazyLock<Bytes> =
    LazyLock::new(|| serde_json::from_str(include_str!("fixtures/smollm2.json")).unwrap());

fn kind(number: i64) -> TokenKind {
    match number {
        2 => TokenKind::Unknown,
        3 => TokenKind::Control,
        4 => TokenKind::UserDefined,
        6 => TokenKind::Byte,
        _ => TokenKind::Normal,
    }
}

/// The model file's vocabulary.
fn smollm2_vocab() -> GgufVocab {
    let gguf = smollm2::gguf();
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    GgufVocab {
        model: VocabModel::Gpt2,
        pre: gguf.text(&key("pre")).unwrap().to_owned(),
        tokens: gguf.texts(&key("tokens")).unwrap().to_vec(),
        merges: gguf.texts(&key("merges")).unwrap().to_vec(),
        kinds: gguf
            .integers(&key("token_type"))
            .unwrap()
            .iter()
            .map(|&n| kind(n))
            .collect(),
        bos: gguf.unsigned(&key("bos_token_id")).map(|id| id as u32),
        unknown: gguf.unsigned(&key("unknown_token_id")).map(|id| id as u32),
        add_bos: gguf.flag(&key("add_bos_token")),
        add_space_prefix: gguf.flag(&key("add_space_prefix")),
        scores: Vec::new(),
    }
}

/// Names every text whose ids differ.
fn check(tokenizer: &Tokenizer, cases: &[(String, Vec<u32>)], add: AddSpecial) {
    let wrong: Vec<_> = cases
        .iter()
        .filter_map(|(text, expected)| {
            let ids = tokenizer.encode(text, add).unwrap();
            (ids != *expected).then_some((text, ids, expected))
        })
        .collect();
    assert!(
        wrong.is_empty(),
        "{} of {} differ: {wrong:#?}",
        wrong.len(),
        cases.len()
    );
}

#[test]
fn smollm2_takes_every_text_as_hugging_face_does() {
    assert!(BYTES.encode["smollm"].len() > 200);
    // The model has a begin-of-sequence token and does not want it added.
    check(&TOKENIZER, &BYTES.encode["smollm"], AddSpecial::Yes);
    check(&TOKENIZER, &BYTES.encode["smollm"], AddSpecial::No);
}

#[test]
fn other_pre_tokenizers_split_as_their_models_do() {
    for (pre, cases) in &BYTES.encode {
        let vocab = GgufVocab {
            pre: pre.clone(),
            ..SMOLLM2.clone()
        };
        check(
            &Tokenizer::from_gguf(&vocab).unwrap(),
            cases,
            AddSpecial::Yes,
        );
    }
}

#[test]
fn ids_come_back_as_the_text_they_were_made_of() {
    for (text, ids) in &BYTES.encode["smollm"] {
        assert_eq!(TOKENIZER.decode(ids, SpecialTokens::Keep), *text);
    }
}

#[test]
fn random_ids_decode_as_hugging_face_does_at_once_and_in_pieces() {
    for (ids, kept, skipped) in &BYTES.decode {
        for (special, expected) in [(SpecialTokens::Keep, kept), (SpecialTokens::Skip, skipped)] {
            assert_eq!(TOKENIZER.decode(ids, special), *expected, "{ids:?}");
            let mut detokenizer = Detokenizer::of_whole_text(special);
            let mut out = String::new();
            ids.iter()
                .for_each(|&id| detokenizer.push(&TOKENIZER, id, &mut out));
            detokenizer.finish(&mut out);
            assert_eq!(out, *expected, "{ids:?}");
        }
    }
}

#[test]
fn megabytes_of_one_character_are_tokenized_as_pieces_of_it_are() {
    for (unit, n) in [
        (" ", 1 << 20),
        ("a", 1 << 20),
        ("\n", 1 << 20),
        ("🥇", 1 << 18),
        ("\0", 1 << 20),
    ] {
        let text = unit.repeat(n);
        let ids = TOKENIZER.encode(&text, AddSpecial::No).unwrap();
        assert_eq!(TOKENIZER.decode(&ids, SpecialTokens::Keep), text);
        let quarter = TOKENIZER
            .encode(&unit.repeat(n / 4), AddSpecial::No)
            .unwrap();
        assert_eq!(ids.len(), 4 * quarter.len(), "{unit:?}");
    }
}

#[test]
fn words_after_a_megabyte_of_spaces_are_still_split() {
    let text = " ".repeat(1 << 20) + "1 word's";
    let ids = TOKENIZER.encode(&text, AddSpecial::No).unwrap();
    let tail = TOKENIZER.encode("1 word's", AddSpecial::No).unwrap();
    assert_eq!(ids[ids.len() - tail.len()..], tail);
}

fn sentencepiece() -> (GgufVocab, Vec<(String, Vec<u32>)>) {
    let pieces: Pieces = serde_json::from_str(include_str!("fixtures/sentencepiece.json")).unwrap();
    let vocab = GgufVocab {
        model: VocabModel::Llama,
        tokens: pieces.tokens,
        scores: pieces.scores,
        kinds: pieces.kinds.iter().map(|&n| kind(n)).collect(),
        bos: Some(1),
        unknown: Some(0),
        ..GgufVocab::default()
    };
    (vocab, pieces.encode)
}

#[test]
fn merges_from_scores_are_what_sentencepiece_does() {
    let (vocab, cases) = sentencepiece();
    let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
    // Hugging Face's tokenizers leave the empty text empty, so does sentencepiece.
    check(&tokenizer, &cases, AddSpecial::No);
    for (text, ids) in &cases {
        assert_eq!(tokenizer.decode(ids, SpecialTokens::Keep), *text);
        let with_bos = tokenizer.encode(text, AddSpecial::Yes).unwrap();
        assert_eq!((with_bos[0], &with_bos[1..]), (1, &ids[..]));
    }
}
