//! How much of a prompt this server computes when the KV that it waited for does not come. Beyond that the client does
//! better to come again: many long prompts at once would hold up every answer that flows.

use baton_openai::ApiError;
use http::HeaderMap;

/// Overrules the server's own limit for one request.
const HEADER: &str = "x-kv-failure-policy";

/// Most prompt tokens that are computed in place of KV that did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecomputeMax(pub(crate) u32);

impl RecomputeMax {
    /// What a request's head says, else `ours`.
    pub(crate) fn of_request(headers: &HeaderMap, ours: u32) -> Result<Self, ApiError> {
        let Some(policy) = headers.get(HEADER) else {
            return Ok(Self(ours));
        };
        match policy.to_str().map(str::trim) {
            Ok("recompute") => Ok(Self(u32::MAX)),
            Ok("fail") => Ok(Self(0)),
            _ => Err(ApiError::bad_request(format!(
                "{HEADER} is neither recompute nor fail"
            ))),
        }
    }

    pub(crate) fn allows(self, n_tokens: usize) -> bool {
        n_tokens <= self.0 as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &'static str) -> Result<RecomputeMax, ApiError> {
        let headers = HeaderMap::from_iter([(HEADER.parse().unwrap(), text.parse().unwrap())]);
        RecomputeMax::of_request(&headers, 100)
    }

    #[test]
    fn a_request_may_overrule_the_limit_and_nothing_else() {
        let ours = RecomputeMax::of_request(&HeaderMap::new(), 100).unwrap();
        assert!(ours.allows(100) && !ours.allows(101));
        assert!(policy("recompute").unwrap().allows(1 << 30));
        let fail = policy(" fail ").unwrap();
        assert!(fail.allows(0) && !fail.allows(1));
        for wrong in ["", "maybe", "Recompute"] {
            assert!(policy(wrong).is_err(), "{wrong}");
        }
    }
}
