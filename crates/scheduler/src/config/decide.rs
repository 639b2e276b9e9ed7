//! Plugins that decide: filters, scorers, pickers, handlers, deciders, detectors.

use super::fields::Fields;
use super::plugins::Is;
use super::supply::{Supplies, approximate_fields};
use crate::{
    Concurrency, Costs, Counted, Decider, Detector, Filter, Measure, OnUnavailable, Picker,
    Picking, Requirement, Roles, Scorer, SessionStrategy, Sooner, Source, StageOrder, Utilization,
};
use std::time::Duration;

/// A profile handler as it is written, with names.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum HandlerSpec {
    Single,
    DataParallel(u16),
    Disaggregated(Box<StagesSpec>),
}

/// The stages of a handler as they are written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct StagesSpec {
    pub(super) decode: Box<str>,
    pub(super) prefill: Box<str>,
    pub(super) encode: Box<str>,
    pub(super) prefill_if: DeciderSpec,
    pub(super) encode_if: DeciderSpec,
    pub(super) on_unavailable: OnUnavailable,
    pub(super) order: StageOrder,
    pub(super) primary_port: Option<u16>,
    pub(super) same_label: Option<Box<str>>,
}

/// A decider as it is written.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum DeciderSpec {
    Is(Decider),
    /// A plugin's name, and the field that has it.
    Named(Box<str>, &'static str),
}

/// Chances are from 0 to 1.
const PART: (f64, f64) = (0.0, 1.0);
const POSITIVE: (f64, f64) = (1e-9, 1e18);

pub(super) fn decode_filter(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Filter(Filter::Roles(Roles::DECODE))
}

pub(super) fn prefill_filter(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Filter(Filter::Roles(Roles::PREFILL))
}

pub(super) fn encode_filter(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Filter(Filter::Roles(Roles::ENCODE))
}

pub(super) fn by_label(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    let key = f.text("label", "");
    let values = f.texts("validValues");
    // Upstream reads a missing label as an empty one.
    let or_missing = f.flag("allowsNoLabel", false) || values.contains(&"");
    if key.is_empty() {
        f.wrong("label", "a label is needed");
    }
    if values.is_empty() && !or_missing {
        f.wrong("validValues", "without values nobody is kept");
    }
    let values = values.into_iter().map(Into::into).collect();
    Is::Filter(Filter::Label {
        key,
        values,
        or_missing,
    })
}

pub(super) fn label_selector(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    let mut all = Vec::new();
    let labels = f.raw("matchLabels");
    match labels.map(|l| (l, l.as_object())) {
        None => {}
        Some((said, Some(labels))) => {
            f.say("matchLabels", said.clone());
            for (key, value) in labels {
                match value.as_str() {
                    Some(value) => {
                        all.push(Requirement::In(key.as_str().into(), vec![value.into()]));
                    }
                    None => f.wrong("matchLabels", format!("{key} is no string")),
                }
            }
        }
        Some((_, None)) => f.wrong("matchLabels", "this is no object"),
    }
    all.extend(f.each("matchExpressions", |f| {
        let key = f.text("key", "");
        let values: Vec<Box<str>> = f.texts("values").into_iter().map(Into::into).collect();
        let words = [("In", 0), ("NotIn", 1), ("Exists", 2), ("DoesNotExist", 3)];
        if !f.has("operator") {
            f.wrong("operator", "an operator is needed");
        }
        let operator = f.choice("operator", &words);
        if (operator < 2) == values.is_empty() {
            f.wrong("values", "In and NotIn need values, the others have none");
        }
        match operator {
            0 => Requirement::In(key, values),
            1 => Requirement::NotIn(key, values),
            2 => Requirement::Exists(key),
            _ => Requirement::Missing(key),
        }
    }));
    Is::Filter(Filter::Selector(all))
}

pub(super) fn prefix_affinity(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let threshold = f.number("affinityThreshold", 0.8, (-1.0, 1.0));
    let exploration = f.number("explorationProbability", 0.01, PART);
    let predictions = "nobody predicts times to first token here";
    for key in [
        "maxTTFTPenaltyMs",
        "ttftSource",
        "peakPrefillThroughput",
        "latencyPredictorProducerName",
    ] {
        f.ignored(key, predictions);
    }
    let source = source(
        f,
        supplies,
        "prefixMatchInfoProducerName",
        Source::Approximate,
    );
    Is::Filter(if threshold > 0.0 {
        Filter::PrefixAffinity {
            threshold,
            exploration,
            source,
        }
    } else {
        everybody()
    })
}

/// A filter that keeps everybody.
fn everybody() -> Filter {
    Filter::Selector(Vec::new())
}

pub(super) fn slo_headroom(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    f.number("epsilonExploreNeg", 0.01, PART);
    f.ignored(
        "latencyPredictorProducerName",
        "nobody predicts latencies here",
    );
    let place = f.place.clone();
    f.notes.warn(
        place,
        "without predicted latencies this filter keeps everybody",
    );
    Is::Filter(everybody())
}

pub(super) fn context_length(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    let label = f.text("label", "llm-d.ai/context-length-range");
    let scorer = Scorer::ContextLength {
        label: label.clone(),
    };
    if f.flag("enableFiltering", false) {
        Is::Both(Filter::ContextLength { label }, scorer)
    } else {
        Is::Scorer(scorer)
    }
}

pub(super) fn session_filter(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    session(f, supplies);
    Is::Filter(Filter::Session)
}

pub(super) fn caps(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    let words = [
        ("active-requests", Measure::Active),
        ("running-requests", Measure::Running),
        ("waiting-queue", Measure::Waiting),
        ("kv-cache-utilization", Measure::KvUsage),
    ];
    let caps = f.each("conditions", |f| {
        let measure = f.choice("metric", &words);
        (measure, f.number("maxValue", 0.0, (0.0, 1e18)))
    });
    let or_all = f.flag("fallbackOnEmpty", false);
    Is::Filter(Filter::Caps { caps, or_all })
}

pub(super) fn selection(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Filter(Filter::Selection)
}

pub(super) fn queue(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Scorer(Scorer::Queue)
}

pub(super) fn running(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Scorer(Scorer::Running)
}

pub(super) fn kv_usage(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Scorer(Scorer::KvUsage)
}

pub(super) fn load_aware(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    let threshold = f.number("threshold", 128.0, (f64::from(i32::MIN), 1e18));
    let threshold = if threshold > 0.0 { threshold } else { 128.0 };
    Is::Scorer(Scorer::LoadAware { threshold })
}

pub(super) fn active_requests(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    f.ignored("requestTimeout", "requests count until they end");
    f.ignored(
        "inFlightLoadProducerName",
        "there is one account of requests under way",
    );
    Is::Scorer(Scorer::ActiveRequests {
        idle: f.count("idleThreshold", 0, 0),
        most_when_busy: f.number("maxBusyScore", 1.0, PART),
    })
}

pub(super) fn token_load(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    f.ignored(
        "inFlightLoadProducerName",
        "there is one account of requests under way",
    );
    Is::Scorer(Scorer::TokenLoad {
        threshold: f.number("queueThresholdTokens", 4_194_304.0, POSITIVE),
    })
}

pub(super) fn lora(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Scorer(Scorer::LoraAffinity)
}

pub(super) fn prefix_cache(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let old = [
        "hashBlockSize",
        "blockSizeTokens",
        "maxPrefixBlocksToMatch",
        "maxPrefixTokensToMatch",
        "lruCapacityPerServer",
        "autoTune",
    ];
    if let Some(first) = old.into_iter().find(|key| f.has(key)) {
        f.warn(
            first,
            "settings of the index belong to approx-prefix-cache-producer, and are taken as if they were there",
        );
        supplies.forwarded = Some(approximate_fields(f));
    }
    let source = source(
        f,
        supplies,
        "prefixMatchInfoProducerName",
        Source::Approximate,
    );
    Is::Scorer(Scorer::Prefix {
        source,
        length_weight: f.number("matchLengthWeight", 0.0, PART),
        long: f.number("matchLengthScaleTokens", 8192.0, POSITIVE),
    })
}

pub(super) fn no_hit_lru(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    for key in ["prefixPluginType", "prefixPluginName"] {
        f.ignored(key, "prefixMatchInfoProducerName says whom to ask");
    }
    let size = f.count("lruSize", 1024, 1) as usize;
    supplies.recently_used = supplies.recently_used.max(size.min(1 << 20));
    let source = source(
        f,
        supplies,
        "prefixMatchInfoProducerName",
        Source::Approximate,
    );
    Is::Scorer(Scorer::NoHitLru { source })
}

pub(super) fn session_scorer(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    session(f, supplies);
    Is::Scorer(Scorer::Session)
}

/// Settings of session affinity: there is one for the whole configuration.
fn session(f: &mut Fields<'_, '_>, supplies: &mut Supplies) {
    let by_id = f.choice(
        "strategy",
        &[("encoded_endpoint_header", false), ("session_id", true)],
    );
    let profile = f.text_if("profileName").map(Into::into);
    let header = f.inside("encodedEndpointHeaderConfig", |f| {
        f.text("header", "x-session-token").to_lowercase()
    });
    let (headers, idle) = f.inside("sessionIdConfig", |f| {
        let mut headers = f.each("sources", |f| {
            f.text("header", "x-session-id").to_lowercase()
        });
        if headers.is_empty() {
            headers.push("x-session-id".to_owned());
        }
        let idle = f.count("evictionTtlSeconds", 300, 1);
        f.count("evictionSweepSeconds", 10, 1);
        (headers, Duration::from_secs(idle.into()))
    });
    let strategy = if by_id {
        SessionStrategy::Id {
            headers: headers.into_iter().map(Into::into).collect(),
            idle,
        }
    } else {
        SessionStrategy::Token {
            header: header.into(),
        }
    };
    let session = (strategy, profile);
    if supplies.session.as_ref().is_some_and(|s| *s != session) {
        f.wrong(
            "strategy",
            "session affinity is set up differently in another plugin",
        );
    }
    supplies.session = Some(session);
}

pub(super) fn latency(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    for key in ["ttftWeight", "tpotWeight", "headroomSelectionStrategy"] {
        f.ignored(
            key,
            "nobody predicts latencies here, so that KV use, queue and prefix decide",
        );
    }
    f.ignored(
        "latencyPredictorProducerName",
        "nobody predicts latencies here",
    );
    let weight = |f: &mut Fields<'_, '_>, key| f.number(key, 1.0, (0.0, 1e18));
    Is::Scorer(Scorer::Composite {
        kv: weight(f, "compositeKVWeight"),
        queue: weight(f, "compositeQueueWeight"),
        prefix: weight(f, "compositePrefixWeight"),
        source: source(
            f,
            supplies,
            "prefixMatchInfoProducerName",
            Source::Approximate,
        ),
    })
}

/// Ours.
pub(super) fn least_work(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let usual = Costs::default();
    let costs = Costs {
        queued: f.number("queuedTokenWeight", usual.queued, (0.0, 1e6)),
        active: f.number("tokensPerRequest", usual.active, (0.0, 1e9)),
        double_at: f.number("doubleWorkAtTokens", usual.double_at, POSITIVE),
    };
    if supplies.costs.is_some_and(|said| said != costs) {
        f.wrong(
            "queuedTokenWeight",
            "work is weighed differently in another plugin",
        );
    }
    supplies.costs = Some(costs);
    let best = best_source(supplies);
    Is::Scorer(Scorer::LeastWork {
        source: source(f, supplies, "prefixMatchInfoProducerName", best),
    })
}

fn best_source(supplies: &Supplies) -> Source {
    if supplies.has_precise() {
        Source::Precise
    } else {
        Source::Approximate
    }
}

pub(super) fn max_score(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    picker(f, Picking::MaxScore)
}

pub(super) fn max_score_in_turn(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    picker(f, Picking::MaxScoreInTurn)
}

pub(super) fn random(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    picker(f, Picking::Random)
}

pub(super) fn weighted_random(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    picker(f, Picking::WeightedRandom)
}

fn picker(f: &mut Fields<'_, '_>, by: Picking) -> Is {
    let most = f.whole_if("maxNumOfEndpoints", (i32::MIN.into(), i32::MAX.into()));
    let most = most
        .and_then(|n| usize::try_from(n).ok())
        .unwrap_or(1)
        .max(1);
    f.say("maxNumOfEndpoints", most);
    Is::Picker(Picker { by, most })
}

pub(super) fn single_handler(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Handler(HandlerSpec::Single)
}

pub(super) fn data_parallel_handler(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    let port = f.port("primaryPort").unwrap_or(8000);
    f.say("primaryPort", port);
    Is::Handler(HandlerSpec::DataParallel(port))
}

/// The old handler: with a decider since its second generation, before that with a threshold.
pub(super) fn pd_handler(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    for key in ["prefixPluginType", "prefixPluginName"] {
        f.ignored(key, "the decider says whom to ask");
    }
    let threshold = f.whole_if("threshold", (0, u32::MAX.into()));
    f.ignored("hashBlockSize", "what is cached is counted in tokens");
    const DECIDER: &str = "deciderPluginName";
    let named = f.text_if(DECIDER);
    if named.is_some() && threshold.is_some() {
        f.wrong("threshold", "give either a threshold or a decider");
    }
    let known = supplies.types.contains_key("prefix-based-pd-decider");
    let prefill_if = match (named, threshold) {
        (Some(name), _) => DeciderSpec::Named(name.into(), DECIDER),
        (None, None) if known => DeciderSpec::Named("prefix-based-pd-decider".into(), DECIDER),
        (None, threshold) => DeciderSpec::Is(by_threshold(f, threshold)),
    };
    let spec = StagesSpec {
        decode: f.text("decodeProfile", "decode"),
        prefill: f.text("prefillProfile", "prefill"),
        encode: "".into(),
        prefill_if,
        encode_if: DeciderSpec::Is(Decider::Never),
        on_unavailable: OnUnavailable::Fallback,
        order: StageOrder::DecodeFirst,
        primary_port: f.port("primaryPort"),
        same_label: None,
    };
    Is::Handler(HandlerSpec::Disaggregated(Box::new(spec)))
}

/// What the first generation's threshold means: bytes of the prompt that are not cached, and 0 for always.
fn by_threshold(f: &mut Fields<'_, '_>, threshold: Option<i64>) -> Decider {
    let Some(bytes) = threshold
        .and_then(|n| u32::try_from(n).ok())
        .filter(|n| *n > 0)
    else {
        f.warn(
            "threshold",
            "neither a threshold above 0 nor a decider: every prompt goes through a prefill server",
        );
        return Decider::Always;
    };
    let at_least = bytes.div_ceil(4);
    f.warn(
        "threshold",
        format!("{bytes} counts bytes: taken for {at_least} tokens; prefix-based-pd-decider counts tokens"),
    );
    Decider::Uncached {
        at_least,
        prompt_at_least: 0,
        source: Source::Approximate,
    }
}

/// Fields that `profiles` and `deciders` took the place of.
const FLAT: [&str; 6] = [
    "decodeProfile",
    "prefillProfile",
    "encodeProfile",
    "deciderPluginName",
    "prefillDeciderPluginName",
    "encodeDeciderPluginName",
];

pub(super) fn disagg_handler(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    let nested = f.has("profiles") || f.has("deciders");
    if let Some(key) = FLAT.into_iter().find(|key| nested && f.has(key)) {
        f.wrong(
            key,
            "the old flat fields do not go with profiles and deciders",
        );
    }
    let [decode, prefill, encode, decider, other, encode_if] = FLAT.map(|key| f.text_if(key));
    for key in FLAT {
        f.unsay(key);
    }
    let [decode, prefill, encode] = f.inside("profiles", |f| {
        [("decode", decode), ("prefill", prefill), ("encode", encode)].map(|(key, old)| {
            let name: Box<str> = f.text_if(key).or(old).unwrap_or(key).into();
            f.say(key, &*name);
            name
        })
    });
    let [prefill_if, encode_if] = f.inside("deciders", |f| {
        [
            decider_spec(f, "prefill", "deciders.prefill", decider.or(other)),
            decider_spec(f, "encode", "deciders.encode", encode_if),
        ]
    });
    let unavailable = [
        ("fallback", OnUnavailable::Fallback),
        ("fail", OnUnavailable::Fail),
    ];
    let orders = [
        ("decode-first", StageOrder::DecodeFirst),
        ("prefill-first", StageOrder::PrefillFirst),
    ];
    let spec = StagesSpec {
        decode,
        prefill,
        encode,
        prefill_if,
        encode_if,
        on_unavailable: f.choice("onUnavailable", &unavailable),
        order: f.choice("stageOrder", &orders),
        primary_port: f.port("primaryPort"),
        same_label: f.text_if("compatibilityLabel").map(Into::into),
    };
    Is::Handler(HandlerSpec::Disaggregated(Box::new(spec)))
}

/// A decider by its name; `old` is what a flat field says.
fn decider_spec(
    f: &mut Fields<'_, '_>,
    key: &'static str,
    place: &'static str,
    old: Option<&str>,
) -> DeciderSpec {
    match f.text_if(key).or(old) {
        Some(name) => {
            f.say(key, name);
            DeciderSpec::Named(name.into(), place)
        }
        None => DeciderSpec::Is(Decider::Never),
    }
}

pub(super) fn header_handler(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    for key in ["prefillProfile", "encodeProfile"] {
        f.ignored(key, "headers follow what the profile handler decides");
    }
    Is::Quiet
}

pub(super) fn always(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Decider(Decider::Always)
}

pub(super) fn never(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Decider(Decider::Never)
}

pub(super) fn multimodal(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Decider(Decider::Multimodal)
}

pub(super) fn prefix_based(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let at_least = f.count("nonCachedTokens", 0, 0);
    let prompt_at_least = f.count("promptTokens", 0, 0);
    let best = best_source(supplies);
    let source = source(f, supplies, "prefixMatchInfoProducerName", best);
    if at_least == 0 {
        f.warn(
            "nonCachedTokens",
            "0 means never: never-disagg-pd-decider and always-disagg-pd-decider say it plainly",
        );
        return Is::Decider(Decider::Never);
    }
    Is::Decider(Decider::Uncached {
        at_least,
        prompt_at_least,
        source,
    })
}

/// Ours.
pub(super) fn sooner(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let usual = Sooner::default();
    let micros = f.number("kvMicrosecondsPerToken", usual.per_token * 1e6, (0.0, 1e6));
    let hand_over = f.duration("handOver", Duration::from_secs_f64(usual.hand_over));
    let best = best_source(supplies);
    Is::Decider(Decider::Sooner(Sooner {
        at_least: f.count("nonCachedTokens", usual.at_least, 1),
        hand_over: hand_over.as_secs_f64(),
        per_token: micros / 1e6,
        delay: f.number("delayWeight", usual.delay, (0.0, 1e6)),
        source: source(f, supplies, "prefixMatchInfoProducerName", best),
    }))
}

pub(super) fn utilization(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let detector = Utilization {
        queue_depth: f.number("queueDepthThreshold", 5.0, POSITIVE),
        kv_usage: f.number("kvCacheUtilThreshold", 0.8, (1e-9, 1.0)),
        headroom: f.number("headroom", 0.0, (0.0, 1e9)),
    };
    let stale = f.duration("metricsStalenessThreshold", Duration::from_millis(200));
    if stale.is_zero() {
        f.wrong("metricsStalenessThreshold", "this must be more than 0");
    } else if f.has("metricsStalenessThreshold") {
        supplies.data.stale_after = Some(stale);
    }
    Is::Detector(Detector::Utilization(detector))
}

pub(super) fn concurrency(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    f.ignored(
        "inFlightLoadProducerName",
        "there is one account of requests under way",
    );
    Is::Detector(Detector::Concurrency(Concurrency {
        mode: f.choice(
            "concurrencyMode",
            &[
                ("requests", Counted::Requests),
                ("tokens", Counted::Tokens),
                ("hybrid", Counted::Both),
            ],
        ),
        requests: f.number("maxConcurrency", 100.0, POSITIVE),
        tokens: f.number("maxTokenConcurrency", 1e6, POSITIVE),
        headroom: f.number("headroom", 0.0, (0.0, 1e9)),
    }))
}

/// Who knows what is cached: the producer that is named.
fn source(
    f: &mut Fields<'_, '_>,
    supplies: &Supplies,
    key: &'static str,
    default: Source,
) -> Source {
    let Some(name) = f.text_if(key) else {
        return default;
    };
    let kind = supplies.types.get(name).map_or(name, String::as_str);
    match kind {
        "approx-prefix-cache-producer" => Source::Approximate,
        "precise-prefix-cache-producer" | "precise-prefix-cache-scorer"
            if supplies.types.contains_key(name) =>
        {
            Source::Precise
        }
        _ => {
            f.wrong(key, format!("{name:?} is no producer of prefix matches"));
            default
        }
    }
}
