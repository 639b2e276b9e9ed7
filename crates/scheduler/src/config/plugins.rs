//! The list of plugins: which types there are, and what each entry is.

use super::decide::{self, HandlerSpec};
use super::fields::{Fields, Notes, did_you_mean, object};
use super::supply::{self, Parser, Supplies};
use crate::flow::{Fairness, Ordering};
use crate::{Decider, Detector, Filter, Named, Picker, Scorer};
use serde_json::{Value, json};

/// One entry of the list.
#[derive(Clone, Debug)]
pub(super) struct Plugin {
    pub(super) name: String,
    pub(super) kind: &'static str,
    pub(super) is: Is,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Is {
    Filter(Filter),
    Scorer(Scorer),
    Both(Filter, Scorer),
    Picker(Picker),
    Handler(HandlerSpec),
    Decider(Decider),
    /// Also a filter.
    Detector(Detector),
    Parser(Parser),
    Source,
    Extractor,
    Discovery,
    Fairness(Fairness),
    Ordering(Ordering),
    /// The saturation from which on nothing is let through.
    UsageLimit(f64),
    /// Something that acts, if at all, wherever it is listed.
    Quiet,
}

impl Plugin {
    /// What it is, with its name.
    pub(super) fn named<T>(&self, is: T) -> Named<T> {
        Named {
            name: self.name.as_str().into(),
            kind: self.kind,
            is,
        }
    }
}

type Read = fn(&mut Fields<'_, '_>, &mut Supplies) -> Is;

/// Every type that is known.
pub(super) const TYPES: &[(&str, Read)] = &[
    ("decode-filter", decide::decode_filter),
    ("prefill-filter", decide::prefill_filter),
    ("encode-filter", decide::encode_filter),
    ("by-label", decide::by_label),
    ("label-selector-filter", decide::label_selector),
    ("by-label-selector", decide::label_selector),
    ("prefix-cache-affinity-filter", decide::prefix_affinity),
    ("slo-headroom-tier-filter", decide::slo_headroom),
    ("context-length-aware", decide::context_length),
    ("session-affinity-filter", decide::session_filter),
    ("utilization-filter", decide::caps),
    ("header-based-testing-filter", decide::selection),
    ("queue-scorer", decide::queue),
    ("running-requests-size-scorer", decide::running),
    ("kv-cache-utilization-scorer", decide::kv_usage),
    ("load-aware-scorer", decide::load_aware),
    ("active-request-scorer", decide::active_requests),
    ("token-load-scorer", decide::token_load),
    ("lora-affinity-scorer", decide::lora),
    ("prefix-cache-scorer", decide::prefix_cache),
    ("precise-prefix-cache-scorer", supply::precise_scorer),
    ("no-hit-lru-scorer", decide::no_hit_lru),
    ("session-affinity-scorer", decide::session_scorer),
    ("latency-scorer", decide::latency),
    ("least-work-scorer", decide::least_work),
    ("mm-embeddings-cache-scorer", supply::embeddings_scorer),
    ("max-score-picker", decide::max_score),
    ("max-score-in-turn-picker", decide::max_score_in_turn),
    ("random-picker", decide::random),
    ("weighted-random-picker", decide::weighted_random),
    ("single-profile-handler", decide::single_handler),
    (
        "data-parallel-profile-handler",
        decide::data_parallel_handler,
    ),
    ("pd-profile-handler", decide::pd_handler),
    ("disagg-profile-handler", decide::disagg_handler),
    ("prefill-header-handler", decide::header_handler),
    ("disagg-headers-handler", decide::header_handler),
    ("always-disagg-pd-decider", decide::always),
    ("always-disagg-multimodal-decider", decide::multimodal),
    ("never-disagg-pd-decider", decide::never),
    ("prefix-based-pd-decider", decide::prefix_based),
    ("sooner-pd-decider", decide::sooner),
    ("utilization-detector", decide::utilization),
    ("concurrency-detector", decide::concurrency),
    ("approx-prefix-cache-producer", supply::approximate),
    ("precise-prefix-cache-producer", supply::precise),
    ("token-producer", supply::tokens),
    ("tokenizer", supply::tokens),
    ("inflight-load-producer", supply::in_flight),
    ("session-id-producer", supply::quiet),
    ("mm-embeddings-cache-producer", supply::embeddings_producer),
    ("predicted-latency-producer", supply::predicted_latency),
    ("latency-slo-admitter", supply::latency_admitter),
    ("probabilistic-admitter", supply::probabilistic_admitter),
    ("openai-parser", supply::openai),
    ("anthropic-parser", supply::anthropic),
    ("vllmhttp-parser", supply::vllm_http),
    ("sglanghttp-parser", supply::sglang_http),
    ("vllmgrpc-parser", supply::vllm_grpc),
    ("vertexai-parser", supply::vertex),
    ("passthrough-parser", supply::passthrough),
    ("request-attribute-reporter", supply::attributes),
    ("destination-endpoint-served-verifier", supply::served),
    ("metrics-data-source", supply::metrics_source),
    ("core-metrics-extractor", supply::core_metrics),
    ("models-data-source", supply::models_source),
    ("models-data-extractor", supply::models_extractor),
    ("endpoint-notification-source", supply::notification),
    ("k8s-notification-source", supply::objects),
    ("file-discovery", supply::file_discovery),
    ("local-syncer", supply::quiet),
    ("fcfs-ordering-policy", supply::arrival),
    ("edf-ordering-policy", supply::deadline),
    ("slo-deadline-ordering-policy", supply::slo_deadline),
    ("global-strict-fairness-policy", supply::global_strict),
    ("round-robin-fairness-policy", supply::round_robin),
    ("program-aware-fairness", supply::by_programs),
    ("token-fairness-policy", supply::by_tokens),
    ("static-usage-limit-policy", supply::static_limit),
    ("sheddable-eviction-filter", supply::quiet),
    ("priority-then-time-eviction-order-policy", supply::quiet),
];

/// Experiments that are not here.
const EXPERIMENTS: &[&str] = &[
    "endpoint-attribute-filter",
    "topology-affinity-filter",
    "multicluster-session-affinity-filter",
    "endpoint-attribute-scorer",
    "header-label-affinity-scorer",
    "topology-affinity-scorer",
    "multicluster-queue-scorer",
    "multicluster-kv-cache-utilization-scorer",
    "multicluster-prefix-cache-scorer",
    "header-profile-handler",
    "burst-prefix-cache-producer",
    "p2p-source-producer",
    "agent-identity",
    "disaggregatedset-rollout-screener",
    "dcgm-data-source",
    "dcgm-extractor",
    "topology-extractor",
    "priority-holdback-policy",
    "soft-reflective-ceiling-policy",
];

/// All entries.
#[derive(Debug, Default)]
pub(super) struct Plugins {
    pub(super) list: Vec<Plugin>,
    /// As they were read, with their defaults.
    pub(super) said: Vec<Value>,
}

impl Plugins {
    /// Reads the list; what it says beside its entries goes into `supplies`.
    pub(super) fn read(list: &[Value], supplies: &mut Supplies, notes: &mut Notes) -> Self {
        supplies.types = (list.iter())
            .filter_map(|entry| {
                let kind = entry.get("type")?.as_str()?;
                let name = entry.get("name").and_then(Value::as_str);
                Some((name.unwrap_or(kind).to_owned(), kind.to_owned()))
            })
            .collect();
        let mut all = Self::default();
        for (i, entry) in list.iter().enumerate() {
            let place = format!("plugins[{i}]");
            let (read, _) = object(Some(entry), place, notes, |f| entry_of(f, supplies));
            let Some((plugin, said)) = read else { continue };
            if all.find(&plugin.name).is_some() {
                let twice = format!("a plugin {:?} is there already", plugin.name);
                notes.wrong(format!("plugins[{i}].name"), twice);
                continue;
            }
            all.list.push(plugin);
            all.said.push(said);
        }
        all
    }

    /// Adds what no configuration has to say.
    pub(super) fn add(&mut self, kind: &'static str, is: Is) -> Plugin {
        let mut name = kind.to_owned();
        while self.find(&name).is_some() {
            name.push_str("-default");
        }
        self.said.push(json!({"name": name, "type": kind}));
        let added = Plugin { name, kind, is };
        self.list.push(added.clone());
        added
    }

    pub(super) fn find(&self, name: &str) -> Option<&Plugin> {
        self.list.iter().find(|p| p.name == name)
    }

    /// The entry of this name; or, if it is a type's name, that type with its defaults.
    pub(super) fn find_or_default(&self, name: &str) -> Option<Plugin> {
        self.find(name).cloned().or_else(|| by_default(name))
    }

    /// A hint at the entry that is meant by `name`.
    pub(super) fn did_you_mean(&self, name: &str) -> String {
        did_you_mean(name, self.list.iter().map(|p| &*p.name))
    }
}

/// A type with its defaults.
fn by_default(kind: &str) -> Option<Plugin> {
    let (kind, read) = TYPES.iter().find(|(k, _)| *k == kind)?;
    let mut notes = Notes::default();
    let supplies = &mut Supplies::default();
    let (is, _) = object(None, String::new(), &mut notes, |f| read(f, supplies));
    Some(Plugin {
        name: (*kind).to_owned(),
        kind,
        is,
    })
    .filter(|_| notes.errors.is_empty())
}

/// One entry, and how it is written with its defaults.
fn entry_of(fields: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Option<(Plugin, Value)> {
    let (name, kind) = (fields.text_if("name"), fields.text_if("type"));
    let parameters = fields.raw("parameters");
    let Some(kind) = kind else {
        if !fields.has("type") {
            fields.wrong("type", "a plugin needs a type");
        }
        return None;
    };
    let Some((kind, read)) = TYPES.iter().find(|(k, _)| *k == kind) else {
        let why = if EXPERIMENTS.contains(&kind) {
            format!("{kind} is an experiment that is not supported")
        } else {
            let hint = did_you_mean(kind, TYPES.iter().map(|(k, _)| *k));
            format!("there is no plugin type {kind:?}{hint}")
        };
        fields.wrong("type", why);
        return None;
    };
    let name = name.filter(|n| !n.is_empty()).unwrap_or(kind);
    let place = fields.at("parameters");
    let (is, parameters) = object(parameters, place, fields.notes, |f| read(f, supplies));
    let mut said = json!({"name": name, "type": kind});
    if parameters.as_object().is_some_and(|p| !p.is_empty()) {
        said["parameters"] = parameters;
    }
    let plugin = Plugin {
        name: name.to_owned(),
        kind,
        is,
    };
    Some((plugin, said))
}
