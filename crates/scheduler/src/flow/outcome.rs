//! What becomes of a request at the queue, in the words of metrics, of HTTP and of the headers that clients see.

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It may go to a server.
    Dispatched,
    /// The queue is full.
    RejectedCapacity,
    /// The queue is full, and there is no server at all.
    RejectedNoEndpoints,
    /// The queue is being closed.
    RejectedOther,
    /// It waited as long as it may.
    EvictedTtl,
    /// It waited as long as it may for a first server.
    EvictedNoEndpoints,
    /// Its client went away.
    EvictedContextCancelled,
    /// The queue was closed while it waited.
    EvictedOther,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Dispatched,
        Self::RejectedCapacity,
        Self::RejectedNoEndpoints,
        Self::RejectedOther,
        Self::EvictedTtl,
        Self::EvictedNoEndpoints,
        Self::EvictedContextCancelled,
        Self::EvictedOther,
    ];

    /// The label that metrics give it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Dispatched => "Dispatched",
            Self::RejectedCapacity => "RejectedCapacity",
            Self::RejectedNoEndpoints => "RejectedNoEndpoints",
            Self::RejectedOther => "RejectedOther",
            Self::EvictedTtl => "EvictedTTL",
            Self::EvictedNoEndpoints => "EvictedNoEndpoints",
            Self::EvictedContextCancelled => "EvictedContextCancelled",
            Self::EvictedOther => "EvictedOther",
        }
    }

    /// How a refusal is told: `None` for a request that was not refused.
    #[must_use]
    pub fn refusal(self) -> Option<Refusal> {
        let (status, dropped_reason, message) = match self {
            Self::Dispatched => return None,
            Self::RejectedCapacity => (429, "rejected-saturated", "the queue is full"),
            Self::EvictedTtl => (
                429,
                "rejected-ttl-expired",
                "the request waited too long for a server with room",
            ),
            Self::RejectedNoEndpoints | Self::EvictedNoEndpoints => {
                (503, "rejected-no-endpoints", "there is no server")
            }
            Self::EvictedContextCancelled => {
                (503, "rejected-context-cancelled", "the client went away")
            }
            Self::RejectedOther | Self::EvictedOther => {
                (503, "rejected-shutting-down", "shutting down")
            }
        };
        Some(Refusal {
            status,
            dropped_reason,
            message,
        })
    }
}

/// A refusal as a client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status: 429, or 503.
    pub status: u16,
    /// Value of `x-llm-d-request-dropped-reason`.
    pub dropped_reason: &'static str,
    /// In a few words.
    pub message: &'static str,
}

impl Refusal {
    /// A request that had begun and was given up for one of higher priority.
    pub const EVICTED: Self = Self {
        status: 429,
        dropped_reason: "evicted",
        message: "request evicted by flow control",
    };

    /// The name of the error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self.status {
            429 => "ResourceExhausted",
            _ => "ServiceUnavailable",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_but_one_has_a_status_and_a_reason() {
        let table: Vec<String> = (Outcome::ALL.into_iter())
            .map(|o| match o.refusal() {
                None => o.label().to_owned(),
                Some(r) => format!(
                    "{} {} {} {}",
                    o.label(),
                    r.status,
                    r.code(),
                    r.dropped_reason
                ),
            })
            .collect();
        assert_eq!(
            table,
            [
                "Dispatched",
                "RejectedCapacity 429 ResourceExhausted rejected-saturated",
                "RejectedNoEndpoints 503 ServiceUnavailable rejected-no-endpoints",
                "RejectedOther 503 ServiceUnavailable rejected-shutting-down",
                "EvictedTTL 429 ResourceExhausted rejected-ttl-expired",
                "EvictedNoEndpoints 503 ServiceUnavailable rejected-no-endpoints",
                "EvictedContextCancelled 503 ServiceUnavailable rejected-context-cancelled",
                "EvictedOther 503 ServiceUnavailable rejected-shutting-down",
            ]
        );
    }
}
