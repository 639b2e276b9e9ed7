//! The part of MessagePack that events need. A reader of our own, because it must survive whatever a peer sends: it
//! never recurses, and never makes room for more than the bytes that are there.

/// Bytes that are no MessagePack, or not what was expected of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("the bytes end inside a value")]
    Truncated,
    #[error("a byte that begins no value")]
    Reserved,
    #[error("a value of another type")]
    Type,
}

/// What a value begins with; the bytes or values it announces follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Head {
    Nil,
    Bool(bool),
    Unsigned(u64),
    /// Below zero.
    Negative(i64),
    Float(f64),
    /// Bytes of text.
    Text(usize),
    /// Bytes.
    Binary(usize),
    /// Values.
    Array(usize),
    /// Pairs of values.
    Map(usize),
    /// Bytes, after that of the type.
    Extension(usize),
}

/// Reads values from the front of a slice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// How many values there can be at most: each takes a byte.
    pub(crate) const fn most(&self) -> usize {
        self.rest.len()
    }

    #[cfg(test)]
    const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(Malformed::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Malformed::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from(u8::from_be_bytes(self.number()?)))
    }

    fn u16(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from(u16::from_be_bytes(self.number()?)))
    }

    fn u32(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from(u32::from_be_bytes(self.number()?)))
    }

    /// The next value's head.
    pub(crate) fn head(&mut self) -> Result<Head, Malformed> {
        let [first] = self.number()?;
        let length = |n: u64| usize::try_from(n).map_err(|_| Malformed::Truncated);
        Ok(match first {
            0x00..=0x7f => Head::Unsigned(u64::from(first)),
            0x80..=0x8f => Head::Map(usize::from(first & 0x0f)),
            0x90..=0x9f => Head::Array(usize::from(first & 0x0f)),
            0xa0..=0xbf => Head::Text(usize::from(first & 0x1f)),
            0xc0 => Head::Nil,
            0xc1 => return Err(Malformed::Reserved),
            0xc2 | 0xc3 => Head::Bool(first == 0xc3),
            0xc4 => Head::Binary(length(self.u8()?)?),
            0xc5 => Head::Binary(length(self.u16()?)?),
            0xc6 => Head::Binary(length(self.u32()?)?),
            0xc7 => Head::Extension(length(self.u8()?)?),
            0xc8 => Head::Extension(length(self.u16()?)?),
            0xc9 => Head::Extension(length(self.u32()?)?),
            0xca => Head::Float(f64::from(f32::from_be_bytes(self.number()?))),
            0xcb => Head::Float(f64::from_be_bytes(self.number()?)),
            0xcc => Head::Unsigned(self.u8()?),
            0xcd => Head::Unsigned(self.u16()?),
            0xce => Head::Unsigned(self.u32()?),
            0xcf => Head::Unsigned(u64::from_be_bytes(self.number()?)),
            0xd0 => signed(i64::from(i8::from_be_bytes(self.number()?))),
            0xd1 => signed(i64::from(i16::from_be_bytes(self.number()?))),
            0xd2 => signed(i64::from(i32::from_be_bytes(self.number()?))),
            0xd3 => signed(i64::from_be_bytes(self.number()?)),
            0xd4..=0xd8 => Head::Extension(1 << (first - 0xd4)),
            0xd9 => Head::Text(length(self.u8()?)?),
            0xda => Head::Text(length(self.u16()?)?),
            0xdb => Head::Text(length(self.u32()?)?),
            0xdc => Head::Array(length(self.u16()?)?),
            0xdd => Head::Array(length(self.u32()?)?),
            0xde => Head::Map(length(self.u16()?)?),
            0xdf => Head::Map(length(self.u32()?)?),
            0xe0..=0xff => Head::Negative(i64::from(first.cast_signed())),
        })
    }

    /// Passes over a value with all that it holds, and returns it.
    pub(crate) fn value(&mut self) -> Result<Reader<'a>, Malformed> {
        let before = self.rest;
        let mut open = 1_usize;
        while open > 0 {
            open -= 1;
            let more = match self.head()? {
                Head::Text(n) | Head::Binary(n) => self.take(n).map(|_| 0)?,
                Head::Extension(n) => self.take(n.saturating_add(1)).map(|_| 0)?,
                Head::Array(n) => n,
                Head::Map(n) => n.saturating_mul(2),
                _ => 0,
            };
            open = open.saturating_add(more);
            if open > self.rest.len() {
                return Err(Malformed::Truncated);
            }
        }
        let taken = before.len() - self.rest.len();
        Ok(Reader::new(&before[..taken]))
    }

    /// A count of values; there may turn out to be fewer.
    pub(crate) fn array(&mut self) -> Result<usize, Malformed> {
        match self.head()? {
            Head::Array(n) => Ok(n),
            _ => Err(Malformed::Type),
        }
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, Malformed> {
        match self.head()? {
            Head::Text(n) => std::str::from_utf8(self.take(n)?).map_err(|_| Malformed::Type),
            _ => Err(Malformed::Type),
        }
    }

    pub(crate) fn unsigned(&mut self) -> Result<u64, Malformed> {
        match self.head()? {
            Head::Unsigned(n) => Ok(n),
            _ => Err(Malformed::Type),
        }
    }

    pub(crate) fn number_as_float(&mut self) -> Result<f64, Malformed> {
        match self.head()? {
            Head::Float(x) => Ok(x),
            Head::Unsigned(n) => Ok(n as f64),
            Head::Negative(n) => Ok(n as f64),
            _ => Err(Malformed::Type),
        }
    }

    /// A value's bytes, after its [`Head::Text`] or [`Head::Binary`].
    pub(crate) fn bytes(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        self.take(n)
    }
}

fn signed(n: i64) -> Head {
    u64::try_from(n).map_or(Head::Negative(n), Head::Unsigned)
}

/// Appends the head of an array.
pub(crate) fn put_array(out: &mut Vec<u8>, n: usize) {
    put_length(out, n, 0x90, 16, [0xdc, 0xdc, 0xdd]);
}

/// Appends the head of a map of `n` pairs; at most 15.
pub(crate) fn put_small_map(out: &mut Vec<u8>, n: u8) {
    debug_assert!(n < 16, "a small map");
    out.push(0x80 | (n & 0x0f));
}

/// Appends text.
pub(crate) fn put_text(out: &mut Vec<u8>, text: &str) {
    put_length(out, text.len(), 0xa0, 32, [0xd9, 0xda, 0xdb]);
    out.extend_from_slice(text.as_bytes());
}

/// Appends bytes.
pub(crate) fn put_binary(out: &mut Vec<u8>, bytes: &[u8]) {
    put_length(out, bytes.len(), 0, 0, [0xc4, 0xc5, 0xc6]);
    out.extend_from_slice(bytes);
}

/// Appends nothing, as a value.
pub(crate) fn put_nil(out: &mut Vec<u8>) {
    out.push(0xc0);
}

/// Appends a number in the fewest bytes.
pub(crate) fn put_unsigned(out: &mut Vec<u8>, n: u64) {
    let bytes = n.to_be_bytes();
    match n {
        0..=0x7f => out.push(bytes[7]),
        0x80..=0xff => out.extend_from_slice(&[0xcc, bytes[7]]),
        0x100..=0xffff => out.extend_from_slice(&[0xcd, bytes[6], bytes[7]]),
        0x1_0000..=0xffff_ffff => {
            out.push(0xce);
            out.extend_from_slice(&bytes[4..]);
        }
        _ => {
            out.push(0xcf);
            out.extend_from_slice(&bytes);
        }
    }
}

/// Appends a number with a fraction.
pub(crate) fn put_float(out: &mut Vec<u8>, x: f64) {
    out.push(0xcb);
    out.extend_from_slice(&x.to_be_bytes());
}

/// A length below `small` goes into the first byte; else `tags` are those for one, two and four bytes of it. Equal tags
/// for one and two bytes say that there is no form with one.
fn put_length(out: &mut Vec<u8>, n: usize, base: u8, small: usize, tags: [u8; 3]) {
    // A single value of 4 GiB is never written: batches are bounded long before.
    let n32 = u32::try_from(n).unwrap_or(u32::MAX);
    let bytes = n32.to_be_bytes();
    if n < small {
        out.push(base | bytes[3]);
    } else if n <= 0xff && tags[0] != tags[1] {
        out.extend_from_slice(&[tags[0], bytes[3]]);
    } else if n <= 0xffff {
        out.extend_from_slice(&[tags[1], bytes[2], bytes[3]]);
    } else {
        out.push(tags[2]);
        out.extend_from_slice(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_value_is_passed_over_whole() {
        // {"a": [1, nil, -1], "b": bin 2} and one more byte.
        let bytes = [
            0x82, 0xa1, b'a', 0x93, 1, 0xc0, 0xff, 0xa1, b'b', 0xc4, 2, 9, 9, 0x07,
        ];
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.value().unwrap().most(), 13);
        assert_eq!(reader.unsigned(), Ok(7));
        assert!(reader.is_empty());
    }

    #[test]
    fn what_is_announced_and_not_there_is_refused_at_once() {
        for bytes in [
            &[0xdd, 0xff, 0xff, 0xff, 0xff, 1][..],
            &[0xdf, 0xff, 0xff, 0xff, 0xff][..],
            &[0xdb, 0xff, 0xff, 0xff, 0xff, b'x'][..],
            &[0xc7, 3, 1][..],
            &[0xcb, 0][..],
            &[][..],
        ] {
            let refused = Reader::new(bytes).value().map(|_| ());
            assert_eq!(refused, Err(Malformed::Truncated), "{bytes:x?}");
        }
        let refused = Reader::new(&[0xc1]).value().map(|_| ());
        assert_eq!(refused, Err(Malformed::Reserved));
    }

    #[test]
    fn deep_nesting_takes_no_stack() {
        let mut bytes = vec![0x91; 1 << 20];
        bytes.push(0xc0);
        assert_eq!(Reader::new(&bytes).value().unwrap().most(), bytes.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn numbers_come_back(n: u64) {
            let mut out = Vec::new();
            put_unsigned(&mut out, n);
            prop_assert_eq!(Reader::new(&out).unsigned(), Ok(n));
        }

        #[test]
        fn texts_and_lengths_come_back(n in prop_oneof![0..40_usize, 200..300_usize, 65_000..66_000_usize]) {
            let mut out = Vec::new();
            put_text(&mut out, &"x".repeat(n));
            put_binary(&mut out, &vec![7; n]);
            put_array(&mut out, n);
            let mut reader = Reader::new(&out);
            prop_assert_eq!(reader.text().map(str::len), Ok(n));
            prop_assert_eq!(reader.head(), Ok(Head::Binary(n)));
            prop_assert_eq!(reader.bytes(n).map(<[u8]>::len), Ok(n));
            prop_assert_eq!(reader.array(), Ok(n));
            prop_assert!(reader.is_empty());
        }

        #[test]
        fn nothing_panics(bytes: Vec<u8>) {
            let mut reader = Reader::new(&bytes);
            while reader.value().is_ok() {}
        }
    }
}
