//! What to do after prefill failed: ask again, ask another, do without, or tell the client.

use http::StatusCode;
use std::time::Duration;

/// What becomes of a request whose prefill failed for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// Decode computes the prompt itself.
    #[default]
    Decode,
    /// The client is told, as llm-d's sidecar does since mid-2026.
    Error,
}

/// How prefill failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It answered, but not with success.
    Status(StatusCode),
    /// No connection.
    Unreachable,
    /// The connection failed before an answer.
    Lost,
    /// The answer broke off, or is too long.
    BrokeOff,
    /// It says success, but is not one JSON object.
    Malformed,
    /// It took too long.
    TimedOut,
}

impl Failure {
    /// For metrics.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Status(StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) => "busy",
            Self::Status(_) => "status",
            Self::Unreachable => "unreachable",
            Self::Lost => "lost",
            Self::BrokeOff => "broke_off",
            Self::Malformed => "malformed",
            Self::TimedOut => "timed_out",
        }
    }

    /// Whether the same server may do better in a moment.
    fn is_passing(self) -> bool {
        match self {
            Self::Unreachable | Self::Lost => true,
            Self::Status(status) => matches!(
                status,
                StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT
            ),
            Self::BrokeOff | Self::Malformed | Self::TimedOut => false,
        }
    }

    /// Whether the request is at fault, so that every server would say the same.
    fn is_clients(self) -> bool {
        let Self::Status(status) = self else {
            return false;
        };
        let passing = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
        status.is_client_error() && !passing.contains(&status)
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Ask the same server again, after a pause.
    Again(Duration),
    /// Ask the next server.
    Another,
    /// Have decode compute the prompt.
    DecodeAlone,
    /// Tell the client: what prefill answered, or else that it failed.
    Tell,
    /// Tell the client to come again: the prompt is too long to be computed on a decode server.
    TooLong,
}

/// What is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) fallback: Fallback,
    /// Further tries on each server.
    pub(crate) retries: u32,
    /// Pause before each.
    pub(crate) pause: Duration,
    /// Longest body whose prompt decode may compute itself.
    pub(crate) max_alone: usize,
}

/// What is left to try for one request.
#[derive(Clone, Debug)]
pub(crate) struct Tries {
    policy: Policy,
    retries: u32,
    others: usize,
    can_alone: Alone,
}

/// Whether decode may compute this prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alone {
    Yes,
    /// The protocol does not allow it.
    Never,
    /// The prompt is too long for that.
    TooLong,
}

impl Policy {
    /// For a request with a body of `len` bytes and `others` servers besides the first.
    pub(crate) fn tries(self, len: usize, others: usize, can_alone: bool) -> Tries {
        let can_alone = match (can_alone, len <= self.max_alone) {
            (false, _) => Alone::Never,
            (true, true) => Alone::Yes,
            (true, false) => Alone::TooLong,
        };
        Tries {
            policy: self,
            retries: self.retries,
            others,
            can_alone,
        }
    }

    /// How many of the servers that a header lists are asked.
    pub(crate) fn candidates(self) -> usize {
        match self.fallback {
            Fallback::Decode => 2,
            Fallback::Error => 1,
        }
    }
}

impl Tries {
    /// What to do after `failure`.
    pub(crate) fn after(&mut self, failure: Failure) -> Next {
        if failure.is_passing() && self.retries > 0 {
            self.retries -= 1;
            return Next::Again(self.policy.pause);
        }
        if self.policy.fallback == Fallback::Error || failure.is_clients() {
            return Next::Tell;
        }
        if self.others > 0 {
            self.others -= 1;
            self.retries = self.policy.retries;
            return Next::Another;
        }
        match self.can_alone {
            Alone::Yes => Next::DecodeAlone,
            Alone::Never => Next::Tell,
            Alone::TooLong => Next::TooLong,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(name: &str) -> Failure {
        match name {
            "unreachable" => Failure::Unreachable,
            "lost" => Failure::Lost,
            "broke-off" => Failure::BrokeOff,
            "malformed" => Failure::Malformed,
            "timed-out" => Failure::TimedOut,
            code => Failure::Status(code.parse().unwrap()),
        }
    }

    fn next(next: Next) -> &'static str {
        match next {
            Next::Again(_) => "again",
            Next::Another => "another",
            Next::DecodeAlone => "decode",
            Next::Tell => "tell",
            Next::TooLong => "503",
        }
    }

    /// Each line: `policy retries others: failure failure … => next next …`; a policy may say `never` or `long` as well.
    #[track_caller]
    fn check(scenarios: &str) {
        for line in scenarios.lines().map(str::trim).filter(|l| !l.is_empty()) {
            let (setting, rest) = line.split_once(": ").unwrap();
            let (failures, expect) = rest.split_once(" => ").unwrap();
            let words: Vec<&str> = setting.split(' ').collect();
            let policy = Policy {
                fallback: match words[0] {
                    "error" => Fallback::Error,
                    _ => Fallback::Decode,
                },
                retries: words[1].parse().unwrap(),
                pause: Duration::ZERO,
                max_alone: 10,
            };
            let len = if words.contains(&"long") { 11 } else { 10 };
            let mut tries = policy.tries(len, words[2].parse().unwrap(), !words.contains(&"never"));
            let seen: Vec<_> = failures
                .split(' ')
                .map(|f| next(tries.after(failure(f))))
                .collect();
            assert_eq!(seen.join(" "), expect, "{line}");
        }
    }

    #[test]
    fn a_dead_prefill_server_costs_no_request() {
        check(
            "decode 0 1: unreachable unreachable => another decode
             decode 0 1: lost 500 => another decode
             decode 0 0: broke-off => decode
             decode 0 0: malformed => decode
             decode 0 0: timed-out => decode
             decode 0 1: 503 429 => another decode
             decode 0 0: 301 => decode
             decode 0 0: 408 => decode",
        );
    }

    #[test]
    fn a_request_at_fault_is_not_tried_elsewhere() {
        check(
            "decode 2 1: 400 => tell
             decode 2 1: 404 => tell
             decode 2 1: 422 => tell
             error 2 0: 400 => tell",
        );
    }

    #[test]
    fn the_same_server_is_asked_again_only_after_what_may_pass() {
        check(
            "decode 2 1: 503 unreachable lost 502 504 500 => again again another again again decode
             error 1 0: 503 503 => again tell
             error 1 0: 429 => tell
             error 1 0: 500 => tell
             error 2 0: lost broke-off => again tell
             error 2 0: malformed => tell",
        );
    }

    #[test]
    fn decode_computes_only_what_it_can_and_may() {
        check(
            "decode 0 1 never: unreachable 503 => another tell
             decode 0 0 never: unreachable => tell
             decode 0 0 long: unreachable => 503
             error 0 0: unreachable => tell
             error 0 0: 301 => tell",
        );
    }
}
