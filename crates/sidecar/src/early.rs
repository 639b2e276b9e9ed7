//! KV of our own prefill servers is fetched while it is computed.
//!
//! Such a server says in its answers that it can tell how its KV is fetched before it has computed it. From then on it is
//! asked to, and decode is called as soon as the head of its answer is there. Other servers never see a header that they do
//! not know.

use crate::target::Target;
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use std::collections::HashSet;

/// In a request: say at once how the KV is fetched. In an answer: that could have been asked for.
const EARLY: HeaderName = HeaderName::from_static("x-kv-early");
/// The transfer parameters in an answer's head.
pub(crate) const PARAMS: HeaderName = HeaderName::from_static("x-kv-transfer-params");
/// Servers that are remembered; one more, and they are learnt anew.
const MOST: usize = 1024;

/// The servers that can.
#[derive(Debug, Default)]
pub(crate) struct Early(Mutex<HashSet<Authority>>);

impl Early {
    /// Asks `target`, if it can.
    pub(crate) fn ask(&self, target: &Target, headers: &mut HeaderMap) {
        // A client's own wish would be answered in a form that it does not expect.
        headers.remove(EARLY);
        if self.0.lock().contains(target.authority()) {
            headers.insert(EARLY, HeaderValue::from_static("1"));
        }
    }

    /// Takes note of whether `target` can, from the head of a good answer.
    pub(crate) fn learn(&self, target: &Target, headers: &HeaderMap) {
        let can = headers.contains_key(EARLY) || headers.contains_key(PARAMS);
        let mut able = self.0.lock();
        if can == able.contains(target.authority()) {
            return;
        }
        if !can {
            able.remove(target.authority());
            return;
        }
        if able.len() >= MOST {
            able.clear();
        }
        able.insert(target.authority().clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(early: &Early, target: &Target) -> bool {
        let mut headers = HeaderMap::from_iter([(EARLY, HeaderValue::from_static("client"))]);
        early.ask(target, &mut headers);
        headers.get(EARLY).is_some_and(|value| value == "1")
    }

    #[test]
    fn only_a_server_that_can_is_asked_and_only_as_long_as_it_can() {
        let (early, ours) = (Early::default(), Target::parse("a:1").unwrap());
        let theirs = Target::parse("b:1").unwrap();
        assert!(!asks(&early, &ours));
        let offer = |name| HeaderMap::from_iter([(name, HeaderValue::from_static("1"))]);
        early.learn(&ours, &offer(EARLY));
        assert!(asks(&early, &ours) && !asks(&early, &theirs));
        early.learn(&ours, &offer(PARAMS));
        assert!(asks(&early, &ours));
        early.learn(&ours, &HeaderMap::new());
        assert!(!asks(&early, &ours));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let early = Early::default();
        for n in 0..3 * MOST {
            let target = Target::parse(&format!("10.0.{}.{}:1", n / 256, n % 256)).unwrap();
            early.learn(
                &target,
                &HeaderMap::from_iter([(EARLY, HeaderValue::from_static("1"))]),
            );
            assert!(asks(&early, &target) && early.0.lock().len() <= MOST);
        }
    }
}
