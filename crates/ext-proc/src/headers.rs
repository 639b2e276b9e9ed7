//! Headers as the proxy sends them: read in place.

use crate::inbound::Malformed;
use bytes::{Buf, Bytes};
use prost::encoding::{DecodeContext, decode_key, decode_varint, skip_field};
use std::fmt;
use std::ops::Range;

/// Most headers of a message; Envoy's own default is a hundred.
const MAX_HEADERS: usize = 1000;

/// Headers of a request or a response, pseudo headers (`:path`, `:status`) among them. Names are in lower case.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers {
    /// An encoded `HeaderMap`.
    text: Bytes,
    spans: Vec<Span>,
}

/// Where a header lies. Half the size of two ranges of `usize`: there may be many of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    name: (u32, u32),
    value: (u32, u32),
}

impl Headers {
    /// The value of the first header called `name`, which is in lower case.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let named = |(n, _): &(&[u8], &[u8])| n.eq_ignore_ascii_case(name.as_bytes());
        self.iter().find(named).map(|(_, value)| value)
    }

    /// As [`get`](Self::get), if the value is text.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|v| std::str::from_utf8(v).ok())
    }

    /// As [`get`](Self::get), sharing the bytes.
    #[must_use]
    pub fn bytes(&self, name: &str) -> Option<Bytes> {
        self.get(name).map(|value| self.text.slice_ref(value))
    }

    /// Names and values in the order in which they came.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let part = |(from, to): (u32, u32)| &self.text[from as usize..to as usize];
        self.spans
            .iter()
            .map(move |s| (part(s.name), part(s.value)))
    }

    /// Reads an encoded `HeaderMap`.
    pub(crate) fn read(text: Bytes) -> Result<Self, Malformed> {
        if u32::try_from(text.len()).is_err() {
            return Err(Malformed("headers too long"));
        }
        let mut spans = Vec::new();
        let mut rest = &text[..];
        while let Some((tag, range)) = field(&text, &mut rest)? {
            if tag != 1 {
                continue;
            }
            if spans.len() == MAX_HEADERS {
                return Err(Malformed("too many headers"));
            }
            spans.push(span(&text, range)?);
        }
        Ok(Self { text, spans })
    }
}

impl fmt::Debug for Headers {
    /// Names only: values may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(self.iter().map(|(name, _)| String::from_utf8_lossy(name)))
            .finish()
    }
}

/// Reads one `HeaderValue`. The value for any bytes goes before the one for text.
fn span(text: &Bytes, range: Range<usize>) -> Result<Span, Malformed> {
    let (mut name, mut value, mut raw) = (0..0, 0..0, 0..0);
    let mut rest = &text[range];
    while let Some((tag, range)) = field(text, &mut rest)? {
        match tag {
            1 => name = range,
            2 => value = range,
            3 => raw = range,
            _ => {}
        }
    }
    let narrow = |range: Range<usize>| (range.start as u32, range.end as u32);
    Ok(Span {
        name: narrow(name),
        value: narrow(if raw.is_empty() { value } else { raw }),
    })
}

/// The next field with bytes in it: its number and where in `text` the bytes are. Fields of other kinds are skipped.
pub(crate) fn field(
    text: &[u8],
    rest: &mut &[u8],
) -> Result<Option<(u32, Range<usize>)>, Malformed> {
    while rest.has_remaining() {
        let (tag, kind) = decode_key(rest)?;
        if kind != prost::encoding::WireType::LengthDelimited {
            skip_field(kind, tag, rest, DecodeContext::default())?;
            continue;
        }
        let len = usize::try_from(decode_varint(rest)?).unwrap_or(usize::MAX);
        let Some(left) = rest.len().checked_sub(len) else {
            return Err(Malformed("a field is longer than its message"));
        };
        // `rest` is the end of a part of `text`; where it begins follows from the addresses.
        let start = rest.as_ptr().addr() - text.as_ptr().addr();
        *rest = &rest[rest.len() - left..];
        return Ok(Some((tag, start..start + len)));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    struct Map {
        #[prost(message, repeated, tag = "1")]
        headers: Vec<Value>,
        #[prost(string, tag = "9")]
        unknown: String,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Value {
        #[prost(string, tag = "1")]
        key: String,
        #[prost(string, tag = "2")]
        value: String,
        #[prost(bytes, tag = "3")]
        raw_value: Vec<u8>,
        #[prost(fixed32, tag = "7")]
        unknown: u32,
    }

    fn value(key: &str, value: &str, raw: &[u8]) -> Value {
        Value {
            key: key.to_owned(),
            value: value.to_owned(),
            raw_value: raw.to_owned(),
            unknown: 7,
        }
    }

    #[test]
    fn a_raw_value_goes_before_text_and_what_is_unknown_is_skipped() {
        let map = Map {
            headers: vec![
                value(":path", "", b"/v1/models"),
                value("a", "text", b""),
                value("b", "text", b"raw\xff"),
                value("a", "second", b""),
            ],
            unknown: "x".to_owned(),
        };
        let headers = Headers::read(map.encode_to_vec().into()).unwrap();
        assert_eq!(headers.text(":path"), Some("/v1/models"));
        assert_eq!(headers.get("a").unwrap(), b"text");
        assert_eq!(headers.bytes("b").unwrap(), &b"raw\xff"[..]);
        assert_eq!((headers.text("b"), headers.get("c")), (None, None));
        assert_eq!(headers.iter().count(), 4);
        assert_eq!(format!("{headers:?}"), r#"{":path", "a", "b", "a"}"#);
    }

    #[test]
    fn too_many_headers_and_broken_ones_are_refused() {
        let map = |n| Map {
            headers: vec![Value::default(); n],
            unknown: String::new(),
        };
        assert!(Headers::read(map(MAX_HEADERS).encode_to_vec().into()).is_ok());
        assert!(Headers::read(map(MAX_HEADERS + 1).encode_to_vec().into()).is_err());
        for broken in [&b"\x0a\x05\x0a"[..], b"\x0a", b"\x0a\x02\x0a\x09", b"\xff"] {
            assert!(Headers::read(Bytes::from_static(broken)).is_err());
        }
    }
}
