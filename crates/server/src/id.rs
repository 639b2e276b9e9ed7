//! Ids and seeds: unpredictable enough to be distinct, not secret.

use std::hash::{BuildHasher, RandomState};

use http::HeaderMap;

/// Longest part of an id that a client may choose.
const MAX_CLIENT_ID: usize = 256;

/// 64 random bits: the standard library keys every hash state afresh from the system's randomness.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0u8)
}

/// The id of an answer: the client's own, from header or body, or 16 random digits.
pub(crate) fn answer_id(prefix: &str, headers: &HeaderMap, body: Option<&str>) -> String {
    let header = headers
        .get("x-request-id")
        .and_then(|value| value.to_str().ok());
    match header
        .or(body)
        .filter(|id| !id.is_empty() && id.len() <= MAX_CLIENT_ID)
    {
        Some(id) => format!("{prefix}-{id}"),
        None => format!("{prefix}-{:016x}", random()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn a_header_beats_the_body_and_both_beat_chance() {
        let mut headers = HeaderMap::new();
        assert_eq!(answer_id("cmpl", &headers, Some("b")), "cmpl-b");
        assert_eq!(
            answer_id("cmpl", &headers, Some("")).len(),
            "cmpl-".len() + 16
        );
        assert_ne!(
            answer_id("cmpl", &headers, None),
            answer_id("cmpl", &headers, None)
        );
        headers.insert("x-request-id", HeaderValue::from_static("h"));
        assert_eq!(answer_id("cmpl", &headers, Some("b")), "cmpl-h");
    }
}
