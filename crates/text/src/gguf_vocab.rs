//! A GGUF file's vocabulary as a `tokenizer.json`: one way into the tokenizer library for both formats.
//!
//! Says nothing of how text is split into words: see `split`.

use crate::TokenizerError;
use crate::split::Split;
use crate::token_bytes::Spelled;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// Longer sentencepiece tokens, in bytes, are never put together from pieces: trying every cut takes the square of it.
const MAX_PIECE: usize = 1024;

/// What a GGUF file says of its tokens.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`.
    pub model: VocabModel,
    /// `tokenizer.ggml.pre`, empty when absent.
    pub pre: String,
    /// `tokenizer.ggml.tokens`.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.merges`, each two pieces around a space.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.scores`; empty when absent.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`; empty when absent.
    pub kinds: Vec<TokenKind>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; absent: the model's default.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`; absent: the model's default.
    pub add_space_prefix: Option<bool>,
}

/// How tokens are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VocabModel {
    /// `gpt2`: byte-level BPE with a list of merges.
    #[default]
    Gpt2,
    /// `llama`: sentencepiece BPE, whose merges follow from the scores.
    Llama,
}

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// Text.
    Normal,
    /// Stands for what has no token.
    Unknown,
    /// A control word, such as an end of turn.
    Control,
    /// A word that is never split.
    UserDefined,
    /// A single byte.
    Byte,
}

/// The same vocabulary as a `tokenizer.json`.
pub(crate) fn tokenizer_json(vocab: &GgufVocab) -> Result<Value, TokenizerError> {
    if vocab.tokens.is_empty() {
        return Err(TokenizerError::Vocab("no tokens".to_owned()));
    }
    if !vocab.kinds.is_empty() && vocab.kinds.len() != vocab.tokens.len() {
        let (kinds, tokens) = (vocab.kinds.len(), vocab.tokens.len());
        return Err(TokenizerError::Vocab(format!(
            "{kinds} token types for {tokens} tokens"
        )));
    }
    let parts = match vocab.model {
        VocabModel::Gpt2 => byte_level(vocab)?,
        VocabModel::Llama => sentencepiece(vocab)?,
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(vocab),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(vocab, parts.adds_bos)?,
        "decoder": parts.decoder,
        "model": parts.model,
    }))
}

struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// What this kind of model does when the file does not say.
    adds_bos: bool,
}

fn byte_level(vocab: &GgufVocab) -> Result<Parts, TokenizerError> {
    let split = Split::named(&vocab.pre).ok_or_else(|| {
        TokenizerError::Vocab(format!("pre-tokenizer {} is not known", vocab.pre))
    })?;
    let merges = listed_merges(vocab)?;
    Ok(Parts {
        normalizer: split.normalizer(),
        pre_tokenizer: split.pre_tokenizer(),
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        model: bpe(
            vocab,
            &merges,
            &json!({"byte_fallback": false, "fuse_unk": false,
                    "ignore_merges": split.takes_known_words_whole()}),
        ),
        adds_bos: split.adds_bos(),
    })
}

fn sentencepiece(vocab: &GgufVocab) -> Result<Parts, TokenizerError> {
    let merges = if vocab.merges.is_empty() {
        merges_from_scores(vocab)?
    } else {
        listed_merges(vocab)?
    };
    let unknown = vocab.unknown.unwrap_or(0);
    let mut normalizers =
        vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if vocab.add_space_prefix.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unk_token = vocab.tokens.get(unknown as usize);
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: bpe(
            vocab,
            &merges,
            &json!({"byte_fallback": true, "fuse_unk": true, "unk_token": unk_token}),
        ),
        adds_bos: true,
    })
}

fn bpe(vocab: &GgufVocab, merges: &[Value], more: &Value) -> Value {
    // Should a spelling occur twice, its first id stands, as in llama.cpp.
    let mut ids = Map::with_capacity(vocab.tokens.len());
    for (id, token) in vocab.tokens.iter().enumerate() {
        ids.entry(token.clone()).or_insert_with(|| json!(id));
    }
    let mut model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "vocab": ids, "merges": merges});
    if let (Some(model), Some(more)) = (model.as_object_mut(), more.as_object()) {
        model.extend(more.clone());
    }
    model
}

fn listed_merges(vocab: &GgufVocab) -> Result<Vec<Value>, TokenizerError> {
    let merges = vocab.merges.iter().map(|merge| {
        let (left, right) = merge.split_once(' ')?;
        Some(json!([left, right]))
    });
    merges
        .collect::<Option<_>>()
        .ok_or_else(|| TokenizerError::Vocab("a merge without a space".to_owned()))
}

/// Every way to put a piece together from two others is a merge; the better the piece's score, the earlier. Of one score
/// the longer left side comes first, then the longer right side, then the lower ids: Hugging Face's order.
fn merges_from_scores(vocab: &GgufVocab) -> Result<Vec<Value>, TokenizerError> {
    if vocab.scores.len() != vocab.tokens.len() {
        return Err(TokenizerError::Vocab(
            "a sentencepiece vocabulary needs a score for every token".to_owned(),
        ));
    }
    let mut ids = HashMap::with_capacity(vocab.tokens.len());
    for (id, token) in mergeable(vocab) {
        ids.entry(token).or_insert(id);
    }
    let mut merges: Vec<Merge> = Vec::new();
    for (id, token) in mergeable(vocab) {
        let score = vocab.scores[id];
        let found = token
            .char_indices()
            .skip(1)
            .enumerate()
            .filter_map(|(n, (cut, _))| {
                let (left, right) = token.split_at(cut);
                Some(Merge {
                    score,
                    left: *ids.get(left)?,
                    right: *ids.get(right)?,
                    n_left: n + 1,
                    cut,
                    id,
                })
            });
        let from = merges.len();
        merges.extend(found);
        merges[from..].sort_by_key(|merge| (merge.left, merge.right));
    }
    // The longer the left side of one token, the shorter the right; between tokens, both count.
    let n_right = |merge: &Merge| vocab.tokens[merge.id][merge.cut..].chars().count();
    merges.sort_by(|a, b| {
        let by_score = b.score.total_cmp(&a.score).then(b.n_left.cmp(&a.n_left));
        by_score.then_with(|| n_right(b).cmp(&n_right(a)))
    });
    let side = |id: usize| vocab.tokens[id].as_str();
    Ok(merges
        .iter()
        .map(|merge| json!([side(merge.left), side(merge.right)]))
        .collect())
}

/// Two pieces that make a third.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    /// Characters of the left side.
    n_left: usize,
    /// Bytes of the left side.
    cut: usize,
    /// The token they make.
    id: usize,
}

/// Tokens that text is made of, piece by piece: not the control words, not single bytes.
fn mergeable(vocab: &GgufVocab) -> impl Iterator<Item = (usize, &str)> {
    let is_text = |id: usize| {
        !matches!(
            vocab.kinds.get(id),
            Some(TokenKind::Control | TokenKind::Unknown | TokenKind::Byte)
        )
    };
    let tokens = vocab.tokens.iter().map(String::as_str).enumerate();
    tokens.filter(move |&(id, token)| token.len() <= MAX_PIECE && is_text(id))
}

/// Every token, as it is spelled.
pub(crate) fn spelled(vocab: &GgufVocab) -> impl Iterator<Item = (u32, Spelled<'_>)> {
    (0..).zip(&vocab.tokens).map(|(id, text)| {
        let kind = vocab
            .kinds
            .get(id as usize)
            .copied()
            .unwrap_or(TokenKind::Normal);
        let is_special = matches!(kind, TokenKind::Control | TokenKind::Unknown);
        let is_added = is_special || kind == TokenKind::UserDefined;
        (
            id,
            Spelled {
                text,
                is_added,
                is_special,
            },
        )
    })
}

fn added_tokens(vocab: &GgufVocab) -> Vec<Value> {
    let added = spelled(vocab).filter(|(_, token)| token.is_added && !token.text.is_empty());
    let added = added.map(|(id, token)| {
        json!({"id": id, "content": token.text, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": token.is_special})
    });
    added.collect()
}

fn post_processor(vocab: &GgufVocab, adds_bos: bool) -> Result<Value, TokenizerError> {
    if !vocab.add_bos.unwrap_or(adds_bos) {
        return Ok(Value::Null);
    }
    let Some(id) = vocab.bos else {
        return Ok(Value::Null);
    };
    let token = vocab.tokens.get(id as usize).ok_or_else(|| {
        TokenizerError::Vocab(format!(
            "begin-of-sequence id {id} is outside the vocabulary"
        ))
    })?;
    let text = |which: &str, type_id: u32| json!({"Sequence": {"id": which, "type_id": type_id}});
    let bos = |type_id: u32| json!({"SpecialToken": {"id": token, "type_id": type_id}});
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [bos(0), text("A", 0)],
        "pair": [bos(0), text("A", 0), bos(1), text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{AddSpecial, SpecialTokens, Tokenizer};
    use proptest::prelude::*;

    /// A sentencepiece vocabulary with the bytes, a few pieces, and `<s>`.
    pub(crate) fn llama() -> GgufVocab {
        let mut vocab = GgufVocab {
            model: VocabModel::Llama,
            bos: Some(1),
            unknown: Some(0),
            ..GgufVocab::default()
        };
        let mut put = |token: &str, score: f32, kind| {
            vocab.tokens.push(token.to_owned());
            vocab.scores.push(score);
            vocab.kinds.push(kind);
        };
        put("<unk>", 0.0, TokenKind::Unknown);
        put("<s>", 0.0, TokenKind::Control);
        for byte in 0..=255u8 {
            put(&format!("<0x{byte:02X}>"), 0.0, TokenKind::Byte);
        }
        for (i, piece) in [
            "▁h", "el", "lo", "hel", "▁hel", "▁hello", "▁", "h", "e", "l", "o",
        ]
        .iter()
        .enumerate()
        {
            put(piece, -(i as f32), TokenKind::Normal);
        }
        vocab
    }

    #[test]
    fn sentencepiece_merges_follow_the_scores() {
        let vocab = llama();
        let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
        let names = |text: &str| -> Vec<String> {
            let ids = tokenizer.encode(text, AddSpecial::Yes).unwrap();
            ids.iter()
                .map(|&id| tokenizer.token_name(id).unwrap())
                .collect()
        };
        assert_eq!(names("hello"), ["<s>", "▁hello"]);
        assert_eq!(names("é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
        let ids = tokenizer.encode("hello é\n", AddSpecial::Yes).unwrap();
        assert_eq!(tokenizer.decode(&ids, SpecialTokens::Skip), "hello é\n");
    }

    #[test]
    fn a_space_goes_before_every_text_between_control_words() {
        let tokenizer = Tokenizer::from_gguf(&llama()).unwrap();
        let hello = tokenizer.token_id("▁hello").unwrap();
        assert_eq!(
            tokenizer.encode("hello<s>hello", AddSpecial::No).unwrap(),
            [hello, 1, hello]
        );
        let vocab = GgufVocab {
            add_space_prefix: Some(false),
            ..llama()
        };
        let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
        assert_eq!(
            tokenizer.encode(" hello", AddSpecial::Yes).unwrap(),
            [1, hello]
        );
        assert_eq!(tokenizer.decode(&[1, hello], SpecialTokens::Skip), " hello");
    }

    #[test]
    fn of_two_tokens_spelled_alike_both_have_text() {
        let mut vocab = llama();
        let twice = vocab.tokens.len() as u32;
        vocab.tokens.push("▁hello".to_owned());
        vocab.scores.push(-99.0);
        vocab.kinds.push(TokenKind::Normal);
        let tokenizer = Tokenizer::from_gguf(&vocab).unwrap();
        assert_eq!(tokenizer.vocab_size() as u32, twice + 1);
        assert_eq!(tokenizer.token_bytes(twice), b" hello");
        assert!(tokenizer.encode("hello", AddSpecial::No).unwrap()[0] < twice);
    }

    proptest! {
        #[test]
        fn no_vocabulary_ends_the_process(
            tokens in prop::collection::vec("[ab▁ ]{0,3}|<0x0A>", 0..12), merges in prop::collection::vec("[ab ▁]{0,3} ?[ab]{0,2}", 0..6),
            scores in prop::collection::vec(prop::num::f32::ANY, 0..12), kinds in prop::collection::vec(0usize..5, 0..12),
            (is_llama, bos, unknown) in any::<(bool, Option<u8>, Option<u8>)>(), text in "[ab▁ \n]{0,8}",
        ) {
            use TokenKind::{Byte, Control, Normal, Unknown, UserDefined};
            let vocab = GgufVocab {
                model: if is_llama { VocabModel::Llama } else { VocabModel::Gpt2 },
                kinds: kinds.iter().map(|&kind| [Normal, Unknown, Control, UserDefined, Byte][kind]).collect(),
                bos: bos.map(u32::from),
                unknown: unknown.map(u32::from),
                tokens, merges, scores,
                ..GgufVocab::default()
            };
            if let Ok(tokenizer) = Tokenizer::from_gguf(&vocab) {
                let ids = tokenizer.encode(&text, AddSpecial::Yes).unwrap_or_default();
                tokenizer.decode(&ids, SpecialTokens::Keep);
            }
        }
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        assert!(Tokenizer::from_gguf(&GgufVocab::default()).is_err());
        assert!(
            Tokenizer::from_gguf(&GgufVocab {
                scores: vec![],
                ..llama()
            })
            .is_err()
        );
        assert!(
            Tokenizer::from_gguf(&GgufVocab {
                bos: Some(99_999),
                ..llama()
            })
            .is_err()
        );
        let gpt2 = GgufVocab {
            tokens: vec!["a".into()],
            pre: "unheard-of".into(),
            ..GgufVocab::default()
        };
        assert!(
            Tokenizer::from_gguf(&gpt2)
                .err()
                .unwrap()
                .to_string()
                .contains("unheard-of")
        );
    }
}
