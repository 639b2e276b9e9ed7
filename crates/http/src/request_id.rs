//! The id by which one request is known to every server that works on it.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Names a request in logs and answers.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id taken from a client.
const MAX_REQUEST_ID: usize = 128;

/// The client's request id, if it is a sensible one, else a fresh one.
pub fn request_id(headers: &HeaderMap) -> HeaderValue {
    let sensible = |v: &&HeaderValue| {
        !v.is_empty() && v.len() <= MAX_REQUEST_ID && v.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    headers
        .get(REQUEST_ID)
        .filter(sensible)
        .cloned()
        .unwrap_or_else(fresh_request_id)
}

fn fresh_request_id() -> HeaderValue {
    // Without randomness an id that is not unique is better than no answer.
    let mut bytes = [0u8; 16];
    let _ = getrandom::fill(&mut bytes);
    let id = format!("{:032x}", u128::from_be_bytes(bytes));
    HeaderValue::from_str(&id).unwrap_or_else(|_| HeaderValue::from_static("0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_kept_if_it_is_sensible() {
        let with = |id: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(id).unwrap());
            request_id(&headers)
        };
        assert_eq!(with(b"abc-1"), "abc-1");
        for id in [&b""[..], b"a b", b"\xff", &[b'a'; 129]] {
            assert_eq!(with(id).len(), 32);
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
