//! `shared-storage`: KV lies in a store that both servers reach, found by the prompt's prefix; no ids are passed.
//!
//! A request with `cache_hit_threshold` goes to decode first, which declines it with the finish reason
//! `cache_threshold` if too little of the prompt is in the store. Otherwise, and then, prefill fills the store first.

use crate::edit::{Edit, Object};
use crate::field::Field;
use crate::route::{Route, one_token};
use baton_http::Pieces;

const ANY: &str = "0";

/// Whether decode is to be tried first.
pub(crate) fn tries_decode_first(body: &Object) -> bool {
    body.given(Field::CacheHitThreshold).is_some()
}

/// What prefill is asked.
pub(crate) fn prefill(route: Route, body: &Object) -> Pieces {
    one_token(route, Edit::of(body))
        .set(Field::CacheHitThreshold, ANY)
        .finish()
}

/// What decode is asked afterwards: to take whatever is there.
pub(crate) fn decode(body: &Object) -> Pieces {
    Edit::of(body).set(Field::CacheHitThreshold, ANY).finish()
}

/// Whether `answer`, a whole one or the beginning of a stream, declines the request for lack of cached tokens.
pub(crate) fn declines(answer: &[u8]) -> bool {
    // Text that a model wrote has its quotes escaped, and cannot be mistaken for a name and a value.
    let name = b"\"finish_reason\"";
    let ends = answer.windows(name.len()).enumerate();
    ends.filter(|(_, window)| window == name).any(|(at, _)| {
        let rest = answer.get(at + name.len()..).unwrap_or_default();
        let value = rest
            .trim_ascii_start()
            .strip_prefix(b":")
            .unwrap_or_default();
        value.trim_ascii_start().starts_with(b"\"cache_threshold\"")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefill_and_decode_take_whatever_is_there() {
        let body = Object::parse(r#"{"cache_hit_threshold":0.8,"stream":true}"#.into()).unwrap();
        assert!(tries_decode_first(&body));
        assert_eq!(
            decode(&body).into_bytes(),
            r#"{"cache_hit_threshold":0,"stream":true}"#
        );
        assert_eq!(
            prefill(Route::Responses, &body).into_bytes(),
            r#"{"cache_hit_threshold":0,"stream":false,"max_output_tokens":1}"#
        );
    }

    #[test]
    fn a_declined_request_is_told_by_its_finish_reason() {
        assert!(declines(
            br#"{"choices":[{"finish_reason": "cache_threshold"}]}"#
        ));
        assert!(!declines(
            br#"{"choices":[{"text":"cache_threshold","finish_reason":"stop"}]}"#
        ));
    }
}
