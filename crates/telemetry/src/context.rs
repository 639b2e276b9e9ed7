//! Which trace a request belongs to, as W3C's `traceparent` says it. Pure.

use std::fmt;

/// The header.
pub const TRACEPARENT: &str = "traceparent";

/// Name of a trace; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(pub u128);

/// Name of a span in its trace; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanId(pub u64);

/// Where in a trace something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: TraceId,
    /// The span.
    pub span: SpanId,
    /// Whether the trace is recorded.
    pub sampled: bool,
}

impl Context {
    /// Reads a `traceparent`. Versions to come may have more behind what is known of them.
    #[must_use]
    pub fn parse(header: &[u8]) -> Option<Self> {
        let mut parts = header.splitn(5, |&b| b == b'-');
        let mut part = |digits| hex(parts.next()?, digits);
        let (version, trace, span, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        let extra = parts.next().is_some();
        let known = version != 0xff && !(version == 0 && extra);
        (known && trace != 0 && span != 0).then_some(Self {
            trace: TraceId(trace),
            span: SpanId(span as u64),
            sampled: flags & 1 == 1,
        })
    }
}

/// Just so many lower-case digits.
fn hex(text: &[u8], digits: usize) -> Option<u128> {
    let digit = |value: u128, &b: &u8| match b {
        b'0'..=b'9' => Some(value << 4 | u128::from(b - b'0')),
        b'a'..=b'f' => Some(value << 4 | u128::from(b - b'a' + 10)),
        _ => None,
    };
    (text.len() == digits).then(|| text.iter().try_fold(0, digit))?
}

/// As a `traceparent`.
impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (trace, span, flags) = (self.trace.0, self.span.0, u8::from(self.sampled));
        write!(f, "00-{trace:032x}-{span:016x}-{flags:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_parent_is_read_as_the_standard_says() {
        let read = |text: &str| Context::parse(text.as_bytes());
        let good = read(GOOD).unwrap();
        assert!(good.sampled && good.to_string() == GOOD);
        assert!(!read(&GOOD.replace("-01", "-02")).unwrap().sampled);
        let later = format!("{}-what-comes", GOOD.replacen("00", "cc", 1));
        assert_eq!(read(&later), Some(good));
        for bad in [
            "",
            &format!("{GOOD}-x"),
            &GOOD.to_uppercase(),
            &GOOD[..54],
            &GOOD.replacen("00", "ff", 1),
            &GOOD.replace("00f067aa0ba902b7", "0000000000000000"),
            &GOOD.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            &GOOD.replace('f', "g"),
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_or_not(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Some(read) = Context::parse(&bytes) {
                prop_assert_eq!(Context::parse(read.to_string().as_bytes()), Some(read));
            }
        }
    }
}
