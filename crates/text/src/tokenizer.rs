//! One tokenizer for all models: Hugging Face's `tokenizers` for text to ids, a table of bytes for ids to text.

use crate::GgufVocab;
use crate::gguf_vocab::{spelled, tokenizer_json};
use crate::token_bytes::{ByteForm, Spelled, TokenBytes, drops_leading_space};
use crate::whitespace::ShortRuns;
use serde::Deserialize;
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::{DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper};

/// Text to token ids and back. Immutable; share it behind an `Arc`.
pub struct Tokenizer {
    library: Library,
    bytes: TokenBytes,
    leading_space: LeadingSpace,
}

/// Why a tokenizer could not be made, or could not encode.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The library refused the definition or the text.
    #[error("tokenizer: {0}")]
    Library(String),
    /// A definition we cannot turn back into bytes.
    #[error("tokenizer decoder {0} is not supported; byte-level BPE and byte-fallback BPE are")]
    Decoder(String),
    /// A GGUF vocabulary that contradicts itself or is of a kind we do not know.
    #[error("gguf vocabulary: {0}")]
    Vocab(String),
}

/// Whether the tokenizer adds the tokens it puts around a text (for many models a begin-of-sequence token).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddSpecial {
    /// As the model was trained: for plain prompts.
    Yes,
    /// The text holds them already: for rendered chat templates.
    No,
}

/// What becomes of special tokens when ids turn into text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Left out.
    Skip,
    /// Written as they are.
    Keep,
}

/// The library's tokenizer, with our own guard before its regexes.
type Library = tokenizers::TokenizerImpl<
    ModelWrapper,
    NormalizerWrapper,
    ShortRuns,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// Whether the first space of a decoded text is the tokenizer's own (sentencepiece puts one before every text).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeadingSpace {
    Dropped,
    Kept,
}

impl LeadingSpace {
    fn of(decoder: &Value) -> Self {
        if drops_leading_space(decoder) {
            Self::Dropped
        } else {
            Self::Kept
        }
    }
}

/// What we read of a `tokenizer.json` ourselves.
#[derive(Deserialize)]
struct Definition {
    #[serde(default)]
    decoder: Value,
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    continuing_subword_prefix: Option<String>,
}

impl Tokenizer {
    /// From the text of a `tokenizer.json`. Truncation and padding in it are training settings and left out.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let Definition { decoder, model } = serde_json::from_slice(json).map_err(refused)?;
        // The library cuts it off as bytes, be it there or not.
        if model
            .continuing_subword_prefix
            .is_some_and(|p| !p.is_empty())
        {
            return Err(refused("a continuing_subword_prefix is not supported"));
        }
        let form = ByteForm::of(&decoder)?;
        let library = library(json)?;
        Ok(Self {
            bytes: token_bytes(&library, form)?,
            library,
            leading_space: LeadingSpace::of(&decoder),
        })
    }

    /// From the vocabulary in a GGUF file's metadata.
    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self, TokenizerError> {
        let definition = tokenizer_json(vocab)?;
        Ok(Self {
            // Of two tokens spelled alike the library knows one; a model may say either.
            bytes: TokenBytes::new(ByteForm::of(&definition["decoder"])?, spelled(vocab))?,
            library: library(definition.to_string().as_bytes())?,
            leading_space: LeadingSpace::of(&definition["decoder"]),
        })
    }

    /// Token ids of a text. Special tokens written in the text become their ids.
    pub fn encode(&self, text: &str, add: AddSpecial) -> Result<Vec<u32>, TokenizerError> {
        caught(|| {
            let encoded = self.library.encode_fast(text, add == AddSpecial::Yes);
            Ok(encoded.map_err(refused)?.get_ids().to_vec())
        })
    }

    /// The text of a whole sequence; bytes that are no UTF-8 become U+FFFD. Unknown ids are nothing.
    pub fn decode(&self, ids: &[u32], special: SpecialTokens) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if special == SpecialTokens::Keep || !self.is_special(id) {
                bytes.extend_from_slice(self.token_bytes(id));
            }
        }
        String::from_utf8_lossy(self.without_own_space(&bytes)).into_owned()
    }

    /// A text's bytes without the space that the tokenizer put before it, if it is of that kind.
    pub(crate) fn without_own_space<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        match self.leading_space {
            LeadingSpace::Dropped => bytes.strip_prefix(b" ").unwrap_or(bytes),
            LeadingSpace::Kept => bytes,
        }
    }

    /// The bytes that an id stands for; empty for an unknown one.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// Whether an id is a special token (a control word of the model, not text).
    pub fn is_special(&self, id: u32) -> bool {
        self.bytes.is_special(id)
    }

    /// The id of a token written out, such as `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.library.token_to_id(token)
    }

    /// The token as the vocabulary spells it.
    pub fn token_name(&self, id: u32) -> Option<String> {
        self.library.id_to_token(id)
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }
}

fn library(json: &[u8]) -> Result<Library, TokenizerError> {
    caught(|| {
        let mut library: Library = serde_json::from_slice(json).map_err(refused)?;
        library.with_truncation(None).map_err(refused)?;
        library.with_padding(None);
        Ok(library)
    })
}

/// The library panics where a definition contradicts itself, such as at a merge that makes no token; here that is an
/// error like others. What it leaves half done is a cache, which it checks.
fn caught<T>(call: impl FnOnce() -> Result<T, TokenizerError>) -> Result<T, TokenizerError> {
    let contradiction = |_| Err(refused("the definition contradicts itself"));
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(contradiction)
}

fn refused(error: impl std::fmt::Display) -> TokenizerError {
    TokenizerError::Library(error.to_string())
}

fn token_bytes(library: &Library, form: ByteForm) -> Result<TokenBytes, TokenizerError> {
    let vocab = library.get_vocab(true);
    let added = library.get_added_tokens_decoder();
    let plain = vocab.iter().filter(|(_, id)| !added.contains_key(id));
    let plain = plain.map(|(text, &id)| {
        (
            id,
            Spelled {
                text,
                is_added: false,
                is_special: false,
            },
        )
    });
    let added = added.iter().map(|(&id, token)| {
        (
            id,
            Spelled {
                text: &token.content,
                is_added: true,
                is_special: token.special,
            },
        )
    });
    TokenBytes::new(form, plain.chain(added))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::token_bytes::byte_of_char;
    use serde_json::json;

    /// A byte-level tokenizer of 256 single bytes, two merges, one special and one plain added token.
    pub(crate) fn byte_level() -> Tokenizer {
        Tokenizer::from_json(&byte_level_json()).unwrap()
    }

    fn byte_level_json() -> Vec<u8> {
        let char_of = |b: u8| {
            (0..0x200)
                .filter_map(char::from_u32)
                .find(|&c| byte_of_char(c) == Some(b))
                .unwrap()
        };
        let mut vocab: serde_json::Map<String, Value> = (0..=255u8)
            .map(|b| (char_of(b).to_string(), json!(b)))
            .collect();
        vocab.insert("he".into(), json!(256));
        vocab.insert("hel".into(), json!(257));
        let added = |id: u32, content: &str, special: bool| {
            json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false})
        };
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [added(258, "<|end|>", true), added(259, "<tool>", false)],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                      "vocab": vocab, "merges": [["h", "e"], ["he", "l"]]}});
        json.to_string().into_bytes()
    }

    #[test]
    fn one_tokenizer_serves_many_threads() {
        fn is_shared<T: Send + Sync>() {}
        is_shared::<Tokenizer>();
    }

    #[test]
    fn training_settings_neither_cut_nor_pad() {
        let mut definition: Value = serde_json::from_slice(&byte_level_json()).unwrap();
        definition["truncation"] =
            json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        definition["padding"] = json!({"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
        let tokenizer = Tokenizer::from_json(definition.to_string().as_bytes()).unwrap();
        assert_eq!(tokenizer.encode("abcde", AddSpecial::Yes).unwrap().len(), 5);
    }

    #[test]
    fn text_comes_back_as_it_went_in() {
        let tokenizer = byte_level();
        for text in ["hello", "Größe 日本 🥇\n\t", "a<|end|>b<tool>", ""] {
            let ids = tokenizer.encode(text, AddSpecial::Yes).unwrap();
            assert_eq!(tokenizer.decode(&ids, SpecialTokens::Keep), text);
        }
        assert_eq!(tokenizer.encode("hel", AddSpecial::No).unwrap(), [257]);
        assert_eq!(tokenizer.vocab_size(), 260);
    }

    #[test]
    fn only_special_tokens_are_left_out() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("a<|end|>b<tool>", AddSpecial::No).unwrap();
        assert_eq!(tokenizer.decode(&ids, SpecialTokens::Skip), "ab<tool>");
        assert!(
            tokenizer.is_special(258) && !tokenizer.is_special(259) && !tokenizer.is_special(9999)
        );
    }

    #[test]
    fn a_definition_that_the_library_panics_on_is_refused() {
        let mut definition: Value = serde_json::from_slice(&byte_level_json()).unwrap();
        definition["model"]["merges"] = json!([["he", "hel"]]);
        let refused = Tokenizer::from_json(definition.to_string().as_bytes());
        assert!(matches!(refused, Err(TokenizerError::Library(_))));
        let vocab = GgufVocab {
            tokens: vec!["a".into(), "b".into()],
            merges: vec!["a b".into()],
            ..GgufVocab::default()
        };
        assert!(matches!(
            Tokenizer::from_gguf(&vocab),
            Err(TokenizerError::Library(_))
        ));
    }

    #[test]
    fn a_prefix_of_pieces_is_refused_before_the_library_cuts_characters_at_it() {
        let mut definition: Value = serde_json::from_slice(&byte_level_json()).unwrap();
        definition["model"]["continuing_subword_prefix"] = json!("#");
        definition["model"]["merges"] = json!([["h", "é"]]);
        let refused = Tokenizer::from_json(definition.to_string().as_bytes());
        let message = refused.err().unwrap().to_string();
        assert!(message.contains("continuing_subword_prefix"), "{message}");
    }

    #[test]
    fn a_definition_without_byte_decoder_is_refused() {
        let json = br#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;
        assert!(matches!(
            Tokenizer::from_json(json),
            Err(TokenizerError::Decoder(_))
        ));
        assert!(matches!(
            Tokenizer::from_json(b"{"),
            Err(TokenizerError::Library(_))
        ));
    }
}
