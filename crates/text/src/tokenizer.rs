//! One tokenizer for all models: Hugging Face's `tokenizers` for text to ids, a table of bytes for ids to text.

use crate::GgufVocab;
use crate::gguf_vocab::tokenizer_json;
use serde_json::Value;

/// Text to token ids and back. Immutable; share it behind an `Arc`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
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

/// Whether the first space of a decoded text is the tokenizer's own (sentencepiece puts one before every text).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeadingSpace {
    Dropped,
    Kept,
}

/// Each id's bytes, in one piece of memory.
struct TokenBytes {
    all: Vec<u8>,
    /// End of each id's bytes in `all`.
    ends: Vec<u32>,
    special: Vec<bool>,
}

impl Tokenizer {
    /// From the text of a `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| TokenizerError::Library(e.to_string()))?;
        let value: Value =
            serde_json::from_slice(json).map_err(|e| TokenizerError::Library(e.to_string()))?;
        let form = ByteForm::of(&value["decoder"])?;
        let bytes = TokenBytes::new(&inner, form);
        let leading_space = if has_strip(&value["decoder"]) {
            LeadingSpace::Dropped
        } else {
            LeadingSpace::Kept
        };
        Ok(Self {
            inner,
            bytes,
            leading_space,
        })
    }

    /// From the vocabulary in a GGUF file's metadata.
    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self, TokenizerError> {
        Self::from_json(tokenizer_json(vocab)?.to_string().as_bytes())
    }

    /// Token ids of a text. Special tokens written in the text become their ids.
    pub fn encode(&self, text: &str, add: AddSpecial) -> Result<Vec<u32>, TokenizerError> {
        let encoded = self.inner.encode_fast(text, add == AddSpecial::Yes);
        encoded
            .map(|e| e.get_ids().to_vec())
            .map_err(|e| TokenizerError::Library(e.to_string()))
    }

    /// The text of a whole sequence; bytes that are no UTF-8 become U+FFFD. Unknown ids are nothing.
    pub fn decode(&self, ids: &[u32], special: SpecialTokens) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if special == SpecialTokens::Keep || !self.is_special(id) {
                bytes.extend_from_slice(self.token_bytes(id));
            }
        }
        let start = usize::from(
            self.leading_space == LeadingSpace::Dropped && bytes.first() == Some(&b' '),
        );
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    }

    /// The bytes that an id stands for; empty for an unknown one.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// Whether an id is a special token (a control word of the model, not text).
    pub fn is_special(&self, id: u32) -> bool {
        self.bytes
            .special
            .get(id as usize)
            .copied()
            .unwrap_or(false)
    }

    /// The id of a token written out, such as `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token as the vocabulary spells it.
    pub fn token_name(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.bytes.ends.len()
    }
}

impl TokenBytes {
    fn new(inner: &tokenizers::Tokenizer, form: ByteForm) -> Self {
        let added = inner.get_added_tokens_decoder();
        let n = inner
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1);
        let (mut all, mut ends, mut special) = (
            Vec::with_capacity(n * 6),
            Vec::with_capacity(n),
            vec![false; n],
        );
        for (id, is_special) in special.iter_mut().enumerate() {
            if let Some(token) = added.get(&(id as u32)) {
                all.extend_from_slice(token.content.as_bytes());
                *is_special = token.special;
            } else if let Some(token) = inner.id_to_token(id as u32) {
                form.append(&token, &mut all);
            }
            ends.push(all.len() as u32);
        }
        Self { all, ends, special }
    }

    fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.all[start as usize..end as usize]
    }
}

/// How a vocabulary spells bytes.
#[derive(Clone, Copy)]
enum ByteForm {
    /// GPT-2's: one printable character a byte.
    ByteLevel,
    /// Sentencepiece's: `▁` is a space, `<0x0A>` a byte.
    Fallback,
}

impl ByteForm {
    fn of(decoder: &Value) -> Result<Self, TokenizerError> {
        match decoder["type"].as_str() {
            Some("ByteLevel") => Ok(Self::ByteLevel),
            Some("Sequence") => {
                let parts: Vec<_> = decoder["decoders"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .collect();
                let has = |name| parts.iter().any(|d| d["type"].as_str() == Some(name));
                if has("ByteLevel") {
                    Ok(Self::ByteLevel)
                } else if has("ByteFallback") {
                    Ok(Self::Fallback)
                } else {
                    Err(TokenizerError::Decoder(decoder.to_string()))
                }
            }
            other => Err(TokenizerError::Decoder(other.unwrap_or("none").to_owned())),
        }
    }

    fn append(self, token: &str, out: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                for c in token.chars() {
                    match byte_of_char(c) {
                        Some(byte) => out.push(byte),
                        None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
            }
            Self::Fallback => {
                let hex = token
                    .strip_prefix("<0x")
                    .and_then(|rest| rest.strip_suffix('>'))
                    .filter(|hex| hex.len() == 2);
                match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => out.push(byte),
                    None => out.extend_from_slice(token.replace('▁', " ").as_bytes()),
                }
            }
        }
    }
}

fn has_strip(decoder: &Value) -> bool {
    decoder["decoders"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|d| d["type"].as_str() == Some("Strip"))
}

/// GPT-2's table read backwards: printable Latin-1 stands for itself, the other 68 bytes follow from U+0100 on.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// A byte-level tokenizer of 256 single bytes, two merges, one special and one plain added token.
    pub(crate) fn byte_level() -> Tokenizer {
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
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn every_byte_has_one_character() {
        let mut seen: Vec<u8> = (0..0x200)
            .filter_map(char::from_u32)
            .filter_map(byte_of_char)
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
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
