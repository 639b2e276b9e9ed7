//! The usual plan with prefill and decode apart, in a few numbers.

use crate::Roles;
use crate::filter::Filter;
use crate::picker::{Picker, Picking};
use crate::plan::{
    Decider, Handler, Named, OnUnavailable, Plan, Profile, Sooner, Source, StageOrder, Stages,
    Weighted,
};
use crate::scorer::Scorer;
use serde::{Deserialize, Serialize};

/// How much each scorer counts. Every scorer gives 0 to 1; the sum decides. The names are the plugins'.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Weights {
    /// Little to compute before the first token: of its own prompt, of those that wait there, and of those that run.
    pub least_work_scorer: f32,
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
            least_work_scorer: 0.0,
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
            self.least_work_scorer,
            self.prefix_cache_scorer,
            self.queue_scorer,
            self.active_request_scorer,
            self.kv_cache_utilization_scorer,
        ]
        .iter()
        .all(|w| w.is_finite() && *w >= 0.0)
    }

    fn scorers(self) -> Vec<Weighted> {
        let prefix = Scorer::Prefix {
            source: Source::Approximate,
            length_weight: 0.0,
            long: 8192.0,
        };
        let active = Scorer::ActiveRequests {
            idle: 0,
            most_when_busy: 1.0,
        };
        let least_work = Scorer::LeastWork {
            source: Source::Approximate,
        };
        [
            ("least-work-scorer", least_work, self.least_work_scorer),
            ("prefix-cache-scorer", prefix, self.prefix_cache_scorer),
            ("queue-scorer", Scorer::Queue, self.queue_scorer),
            ("active-request-scorer", active, self.active_request_scorer),
            (
                "kv-cache-utilization-scorer",
                Scorer::KvUsage,
                self.kv_cache_utilization_scorer,
            ),
        ]
        .into_iter()
        .filter(|(.., weight)| *weight > 0.0)
        .map(|(kind, scorer, weight)| Weighted {
            name: kind.into(),
            kind,
            scorer,
            weight: weight.into(),
        })
        .collect()
    }
}

/// How to choose. By default servers with the least work, and a prefill server from 128 uncached tokens on.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Scorers of decode servers.
    pub decode: Weights,
    /// Scorers of prefill servers.
    pub prefill: Weights,
    /// A prompt with at least this many tokens that are not cached on its decode server goes through a prefill
    /// server: 0 for every prompt, `None` for none.
    pub pd_threshold: Option<u32>,
    /// And only if its first token is expected sooner that way.
    pub pd_sooner: bool,
}

impl Default for Policy {
    fn default() -> Self {
        let least_work = Weights {
            least_work_scorer: 1.0,
            ..Weights::default()
        };
        Self {
            decode: least_work,
            prefill: least_work,
            pd_threshold: Some(128),
            pd_sooner: false,
        }
    }
}

impl From<Policy> for Plan {
    fn from(policy: Policy) -> Self {
        let in_turn = Picker::one(Picking::MaxScoreInTurn);
        let profile = |name: &str, filter, roles, weights: Weights| Profile {
            name: name.into(),
            filters: vec![Named::usual(filter, Filter::Roles(roles))],
            scorers: weights.scorers(),
            picker: Named::usual("max-score-in-turn-picker", in_turn),
        };
        let decode = profile("decode", "decode-filter", Roles::DECODE, policy.decode);
        // Servers of both roles keep their prompts to themselves.
        let only = Roles::PREFILL_ONLY;
        let prefill = profile("prefill", "prefill-filter", only, policy.prefill);
        let prefill_if = match policy.pd_threshold {
            None => Decider::Never,
            Some(at_least) if policy.pd_sooner => Decider::Sooner(Sooner {
                at_least,
                ..Sooner::default()
            }),
            Some(at_least) => Decider::Uncached {
                at_least,
                prompt_at_least: 0,
                source: Source::Approximate,
            },
        };
        let handler = Handler::Disaggregated(Stages {
            decode: 0,
            prefill: Some(1),
            encode: None,
            prefill_if,
            encode_if: Decider::Never,
            on_unavailable: OnUnavailable::Fallback,
            order: StageOrder::DecodeFirst,
            primary_port: None,
            same_label: None,
        });
        let handler = Named::usual("disagg-profile-handler", handler);
        Self::with(vec![decode, prefill], handler)
    }
}
