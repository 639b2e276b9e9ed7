//! Who may ask: a bearer key for the API's paths, nothing for health and metrics.

use http::{HeaderMap, Method, header};

use crate::ApiKey;

/// Path prefixes that need a key, as in vLLM.
const GUARDED: [&str; 4] = ["/v1", "/v2", "/inference", "/cohere"];

/// Whether a request may pass.
pub(crate) fn allows(keys: &[ApiKey], method: &Method, path: &str, headers: &HeaderMap) -> bool {
    let is_guarded = GUARDED.iter().any(|prefix| path.starts_with(prefix));
    if keys.is_empty() || !is_guarded || method == Method::OPTIONS {
        return true;
    }
    let shown = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| bearer(value.as_bytes()));
    // Every key is compared, so that the time tells nothing about which one was near.
    shown.is_some_and(|shown| {
        keys.iter()
            .fold(false, |found, key| found | equal(key.bytes(), shown))
    })
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(key)
}

/// Equality in a time that depends on the lengths only.
fn equal(a: &[u8], b: &[u8]) -> bool {
    let difference = a.iter().zip(b).fold(0, |acc, (x, y)| acc | (x ^ y));
    std::hint::black_box(difference) == 0 && a.len() == b.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn passes(path: &str, authorization: Option<&'static str>) -> bool {
        let keys = [ApiKey::new("one"), ApiKey::new("two")];
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert("authorization", HeaderValue::from_static(value));
        }
        allows(&keys, &Method::POST, path, &headers)
    }

    #[test]
    fn the_api_needs_one_of_the_keys_and_health_needs_none() {
        assert!(passes("/v1/completions", Some("Bearer two")));
        assert!(passes("/v1/completions", Some("bearer one")));
        for wrong in [
            None,
            Some("Bearer "),
            Some("Bearer onetwo"),
            Some("Bearer on"),
            Some("one"),
        ] {
            assert!(!passes("/v1/completions", wrong), "{wrong:?}");
        }
        assert!(passes("/health", None) && passes("/tokenize", None));
        assert!(allows(
            &[ApiKey::new("k")],
            &Method::OPTIONS,
            "/v1/models",
            &HeaderMap::new()
        ));
        assert!(allows(&[], &Method::POST, "/v1/models", &HeaderMap::new()));
    }
}
