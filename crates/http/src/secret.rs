//! Keys in headers: finding them, and comparing them without telling how near a guess was.

use http::HeaderValue;

/// The key of an `Authorization: Bearer KEY`.
#[must_use]
pub fn bearer(value: &HeaderValue) -> Option<&[u8]> {
    let (scheme, key) = value.as_bytes().split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(key)
}

/// Equality in a time that depends on the lengths only.
#[must_use]
pub fn same_bytes(a: &[u8], b: &[u8]) -> bool {
    let difference = a.iter().zip(b).fold(0, |acc, (x, y)| acc | (x ^ y));
    std::hint::black_box(difference) == 0 && a.len() == b.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_key_is_found_and_compared_whole() {
        let of = |value| bearer(&HeaderValue::from_static(value)).map(<[u8]>::to_vec);
        assert_eq!(of("bearer k"), Some(b"k".to_vec()));
        assert_eq!(of("Bearer "), Some(Vec::new()));
        assert_eq!((of("Bearer"), of("Basic k")), (None, None));
        assert!(same_bytes(b"ab", b"ab") && same_bytes(b"", b""));
        assert!(!same_bytes(b"ab", b"a") && !same_bytes(b"ab", b"ac") && !same_bytes(b"", b"a"));
    }
}
