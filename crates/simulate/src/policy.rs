//! Ways to choose servers, side by side: ours and those it is compared with. Each is a plan of the scheduler.

use crate::world::{Setup, Split};
use baton_scheduler::config::{default_config, load};
use baton_scheduler::{Costs, Decider, Handler, Picker, Picking, Plan, Sooner, Source, Weights};
use serde_json::{Value, json};

/// A way to choose a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Our own, as the gateway has it: with the approximate index.
    Ours,
    /// Our own, with the precise index.
    OursPrecise,
    /// Any.
    Random,
    /// One after another.
    RoundRobin,
    /// The upstream picker's: its default, and with prefill servers its sample for them.
    Upstream,
    /// Matched blocks minus 0.05 times blocks queued there.
    TenLines,
}

impl Policy {
    /// All of them, ours first.
    pub const ALL: [Self; 6] = [
        Self::Ours,
        Self::OursPrecise,
        Self::Random,
        Self::RoundRobin,
        Self::Upstream,
        Self::TenLines,
    ];

    /// The one of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }

    /// Its name in tables and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "baton",
            Self::OursPrecise => "baton-precise",
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::Upstream => "upstream",
            Self::TenLines => "ten-lines",
        }
    }

    /// Whether it hears what servers report of their caches.
    pub(crate) fn is_precise(self) -> bool {
        self == Self::OursPrecise
    }

    /// Whether it takes work for done before there is an answer.
    pub(crate) fn knows_a_pace(self) -> bool {
        self != Self::TenLines
    }

    /// How it chooses in `setup`, where prompts have blocks of `block_tokens` tokens.
    pub(crate) fn plan(self, setup: &Setup, block_tokens: u32) -> Plan {
        let mut plan = match self {
            Self::Ours => baton_scheduler::Policy::default().into(),
            Self::OursPrecise => configured(&precise()),
            Self::Random => by_picker(Picking::Random),
            Self::RoundRobin => by_picker(Picking::MaxScoreInTurn),
            Self::Upstream if setup.prefill == 0 => configured(&default_config()),
            Self::Upstream => configured(&upstream_apart()),
            Self::TenLines => baton_scheduler::Policy::default().into(),
        };
        plan.costs = match self {
            Self::TenLines => Costs {
                queued: 0.05,
                active: 0.0,
                double_at: f64::INFINITY,
            },
            _ => setup.costs,
        };
        plan.approximate.block_tokens = block_tokens;
        if let Handler::Disaggregated(stages) = &mut plan.handler.is {
            stages.prefill_if = decider(setup, self);
        }
        plan
    }
}

/// When prompts are computed elsewhere is the same for all.
fn decider(setup: &Setup, policy: Policy) -> Decider {
    let source = match policy.is_precise() {
        true => Source::Precise,
        false => Source::Approximate,
    };
    match setup.split {
        Split::Never => Decider::Never,
        Split::Always => Decider::Always,
        Split::AtLeast(at_least) => Decider::Uncached {
            at_least,
            prompt_at_least: 0,
            source,
        },
        Split::Sooner => Decider::Sooner(Sooner {
            per_token: setup.model.kv_bytes / setup.model.link,
            source,
            ..Sooner::default()
        }),
    }
}

/// No score, so that the picker alone decides.
fn by_picker(by: Picking) -> Plan {
    let nothing = baton_scheduler::Policy {
        decode: Weights::default(),
        prefill: Weights::default(),
        ..baton_scheduler::Policy::default()
    };
    let mut plan = Plan::from(nothing);
    for profile in &mut plan.profiles {
        profile.picker.is = Picker::one(by);
    }
    plan
}

/// The plan of a configuration of ours.
fn configured(config: &Value) -> Plan {
    match load(config) {
        Ok(config) => config.plan,
        Err(invalid) => unreachable!("a configuration of ours is wrong: {invalid}"),
    }
}

/// Ours with the precise index: what docs/picker-config.md says, and a time to wait for reports that suits long queues.
fn precise() -> Value {
    json!({
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [
            {"type": "precise-prefix-cache-producer",
                "parameters": {"speculativeIndexing": true, "speculativeTTL": "20s"}},
            {"type": "least-work-scorer"},
            {"type": "max-score-in-turn-picker"},
            {"type": "decode-filter"},
            {"type": "prefill-filter"},
            {"type": "sooner-pd-decider"},
            {"type": "disagg-profile-handler", "parameters": {"deciders": {"prefill": "sooner-pd-decider"}}},
        ],
        "schedulingProfiles": [
            {"name": "decode", "plugins": [
                {"pluginRef": "decode-filter"}, {"pluginRef": "least-work-scorer"},
            ]},
            {"name": "prefill", "plugins": [
                {"pluginRef": "prefill-filter"}, {"pluginRef": "least-work-scorer"},
            ]},
        ],
    })
}

/// Scorers and weights of the upstream guide for prefill and decode apart.
fn upstream_apart() -> Value {
    json!({
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [
            {"type": "prefix-cache-scorer"},
            {"type": "queue-scorer"},
            {"type": "active-request-scorer"},
            {"type": "kv-cache-utilization-scorer"},
            {"type": "decode-filter"},
            {"type": "prefill-filter"},
            {"type": "always-disagg-pd-decider"},
            {"type": "disagg-profile-handler",
                "parameters": {"deciders": {"prefill": "always-disagg-pd-decider"}}},
        ],
        "schedulingProfiles": [
            {"name": "decode", "plugins": [
                {"pluginRef": "decode-filter"},
                {"pluginRef": "prefix-cache-scorer", "weight": 2},
                {"pluginRef": "active-request-scorer", "weight": 2},
                {"pluginRef": "kv-cache-utilization-scorer", "weight": 1},
            ]},
            {"name": "prefill", "plugins": [
                {"pluginRef": "prefill-filter"},
                {"pluginRef": "prefix-cache-scorer", "weight": 3},
                {"pluginRef": "queue-scorer", "weight": 2},
            ]},
        ],
    })
}
