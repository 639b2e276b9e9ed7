//! The section `flowControl`, as plain data.

use super::fields::Fields;
use super::plugins::{Is, Plugins};
use crate::Detector;
use crate::flow::{BandConfig, FlowConfig};
use std::time::Duration;

/// How requests queue before they are scheduled.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowControl {
    /// How the queue is divided and bounded.
    pub queue: FlowConfig,
    /// When servers count as busy.
    pub detector: Detector,
}

/// Reads the section; `detector` is what it or the rest of the configuration names.
pub(super) fn read(
    fields: &mut Fields<'_, '_>,
    plugins: &Plugins,
    detector: Detector,
) -> FlowControl {
    let max_bytes = fields.quantity_if("maxBytes");
    let max_requests = fields.quantity_if("maxRequests");
    let ttl = fields.duration("defaultRequestTTL", Duration::from_secs(60));
    let no_endpoint_ttl = fields.duration("noEndpointRequestTTL", Duration::from_secs(60));
    let template = fields.inside("defaultPriorityBand", |f| {
        band(f, plugins, BandConfig::default())
    });
    let negative_template = fields.has("defaultNegativePriorityBand").then(|| {
        fields.inside("defaultNegativePriorityBand", |f| {
            band(f, plugins, template)
        })
    });
    let bands = fields.each("priorityBands", |f| {
        let priority = f.whole_if("priority", (i32::MIN.into(), i32::MAX.into()));
        if priority.is_none() && !f.has("priority") {
            f.wrong("priority", "a band needs a priority");
        }
        let base = negative_template.filter(|_| priority.is_some_and(|p| p < 0));
        let band = band(f, plugins, base.unwrap_or(template));
        (
            priority.and_then(|p| i32::try_from(p).ok()).unwrap_or(0),
            band,
        )
    });
    for (i, (priority, _)) in bands.iter().enumerate() {
        if bands[..i].iter().any(|(p, _)| p == priority) {
            fields.wrong(
                "priorityBands",
                format!("priority {priority} is given twice"),
            );
        }
    }
    let ceiling = ceiling(fields, plugins);
    let eviction = fields.flag("enableEviction", false);
    FlowControl {
        queue: FlowConfig {
            max_bytes,
            max_requests,
            default_ttl: Some(ttl).filter(|ttl| !ttl.is_zero()),
            no_endpoint_ttl: Some(no_endpoint_ttl),
            template,
            negative_template,
            bands,
            ceiling,
            eviction,
            ..FlowConfig::default()
        },
        detector,
    }
}

/// The saturation at which nothing goes any more.
fn ceiling(fields: &mut Fields<'_, '_>, plugins: &Plugins) -> f64 {
    const KEY: &str = "usageLimitPolicyPluginRef";
    let Some(name) = fields.text_if(KEY) else {
        return 1.0;
    };
    match plugins.find_or_default(name).map(|p| p.is) {
        Some(Is::UsageLimit(limit)) => limit,
        _ => {
            fields.wrong(KEY, "this names no usage limit policy");
            1.0
        }
    }
}

fn band(fields: &mut Fields<'_, '_>, plugins: &Plugins, base: BandConfig) -> BandConfig {
    // In templates it means nothing; upstream lets it stand.
    if fields.place.ends_with("Band") {
        fields.ignored("priority", "a template is for every priority");
    }
    let unless_zero = |n: Option<u64>, or| n.filter(|n| *n != 0).unwrap_or(or);
    let fairness = match policy(fields, plugins, "fairnessPolicyRef") {
        None => base.fairness,
        Some(Is::Fairness(fairness)) => fairness,
        Some(_) => {
            fields.wrong("fairnessPolicyRef", "this names no fairness policy");
            base.fairness
        }
    };
    let ordering = match policy(fields, plugins, "orderingPolicyRef") {
        None => base.ordering,
        Some(Is::Ordering(ordering)) => ordering,
        Some(_) => {
            fields.wrong("orderingPolicyRef", "this names no ordering policy");
            base.ordering
        }
    };
    BandConfig {
        max_bytes: unless_zero(fields.quantity_if("maxBytes"), base.max_bytes),
        max_requests: unless_zero(fields.quantity_if("maxRequests"), base.max_requests),
        fairness,
        ordering,
    }
}

fn policy(fields: &mut Fields<'_, '_>, plugins: &Plugins, key: &'static str) -> Option<Is> {
    let name = fields.text_if(key)?;
    let found = plugins.find_or_default(name);
    Some(found.map_or(Is::Quiet, |p| p.is))
}
