//! llm-d's `EndpointPickerConfig`, all its generations, made into a [`Plan`] and plain data.
//!
//! Reading is strict: what is unknown is refused with its place and the nearest name, all of it at once. Parameters of
//! older generations are translated, and what has no effect here is accepted; both are said as warnings.

mod decide;
mod expression;
mod fields;
mod flow;
mod plugins;
mod profiles;
mod supply;

pub use expression::Expression;
pub use fields::{Note, duration, quantity};
pub use flow::FlowControl;
pub use supply::{Attribute, DataLayer, Engines, FileDiscovery, MetricsSource, Parser, Tokens};

use crate::{Approximate, Detector, Plan, Session, Shedding};
use fields::{Fields, Notes, did_you_mean, object};
use plugins::{Is, Plugins};
use serde_json::{Value, json};
use std::fmt::Write as _;
use supply::Supplies;

/// Everything that a configuration says.
#[derive(Clone, Debug)]
pub struct PickerConfig {
    /// How servers are chosen.
    pub plan: Plan,
    /// How requests queue; `None` if they do not.
    pub flow_control: Option<FlowControl>,
    /// Where facts about servers come from.
    pub data: DataLayer,
    /// How prompts are counted.
    pub tokens: Tokens,
    /// How requests are read; the first whose paths fit.
    pub parsers: Vec<Parser>,
    /// Numbers that are told to the proxy at the end of a response.
    pub attributes: Vec<Attribute>,
    /// Whether responses say which endpoint served them, for tests.
    pub shows_served: bool,
    /// Feature gates that matter.
    pub gates: Gates,
    /// What is worth saying.
    pub warnings: Vec<Note>,
    /// The configuration as it is understood, in its own form, with all defaults.
    pub effective: Value,
}

/// Feature gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gates {
    /// Requests queue before they are scheduled.
    pub flow_control: bool,
    /// Metrics are exported under their old names too.
    pub legacy_metrics: bool,
    /// Replicas that do not lead know the endpoints all the same.
    pub followers_know: bool,
}

/// A configuration that makes no sense.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", listed(.errors))]
pub struct Invalid {
    /// Everything that is wrong with it.
    pub errors: Vec<Note>,
    /// What is worth saying besides.
    pub warnings: Vec<Note>,
}

fn listed(notes: &[Note]) -> String {
    let lines: Vec<String> = notes.iter().map(Note::to_string).collect();
    lines.join("\n")
}

const API_VERSIONS: [&str; 2] = [
    "llm-d.ai/v1alpha1",
    "inference.networking.x-k8s.io/v1alpha1",
];

/// The configuration that holds if none is given.
#[must_use]
pub fn default_config() -> Value {
    json!({
        "apiVersion": API_VERSIONS[0],
        "kind": "EndpointPickerConfig",
        "plugins": [
            {"type": "queue-scorer"},
            {"type": "kv-cache-utilization-scorer"},
            {"type": "prefix-cache-scorer"},
        ],
        "schedulingProfiles": [{
            "name": "default",
            "plugins": [
                {"pluginRef": "queue-scorer", "weight": 2},
                {"pluginRef": "kv-cache-utilization-scorer", "weight": 2},
                {"pluginRef": "prefix-cache-scorer", "weight": 3},
            ],
        }],
    })
}

/// Reads a configuration that was YAML or JSON.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load(value: &Value) -> Result<PickerConfig, Invalid> {
    let mut notes = Notes::default();
    let (config, effective) = if value.is_object() {
        object(Some(value), String::new(), &mut notes, top)
    } else {
        notes.wrong("", "a configuration is an object");
        (None, Value::Null)
    };
    match config {
        Some(config) if notes.errors.is_empty() => Ok(PickerConfig {
            warnings: notes.warnings,
            effective,
            ..config
        }),
        _ => Err(Invalid {
            errors: notes.errors,
            warnings: notes.warnings,
        }),
    }
}

/// What `check-config` prints: warnings and errors, a line each, and the configuration as it is understood. The flag says
/// whether it can be used.
#[must_use]
pub fn report(value: &Value) -> (String, bool) {
    let mut text = String::new();
    let mut say = |kind: &str, notes: &[Note]| {
        for note in notes {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{kind}: {note}");
        }
    };
    match load(value) {
        Ok(config) => {
            say("warning", &config.warnings);
            let effective = serde_json::to_string_pretty(&config.effective);
            text.push_str(&effective.unwrap_or_default());
            text.push('\n');
            (text, true)
        }
        Err(invalid) => {
            say("error", &invalid.errors);
            say("warning", &invalid.warnings);
            (text, false)
        }
    }
}

fn top(f: &mut Fields<'_, '_>) -> Option<PickerConfig> {
    head(f);
    let gates = gates(f);
    let list = match f.raw("plugins") {
        None => &[],
        Some(Value::Array(list)) => list.as_slice(),
        Some(_) => {
            f.wrong("plugins", "this is no list");
            &[]
        }
    };
    let mut supplies = Supplies::default();
    let mut plugins = Plugins::read(list, &mut supplies, f.notes);
    let profiles = profiles::read(f, &mut plugins);
    let detector = detector(f, &plugins);
    let flow = f.inside("flowControl", |f| {
        let own = detector_in(f, &plugins);
        flow::read(f, &plugins, own.or(detector).unwrap_or_default())
    });
    let parsers = parsers(f, &plugins);
    data_layer(f, &plugins);
    f.say("plugins", std::mem::take(&mut plugins.said));
    let (profiles, handler) = profiles?;
    let mut plan = Plan::with(profiles, handler);
    plan.saturation = flow.detector;
    supply(f, &mut plan, &supplies);
    Some(PickerConfig {
        plan,
        flow_control: gates.flow_control.then_some(flow),
        data: supplies.data,
        tokens: supplies.tokens,
        parsers,
        attributes: supplies.attributes,
        shows_served: supplies.shows_served,
        gates,
        warnings: Vec::new(),
        effective: Value::Null,
    })
}

fn head(f: &mut Fields<'_, '_>) {
    match f.text_if("apiVersion") {
        Some(version) if version == API_VERSIONS[0] => {}
        Some(version) if version == API_VERSIONS[1] => {
            f.warn("apiVersion", format!("this is {} now", API_VERSIONS[0]));
        }
        Some(_) => f.wrong(
            "apiVersion",
            format!("known are {}", API_VERSIONS.join(" and ")),
        ),
        None if f.has("apiVersion") => {}
        None => f.wrong("apiVersion", format!("this must be {}", API_VERSIONS[0])),
    }
    f.say("apiVersion", API_VERSIONS[0]);
    let kind = f.text_if("kind");
    if kind.is_some_and(|kind| kind != "EndpointPickerConfig") || !f.has("kind") {
        f.wrong("kind", "this must be EndpointPickerConfig");
    }
}

fn gates(f: &mut Fields<'_, '_>) -> Gates {
    let mut gates = Gates {
        flow_control: false,
        legacy_metrics: false,
        followers_know: true,
    };
    let known = [
        "flowControl",
        "enableLegacyMetrics",
        "haPopulateNonLeaderDatastore",
        "dataLayer",
        "prepareDataPlugins",
    ];
    for entry in f.texts("featureGates") {
        let (name, on) = match entry.split_once('=') {
            None => (entry, true),
            Some((name, value)) => {
                if !matches!(value, "true" | "false") {
                    f.wrong(
                        "featureGates",
                        format!("{entry:?} is neither true nor false"),
                    );
                }
                (name, value == "true")
            }
        };
        match name {
            "flowControl" => gates.flow_control = on,
            "enableLegacyMetrics" => gates.legacy_metrics = on,
            "haPopulateNonLeaderDatastore" => gates.followers_know = on,
            "dataLayer" | "prepareDataPlugins" => {
                f.warn("featureGates", format!("{name} is always on"));
            }
            _ => {
                let hint = did_you_mean(name, known.into_iter());
                f.wrong("featureGates", format!("there is no gate {name:?}{hint}"));
            }
        }
    }
    gates
}

/// The detector that the whole configuration names: its old place, or the one that is listed.
fn detector(f: &mut Fields<'_, '_>, plugins: &Plugins) -> Option<Detector> {
    let named = detector_in(f, plugins);
    if f.has("saturationDetector") {
        f.warn("saturationDetector", "this belongs into flowControl now");
    }
    named.or_else(|| {
        // Upstream's name of the default one; what is listed under it counts.
        match plugins.find("utilization-detector")?.is {
            Is::Detector(detector) => Some(detector),
            _ => None,
        }
    })
}

fn detector_in(f: &mut Fields<'_, '_>, plugins: &Plugins) -> Option<Detector> {
    f.inside("saturationDetector", |f| {
        let name = f.text_if("pluginRef")?;
        match plugins.find_or_default(name).map(|p| p.is) {
            Some(Is::Detector(detector)) => Some(detector),
            _ => {
                let hint = plugins.did_you_mean(name);
                f.wrong(
                    "pluginRef",
                    format!("{name:?} names no saturation detector{hint}"),
                );
                None
            }
        }
    })
}

fn parsers(f: &mut Fields<'_, '_>, plugins: &Plugins) -> Vec<Parser> {
    let parser = |f: &mut Fields<'_, '_>| {
        let name = f.text_if("pluginRef")?;
        match plugins.find_or_default(name).map(|p| p.is) {
            Some(Is::Parser(parser)) => Some(parser),
            _ => {
                f.wrong("pluginRef", format!("{name:?} names no parser"));
                None
            }
        }
    };
    let old = f.inside("parser", parser);
    let new = f.inside("requestHandler", |f| f.each("parsers", parser));
    if old.is_some() {
        f.warn("parser", "this is requestHandler.parsers now");
    }
    let all: Vec<Parser> = old.into_iter().chain(new.into_iter().flatten()).collect();
    if all.is_empty() {
        use Parser::{Anthropic, OpenAi, Passthrough, VllmHttp};
        return vec![OpenAi, Anthropic, VllmHttp, Passthrough];
    }
    all
}

fn data_layer(f: &mut Fields<'_, '_>, plugins: &Plugins) {
    f.inside("dataLayer", |f| {
        f.flag("injectDefaults", true);
        let check = |f: &mut Fields<'_, '_>, is: fn(&Is) -> bool, what| {
            let Some(name) = f.text_if("pluginRef") else {
                if !f.has("pluginRef") {
                    f.wrong("pluginRef", "a reference is needed");
                }
                return;
            };
            if !plugins.find_or_default(name).is_some_and(|p| is(&p.is)) {
                let hint = plugins.did_you_mean(name);
                f.wrong("pluginRef", format!("{name:?} names no {what}{hint}"));
            }
        };
        f.each("sources", |f| {
            check(f, |is| *is == Is::Source, "source");
            // What follows events of endpoints or objects is any plugin that wants to.
            let any = |is: &Is| matches!(is, Is::Extractor | Is::Quiet | Is::Scorer(_));
            f.each("extractors", |f| check(f, any, "extractor"));
        });
        if f.has("discovery") {
            f.inside("discovery", |f| {
                check(f, |is| *is == Is::Discovery, "discovery");
            });
        }
        if f.has("peerDiscovery") {
            f.inside("peerDiscovery", |f| {
                f.ignored("pluginRef", "replicas find each other by themselves");
            });
        }
        f.ignored(
            "crossReplicaSyncerPluginRef",
            "replicas share by themselves",
        );
        f.ignored("crossReplicaSyncInterval", "replicas share by themselves");
    });
}

/// Puts into `plan` what plugins said beside what they are.
fn supply(f: &mut Fields<'_, '_>, plan: &mut Plan, supplies: &Supplies) {
    // What no configuration says is as upstream's default, which is tuned automatically.
    let usual = Approximate {
        block_tokens: 64,
        ..Approximate::default()
    };
    plan.approximate = (supplies.approximate)
        .or(supplies.forwarded)
        .unwrap_or(usual);
    plan.precise = supplies.precise.clone();
    plan.shedding = supplies.shedding.unwrap_or(Shedding::AtSaturation);
    plan.in_flight = supplies.in_flight.unwrap_or_default();
    plan.costs = supplies.costs.unwrap_or_default();
    plan.recently_used = match supplies.recently_used {
        0 => plan.recently_used,
        said => said,
    };
    plan.session = supplies.session.as_ref().map(|(strategy, name)| {
        let position = |name: &str| plan.profiles.iter().position(|p| *p.name == *name);
        let profile = name.as_deref().and_then(position);
        if let (Some(name), None) = (name, profile) {
            f.wrong(
                "schedulingProfiles",
                format!("session affinity names a profile {name:?}, and there is none"),
            );
        }
        Session {
            strategy: strategy.clone(),
            profile,
        }
    });
    if plan.precise.is_some() && !profiles::asks_precise(plan) {
        f.warn("plugins", "there is a precise index, and no scorer, filter or decider asks it: prefixMatchInfoProducerName names it");
    }
}

#[cfg(test)]
mod tests;
