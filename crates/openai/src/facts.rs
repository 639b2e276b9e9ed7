//! What routing needs to know of a request's body, found in one pass, while its pieces arrive, without copying them.
//!
//! A [`Scanner`] is given the pieces, one after another, and keeps places: [`Facts`] says where in the whole body the
//! model's name or the prompt stand, and [`slices`] gives those bytes out of the pieces. It reads every form of request:
//! completions, chats, responses, embeddings, conversations, Anthropic's messages. A body that is not exactly one JSON
//! object is refused: a server that reads JSON more leniently could find in it what was not found here.

mod scan;

pub use scan::{ScanError, Scanner};

use crate::ApiError;
use std::borrow::Cow;
use std::ops::Range;

/// Where something stands in a body, in bytes.
pub type Span = Range<usize>;

/// What a body says. Of a field that is repeated the last counts, as Python takes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The value of `model`, quotes included.
    pub model: Option<Span>,
    /// The values that make up the prompt, in the order in which a chat template would use them, as JSON: `cache_salt`,
    /// `tools`, `instructions` or `system`, and the text: `prompt`, `messages`, `input`, `items` or `token_ids`.
    pub prompt: [Option<Span>; 4],
    /// What the text is made of.
    pub form: Form,
    /// Kinds of data in messages that are not text.
    pub media: Media,
    /// Whether the answer is to be streamed.
    pub stream: bool,
    /// Most tokens of the answer, if that is said: `max_completion_tokens`, else `max_tokens` or `max_output_tokens`.
    pub max_tokens: Option<u32>,
    /// The values of `kv_transfer_params` that are not null, in order.
    pub kv_transfer_params: Vec<Span>,
}

/// What the text of a prompt is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// There is none.
    #[default]
    Missing,
    /// One string.
    Text,
    /// This many strings.
    Texts(u32),
    /// This many token ids.
    Tokens(u32),
    /// Lists of token ids.
    TokenLists {
        /// How many lists.
        lists: u32,
        /// Ids of all of them together.
        tokens: u32,
    },
    /// This many messages, or other objects.
    Messages(u32),
    /// An empty list, null, or something that is no prompt.
    Other,
}

/// A set of kinds of data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Media {
    /// Pictures.
    pub image: bool,
    /// Sound.
    pub audio: bool,
    /// Films.
    pub video: bool,
}

impl Media {
    /// Whether there is anything but text.
    #[must_use]
    pub fn any(self) -> bool {
        self.image || self.audio || self.video
    }
}

impl Facts {
    /// Reads a body that is there as a whole, in one piece or several.
    ///
    /// # Errors
    /// vLLM's error for a body that is not JSON, or no object.
    pub fn read(pieces: &[impl AsRef<[u8]>]) -> Result<Self, ApiError> {
        let mut scanner = Scanner::new();
        for piece in pieces {
            scanner.push(piece.as_ref())?;
        }
        Ok(scanner.finish()?)
    }

    /// The model's name, if it is one; borrowed if it stands in one piece and without escapes.
    #[must_use]
    pub fn model_name<'a>(&self, pieces: &'a [impl AsRef<[u8]>]) -> Option<Cow<'a, str>> {
        let mut found = slices(pieces, self.model.as_ref()?);
        let (first, second) = (found.next()?, found.next());
        match second {
            None => name(first),
            Some(second) => {
                let mut whole = [first, second].concat();
                found.for_each(|slice| whole.extend_from_slice(slice));
                name(&whole).map(|name| Cow::Owned(name.into_owned()))
            }
        }
    }

    /// The bytes that make up the prompt, in order.
    pub fn prompt_slices<'a, P: AsRef<[u8]>>(
        &self,
        pieces: &'a [P],
    ) -> impl Iterator<Item = &'a [u8]> {
        let spans = self.prompt.iter().flatten();
        spans.flat_map(move |span| slices(pieces, span))
    }

    /// Length of the prompt in tokens, if it is given as token ids.
    #[must_use]
    pub fn tokens(&self) -> Option<u32> {
        match self.form {
            Form::Tokens(tokens) | Form::TokenLists { tokens, .. } => Some(tokens),
            _ => None,
        }
    }
}

/// `text` as a JSON string: what takes the place of a model's name.
#[must_use]
pub fn json_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The text of a JSON string.
fn name(json: &[u8]) -> Option<Cow<'_, str>> {
    let inside = json.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    if inside.contains(&b'\\') {
        return serde_json::from_slice(json).ok().map(Cow::Owned);
    }
    std::str::from_utf8(inside).ok().map(Cow::Borrowed)
}

/// The bytes of `span`, which counts from the beginning of the first piece.
pub fn slices<'a, P: AsRef<[u8]>>(
    pieces: &'a [P],
    span: &Span,
) -> impl Iterator<Item = &'a [u8]> + use<'a, P> {
    let (from, to) = (span.start, span.end);
    let mut at = 0;
    pieces.iter().filter_map(move |piece| {
        let piece = piece.as_ref();
        let start = from.saturating_sub(at).min(piece.len());
        let end = to.saturating_sub(at).min(piece.len());
        at += piece.len();
        (start < end).then(|| &piece[start..end])
    })
}

#[cfg(test)]
mod tests;
