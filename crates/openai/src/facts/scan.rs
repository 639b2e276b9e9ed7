//! The scanner: JSON's grammar as a machine that can stop between any two bytes.
//!
//! It accepts what serde_json accepts (a test compares them), but for values that nest more than [`MAX_DEPTH`] deep,
//! which servers refuse as well. Nothing is built of a value: of strings, which are most of a long body, only the end is
//! looked for, many bytes at a time.

use super::{Facts, Form, Media, Span};
use crate::{ApiError, ErrorKind};

/// Containers that may be open at a time.
const MAX_DEPTH: usize = 512;
/// Longest key that may be one of ours: twenty letters, each as an escape of six.
const MAX_CAPTURE: usize = 128;
/// Open containers in which the parts of a message's content stand: body, messages, message, content, part.
const PART_DEPTH: usize = 5;

/// Why a body is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// There is nothing in it.
    #[error("nothing")]
    Empty,
    /// It is something else than an object.
    #[error("not an object")]
    NotAnObject,
    /// It is not JSON.
    #[error("{reason} at byte {at}")]
    Syntax {
        /// Where, counted in bytes from the beginning.
        at: usize,
        /// What was wrong or missing there.
        reason: &'static str,
    },
}

impl From<ScanError> for ApiError {
    fn from(error: ScanError) -> Self {
        match error {
            ScanError::Empty => Self::validation("body".to_owned(), "field required"),
            ScanError::NotAnObject => {
                Self::validation("body".to_owned(), "input should be a valid object")
            }
            ScanError::Syntax { .. } => Self {
                kind: ErrorKind::Validation,
                message: format!("1 validation error:\n  body: not valid JSON: {error}"),
                param: Some("body".to_owned()),
            },
        }
    }
}

/// What may come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The body's first byte.
    Start,
    /// A key, or the end of the object.
    FirstKey,
    Key,
    Colon,
    /// A value, or the end of the array.
    FirstValue,
    Value,
    /// A comma, or the end of what is open.
    AfterValue,
    /// More of a string.
    InString {
        is_key: bool,
    },
    /// What follows a backslash.
    Escape {
        is_key: bool,
    },
    /// This many digits of an escape.
    Hex {
        is_key: bool,
        left: u8,
    },
    Number(Number),
    /// The rest of a word.
    Word(&'static [u8]),
    /// Nothing more.
    Done,
}

/// How far a number has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Integer,
    Dot,
    Fraction,
    E,
    ESign,
    Exponent,
}

impl Number {
    /// After `byte`; `None` if that is no part of the number.
    fn after(self, byte: u8) -> Option<Self> {
        match (self, byte) {
            (Self::Minus, b'0') => Some(Self::Zero),
            (Self::Minus, b'1'..=b'9') | (Self::Integer, b'0'..=b'9') => Some(Self::Integer),
            (Self::Zero | Self::Integer, b'.') => Some(Self::Dot),
            (Self::Dot | Self::Fraction, b'0'..=b'9') => Some(Self::Fraction),
            (Self::Zero | Self::Integer | Self::Fraction, b'e' | b'E') => Some(Self::E),
            (Self::E, b'+' | b'-') => Some(Self::ESign),
            (Self::E | Self::ESign | Self::Exponent, b'0'..=b'9') => Some(Self::Exponent),
            _ => None,
        }
    }

    fn may_end(self) -> bool {
        matches!(
            self,
            Self::Zero | Self::Integer | Self::Fraction | Self::Exponent
        )
    }
}

/// The fields that matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Model,
    /// Part of the prompt, by its place.
    Prompt(usize),
    Stream,
    MaxTokens,
    MaxCompletionTokens,
    KvTransferParams,
    Other,
}

const TEXT: Field = Field::Prompt(3);

fn field(key: &[u8]) -> Field {
    match key {
        b"model" => Field::Model,
        b"cache_salt" => Field::Prompt(0),
        b"tools" => Field::Prompt(1),
        b"instructions" | b"system" => Field::Prompt(2),
        b"prompt" | b"messages" | b"input" | b"items" | b"token_ids" => TEXT,
        b"stream" => Field::Stream,
        b"max_tokens" | b"max_output_tokens" => Field::MaxTokens,
        b"max_completion_tokens" => Field::MaxCompletionTokens,
        b"kv_transfer_params" => Field::KvTransferParams,
        _ => Field::Other,
    }
}

/// What is kept of a short string or number.
#[derive(Debug)]
struct Capture {
    bytes: [u8; MAX_CAPTURE],
    len: usize,
    is_on: bool,
    has_escape: bool,
}

impl Capture {
    fn start(&mut self, is_on: bool) {
        (self.len, self.is_on, self.has_escape) = (0, is_on, false);
    }

    fn add(&mut self, part: &[u8]) {
        if !self.is_on {
            return;
        }
        match self.bytes.get_mut(self.len..self.len + part.len()) {
            Some(room) => {
                room.copy_from_slice(part);
                self.len += part.len();
            }
            // Too long to be anything that is looked for.
            None => self.start(false),
        }
    }

    fn taken(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Reads a body piece by piece. Its memory does not depend on the body, but for repeated `kv_transfer_params`.
#[derive(Debug)]
pub struct Scanner {
    /// Bytes of the pieces before this one.
    before: usize,
    state: State,
    depth: usize,
    /// A bit for each open container: whether it is an object.
    objects: [u64; MAX_DEPTH / 64],
    utf8: Utf8,
    capture: Capture,
    /// The top-level field whose value is being read, and where that began.
    field: Field,
    value_start: usize,
    value_first: u8,
    /// The next value at [`PART_DEPTH`] says what kind of part it is.
    names_part: bool,
    shape: Shape,
    max_completion_tokens: Option<u32>,
    found: Facts,
}

/// What has been seen of the text.
#[derive(Clone, Copy, Debug, Default)]
struct Shape {
    /// First byte of the first element.
    element: u8,
    /// First byte of the first element of the first element.
    inner: u8,
    elements: u32,
    numbers: u32,
    inner_numbers: u32,
}

impl Default for Scanner {
    fn default() -> Self {
        Self::new()
    }
}

impl Scanner {
    /// A scanner that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self {
            before: 0,
            state: State::Start,
            depth: 0,
            objects: [0; MAX_DEPTH / 64],
            utf8: Utf8::default(),
            capture: Capture {
                bytes: [0; MAX_CAPTURE],
                len: 0,
                is_on: false,
                has_escape: false,
            },
            field: Field::Other,
            value_start: 0,
            value_first: 0,
            names_part: false,
            shape: Shape::default(),
            max_completion_tokens: None,
            found: Facts::default(),
        }
    }

    /// Bytes read so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.before
    }

    /// Whether nothing was read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.before == 0
    }

    /// Reads the next piece.
    ///
    /// # Errors
    /// [`ScanError`], as soon as it is clear that the body is none. The scanner is then of no use any more.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), ScanError> {
        self.utf8
            .push(piece)
            .map_err(|at| syntax(self.before + at, "bytes that are not UTF-8"))?;
        let mut at = 0;
        while let Some(&byte) = piece.get(at) {
            at = match self.state {
                State::InString { is_key } => self.read_string(piece, at, is_key)?,
                State::Number(Number::Integer) if byte.is_ascii_digit() => {
                    self.read_digits(piece, at)
                }
                _ => {
                    self.step(byte, self.before + at)?;
                    at + 1
                }
            };
        }
        self.before += piece.len();
        Ok(())
    }

    /// Reads on in a string and returns where it stopped: at its end, at the piece's, or at an escape that is not there
    /// as a whole.
    fn read_string(&mut self, piece: &[u8], at: usize, is_key: bool) -> Result<usize, ScanError> {
        let mut at = at;
        loop {
            let plain = plain_len(&piece[at..]);
            self.capture.add(&piece[at..at + plain]);
            at += plain;
            match piece[at..] {
                [] => return Ok(at),
                [b'\\', next, ..] if is_short_escape(next) => {
                    self.capture.has_escape = true;
                    self.capture.add(&piece[at..at + 2]);
                    at += 2;
                }
                [byte, ..] => {
                    self.end_plain(byte, is_key, self.before + at)?;
                    return Ok(at + 1);
                }
            }
        }
    }

    fn read_digits(&mut self, piece: &[u8], at: usize) -> usize {
        let is_digit = |b: &&u8| b.is_ascii_digit();
        let end = at + piece[at..].iter().take_while(is_digit).count();
        self.capture.add(&piece[at..end]);
        end
    }

    /// Ends the body.
    ///
    /// # Errors
    /// [`ScanError`], if it is not whole.
    pub fn finish(mut self) -> Result<Facts, ScanError> {
        match self.state {
            State::Done => {
                let max_tokens = self.max_completion_tokens.or(self.found.max_tokens);
                self.found.max_tokens = max_tokens;
                Ok(self.found)
            }
            State::Start => Err(ScanError::Empty),
            _ => Err(syntax(self.before, "unexpected end")),
        }
    }

    /// Reads a byte that is not in the middle of a string.
    fn step(&mut self, byte: u8, at: usize) -> Result<(), ScanError> {
        match self.state {
            State::Number(number) => match number.after(byte) {
                Some(next) => {
                    self.capture.add(&[byte]);
                    self.state = State::Number(next);
                    Ok(())
                }
                None if number.may_end() => {
                    self.end_value(at);
                    self.between(byte, at)
                }
                None => Err(syntax(at, "a number that is none")),
            },
            State::Word(rest) => match rest.split_first() {
                Some((&expected, rest)) if expected == byte => {
                    self.state = State::Word(rest);
                    if rest.is_empty() {
                        self.end_value(at + 1);
                    }
                    Ok(())
                }
                _ => Err(syntax(at, "a word that is none")),
            },
            State::Escape { is_key } => {
                self.capture.add(&[byte]);
                self.state = match byte {
                    b'u' => State::Hex { is_key, left: 4 },
                    _ if is_short_escape(byte) => State::InString { is_key },
                    _ => return Err(syntax(at, "an escape that is none")),
                };
                Ok(())
            }
            State::Hex { is_key, left } if byte.is_ascii_hexdigit() => {
                self.capture.add(&[byte]);
                self.state = match left {
                    1 => State::InString { is_key },
                    _ => State::Hex {
                        is_key,
                        left: left - 1,
                    },
                };
                Ok(())
            }
            State::Hex { .. } => Err(syntax(at, "an escape that is none")),
            _ => self.between(byte, at),
        }
    }

    /// Reads a byte between values and keys.
    fn between(&mut self, byte: u8, at: usize) -> Result<(), ScanError> {
        if matches!(byte, b' ' | b'\n' | b'\t' | b'\r') {
            return Ok(());
        }
        match (self.state, byte) {
            (State::Start, b'{') => self.open(true, at),
            (State::Start, b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n') => {
                Err(ScanError::NotAnObject)
            }
            (State::FirstKey | State::Key, b'"') => {
                self.begin_key();
                Ok(())
            }
            (State::FirstKey, b'}') | (State::FirstValue, b']') => {
                self.close(at);
                Ok(())
            }
            (State::Colon, b':') => {
                self.state = State::Value;
                Ok(())
            }
            (State::AfterValue, b',') => {
                self.state = match self.is_in_object() {
                    true => State::Key,
                    false => State::Value,
                };
                Ok(())
            }
            (State::AfterValue, b'}') if self.is_in_object() => {
                self.close(at);
                Ok(())
            }
            (State::AfterValue, b']') if !self.is_in_object() => {
                self.close(at);
                Ok(())
            }
            (State::FirstValue | State::Value, byte) => self.begin_value(byte, at),
            _ => Err(syntax(at, "something that does not belong there")),
        }
    }

    fn begin_key(&mut self) {
        let is_part = self.depth == PART_DEPTH && self.field == TEXT;
        self.capture.start(self.depth == 1 || is_part);
        self.state = State::InString { is_key: true };
    }

    fn begin_value(&mut self, byte: u8, at: usize) -> Result<(), ScanError> {
        if self.depth == 1 {
            self.begin_member(byte, at);
        } else if self.field == TEXT {
            self.note_element(byte);
        }
        match byte {
            b'{' => return self.open(true, at),
            b'[' => return self.open(false, at),
            b'"' => {
                self.capture
                    .start(self.names_part && self.depth == PART_DEPTH);
                self.state = State::InString { is_key: false };
            }
            b'-' | b'0'..=b'9' => {
                let counts = matches!(self.field, Field::MaxTokens | Field::MaxCompletionTokens);
                self.capture.start(counts && self.depth == 1);
                self.capture.add(&[byte]);
                self.state = State::Number(match byte {
                    b'-' => Number::Minus,
                    b'0' => Number::Zero,
                    _ => Number::Integer,
                });
            }
            b't' => self.state = State::Word(b"rue"),
            b'f' => self.state = State::Word(b"alse"),
            b'n' => self.state = State::Word(b"ull"),
            _ => return Err(syntax(at, "no value")),
        }
        Ok(())
    }

    /// The value of a top-level field begins; whatever an earlier one of the same name said is void.
    fn begin_member(&mut self, byte: u8, at: usize) {
        (self.value_start, self.value_first) = (at, byte);
        if self.field == TEXT {
            self.shape = Shape::default();
            self.found.media = Media::default();
        }
    }

    /// A value begins somewhere in the text.
    fn note_element(&mut self, byte: u8) {
        let is_number = u32::from(matches!(byte, b'0'..=b'9' | b'-'));
        let shape = &mut self.shape;
        match self.depth {
            2 => {
                if shape.elements == 0 {
                    shape.element = byte;
                }
                shape.elements = shape.elements.saturating_add(1);
                shape.numbers = shape.numbers.saturating_add(is_number);
            }
            3 => {
                if shape.elements == 1 && shape.inner == 0 {
                    shape.inner = byte;
                }
                shape.inner_numbers = shape.inner_numbers.saturating_add(is_number);
            }
            _ => {}
        }
    }

    /// Reads the byte that ends the plain part of a string.
    fn end_plain(&mut self, byte: u8, is_key: bool, at: usize) -> Result<(), ScanError> {
        match byte {
            b'"' if is_key => self.end_key(at),
            b'"' => {
                if self.capture.is_on {
                    note_media(self.capture.taken(), &mut self.found.media);
                }
                self.end_value(at + 1);
                Ok(())
            }
            b'\\' => {
                self.capture.has_escape = true;
                self.capture.add(b"\\");
                self.state = State::Escape { is_key };
                Ok(())
            }
            _ => Err(syntax(at, "a control character in a string")),
        }
    }

    fn end_key(&mut self, at: usize) -> Result<(), ScanError> {
        self.state = State::Colon;
        if self.depth == 1 {
            self.field = match (self.capture.is_on, self.capture.has_escape) {
                (false, _) => Field::Other,
                (true, false) => field(self.capture.taken()),
                (true, true) => {
                    let key = unescaped(self.capture.taken());
                    field(key.ok_or(syntax(at, "a key that is no text"))?.as_bytes())
                }
            };
        } else if self.capture.is_on {
            self.names_part = self.capture.taken() == b"type";
            note_media(self.capture.taken(), &mut self.found.media);
        }
        Ok(())
    }

    /// A value ended before `at`.
    fn end_value(&mut self, at: usize) {
        self.state = State::AfterValue;
        if self.depth == PART_DEPTH {
            self.names_part = false;
        }
        if self.depth == 1 {
            self.end_member(self.value_start..at);
        }
    }

    fn end_member(&mut self, span: Span) {
        let count = || std::str::from_utf8(self.capture.taken()).ok()?.parse().ok();
        let count = || {
            let is_number = self.value_first.is_ascii_digit() && self.capture.is_on;
            let n: Option<u64> = is_number.then(count).flatten();
            n.map(|n| u32::try_from(n).unwrap_or(u32::MAX))
        };
        match self.field {
            Field::Model => self.found.model = Some(span),
            Field::Prompt(place) => {
                self.found.prompt[place] = Some(span);
                if self.field == TEXT {
                    self.found.form = self.shape.form(self.value_first);
                }
            }
            Field::Stream => self.found.stream = self.value_first == b't',
            Field::MaxTokens => self.found.max_tokens = count(),
            Field::MaxCompletionTokens => self.max_completion_tokens = count(),
            Field::KvTransferParams if self.value_first != b'n' => {
                self.found.kv_transfer_params.push(span);
            }
            Field::KvTransferParams | Field::Other => {}
        }
    }

    fn open(&mut self, is_object: bool, at: usize) -> Result<(), ScanError> {
        if self.depth == MAX_DEPTH {
            return Err(syntax(at, "too many open brackets"));
        }
        let (word, bit) = (self.depth / 64, 1u64 << (self.depth % 64));
        if is_object {
            self.objects[word] |= bit;
            self.state = State::FirstKey;
        } else {
            self.objects[word] &= !bit;
            self.state = State::FirstValue;
        }
        self.depth += 1;
        Ok(())
    }

    fn close(&mut self, at: usize) {
        self.depth -= 1;
        if self.depth == 0 {
            self.state = State::Done;
        } else {
            self.end_value(at + 1);
        }
    }

    fn is_in_object(&self) -> bool {
        let Some(top) = self.depth.checked_sub(1) else {
            return false;
        };
        self.objects[top / 64] & (1 << (top % 64)) != 0
    }
}

impl Shape {
    /// The form of a text that begins with `first`.
    fn form(&self, first: u8) -> Form {
        match (first, self.element, self.inner) {
            (b'"', ..) => Form::Text,
            (b'[', b'"', _) => Form::Texts(self.elements),
            (b'[', b'{', _) => Form::Messages(self.elements),
            (b'[', b'0'..=b'9', _) if self.numbers == self.elements => Form::Tokens(self.numbers),
            (b'[', b'[', b'0'..=b'9') => Form::TokenLists {
                lists: self.elements,
                tokens: self.inner_numbers,
            },
            _ => Form::Other,
        }
    }
}

/// Notes the kind of data that a part's key or type names.
fn note_media(word: &[u8], media: &mut Media) {
    match word {
        b"image_url" | b"input_image" | b"image" | b"image_pil" | b"image_embeds" => {
            media.image = true;
        }
        b"audio_url" | b"input_audio" | b"audio" | b"audio_embeds" => media.audio = true,
        b"video_url" | b"input_video" | b"video" => media.video = true,
        _ => {}
    }
}

fn unescaped(raw: &[u8]) -> Option<String> {
    serde_json::from_slice(&[b"\"", raw, b"\""].concat()).ok()
}

fn syntax(at: usize, reason: &'static str) -> ScanError {
    ScanError::Syntax { at, reason }
}

/// Whether `byte` after a backslash is an escape of its own.
fn is_short_escape(byte: u8) -> bool {
    matches!(byte, b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't')
}

/// Length of the part of a string before the next byte that means something: a quote, a backslash, a control character.
pub(super) fn plain_len(bytes: &[u8]) -> usize {
    let special = |b: u8| b < 0x20 || b == b'"' || b == b'\\';
    let (mut at, mut rest) = (0, bytes);
    // Without a branch for each byte, so that the compiler takes many at a time.
    while let Some((chunk, after)) = rest.split_first_chunk::<32>()
        && !chunk.iter().fold(false, |any, &b| any | special(b))
    {
        (at, rest) = (at + 32, after);
    }
    while let Some((word, after)) = rest.split_first_chunk::<8>() {
        let found = specials(u64::from_le_bytes(*word));
        if found != 0 {
            return at + found.trailing_zeros() as usize / 8;
        }
        (at, rest) = (at + 8, after);
    }
    at + rest.iter().position(|&b| special(b)).unwrap_or(rest.len())
}

/// The high bit of every byte of `word` that means something in a string; above the first of them other bits may be
/// set as well.
fn specials(word: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = ONES << 7;
    let below = |word: u64, n: u64| word.wrapping_sub(ONES * n) & !word & HIGH;
    let equal = |byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    below(word, 0x20) | equal(b'"') | equal(b'\\')
}

/// Whether bytes that come in pieces are UTF-8.
#[derive(Debug, Default)]
struct Utf8 {
    /// The beginning of a character whose end has not come.
    held: [u8; 4],
    len: usize,
}

impl Utf8 {
    /// Reads the next piece; where it is wrong, if it is.
    fn push(&mut self, mut piece: &[u8]) -> Result<(), usize> {
        let mut done = 0;
        if self.len > 0 {
            let width = match self.held[0] {
                0xf0.. => 4,
                0xe0.. => 3,
                _ => 2,
            };
            let n = (width - self.len).min(piece.len());
            self.held[self.len..self.len + n].copy_from_slice(&piece[..n]);
            self.len += n;
            if self.len < width {
                return Ok(());
            }
            std::str::from_utf8(&self.held[..width]).map_err(|_| 0usize)?;
            (done, piece, self.len) = (n, &piece[n..], 0);
        }
        match std::str::from_utf8(piece) {
            Ok(_) => Ok(()),
            Err(error) if error.error_len().is_none() => {
                let rest = &piece[error.valid_up_to()..];
                self.held[..rest.len()].copy_from_slice(rest);
                self.len = rest.len();
                Ok(())
            }
            Err(error) => Err(done + error.valid_up_to()),
        }
    }
}
