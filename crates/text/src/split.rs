//! How byte-level vocabularies split text into words before merging, by the name a GGUF file gives
//! (`tokenizer.ggml.pre`).
//!
//! Names and groups are llama.cpp's; the expressions are those of the models' own `tokenizer.json` files, of which
//! llama.cpp's are adaptations.

use serde_json::{Value, json};

/// A way to split text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    /// GPT-2's words.
    Gpt2,
    /// Every digit by itself, then GPT-2's words.
    Digits,
    /// Words with the sign before them, digits by threes, line ends together.
    Llama3,
    /// As Llama 3's, from tokenizers that add nothing at the start.
    Llama3Plain,
    /// As Llama 3's, with digits one by one.
    Qwen2,
    /// Words also end where lower case turns into upper case.
    Tekken,
    /// As Tekken's, with English endings, and digits by threes.
    Gpt4o,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl Split {
    /// The way that a name stands for. Files without a name are old; GPT-2's words are what their makers knew.
    pub(crate) fn named(pre: &str) -> Option<Self> {
        Some(match pre {
            "" | "default" | "gpt-2" | "gpt2" | "phi-2" => Self::Gpt2,
            "smollm" | "starcoder" | "refact" | "codeshell" => Self::Digits,
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral"
            | "midm-2.0" | "lfm2" => Self::Llama3,
            "dbrx" | "smaug-bpe" => Self::Llama3Plain,
            "qwen2" | "deepseek-r1-qwen" | "megrez" => Self::Qwen2,
            "tekken" => Self::Tekken,
            "gpt-4o" | "llama4" => Self::Gpt4o,
            _ => return None,
        })
    }

    pub(crate) fn pre_tokenizer(self) -> Value {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let first = match self {
            Self::Gpt2 => return bytes(true),
            Self::Digits => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                return json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]});
            }
            Self::Llama3 | Self::Llama3Plain => LLAMA3,
            Self::Qwen2 => QWEN2,
            Self::Tekken => TEKKEN,
            Self::Gpt4o => GPT4O,
        };
        let words = json!({"type": "Split", "pattern": {"Regex": first}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [words, bytes(false)]})
    }

    pub(crate) fn normalizer(self) -> Value {
        match self {
            Self::Qwen2 => json!({"type": "NFC"}),
            _ => Value::Null,
        }
    }

    /// A word that is a token is taken whole, whatever the merges say.
    pub(crate) fn takes_known_words_whole(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    /// What such a tokenizer does about the begin-of-sequence token when the file does not say.
    pub(crate) fn adds_bos(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper,
    };

    /// The words of a text, with spaces as `Ġ` and line ends as `Ċ`, put together with `|`.
    fn words(pre: &str, text: &str) -> String {
        let split = Split::named(pre).unwrap();
        let splitter: PreTokenizerWrapper = serde_json::from_value(split.pre_tokenizer()).unwrap();
        let mut text = PreTokenizedString::from(text);
        splitter.pre_tokenize(&mut text).unwrap();
        let words = text.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
        words
            .into_iter()
            .map(|(word, _, _)| word)
            .collect::<Vec<_>>()
            .join("|")
    }

    #[test]
    fn each_name_splits_in_its_own_way() {
        let text = "It'S  x=1234,\n\n  fooBar";
        for (pre, expected) in [
            ("gpt-2", "It|'|S|Ġ|Ġx|=|1234|,|ĊĊĠ|ĠfooBar"),
            ("smollm", "It|'|S|Ġ|Ġx|=|1|2|3|4|,|ĊĊĠ|ĠfooBar"),
            ("llama-bpe", "It|'S|Ġ|Ġx|=|123|4|,ĊĊ|Ġ|ĠfooBar"),
            ("qwen2", "It|'S|Ġ|Ġx|=|1|2|3|4|,ĊĊ|Ġ|ĠfooBar"),
            ("tekken", "It|'S|Ġ|Ġx|=|1|2|3|4|,ĊĊ|Ġ|Ġfoo|Bar"),
            ("gpt-4o", "It'S|Ġ|Ġx|=|123|4|,ĊĊ|Ġ|Ġfoo|Bar"),
        ] {
            assert_eq!(words(pre, text), expected, "{pre}");
        }
    }

    #[test]
    fn white_space_before_digits_tells_digits_first_from_words_first() {
        assert_eq!(words("smollm", "a   12"), "a|ĠĠĠ|1|2");
        assert_eq!(words("gpt-2", "a   12"), "a|ĠĠ|Ġ12");
    }

    #[test]
    fn an_unknown_name_is_nothing() {
        assert_eq!(Split::named("unheard-of"), None);
    }
}
