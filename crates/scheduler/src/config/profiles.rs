//! Profiles and their handler: references are resolved and defaults filled in.

use super::decide::{DeciderSpec, HandlerSpec, StagesSpec};
use super::fields::{Fields, did_you_mean};
use super::plugins::{Is, Plugin, Plugins};
use crate::{
    Decider, Detector, Filter, Handler, Named, Picker, Picking, Plan, Profile, ProfileIdx, Scorer,
    Sooner, Source, Stages, Weighted,
};
use serde_json::{Value, json};

/// A reference to a plugin, with its weight.
struct Reference {
    name: String,
    weight: Option<f64>,
    place: String,
}

/// A profile as it is written.
struct Written {
    name: String,
    references: Vec<Reference>,
}

/// The profiles and who runs them; nothing if that makes no sense, which is noted.
pub(super) fn read(
    f: &mut Fields<'_, '_>,
    plugins: &mut Plugins,
) -> Option<(Vec<Profile>, Named<Handler>)> {
    let mut written = f.each("schedulingProfiles", |f| {
        let name = f.text("name", "").into_string();
        if name.is_empty() {
            f.wrong("name", "a profile needs a name");
        }
        let references = f.each("plugins", reference);
        Written { name, references }
    });
    for (i, profile) in written.iter().enumerate() {
        if written[..i].iter().any(|p| p.name == profile.name) {
            let twice = format!("a profile {:?} is there twice", profile.name);
            f.wrong("schedulingProfiles", twice);
        }
    }
    if written.is_empty() {
        written.push(everything(plugins));
    }
    let picker = default_picker(plugins);
    let mut said = Vec::new();
    let profiles: Vec<Profile> = (written.into_iter())
        .map(|written| profile(f, written, plugins, &picker, &mut said))
        .collect();
    f.say("schedulingProfiles", said);
    let handler = handler(f, &profiles, plugins)?;
    Some((profiles, handler))
}

fn reference(f: &mut Fields<'_, '_>) -> Reference {
    let name = f.text_if("pluginRef");
    if name.is_none() && !f.has("pluginRef") {
        f.wrong("pluginRef", "a reference is needed");
    }
    let weight = if f.raw("weight").is_some() {
        Some(f.number("weight", 1.0, (-1e9, 1e9)))
    } else {
        None
    };
    Reference {
        name: name.unwrap_or("").to_owned(),
        weight,
        place: f.place.clone(),
    }
}

/// Without profiles there is one with every filter, scorer and picker, in the order in which they are listed. Detectors
/// are filters only where a profile says so.
fn everything(plugins: &Plugins) -> Written {
    let takes_part = |p: &&Plugin| {
        matches!(
            p.is,
            Is::Filter(_) | Is::Scorer(_) | Is::Both(..) | Is::Picker(_)
        )
    };
    let references = plugins.list.iter().filter(takes_part).map(|p| Reference {
        name: p.name.clone(),
        weight: None,
        place: "schedulingProfiles".to_owned(),
    });
    Written {
        name: "default".to_owned(),
        references: references.collect(),
    }
}

/// The picker of profiles that name none: the first there is, or the usual one.
fn default_picker(plugins: &mut Plugins) -> Named<Picker> {
    let listed = plugins.list.iter().find_map(|p| match p.is {
        Is::Picker(picker) => Some(p.named(picker)),
        _ => None,
    });
    let usual = Picker::one(Picking::MaxScore);
    listed.unwrap_or_else(|| {
        let added = plugins.add("max-score-picker", Is::Picker(usual));
        added.named(usual)
    })
}

fn profile(
    f: &mut Fields<'_, '_>,
    written: Written,
    plugins: &Plugins,
    default_picker: &Named<Picker>,
    said: &mut Vec<Value>,
) -> Profile {
    let mut profile = Profile {
        name: written.name.into(),
        filters: Vec::new(),
        scorers: Vec::new(),
        picker: default_picker.clone(),
    };
    let (mut has_picker, mut lines) = (false, Vec::new());
    for reference in written.references {
        let Reference {
            name,
            weight,
            place,
        } = reference;
        let Some(plugin) = plugins.find(&name) else {
            let hint = plugins.did_you_mean(&name);
            let place = format!("{place}.pluginRef");
            f.notes
                .wrong(place, format!("there is no plugin {name:?}{hint}"));
            continue;
        };
        let is_scorer = matches!(plugin.is, Is::Scorer(_) | Is::Both(..));
        match &plugin.is {
            Is::Picker(_) if std::mem::replace(&mut has_picker, true) => {
                f.notes.wrong(&*place, "a profile has one picker");
            }
            Is::Picker(picker) => profile.picker = plugin.named(*picker),
            _ => {
                if !profile.take(plugin, weight.unwrap_or(1.0)) {
                    let kind = plugin.kind;
                    f.notes
                        .warn(&*place, format!("{kind} does nothing in a profile"));
                }
            }
        }
        let mut line = json!({"pluginRef": name});
        if is_scorer {
            line["weight"] = json!(weight.unwrap_or(1.0));
        } else if weight.is_some() {
            f.notes.warn(
                format!("{place}.weight"),
                "has no effect: only scorers have weights",
            );
        }
        lines.push(line);
    }
    if !has_picker {
        lines.push(json!({"pluginRef": default_picker.name}));
    }
    said.push(json!({"name": profile.name, "plugins": lines}));
    profile
}

impl Profile {
    /// Puts a plugin where it belongs; whether it belongs anywhere.
    fn take(&mut self, plugin: &Plugin, weight: f64) -> bool {
        let (filter, scorer) = match &plugin.is {
            Is::Filter(filter) => (Some(filter.clone()), None),
            Is::Scorer(scorer) => (None, Some(scorer.clone())),
            Is::Both(filter, scorer) => (Some(filter.clone()), Some(scorer.clone())),
            Is::Detector(Detector::Utilization(u)) => (Some(Filter::Utilization(*u)), None),
            Is::Detector(Detector::Concurrency(c)) => (Some(Filter::Concurrency(*c)), None),
            _ => return false,
        };
        self.filters.extend(filter.map(|is| plugin.named(is)));
        self.scorers.extend(scorer.map(|scorer| Weighted {
            name: plugin.name.as_str().into(),
            kind: plugin.kind,
            scorer,
            weight,
        }));
        true
    }
}

fn handler(
    f: &mut Fields<'_, '_>,
    profiles: &[Profile],
    plugins: &mut Plugins,
) -> Option<Named<Handler>> {
    let mut handlers = plugins.list.iter().filter_map(|p| match &p.is {
        Is::Handler(spec) => Some(p.named(spec.clone())),
        _ => None,
    });
    let (first, second) = (handlers.next(), handlers.next());
    drop(handlers);
    if second.is_some() {
        f.wrong("plugins", "there is one profile handler");
        return None;
    }
    let spec = match first {
        Some(spec) => spec,
        None if profiles.len() == 1 => {
            let single = HandlerSpec::Single;
            let added = plugins.add("single-profile-handler", Is::Handler(single.clone()));
            added.named(single)
        }
        None => {
            let several = "several profiles need a profile handler, such as disagg-profile-handler";
            f.wrong("plugins", several);
            return None;
        }
    };
    let Named { name, kind, is } = spec;
    let is = match is {
        HandlerSpec::Disaggregated(spec) => stages(f, &spec, profiles, plugins)?,
        _ if profiles.len() > 1 => {
            f.wrong(
                "schedulingProfiles",
                "this profile handler runs one profile",
            );
            return None;
        }
        HandlerSpec::Single => Handler::Single(0),
        HandlerSpec::DataParallel(primary_port) => Handler::DataParallel {
            profile: 0,
            primary_port,
        },
    };
    Some(Named { name, kind, is })
}

fn stages(
    f: &mut Fields<'_, '_>,
    spec: &StagesSpec,
    profiles: &[Profile],
    plugins: &Plugins,
) -> Option<Handler> {
    let position = |name: &str| profiles.iter().position(|p| *p.name == *name);
    let Some(decode) = position(&spec.decode) else {
        let hint = did_you_mean(&spec.decode, profiles.iter().map(|p| &*p.name));
        let none = format!("the handler needs a profile {:?}{hint}", spec.decode);
        f.wrong("schedulingProfiles", none);
        return None;
    };
    let (prefill, encode) = (position(&spec.prefill), position(&spec.encode));
    let prefill_if = decider(f, &spec.prefill_if, plugins);
    let encode_if = decider(f, &spec.encode_if, plugins);
    let mut missing = |profile: Option<ProfileIdx>, decider, name: &str| {
        if profile.is_none() && decider != Decider::Never {
            let text = format!("there is no profile {name:?}, so that its decider has no effect");
            f.warn("schedulingProfiles", text);
        }
    };
    missing(prefill, prefill_if, &spec.prefill);
    missing(encode, encode_if, &spec.encode);
    Some(Handler::Disaggregated(Stages {
        decode,
        prefill,
        encode,
        prefill_if,
        encode_if,
        on_unavailable: spec.on_unavailable,
        order: spec.order,
        primary_port: spec.primary_port,
        same_label: spec.same_label.clone(),
    }))
}

fn decider(f: &mut Fields<'_, '_>, spec: &DeciderSpec, plugins: &Plugins) -> Decider {
    let (name, field) = match spec {
        DeciderSpec::Is(decider) => return *decider,
        DeciderSpec::Named(name, field) => (name, field),
    };
    match plugins.find(name).map(|p| &p.is) {
        Some(Is::Decider(decider)) => *decider,
        found => {
            let why = match found {
                Some(_) => format!("{name:?} is no decider"),
                None => format!("there is no plugin {name:?}{}", plugins.did_you_mean(name)),
            };
            let of = |p: &Plugin| matches!(p.is, Is::Handler(_));
            let at = plugins.list.iter().position(of).unwrap_or(0);
            f.notes
                .wrong(format!("plugins[{at}].parameters.{field}"), why);
            Decider::Never
        }
    }
}

/// Whether anything in `plan` asks the precise index.
pub(super) fn asks_precise(plan: &Plan) -> bool {
    let of_filter = |f: &Named<Filter>| f.is.source();
    let of_scorer = |s: &Weighted| Scorer::source(&s.scorer);
    let mut asked = plan.profiles.iter().flat_map(|p| {
        let filters = p.filters.iter().map(of_filter);
        filters.chain(p.scorers.iter().map(of_scorer))
    });
    let decides = matches!(
        &plan.handler.is,
        Handler::Disaggregated(Stages {
            prefill_if: Decider::Uncached {
                source: Source::Precise,
                ..
            } | Decider::Sooner(Sooner {
                source: Source::Precise,
                ..
            }),
            ..
        })
    );
    decides || asked.any(|source| source == Some(Source::Precise))
}
