//! Who may ask: a bearer key for the API's paths, nothing for health and metrics.

use crate::ApiKey;
use baton_http::{bearer, same_bytes};
use http::{HeaderMap, Method, header};

/// Path prefixes that need a key, as in vLLM.
const GUARDED: [&str; 4] = ["/v1", "/v2", "/inference", "/cohere"];

/// Whether a request may pass.
pub(crate) fn allows(keys: &[ApiKey], method: &Method, path: &str, headers: &HeaderMap) -> bool {
    let is_guarded = GUARDED.iter().any(|prefix| path.starts_with(prefix));
    if keys.is_empty() || !is_guarded || method == Method::OPTIONS {
        return true;
    }
    let shown = headers.get(header::AUTHORIZATION).and_then(bearer);
    // Every key is compared, so that the time tells nothing about which one was near.
    shown.is_some_and(|shown| {
        keys.iter()
            .fold(false, |found, key| found | same_bytes(key.bytes(), shown))
    })
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
