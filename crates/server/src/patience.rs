//! How much of a prompt this server computes when the KV that it waited for does not come. Beyond that the client does
//! better to come again: a long prompt would hold up every answer that flows. Where none flows there is nothing to hold
//! up, and the answer is computed however long its prompt is.

use baton_openai::ApiError;
use http::HeaderMap;

/// Overrules the server's own limit for one request.
const HEADER: &str = "x-kv-failure-policy";

/// Whether prompt tokens are computed in place of KV that did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recompute {
    /// However many there are.
    Always,
    /// At most so many, or any number where nothing else is to be done. 0 is never.
    UpTo(u32),
    /// None.
    Never,
}

impl Recompute {
    /// What a request's head says, else as far as `ours`.
    pub(crate) fn of_request(headers: &HeaderMap, ours: u32) -> Result<Self, ApiError> {
        let Some(policy) = headers.get(HEADER) else {
            return Ok(Self::UpTo(ours));
        };
        match policy.to_str().map(str::trim) {
            Ok("recompute") => Ok(Self::Always),
            Ok("fail") => Ok(Self::Never),
            _ => Err(ApiError::bad_request(format!(
                "{HEADER} is neither recompute nor fail"
            ))),
        }
    }

    /// Whether `n_tokens` may be computed by a server that has something else to do, or has not.
    pub(crate) fn allows(self, n_tokens: usize, is_busy: bool) -> bool {
        match self {
            Self::Always => true,
            Self::Never | Self::UpTo(0) => n_tokens == 0,
            Self::UpTo(max) => n_tokens <= max as usize || !is_busy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &'static str) -> Result<Recompute, ApiError> {
        let headers = HeaderMap::from_iter([(HEADER.parse().unwrap(), text.parse().unwrap())]);
        Recompute::of_request(&headers, 100)
    }

    #[test]
    fn a_request_may_overrule_the_limit_and_nothing_else() {
        let ours = Recompute::of_request(&HeaderMap::new(), 100).unwrap();
        assert_eq!(ours, Recompute::UpTo(100));
        assert_eq!(policy("recompute").unwrap(), Recompute::Always);
        assert_eq!(policy(" fail ").unwrap(), Recompute::Never);
        for wrong in ["", "maybe", "Recompute"] {
            assert!(policy(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_limit_is_for_who_has_something_else_to_do() {
        for (recompute, n_tokens, busy, idle) in [
            (Recompute::UpTo(100), 100, true, true),
            (Recompute::UpTo(100), 101, false, true),
            (Recompute::UpTo(0), 0, true, true),
            (Recompute::UpTo(0), 1, false, false),
            (Recompute::Never, 0, true, true),
            (Recompute::Never, 1, false, false),
            (Recompute::Always, 1 << 30, true, true),
        ] {
            let allowed = [true, false].map(|is_busy| recompute.allows(n_tokens, is_busy));
            assert_eq!(allowed, [busy, idle], "{recompute:?}, {n_tokens} tokens");
        }
    }
}
