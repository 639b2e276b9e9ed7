//! Decode's answer with prefill's count of cached tokens.
//!
//! To decode, everything it was handed looks cached; what the client wants to know is what prefill had cached. Only
//! `usage.prompt_tokens_details.cached_tokens` is touched. Answers pass through as they come: of a stream only events
//! that say `"usage"` are read, of any other answer only the value of its top-level `usage` is held back.

use crate::edit::{Edit, Object};
use crate::field::Field;
use baton_http::Pieces;
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

/// Longest value of `usage` that is looked at.
const MAX_USAGE: usize = 64 << 10;
/// Longest line of a stream that is held back until it is whole; a longer one is passed on unread.
const MAX_LINE: usize = 1 << 20;
const NAME: &[u8] = b"\"usage\"";

/// Prefill's count of cached tokens, a JSON number. It may come later than the head of the answer that it goes into.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cached(Arc<OnceLock<Bytes>>);

impl Cached {
    pub(crate) fn tell(&self, number: Bytes) {
        // Told once; a second number would come too late for the answer.
        let _ = self.0.set(number);
    }

    /// None, as long as nothing was told.
    fn number(&self) -> Bytes {
        self.0.get().cloned().unwrap_or(Bytes::from_static(b"0"))
    }
}

impl From<Bytes> for Cached {
    fn from(number: Bytes) -> Self {
        Self(Arc::new(OnceLock::from(number)))
    }
}

/// What kind of answer is patched.
#[derive(Debug)]
pub(crate) enum Patch {
    Stream(StreamPatch),
    Whole(WholePatch),
}

impl Patch {
    /// What can be passed on once `data` came.
    pub(crate) fn push(&mut self, data: Bytes) -> Pieces {
        match self {
            Self::Stream(patch) => patch.push(data),
            Self::Whole(patch) => patch.push(&data),
        }
    }

    /// What was held back when the answer ended.
    pub(crate) fn finish(&mut self) -> Pieces {
        match self {
            Self::Stream(patch) => {
                let rest = patch.line.split().freeze();
                patched_line(&rest, &patch.cached).unwrap_or_else(|| rest.into())
            }
            Self::Whole(patch) => patch.held.take().unwrap_or_default().freeze().into(),
        }
    }
}

/// `usage` with `cached` as its count of cached tokens; nothing if it is no object.
fn patched_usage(usage: Bytes, cached: &Cached) -> Option<Pieces> {
    let usage = Object::parse(usage).ok()?;
    let details = match usage.object(Field::PromptTokensDetails) {
        Some(details) => details,
        None => Object::parse("{}".into()).ok()?,
    };
    let details = Edit::of(&details)
        .set(Field::CachedTokens, cached.number())
        .finish();
    Some(
        Edit::of(&usage)
            .set(Field::PromptTokensDetails, details)
            .finish(),
    )
}

/// Server-sent events.
#[derive(Debug)]
pub(crate) struct StreamPatch {
    cached: Cached,
    /// The part of a line that has come so far.
    line: BytesMut,
    /// The rest of the line is passed on unread: it is too long.
    skip: bool,
}

impl StreamPatch {
    pub(crate) fn new(cached: Cached) -> Self {
        Self {
            cached,
            line: BytesMut::new(),
            skip: false,
        }
    }

    fn push(&mut self, mut data: Bytes) -> Pieces {
        let mut out = Pieces::default();
        if self.skip || !self.line.is_empty() {
            let Some(end) = data.iter().position(|&b| b == b'\n') else {
                self.hold(data, &mut out);
                return out;
            };
            let rest = data.split_to(end + 1);
            self.hold(rest, &mut out);
            self.skip = false;
            let line = self.line.split().freeze();
            out.append(self.lines(line));
        }
        let whole = data
            .iter()
            .rposition(|&b| b == b'\n')
            .map_or(0, |end| end + 1);
        let lines = data.split_to(whole);
        out.append(self.lines(lines));
        self.hold(data, &mut out);
        out
    }

    /// Keeps part of a line for later, unless the line is too long for that.
    fn hold(&mut self, part: Bytes, out: &mut Pieces) {
        if !self.skip && self.line.len() + part.len() <= MAX_LINE {
            self.line.extend_from_slice(&part);
            return;
        }
        self.skip = true;
        out.push(self.line.split().freeze());
        out.push(part);
    }

    /// Whole lines, patched where they say `"usage"`.
    fn lines(&self, mut lines: Bytes) -> Pieces {
        let mut out = Pieces::default();
        while let Some(found) = find(&lines, NAME) {
            let before = lines.get(..found).unwrap_or_default();
            let start = before
                .iter()
                .rposition(|&b| b == b'\n')
                .map_or(0, |n| n + 1);
            out.push(lines.split_to(start));
            let end = lines
                .iter()
                .position(|&b| b == b'\n')
                .map_or(lines.len(), |n| n + 1);
            let line = lines.split_to(end);
            match patched_line(&line, &self.cached) {
                Some(patched) => out.append(patched),
                None => out.push(line),
            }
        }
        out.push(lines);
        out
    }
}

/// `data: {…"usage":{…}…}`, patched.
fn patched_line(line: &Bytes, cached: &Cached) -> Option<Pieces> {
    let json = line.strip_prefix(b"data:")?.trim_ascii();
    let start = line.len() - line.strip_prefix(b"data:")?.trim_ascii_start().len();
    let end = start + json.len();
    let event = Object::parse(line.slice(start..end)).ok()?;
    let usage = patched_usage(event.given(Field::Usage)?, cached)?;
    let mut out = Pieces::from(line.slice(..start));
    out.append(Edit::of(&event).set(Field::Usage, usage).finish());
    out.push(line.slice(end..));
    Some(out)
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    let first = *what.first()?;
    let mut from = 0;
    loop {
        let rest = text.get(from..)?;
        let at = from + rest.iter().position(|&b| b == first)?;
        if text.get(at..)?.starts_with(what) {
            return Some(at);
        }
        from = at + 1;
    }
}

/// One JSON object, read as it comes.
#[derive(Debug)]
pub(crate) struct WholePatch {
    cached: Cached,
    depth: u64,
    place: Place,
    escaped: bool,
    /// How much of a name at depth one is like `usage` so far; nothing if it is another.
    matched: Option<usize>,
    /// The value of `usage` so far.
    held: Option<BytesMut>,
}

/// Where in the text the last byte was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Between tokens, in a number or in a word.
    Open,
    /// In a string that is a value or a name below depth one.
    Text,
    /// In a name at depth one.
    Name,
    /// Behind the name `usage` at depth one.
    Colon,
    /// Behind its colon.
    Value,
}

impl WholePatch {
    pub(crate) fn new(cached: Cached) -> Self {
        Self {
            cached,
            depth: 0,
            place: Place::Open,
            escaped: false,
            matched: None,
            held: None,
        }
    }

    fn push(&mut self, data: &Bytes) -> Pieces {
        let mut out = Pieces::default();
        let mut copied = 0;
        let mut next = self.skip_text(data, 0);
        while let Some(&byte) = data.get(next) {
            let at = next;
            if self.place == Place::Value && !byte.is_ascii_whitespace() {
                self.place = Place::Open;
                if byte == b'{' {
                    out.push(data.slice(copied..at));
                    copied = at;
                    self.held = Some(BytesMut::new());
                }
            }
            self.step(byte);
            let ended = self.held.is_some() && self.depth <= 1 && self.place == Place::Open;
            if let Some(mut held) = self.held.take_if(|_| ended) {
                held.extend_from_slice(data.get(copied..=at).unwrap_or_default());
                copied = at + 1;
                let usage = held.freeze();
                let patched = patched_usage(usage.clone(), &self.cached);
                out.append(patched.unwrap_or_else(|| usage.into()));
            }
            next = self.skip_text(data, at + 1);
        }
        let rest = data.slice(copied..);
        match &mut self.held {
            Some(held) if held.len() + rest.len() <= MAX_USAGE => held.extend_from_slice(&rest),
            _ => {
                out.append(self.held.take().unwrap_or_default().freeze().into());
                out.push(rest);
            }
        }
        out
    }

    /// From `at`, the first byte that is not just more of a string's text: most of an answer is.
    fn skip_text(&self, data: &[u8], at: usize) -> usize {
        if self.place != Place::Text || self.escaped {
            return at;
        }
        let rest = data.get(at..).unwrap_or_default();
        let ends = rest.iter().position(|b| matches!(b, b'"' | b'\\'));
        at + ends.unwrap_or(rest.len())
    }

    /// Follows the text by one byte.
    fn step(&mut self, byte: u8) {
        match self.place {
            Place::Text | Place::Name if self.escaped => {
                self.escaped = false;
                self.matched = None;
            }
            Place::Text | Place::Name if byte == b'\\' => self.escaped = true,
            Place::Text if byte == b'"' => self.place = Place::Open,
            Place::Text => {}
            Place::Name if byte == b'"' => {
                let is_usage = self.matched.take() == Some(NAME.len() - 1);
                self.place = if is_usage { Place::Colon } else { Place::Open };
            }
            Place::Name => {
                let next = self.matched.filter(|&n| NAME.get(n) == Some(&byte));
                self.matched = next.map(|n| n + 1);
            }
            Place::Colon if byte == b':' => self.place = Place::Value,
            Place::Colon | Place::Value if byte.is_ascii_whitespace() => {}
            Place::Colon | Place::Value | Place::Open => self.open(byte),
        }
    }

    fn open(&mut self, byte: u8) {
        self.place = Place::Open;
        match byte {
            b'{' | b'[' => self.depth = self.depth.saturating_add(1),
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b'"' if self.depth == 1 => {
                // A value is taken for a name here, which does no harm: no colon follows it.
                self.matched = Some(1);
                self.place = Place::Name;
            }
            b'"' => self.place = Place::Text,
            _ => {}
        }
    }
}

/// An answer's body on its way through a [`Patch`].
#[derive(Debug)]
pub(crate) struct Patched<B> {
    upstream: Option<B>,
    patch: Patch,
    ready: Pieces,
}

impl<B> Patched<B> {
    pub(crate) fn new(upstream: B, patch: Patch) -> Self {
        Self {
            upstream: Some(upstream),
            patch,
            ready: Pieces::default(),
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Patched<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        loop {
            if let Poll::Ready(Some(Ok(frame))) = Pin::new(&mut this.ready).poll_frame(cx) {
                return Poll::Ready(Some(Ok(frame)));
            }
            let Some(upstream) = &mut this.upstream else {
                return Poll::Ready(None);
            };
            match ready!(Pin::new(upstream).poll_frame(cx)) {
                None => {
                    this.upstream = None;
                    this.ready = this.patch.finish();
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.ready = this.patch.push(data),
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.upstream.is_none() && self.ready.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn twelve() -> Cached {
        Bytes::from("12").into()
    }

    use proptest::prelude::*;

    fn run(mut patch: Patch, text: &str, cut: &[usize]) -> String {
        let mut out = Pieces::default();
        let mut rest = Bytes::copy_from_slice(text.as_bytes());
        for &n in cut {
            let part = rest.split_to(n.min(rest.len()));
            out.append(patch.push(part));
        }
        out.append(patch.push(rest));
        out.append(patch.finish());
        String::from_utf8(out.into_bytes().to_vec()).unwrap()
    }

    fn whole(text: &str, cut: &[usize]) -> String {
        run(Patch::Whole(WholePatch::new(twelve())), text, cut)
    }

    fn stream(text: &str, cut: &[usize]) -> String {
        run(Patch::Stream(StreamPatch::new(twelve())), text, cut)
    }

    const ANSWER: &str = r#"{"id":"usage","choices":[{"usage":{"a":1},"text":"\"usage\":{"}],"usage" : {"prompt_tokens":18446744073709551615,"prompt_tokens_details":{"cached_tokens":64, "x":1.50},"total_tokens":7},"z":"\\"}"#;

    #[test]
    fn the_count_is_replaced_and_nothing_else() {
        assert_eq!(whole(ANSWER, &[]), ANSWER.replace("64", "12"));
    }

    #[test]
    fn a_count_that_is_missing_is_added() {
        for details in [
            "",
            r#","prompt_tokens_details":null"#,
            r#","prompt_tokens_details":{}"#,
        ] {
            assert_eq!(
                whole(
                    &format!(r#"{{"usage":{{"total_tokens":7{details}}}}}"#),
                    &[]
                ),
                r#"{"usage":{"total_tokens":7,"prompt_tokens_details":{"cached_tokens":12}}}"#
            );
        }
    }

    #[test]
    fn what_has_no_usage_passes_as_it_is() {
        for text in [
            "",
            "no JSON",
            "{",
            r#"{"usage":null,"x":{"usage":{}}}"#,
            r#"{"usage":"x"}"#,
            r#"["usage",{"a":1}]"#,
            r#"{"usage":{"a":1"#,
            r#"{"x":"usage","y":{"z":1}}"#,
        ] {
            assert_eq!(whole(text, &[3, 5]), text);
            assert_eq!(stream(text, &[3, 5]), text);
        }
    }

    #[test]
    fn an_absurdly_long_usage_is_not_held_back() {
        let long = format!(r#"{{"usage":{{"x":"{}"}}}}"#, "y".repeat(2 * MAX_USAGE));
        assert_eq!(whole(&long, &[MAX_USAGE, MAX_USAGE]), long);
    }

    const EVENTS: &str = "event: x\ndata: {\"text\":\"\\\"usage\\\"\",\"usage\":null}\n\ndata:{\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":64}}}\r\n\r\ndata: [DONE]\n\n";

    #[test]
    fn events_that_say_usage_are_patched() {
        assert_eq!(stream(EVENTS, &[]), EVENTS.replace("64", "12"));
    }

    #[test]
    fn what_is_not_changed_is_passed_on_in_the_bytes_it_came_in() {
        let uncopied = |patch: &mut Patch, piece: &'static str| {
            let out = patch.push(piece.into()).into_bytes();
            assert_eq!(
                (out.as_ptr(), out.len()),
                (piece.as_ptr(), piece.len()),
                "{piece}"
            );
        };
        let mut events = Patch::Stream(StreamPatch::new(twelve()));
        for piece in ["data: {\"a\":1}\n\n", "data: {{{\n\n", ": x\r\n", "\n"] {
            uncopied(&mut events, piece);
        }
        let mut answer = Patch::Whole(WholePatch::new(twelve()));
        for piece in ["{\"choices\":[", "{\"text\":\"", "\\\"usage\\\":{", "\"}]"] {
            uncopied(&mut answer, piece);
        }
    }

    #[test]
    fn an_overlong_line_is_passed_on_unread_and_the_next_is_read() {
        let long = format!(
            "data: {{\"x\":\"{}\",\"usage\":{{}}}}\n",
            "y".repeat(MAX_LINE)
        );
        let text = format!("{long}data: {{\"usage\":{{}}}}\n\n");
        let patched = stream(&text, &[10, 1000, MAX_LINE]);
        assert!(patched.starts_with(&long));
        assert!(
            patched.ends_with(
                "data: {\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":12}}}\n\n"
            )
        );
    }

    proptest! {
        #[test]
        fn wherever_the_pieces_are_cut_the_answer_is_the_same(cut in prop::collection::vec(0usize..40, 0..12)) {
            prop_assert_eq!(whole(ANSWER, &cut), ANSWER.replace("64", "12"));
            prop_assert_eq!(stream(EVENTS, &cut), EVENTS.replace("64", "12"));
        }
    }
}
