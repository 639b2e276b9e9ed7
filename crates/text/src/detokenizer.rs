//! Ids to text while they stream in: a character is written once all its bytes are there.

use crate::{SpecialTokens, Tokenizer};

/// One sequence's state. The pieces put together are what the bytes of all tokens decode to at once, U+FFFD standing for
/// what is no UTF-8. Amortized constant time a token; no allocation but the growth of the caller's string.
#[derive(Debug)]
pub struct Detokenizer {
    special: SpecialTokens,
    start: Start,
    /// Bytes of a character that is not whole yet, at most three between calls.
    held: Vec<u8>,
}

/// Whether the space that some tokenizers put before a text is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    Ahead,
    Passed,
}

impl Detokenizer {
    /// For the tokens that follow a prompt: a space at their start is text.
    pub fn new(special: SpecialTokens) -> Self {
        Self {
            special,
            start: Start::Passed,
            held: Vec::new(),
        }
    }

    /// For the tokens of a whole text: the pieces together are [`Tokenizer::decode`] of all of them.
    pub fn of_whole_text(special: SpecialTokens) -> Self {
        Self {
            special,
            start: Start::Ahead,
            held: Vec::new(),
        }
    }

    /// Takes a token; appends the text that has become certain to `out`.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32, out: &mut String) {
        if self.special == SpecialTokens::Skip && tokenizer.is_special(token) {
            return;
        }
        let mut bytes = tokenizer.token_bytes(token);
        if self.start == Start::Ahead && !bytes.is_empty() {
            self.start = Start::Passed;
            bytes = tokenizer.without_own_space(bytes);
        }
        match std::str::from_utf8(bytes) {
            // Nearly every token: whole characters, after whole characters.
            Ok(text) if self.held.is_empty() => out.push_str(text),
            _ => self.push_bytes(bytes, out),
        }
    }

    /// Appends what stands for an unfinished character.
    pub fn finish(&mut self, out: &mut String) {
        if !self.held.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.held.clear();
        }
    }

    fn push_bytes(&mut self, bytes: &[u8], out: &mut String) {
        self.held.extend_from_slice(bytes);
        let mut start = 0;
        loop {
            let rest = &self.held[start..];
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    start = self.held.len();
                    break;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    out.push_str(std::str::from_utf8(&rest[..valid]).unwrap_or_default());
                    start += valid;
                    // No length means that the end cuts a character off: it may still become whole.
                    let Some(bad) = error.error_len() else { break };
                    out.push(char::REPLACEMENT_CHARACTER);
                    start += bad;
                }
            }
        }
        self.held.drain(..start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AddSpecial;
    use crate::gguf_vocab::tests::llama;
    use crate::tokenizer::tests::byte_level;
    use proptest::prelude::*;

    fn stream(ids: &[u32], special: SpecialTokens) -> (Vec<String>, String) {
        let tokenizer = byte_level();
        let mut detokenizer = Detokenizer::new(special);
        let mut pieces = Vec::new();
        for &id in ids {
            let mut piece = String::new();
            detokenizer.push(&tokenizer, id, &mut piece);
            pieces.push(piece);
        }
        let mut tail = String::new();
        detokenizer.finish(&mut tail);
        let whole = pieces.concat() + &tail;
        (pieces, whole)
    }

    #[test]
    fn a_character_is_never_split() {
        let ids: Vec<u32> = "é🥇".bytes().map(u32::from).collect();
        let (pieces, whole) = stream(&ids, SpecialTokens::Keep);
        assert_eq!(pieces, ["", "é", "", "", "", "🥇"]);
        assert_eq!(whole, "é🥇");
    }

    #[test]
    fn an_unfinished_character_ends_as_a_replacement() {
        assert_eq!(stream(&[0xf0, 0x9f], SpecialTokens::Keep).1, "\u{fffd}");
    }

    #[test]
    fn only_the_first_text_loses_the_tokenizers_own_space() {
        let tokenizer = Tokenizer::from_gguf(&llama()).unwrap();
        let ids = tokenizer.encode("hello hello", AddSpecial::Yes).unwrap();
        let stream = |mut detokenizer: Detokenizer| {
            let mut out = String::new();
            ids.iter()
                .for_each(|&id| detokenizer.push(&tokenizer, id, &mut out));
            out
        };
        assert_eq!(
            stream(Detokenizer::of_whole_text(SpecialTokens::Skip)),
            "hello hello"
        );
        assert_eq!(
            stream(Detokenizer::of_whole_text(SpecialTokens::Keep)),
            "<s> hello hello"
        );
        assert_eq!(
            stream(Detokenizer::new(SpecialTokens::Skip)),
            " hello hello"
        );
    }

    proptest! {
        #[test]
        fn pieces_put_together_are_the_whole(ids in prop::collection::vec(0u32..270, 0..60)) {
            for tokenizer in [byte_level(), Tokenizer::from_gguf(&llama()).unwrap()] {
                for special in [SpecialTokens::Keep, SpecialTokens::Skip] {
                    let mut detokenizer = Detokenizer::of_whole_text(special);
                    let mut out = String::new();
                    ids.iter().for_each(|&id| detokenizer.push(&tokenizer, id, &mut out));
                    detokenizer.finish(&mut out);
                    prop_assert_eq!(out, tokenizer.decode(&ids, special));
                }
            }
        }
    }
}
