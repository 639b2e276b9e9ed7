//! A GGUF file's vocabulary as a `tokenizer.json`: one way into the tokenizer library for both formats.
//!
//! GGUF names the pre-tokenizer (`tokenizer.ggml.pre`); the rules behind the names are those of llama.cpp's
//! `llama-vocab` and of the models' own `tokenizer.json` files.

use crate::TokenizerError;
use serde_json::{Map, Value, json};

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

/// Llama 3's way to cut text into words, also the base of others.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's: as Llama 3's, with digits one by one.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

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
    let cut = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]})
    };
    let gpt2 = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let digits = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, gpt2]});
    let (pre_tokenizer, normalizer, adds_bos) = match vocab.pre.as_str() {
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
            (digits, Value::Null, false)
        }
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "pixtral" => {
            (cut(LLAMA3), Value::Null, true)
        }
        "qwen2" | "deepseek-r1-qwen" => (cut(QWEN2), json!({"type": "NFC"}), false),
        "" | "default" | "gpt-2" | "gpt2" => (gpt2, Value::Null, false),
        other => {
            return Err(TokenizerError::Vocab(format!(
                "pre-tokenizer {other} is not known"
            )));
        }
    };
    let merges: Vec<Value> = vocab
        .merges
        .iter()
        .map(|merge| {
            merge
                .split_once(' ')
                .map(|(left, right)| json!([left, right]))
        })
        .collect::<Option<_>>()
        .ok_or_else(|| TokenizerError::Vocab("a merge without a space".to_owned()))?;
    // Llama 3's words that are tokens are taken whole, whatever the merges say.
    let ignore_merges = matches!(vocab.pre.as_str(), "llama3" | "llama-v3" | "llama-bpe");
    Ok(Parts {
        normalizer,
        pre_tokenizer,
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        model: bpe(
            vocab,
            &merges,
            &json!({"byte_fallback": false, "fuse_unk": false, "ignore_merges": ignore_merges}),
        ),
        adds_bos,
    })
}

fn sentencepiece(vocab: &GgufVocab) -> Result<Parts, TokenizerError> {
    let merges = merges_from_scores(vocab)?;
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

/// Every way to put a piece together from two others is a merge; the better the piece's score, the earlier.
fn merges_from_scores(vocab: &GgufVocab) -> Result<Vec<Value>, TokenizerError> {
    if vocab.scores.len() != vocab.tokens.len() {
        return Err(TokenizerError::Vocab(
            "a sentencepiece vocabulary needs a score for every token".to_owned(),
        ));
    }
    let ids: std::collections::BTreeMap<&str, usize> = vocab
        .tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let mut merges: Vec<(f32, usize, usize)> = Vec::new();
    for (token, &score) in vocab.tokens.iter().zip(&vocab.scores) {
        let mut found: Vec<(f32, usize, usize)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(cut, _)| {
                Some((score, *ids.get(&token[..cut])?, *ids.get(&token[cut..])?))
            })
            .collect();
        found.sort_by_key(|&(_, left, right)| (left, right));
        merges.append(&mut found);
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(merges
        .into_iter()
        .map(|(_, left, right)| json!([vocab.tokens[left], vocab.tokens[right]]))
        .collect())
}

fn added_tokens(vocab: &GgufVocab) -> Vec<Value> {
    let special = |kind| matches!(kind, TokenKind::Control | TokenKind::Unknown);
    let added = |kind| special(kind) || kind == TokenKind::UserDefined;
    vocab
        .kinds
        .iter()
        .zip(&vocab.tokens)
        .enumerate()
        .filter(|&(_, (&kind, token))| added(kind) && !token.is_empty())
        .map(|(id, (&kind, token))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": special(kind)})
        })
        .collect()
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
mod tests {
    use super::*;
    use crate::{AddSpecial, SpecialTokens, Tokenizer};

    /// A sentencepiece vocabulary with the bytes, a few pieces, and `<s>`.
    fn llama() -> GgufVocab {
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
