//! Configurations as text: what they mean, and what is said against them.

use super::*;
use crate::engines::CacheInfo;
use crate::flow::Fairness;
use crate::{
    Decider, Filter, Handler, Picking, Roles, Scorer, SessionStrategy, Source, StageOrder, Stages,
};
use proptest::prelude::*;
use std::time::Duration;

const FILES: [&str; 6] = [
    include_str!("../../tests/configs/pd.yaml"),
    include_str!("../../tests/configs/pd-first-generation.yaml"),
    include_str!("../../tests/configs/pd-second-generation.yaml"),
    include_str!("../../tests/configs/precise.yaml"),
    include_str!("../../tests/configs/precise-second-generation.yaml"),
    include_str!("../../tests/configs/flow-control.yaml"),
];

fn value(yaml: &str) -> Value {
    serde_norway::from_str(yaml).unwrap()
}

fn loaded(yaml: &str) -> PickerConfig {
    load(&value(yaml)).unwrap_or_else(|e| panic!("{e}\nin {yaml}"))
}

/// A configuration with these plugins and no more; `rest` is what follows them.
fn with(plugins: &str, rest: &str) -> String {
    let head = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n";
    let plugins: String = (plugins.lines().map(str::trim).filter(|l| !l.is_empty()))
        .map(|l| format!("- {l}\n"))
        .collect();
    format!("{head}{plugins}{rest}\n")
}

/// What is wrong with a configuration with these plugins.
fn errors(plugins: &str, rest: &str) -> Vec<String> {
    let invalid = load(&value(&with(plugins, rest))).unwrap_err();
    invalid.errors.iter().map(Note::to_string).collect()
}

fn warnings(config: &PickerConfig) -> Vec<String> {
    config.warnings.iter().map(Note::to_string).collect()
}

fn stages(config: &PickerConfig) -> &Stages {
    match &config.plan.handler.is {
        Handler::Disaggregated(stages) => stages,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_printed_as_effective_means_the_same() {
    for yaml in FILES {
        let config = loaded(yaml);
        let again =
            load(&config.effective).unwrap_or_else(|e| panic!("{e}\nin {}", config.effective));
        assert_eq!(again.plan, config.plan);
        assert_eq!(again.flow_control, config.flow_control);
        assert_eq!(
            (&again.data, &again.tokens, &again.parsers),
            (&config.data, &config.tokens, &config.parsers)
        );
        assert_eq!(again.effective, config.effective);
    }
}

#[test]
fn prefill_and_decode_apart() {
    let config = loaded(FILES[0]);
    assert_eq!(warnings(&config), [""; 0]);
    let plan = &config.plan;
    let stages = stages(&config);
    assert_eq!(
        (stages.decode, stages.prefill, stages.encode),
        (1, Some(0), None)
    );
    assert_eq!(
        stages.prefill_if,
        Decider::Uncached {
            at_least: 512,
            prompt_at_least: 0,
            source: Source::Approximate
        }
    );
    assert_eq!(stages.encode_if, Decider::Never);
    assert_eq!(
        plan.profiles[0].filters[0].is,
        Filter::Roles(Roles::PREFILL)
    );
    let weights =
        |i: usize| -> Vec<f64> { plan.profiles[i].scorers.iter().map(|s| s.weight).collect() };
    assert_eq!(
        (weights(0), weights(1)),
        (vec![3.0, 2.0], vec![2.0, 2.0, 1.0])
    );
    let approximate = Approximate {
        block_tokens: 64,
        most_blocks: 2048,
        per_server: 31_250,
        auto_tune: false,
    };
    assert_eq!(plan.approximate, approximate);
}

#[test]
fn the_first_generation_is_translated() {
    let config = loaded(FILES[1]);
    assert_eq!(stages(&config).prefill_if, Decider::Always);
    assert_eq!(
        warnings(&config),
        [
            "apiVersion: this is llm-d.ai/v1alpha1 now",
            "plugins[5].parameters.hashBlockSize: has no effect: what is cached is counted in tokens",
            "plugins[5].parameters.threshold: neither a threshold above 0 nor a decider: every prompt goes through a prefill server",
        ]
    );
    let selective = loaded(&FILES[1].replace("threshold: 0", "threshold: 130"));
    assert_eq!(
        stages(&selective).prefill_if,
        Decider::Uncached {
            at_least: 33,
            prompt_at_least: 0,
            source: Source::Approximate
        }
    );
}

#[test]
fn the_index_settings_of_a_scorer_are_taken_as_the_producers() {
    let config = loaded(FILES[2]);
    let approximate = Approximate {
        block_tokens: 64,
        most_blocks: 256,
        per_server: 31_250,
        auto_tune: true,
    };
    assert_eq!(config.plan.approximate, approximate);
    assert!(
        warnings(&config)
            .iter()
            .any(|w| w.contains("belong to approx-prefix-cache-producer"))
    );
    let old = loaded(&with(
        "{type: prefix-cache-scorer, parameters: {hashBlockSize: 256}}",
        "",
    ));
    assert_eq!(old.plan.approximate.block_tokens, 64);
}

#[test]
fn prefixes_by_events() {
    for (yaml, bind) in [(FILES[3], None), (FILES[4], Some("tcp://*:5557"))] {
        let config = loaded(yaml);
        let precise = config.plan.precise.as_ref().unwrap();
        assert_eq!(precise.block_tokens, 64);
        assert_eq!(precise.events.bind.as_deref(), bind);
        assert!(precise.metrics);
        assert_eq!(precise.events.port, 5557);
        assert_eq!(config.tokens.model.as_deref(), Some("org/model"));
        let asks = |s: &crate::Weighted| {
            matches!(
                s.scorer,
                Scorer::Prefix {
                    source: Source::Precise,
                    ..
                }
            )
        };
        assert!(config.plan.profiles[0].scorers.iter().any(asks));
    }
    let speculative = loaded(FILES[3]).plan.precise.unwrap().speculative;
    assert_eq!(speculative, Some(Duration::from_secs(2)));
    let unused = FILES[3].replace(
        "prefixMatchInfoProducerName: precise-prefix-cache-producer",
        "",
    );
    assert!(
        warnings(&loaded(&unused))
            .iter()
            .any(|w| w.contains("no scorer, filter or decider asks it"))
    );
}

#[test]
fn queues_are_described() {
    let config = loaded(FILES[5]);
    assert_eq!(warnings(&config), [""; 0]);
    let flow = config.flow_control.unwrap();
    let flow = flow.queue;
    assert_eq!(flow.default_ttl, Some(Duration::from_secs(30)));
    let band = |i: usize| {
        (
            flow.bands[i].0,
            flow.bands[i].1.max_requests,
            flow.bands[i].1.fairness,
        )
    };
    assert_eq!(band(0), (0, 2000, Fairness::RoundRobin));
    assert_eq!(band(1), (-10, 500, Fairness::RoundRobin));
    assert_eq!(flow.bands[0].1.max_bytes, 1_000_000_000);
    assert_eq!(config.data.stale_after, Some(Duration::from_millis(200)));
    let off = loaded(&FILES[5].replace("[flowControl]", "[flowControl=false]"));
    assert!(off.flow_control.is_none());
    let endless = loaded(&FILES[5].replace("30s", "0s")).flow_control.unwrap();
    assert_eq!(endless.queue.default_ttl, None);
}

#[test]
fn defaults_are_filled_in() {
    let config = load(&default_config()).unwrap();
    assert_eq!(config.plan.handler.is, Handler::Single(0));
    assert_eq!(config.plan.profiles[0].picker.is.by, Picking::MaxScore);
    assert_eq!(config.plan.approximate.block_tokens, 64);
    assert_eq!(config.parsers.len(), 4);
    let all = loaded(&with(
        "type: queue-scorer
         {type: random-picker, parameters: {maxNumOfEndpoints: 3}}
         {name: mine, type: decode-filter}",
        "",
    ));
    let profile = &all.plan.profiles[0];
    assert_eq!(
        (&*profile.name, profile.scorers.len(), profile.filters.len()),
        ("default", 1, 1)
    );
    assert_eq!(
        (profile.picker.is.by, profile.picker.is.most),
        (Picking::Random, 3)
    );
    let (filter, picker) = (&profile.filters[0], &profile.picker);
    assert_eq!((&*filter.name, filter.kind), ("mine", "decode-filter"));
    assert_eq!(
        (&*picker.name, picker.kind),
        ("random-picker", "random-picker")
    );
    let handler = &all.plan.handler;
    assert_eq!(
        (&*handler.name, handler.kind),
        ("single-profile-handler", "single-profile-handler")
    );
}

/// Plugins, and what is said against them.
const WRONG_PLUGINS: &[(&str, &str)] = &[
    (
        "{type: queue-scorer}\n{type: approx-prefix-cache-producer, parameters: {blockSizetokens: 3}}",
        "plugins[1].parameters.blockSizetokens: there is no such field; is it blockSizeTokens?",
    ),
    (
        "{type: que-scorer}",
        "plugins[0].type: there is no plugin type \"que-scorer\"; is it queue-scorer?",
    ),
    (
        "{type: agent-identity}",
        "plugins[0].type: agent-identity is an experiment that is not supported",
    ),
    ("{name: a}", "plugins[0].type: a plugin needs a type"),
    (
        "{type: queue-scorer}\n{type: queue-scorer}",
        "plugins[1].name: a plugin \"queue-scorer\" is there already",
    ),
    (
        "{type: load-aware-scorer, parameters: {threshold: high}}",
        "plugins[0].parameters.threshold: this is a string, not a number",
    ),
    (
        "{type: prefix-based-pd-decider, parameters: {nonCachedTokens: -1}}",
        "plugins[0].parameters.nonCachedTokens: -1 is not from 0 to 4294967295",
    ),
    (
        "{type: by-label, parameters: {label: a}}",
        "plugins[0].parameters.validValues: without values nobody is kept",
    ),
    (
        "{type: utilization-detector, parameters: {kvCacheUtilThreshold: 1.5}}",
        "plugins[0].parameters.kvCacheUtilThreshold: 1.5 is not from 0.000000001 to 1",
    ),
    (
        "{type: core-metrics-extractor, parameters: {engineConfigs: [{name: x, queuedRequestsSpec: \"a{b!=c}\"}]}}",
        "plugins[0].parameters.engineConfigs[0].queuedRequestsSpec: only label=value can be asked for",
    ),
    (
        "{type: file-discovery}",
        "plugins[0].parameters.path: the file's path is needed",
    ),
    (
        "{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: x}}",
        "plugins[0].parameters.prefixMatchInfoProducerName: \"x\" is no producer of prefix matches",
    ),
    (
        "{type: single-profile-handler}\n{type: disagg-profile-handler}",
        "plugins: there is one profile handler",
    ),
    (
        "{type: disagg-profile-handler, parameters: {decodeProfile: a, profiles: {prefill: b}}}",
        "plugins[0].parameters.decodeProfile: the old flat fields do not go with profiles and deciders",
    ),
];

#[test]
fn what_is_wrong_is_said_with_its_place_and_the_nearest_name() {
    for (plugins, expected) in WRONG_PLUGINS.iter().copied() {
        let errors = errors(plugins, "");
        assert!(
            errors.iter().any(|e| e == expected),
            "{plugins}: {errors:#?}"
        );
    }
}

/// What follows the plugins, and what is said against it.
const WRONG_REST: &[(&str, &str)] = &[
    (
        "schedulingProfile: []",
        "schedulingProfile: there is no such field; is it schedulingProfiles?",
    ),
    (
        "featureGates: [flowcontrol]",
        "featureGates: there is no gate \"flowcontrol\"; is it flowControl?",
    ),
    (
        "schedulingProfiles: [{name: a, plugins: [{pluginRef: queue}]}]",
        "schedulingProfiles[0].plugins[0].pluginRef: there is no plugin \"queue\"",
    ),
    (
        "schedulingProfiles: [{name: a, plugins: []}, {name: b, plugins: []}]",
        "plugins: several profiles need a profile handler, such as disagg-profile-handler",
    ),
    (
        "schedulingProfiles: [{name: a, plugins: [{pluginRef: queue-scorer, wait: 1}]}]",
        "schedulingProfiles[0].plugins[0].wait: there is no such field",
    ),
    (
        "flowControl: {saturationDetector: {pluginRef: queue-scorer}}",
        "flowControl.saturationDetector.pluginRef: \"queue-scorer\" names no saturation detector",
    ),
    (
        "flowControl: {priorityBands: [{priority: 1}, {priority: 1}]}",
        "flowControl.priorityBands: priority 1 is given twice",
    ),
    (
        "flowControl: {maxBytes: lots}",
        "flowControl.maxBytes: this is no quantity, such as 2000 or 10Mi",
    ),
    (
        "dataLayer: {sources: [{pluginRef: queue-scorer}]}",
        "dataLayer.sources[0].pluginRef: \"queue-scorer\" names no source",
    ),
    (
        "requestHandler: {parsers: [{pluginRef: openai}]}",
        "requestHandler.parsers[0].pluginRef: \"openai\" names no parser",
    ),
];

#[test]
fn what_is_wrong_outside_the_plugins_is_said_too() {
    let profile =
        "schedulingProfiles: [{name: default, plugins: [{pluginRef: queue-scorer, weight: 2}]}]";
    for (rest, expected) in WRONG_REST.iter().copied() {
        let errors = errors("type: queue-scorer", rest);
        assert!(
            errors.iter().any(|e| e.starts_with(expected)),
            "{rest}: {errors:#?}"
        );
    }
    assert!(load(&value(&with("type: queue-scorer", profile))).is_ok());
    let nothing = load(&json!({})).unwrap_err().to_string();
    assert!(
        nothing.contains("apiVersion") && nothing.contains("kind"),
        "{nothing}"
    );
    for odd in [json!(null), json!([]), json!("x")] {
        assert_eq!(
            load(&odd).unwrap_err().to_string(),
            "a configuration is an object"
        );
    }
}

#[test]
fn numbers_may_be_whole_or_not_and_null_is_nothing() {
    let config = loaded(&with(
        "{type: queue-scorer, parameters: null}
         {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 16.0}}
         {type: load-aware-scorer, parameters: {threshold: 64}}",
        "schedulingProfiles: [{name: default, plugins: [{pluginRef: queue-scorer, weight: 1.5}, {pluginRef: load-aware-scorer}]}]",
    ));
    let weights: Vec<f64> = config.plan.profiles[0]
        .scorers
        .iter()
        .map(|s| s.weight)
        .collect();
    assert_eq!(weights, [1.5, 1.0]);
}

#[test]
fn never_and_always_are_different_things() {
    let profiles =
        "schedulingProfiles: [{name: decode, plugins: []}, {name: prefill, plugins: []}]";
    for (decider, expected) in [
        ("{name: d, type: always-disagg-pd-decider}", Decider::Always),
        ("{name: d, type: never-disagg-pd-decider}", Decider::Never),
        (
            "{name: d, type: always-disagg-multimodal-decider}",
            Decider::Multimodal,
        ),
        (
            "{name: d, type: prefix-based-pd-decider, parameters: {nonCachedTokens: 0}}",
            Decider::Never,
        ),
    ] {
        let handler = "{type: disagg-profile-handler, parameters: {stageOrder: prefill-first, onUnavailable: fail, deciderPluginName: d}}";
        let config = loaded(&with(&format!("{decider}\n{handler}"), profiles));
        let stages = stages(&config);
        assert_eq!(
            (stages.prefill_if, stages.order),
            (expected, StageOrder::PrefillFirst)
        );
        assert_eq!(stages.on_unavailable, crate::OnUnavailable::Fail);
    }
}

#[test]
fn sessions_engines_and_files_are_described() {
    let config = loaded(&with(
        "{type: session-affinity-scorer, parameters: {strategy: session_id, sessionIdConfig: {sources: [{header: X-Chat}], evictionTtlSeconds: 60}}}
         {type: core-metrics-extractor, parameters: {defaultEngine: mine, engineConfigs: [{name: mine, queuedRequestsSpec: 'q{a=\"b\"}', cacheInfoSpec: c}]}}
         {type: metrics-data-source, parameters: {scheme: https, path: /m, port: 9000}}
         {type: file-discovery, parameters: {path: /etc/endpoints.yaml, watchFile: true}}",
        "dataLayer: {discovery: {pluginRef: file-discovery}}",
    ));
    let session = config.plan.session.unwrap();
    assert_eq!(
        session.strategy,
        SessionStrategy::Id {
            headers: vec!["x-chat".into()],
            idle: Duration::from_secs(60)
        }
    );
    let mine = config.data.engines.known.last().unwrap();
    assert_eq!(mine.queued.as_ref().unwrap().text(), "q{a=\"b\"}");
    assert!(
        matches!(&mine.cache, Some(CacheInfo::Labels { num_blocks, .. }) if &**num_blocks == "num_gpu_blocks")
    );
    assert_eq!(
        (config.data.metrics.https, config.data.metrics.port),
        (true, Some(9000))
    );
    assert!(config.data.discovery.unwrap().watch);
}

#[test]
fn every_type_can_be_left_to_its_defaults_or_says_what_it_needs() {
    for (kind, _) in plugins::TYPES {
        let alone = json!({
            "apiVersion": API_VERSIONS[0], "kind": "EndpointPickerConfig",
            "plugins": [{"type": kind}],
            "schedulingProfiles": [{"name": "decode", "plugins": []}],
        });
        match load(&alone) {
            Ok(config) => assert_eq!(load(&config.effective).unwrap().plan, config.plan),
            Err(invalid) => {
                let needs = ["by-label", "request-attribute-reporter", "file-discovery"];
                assert!(needs.contains(kind), "{kind}: {invalid}");
            }
        }
    }
}

#[test]
fn a_number_of_a_response_is_told_when_it_is_to_be() {
    let reporter = |attribute: Value| {
        load(&json!({
            "apiVersion": API_VERSIONS[0], "kind": "EndpointPickerConfig",
            "plugins": [{"type": "request-attribute-reporter", "parameters": {"attributes": [attribute]}}],
            "schedulingProfiles": [{"name": "default", "plugins": []}],
        }))
    };
    let config = reporter(json!({
        "key": {"name": "cost"}, "expression": "usage.a / 2", "condition": "has(usage.b)",
    }));
    let config = config.unwrap();
    let idle = |warning: &Note| warning.to_string().contains("no effect");
    assert!(!config.warnings.iter().any(idle), "{:?}", config.warnings);
    let attribute = &config.attributes[0];
    assert_eq!(
        (&*attribute.namespace, &*attribute.name),
        ("envoy.lb", "cost")
    );
    assert_eq!(attribute.of(&json!({"a": 7, "b": 1})), Some(3.0));
    assert_eq!(attribute.of(&json!({"a": 7})), None);
    assert_eq!(attribute.of(&json!({"a": 1, "b": 1})), None);
    for (wrong, word) in [
        (json!({"key": {"name": "cost"}}), "needs an expression"),
        (
            json!({"key": {"name": "cost"}, "expression": "cost()"}),
            "not understood",
        ),
        (
            json!({"key": {"name": "cost"}, "expression": "1", "condition": "?"}),
            "condition: this is not understood",
        ),
        (json!({"expression": "1"}), "needs a name"),
    ] {
        let error = reporter(wrong).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_report_says_everything() {
    let (text, usable) = report(&value(FILES[1]));
    assert!(
        usable
            && text.starts_with("warning: apiVersion")
            && text.contains("\"schedulingProfiles\"")
    );
    let (text, usable) = report(&json!({"kind": "EndpointPickerConfig", "plugin": []}));
    assert!(!usable && text.contains("error: plugin: there is no such field; is it plugins?"));
}

/// Any value, with the words of the schema among its strings.
fn any_value() -> impl Strategy<Value = Value> {
    let words: Vec<&'static str> = (plugins::TYPES.iter().map(|(k, _)| *k))
        .chain(["default", "decode", "prefill", "1s", "2Mi", "a{b=c}", "In"])
        .collect();
    let keys: Vec<&'static str> = [
        "type",
        "name",
        "parameters",
        "pluginRef",
        "weight",
        "plugins",
        "label",
        "key",
        "values",
        "threshold",
        "blockSizeTokens",
        "deciders",
        "profiles",
        "prefill",
        "priority",
        "sources",
        "extractors",
        "engineConfigs",
        "matchExpressions",
        "priorityBands",
        "parsers",
        "autoTune",
    ]
    .into();
    let word = prop::sample::select(words).prop_map(Value::from);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0i64..100).prop_map(Value::from),
        word,
    ];
    leaf.prop_recursive(5, 64, 5, move |inner| {
        let key = prop::sample::select(keys.clone());
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..6)
                .prop_map(|pairs| { pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect() }),
        ]
    })
}

proptest! {
    #[test]
    fn no_configuration_panics_and_what_is_taken_can_be_read_again(
        plugins in any_value(), profiles in any_value(), flow in any_value(), data in any_value(),
        parameters in any_value(), kind in 0..plugins::TYPES.len(),
    ) {
        let kind = plugins::TYPES[kind].0;
        let whole = |plugins: Value| json!({
            "apiVersion": API_VERSIONS[0], "kind": "EndpointPickerConfig", "plugins": plugins,
            "schedulingProfiles": profiles.clone(), "flowControl": flow.clone(), "dataLayer": data.clone(),
        });
        let one = json!({
            "apiVersion": API_VERSIONS[0], "kind": "EndpointPickerConfig",
            "plugins": [{"type": kind, "parameters": parameters}],
        });
        for value in [whole(plugins), one] {
            let _ = report(&value);
            if let Ok(config) = load(&value) {
                let again = load(&config.effective);
                prop_assert!(again.is_ok(), "{:?}", again.err());
                prop_assert_eq!(again.unwrap().plan, config.plan);
            }
        }
    }
}
