//! What bytes each id stands for, from how a vocabulary spells them. No library is asked again while text streams.
//!
//! Invariant: `ends` rises, its last entry is `all.len()`, and `special` is as long as `ends`.

use crate::TokenizerError;
use serde_json::Value;

/// Ids from here on are refused: the largest vocabularies in use have a quarter of a million, and the table is dense.
const MAX_IDS: u32 = 1 << 22;

/// Each id's bytes, in one piece of memory.
pub(crate) struct TokenBytes {
    all: Vec<u8>,
    /// End of each id's bytes in `all`.
    ends: Vec<u32>,
    special: Vec<bool>,
}

/// A token as a definition lists it.
pub(crate) struct Spelled<'a> {
    pub(crate) text: &'a str,
    /// Matched as a whole in text, before any splitting.
    pub(crate) is_added: bool,
    pub(crate) is_special: bool,
}

impl TokenBytes {
    /// A table of these tokens. Ids between them stand for nothing.
    pub(crate) fn new<'a>(
        form: ByteForm,
        tokens: impl IntoIterator<Item = (u32, Spelled<'a>)>,
    ) -> Result<Self, TokenizerError> {
        let mut tokens: Vec<(u32, Spelled<'a>)> = tokens.into_iter().collect();
        tokens.sort_unstable_by_key(|&(id, _)| id);
        let n = tokens.last().map_or(0, |&(id, _)| id.saturating_add(1));
        if n > MAX_IDS {
            return Err(TokenizerError::Vocab(format!(
                "token id {} is too large",
                n - 1
            )));
        }
        let mut table = Self {
            all: Vec::with_capacity(n as usize * 6),
            ends: Vec::with_capacity(n as usize),
            special: vec![false; n as usize],
        };
        for (id, token) in tokens {
            table.fill_up_to(id)?;
            form.append(&token, &mut table.all);
            table.special[id as usize] = token.is_special;
        }
        table.fill_up_to(n)?;
        Ok(table)
    }

    /// Ends every id below `id` at the bytes there are. The second of two tokens of one id adds to the first.
    fn fill_up_to(&mut self, id: u32) -> Result<(), TokenizerError> {
        let end = u32::try_from(self.all.len())
            .map_err(|_| TokenizerError::Vocab("tokens of more than 4 GiB".to_owned()))?;
        if self.ends.len() < id as usize {
            self.ends.resize(id as usize, end);
        }
        Ok(())
    }

    /// The bytes of an id; empty for an unknown one.
    pub(crate) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.all[start as usize..end as usize]
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Ids are below this.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }
}

/// How a vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ByteForm {
    /// GPT-2's: one printable character a byte.
    ByteLevel,
    /// Sentencepiece's: `▁` is a space, `<0x0A>` a byte.
    Fallback,
}

impl ByteForm {
    /// The form that a `tokenizer.json`'s `decoder` undoes.
    pub(crate) fn of(decoder: &Value) -> Result<Self, TokenizerError> {
        let has = |name| steps(decoder).any(|step| step["type"] == name);
        if has("ByteLevel") {
            Ok(Self::ByteLevel)
        } else if has("ByteFallback") || has("Metaspace") {
            Ok(Self::Fallback)
        } else {
            let name = decoder["type"].as_str().unwrap_or("none");
            Err(TokenizerError::Decoder(name.to_owned()))
        }
    }

    fn append(self, token: &Spelled<'_>, out: &mut Vec<u8>) {
        match self {
            // Added tokens are text as people write it.
            Self::ByteLevel if token.is_added => out.extend_from_slice(token.text.as_bytes()),
            Self::ByteLevel => append_byte_level(token.text, out),
            Self::Fallback => match byte_token(token.text) {
                Some(byte) => out.push(byte),
                None => out.extend_from_slice(token.text.replace('▁', " ").as_bytes()),
            },
        }
    }
}

/// Whether decoding drops a space that the tokenizer puts before every text.
pub(crate) fn drops_leading_space(decoder: &Value) -> bool {
    steps(decoder).any(|step| match step["type"].as_str() {
        Some("Strip") => step["content"] == " " && step["start"].as_u64() != Some(0),
        Some("Metaspace") => {
            step["prepend_scheme"] != "never" && step["add_prefix_space"] != Value::Bool(false)
        }
        _ => false,
    })
}

/// A decoder's steps, be it one or a sequence.
fn steps(decoder: &Value) -> impl Iterator<Item = &Value> {
    let several = decoder["decoders"].as_array().into_iter().flatten();
    several.chain(std::iter::once(decoder))
}

/// A token with a character outside of GPT-2's table stands for itself.
fn append_byte_level(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        let Some(byte) = byte_of_char(c) else {
            out.truncate(start);
            out.extend_from_slice(token.as_bytes());
            return;
        };
        out.push(byte);
    }
}

/// The byte of `<0x0A>`.
pub(crate) fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    u8::from_str_radix(hex, 16).ok().filter(|_| is_hex)
}

/// GPT-2's table read backwards: printable Latin-1 stands for itself, the other 68 bytes follow from U+0100 on.
pub(crate) fn byte_of_char(c: char) -> Option<u8> {
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
mod tests {
    use super::*;
    use serde_json::json;

    fn plain(text: &str) -> Spelled<'_> {
        Spelled {
            text,
            is_added: false,
            is_special: false,
        }
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
    fn ids_without_a_token_are_empty() {
        let special = Spelled {
            text: "Ġ",
            is_added: true,
            is_special: true,
        };
        let tokens = [(5, special), (2, plain("Ġa")), (3, plain("日"))];
        let table = TokenBytes::new(ByteForm::ByteLevel, tokens).unwrap();
        let all: Vec<&[u8]> = (0..7).map(|id| table.get(id)).collect();
        assert_eq!(
            all,
            [
                &b""[..],
                b"",
                b" a",
                "日".as_bytes(),
                b"",
                "Ġ".as_bytes(),
                b""
            ]
        );
        assert!(table.len() == 6 && table.is_special(5) && !table.is_special(2));
    }

    #[test]
    fn an_id_far_out_is_refused_before_memory_is_taken() {
        assert!(TokenBytes::new(ByteForm::Fallback, [(u32::MAX, plain("a"))]).is_err());
    }

    #[test]
    fn sentencepiece_spells_bytes_in_hexadecimal() {
        let tokens = ["<0x0A>", "<0x+A>", "▁a▁", "<0xC3>"].map(plain);
        let table = TokenBytes::new(ByteForm::Fallback, (0..).zip(tokens)).unwrap();
        let all: Vec<&[u8]> = (0..4).map(|id| table.get(id)).collect();
        assert_eq!(all, [&b"\n"[..], b"<0x+A>", b" a ", b"\xc3"]);
    }

    #[test]
    fn only_a_decoder_that_strips_drops_the_first_space() {
        let strip = |start: u32| {
            json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"},
            {"type": "Strip", "content": " ", "start": start, "stop": 0}]})
        };
        assert!(drops_leading_space(&strip(1)) && !drops_leading_space(&strip(0)));
        let metaspace = |scheme: &str| json!({"type": "Metaspace", "prepend_scheme": scheme});
        assert!(
            drops_leading_space(&metaspace("first")) && !drops_leading_space(&metaspace("never"))
        );
        assert!(!drops_leading_space(&json!({"type": "ByteLevel"})));
    }
}
