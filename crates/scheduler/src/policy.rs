//! The numbers that decide, as data.

use crate::Endpoint;
use serde::{Deserialize, Serialize};

/// How much each scorer counts. Every scorer gives 0 to 1; the sum decides. The names are the upstream plugins'.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Weights {
    /// Part of the prompt's blocks that are probably cached there.
    pub prefix_cache_scorer: f32,
    /// Few waiting requests: 1 for the shortest queue, 0 for the longest, 1 for all if they are equal.
    pub queue_scorer: f32,
    /// Few requests at all: 1 for none, 0 for the busiest.
    pub active_request_scorer: f32,
    /// Part of the KV pool that is free.
    pub kv_cache_utilization_scorer: f32,
}

/// No scorer counts: endpoints are used in turn.
impl Default for Weights {
    fn default() -> Self {
        Self {
            prefix_cache_scorer: 0.0,
            queue_scorer: 0.0,
            active_request_scorer: 0.0,
            kv_cache_utilization_scorer: 0.0,
        }
    }
}

impl Weights {
    /// Whether every weight is a finite number, not below 0.
    #[must_use]
    pub fn are_sane(&self) -> bool {
        [
            self.prefix_cache_scorer,
            self.queue_scorer,
            self.active_request_scorer,
            self.kv_cache_utilization_scorer,
        ]
        .iter()
        .all(|w| w.is_finite() && *w >= 0.0)
    }
}

/// How to choose. The defaults are those of the upstream prefill/decode guide.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Scorers of decode servers.
    pub decode: Weights,
    /// Scorers of prefill servers.
    pub prefill: Weights,
    /// A prompt with at least this many tokens that are not cached on its decode server goes through a prefill
    /// server: 0 for every prompt, `None` for none.
    pub pd_threshold: Option<u32>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            decode: Weights {
                prefix_cache_scorer: 2.0,
                queue_scorer: 0.0,
                active_request_scorer: 2.0,
                kv_cache_utilization_scorer: 1.0,
            },
            prefill: Weights {
                prefix_cache_scorer: 3.0,
                queue_scorer: 2.0,
                active_request_scorer: 2.0,
                ..Weights::default()
            },
            pd_threshold: Some(128),
        }
    }
}

/// What the scorers made of an endpoint: each scorer's value before its weight, and the weighted sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Weighted sum.
    pub total: f32,
    /// Prefix cache scorer.
    pub prefix: f32,
    /// Queue scorer.
    pub queue: f32,
    /// Active request scorer.
    pub active: f32,
    /// KV cache utilization scorer.
    pub kv: f32,
}

/// The extremes that relative scorers compare with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extremes {
    least_waiting: u32,
    most_waiting: u32,
    most_active: u32,
}

impl Extremes {
    pub(crate) fn of<'a>(candidates: impl Iterator<Item = &'a Endpoint>) -> Self {
        let start = Self {
            least_waiting: u32::MAX,
            most_waiting: 0,
            most_active: 0,
        };
        candidates.fold(start, |e, c| Self {
            least_waiting: e.least_waiting.min(c.load.waiting),
            most_waiting: e.most_waiting.max(c.load.waiting),
            most_active: e.most_active.max(c.load.active),
        })
    }
}

impl Weights {
    /// Scores `endpoint`, which holds `matched` of the prompt's `blocks` blocks.
    pub(crate) fn score(
        &self,
        endpoint: &Endpoint,
        extremes: Extremes,
        matched: usize,
        blocks: usize,
    ) -> Score {
        let load = &endpoint.load;
        let prefix = if blocks == 0 {
            0.0
        } else {
            ratio(matched as u64, blocks as u64)
        };
        let queue = match extremes.most_waiting - extremes.least_waiting {
            0 => 1.0,
            span => ratio((extremes.most_waiting - load.waiting).into(), span.into()),
        };
        let active = match extremes.most_active {
            0 => 1.0,
            most => ratio((most - load.active).into(), most.into()),
        };
        let kv = if load.kv_usage.is_nan() {
            0.0
        } else {
            1.0 - load.kv_usage.clamp(0.0, 1.0)
        };
        let total = self.prefix_cache_scorer * prefix
            + self.queue_scorer * queue
            + self.active_request_scorer * active
            + self.kv_cache_utilization_scorer * kv;
        Score {
            total,
            prefix,
            queue,
            active,
            kv,
        }
    }
}

fn ratio(part: u64, whole: u64) -> f32 {
    part as f32 / whole as f32
}
