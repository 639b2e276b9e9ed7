//! Puts the name that the client asked for back into an answer whose server knows the model by another one.
//!
//! The value of `"model"` is found by its bytes, wherever the answer's pieces end; JSON is not read. Inside of a text
//! the quotes would be escaped, so that nothing there looks like it.

use baton_http::Pieces;
use bytes::{Bytes, BytesMut};
use memchr::memmem::Finder;

/// Replaces one name by another in what passes.
#[derive(Debug)]
pub(crate) struct Restore {
    /// The two ways in which servers write it, without and with a blank.
    wanted: [Finder<'static>; 2],
    replacement: Bytes,
    /// Bytes of the value that the replacement takes the place of, quotes included.
    value: usize,
    /// What may be the beginning of a match.
    held: BytesMut,
}

impl Restore {
    /// Puts `asked`, a JSON string, in the place of `served`, another.
    pub(crate) fn new(served: &str, asked: &str) -> Self {
        let find = |key: &str| Finder::new(&[key, served].concat()).into_owned();
        Self {
            wanted: [find("\"model\":"), find("\"model\": ")],
            replacement: Bytes::copy_from_slice(asked.as_bytes()),
            value: served.len(),
            held: BytesMut::new(),
        }
    }

    /// Takes a piece and gives what can go on.
    pub(crate) fn push(&mut self, piece: Bytes, last: bool, out: &mut Pieces) {
        let mut text = if self.held.is_empty() {
            piece
        } else {
            self.held.extend_from_slice(&piece);
            self.held.split().freeze()
        };
        while let Some(value) = self.next_value(&text) {
            out.push(text.split_to(value));
            out.push(self.replacement.clone());
            drop(text.split_to(self.value));
        }
        let keep = if last { 0 } else { self.begun(&text) };
        let rest = text.split_off(text.len() - keep);
        out.push(text);
        self.held.extend_from_slice(&rest);
    }

    /// Where the next value begins.
    fn next_value(&self, text: &[u8]) -> Option<usize> {
        let found = self.wanted.iter().filter_map(|wanted| {
            let end = wanted.find(text)? + wanted.needle().len();
            Some(end - self.value)
        });
        found.min()
    }

    /// Bytes at the end of `text` with which a match may begin.
    fn begun(&self, text: &[u8]) -> usize {
        let of = |wanted: &Finder<'_>| {
            let needle = wanted.needle();
            let most = text.len().min(needle.len() - 1);
            (1..=most)
                .rev()
                .find(|&n| text.ends_with(&needle[..n]))
                .unwrap_or(0)
        };
        self.wanted.iter().map(of).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn restored(pieces: &[&str]) -> String {
        let mut restore = Restore::new("\"base\"", "\"alias\"");
        let mut out = Pieces::default();
        for piece in pieces {
            restore.push(Bytes::copy_from_slice(piece.as_bytes()), false, &mut out);
        }
        restore.push(Bytes::new(), true, &mut out);
        String::from_utf8(out.into_bytes().to_vec()).unwrap()
    }

    #[test]
    fn the_name_is_put_back_wherever_pieces_end() {
        let text =
            r#"{"model":"base","x":"\"model\":\"base\"","model": "base","model":"base2","model"#;
        let expected =
            r#"{"model":"alias","x":"\"model\":\"base\"","model": "alias","model":"base2","model"#;
        for at in 0..text.len() {
            assert_eq!(restored(&[&text[..at], &text[at..]]), expected);
        }
    }

    proptest! {
        #[test]
        fn how_the_answer_is_cut_does_not_matter(text in "(\"model\": ?|\"base\"|[a-z\",{])*", cuts in prop::collection::vec(0usize..64, 0..8)) {
            let mut rest = &text[..];
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            prop_assert_eq!(restored(&pieces), restored(&[&text]));
        }
    }
}
