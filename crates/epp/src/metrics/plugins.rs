//! How long plugins take, by a clock that is read after each of them.

use super::{APPROXIMATE, PRECISE, histograms};
use baton_scheduler::{Explanation, Observer, Plan, Profile, Source, Step};
use prometheus::{Histogram, HistogramVec, Registry};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Of so many decisions one is timed: with few servers most plugins take less time than a look at the clock. It is a prime,
/// so that clients that take turns are met all of them.
const EVERY: u64 = 13;
/// Seconds of plugins; upstream's begin at a tenth of a millisecond, which says nothing of these.
pub(super) const BUCKETS: [f64; 16] = [
    0.000_000_1,
    0.000_000_2,
    0.000_000_5,
    0.000_001,
    0.000_002,
    0.000_005,
    0.000_01,
    0.000_02,
    0.000_05,
    0.000_1,
    0.000_2,
    0.000_5,
    0.001,
    0.01,
    0.05,
    0.1,
];

/// A histogram for each plugin that decides.
#[derive(Debug)]
pub(crate) struct Plugins {
    decisions: AtomicU64,
    profiles: Vec<OfProfile>,
    next_profile: Histogram,
    results: Histogram,
    approximate: Histogram,
    precise: Option<Histogram>,
    /// The same as `precise`, if the configuration wants the index counted.
    lookups: Option<Histogram>,
}

/// By a plugin's place in its profile.
#[derive(Debug)]
struct OfProfile {
    filters: Vec<Histogram>,
    scorers: Vec<Histogram>,
    picker: Histogram,
}

/// Watches one decision.
#[derive(Debug)]
pub(crate) struct Watch<'a> {
    explanation: Option<&'a mut Explanation>,
    /// When the last step was done, if this decision is timed.
    last: Option<Instant>,
    took: Vec<(Step, Duration)>,
}

impl Observer for Watch<'_> {
    fn did(&mut self, step: Step) {
        let Some(last) = self.last else { return };
        let now = Instant::now();
        if step != Step::Other {
            self.took.push((step, now.saturating_duration_since(last)));
        }
        self.last = Some(now);
    }

    fn explanation(&mut self) -> Option<&mut Explanation> {
        self.explanation.as_deref_mut()
    }
}

impl OfProfile {
    fn new(family: &HistogramVec, profile: &Profile) -> Self {
        let of = |point, kind, name: &str| family.with_label_values(&[point, kind, name]);
        Self {
            filters: (profile.filters.iter())
                .map(|f| of("Filter", f.kind, &f.name))
                .collect(),
            scorers: (profile.scorers.iter())
                .map(|s| of("Scorer", s.kind, &s.name))
                .collect(),
            picker: of("Picker", profile.picker.kind, &profile.picker.name),
        }
    }
}

impl Plugins {
    /// Those of `plan`; `lookups` is where lookups in the index of what servers report are told besides.
    pub(super) fn new(r: &Registry, plan: &Plan, lookups: Option<Histogram>) -> Self {
        let family = histograms(
            r,
            "plugin_duration_seconds",
            "How long plugins took, of one decision in thirteen.",
            &["extension_point", "plugin_type", "plugin_name"],
            &BUCKETS,
        );
        let (kind, name) = (plan.handler.kind, &*plan.handler.name);
        let handler = |point| family.with_label_values(&[point, kind, name]);
        let index =
            |[name, kind]: [&str; 2]| family.with_label_values(&["DataProducer", kind, name]);
        Self {
            decisions: AtomicU64::new(0),
            profiles: (plan.profiles.iter())
                .map(|profile| OfProfile::new(&family, profile))
                .collect(),
            next_profile: handler("ProfilePicker"),
            results: handler("ProcessProfilesResults"),
            approximate: index(APPROXIMATE),
            precise: plan.precise.is_some().then(|| index(PRECISE)),
            lookups,
        }
    }

    /// Who watches the next decision; the reasons go into `explanation`, if they are wanted.
    pub(crate) fn watch<'a>(&self, explanation: Option<&'a mut Explanation>) -> Watch<'a> {
        let nth = self.decisions.fetch_add(1, Relaxed);
        Watch {
            explanation,
            last: nth.is_multiple_of(EVERY).then(Instant::now),
            took: Vec::new(),
        }
    }

    /// Tells what was seen.
    pub(crate) fn saw(&self, watch: &Watch<'_>) {
        let mut profile = None;
        for (step, took) in &watch.took {
            if let Step::Profile(at) = step {
                profile = self.profiles.get(*at);
            }
            for histogram in self.of(*step, profile).into_iter().flatten() {
                histogram.observe(took.as_secs_f64());
            }
        }
    }

    /// Where a step of `profile` is told.
    fn of<'a>(&'a self, step: Step, profile: Option<&'a OfProfile>) -> [Option<&'a Histogram>; 2] {
        let one = match step {
            Step::Profile(_) => Some(&self.next_profile),
            Step::Lookup(Source::Approximate) => Some(&self.approximate),
            Step::Lookup(Source::Precise) => {
                return [self.precise.as_ref(), self.lookups.as_ref()];
            }
            Step::Filter(at) => profile.and_then(|p| p.filters.get(at)),
            Step::Scorer(at) => profile.and_then(|p| p.scorers.get(at)),
            Step::Picker => profile.map(|p| &p.picker),
            Step::Results => Some(&self.results),
            Step::Other => None,
        };
        [one, None]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_scheduler::Scheduler;
    use baton_scheduler::config::{default_config, load};
    use baton_scheduler::{Endpoint, EndpointId, PrefixIndex, PromptHasher, Request, Role};

    /// Counts of the page, by what the labels say.
    fn counts(registry: &Registry) -> Vec<String> {
        let page = baton_metrics::text(&registry.gather());
        let prefix = "llm_d_epp_plugin_duration_seconds_count{extension_point=";
        let lines = page.lines().filter_map(|line| line.strip_prefix(prefix));
        lines.map(|line| line.replace('"', "")).collect()
    }

    #[test]
    fn every_plugin_of_one_decision_in_thirteen_is_timed() {
        let plan = load(&default_config()).unwrap().plan;
        let registry = Registry::new();
        let plugins = Plugins::new(&registry, &plan, None);
        let mut scheduler = Scheduler::new(plan, PrefixIndex::new(10));
        let prompt = PromptHasher::new(7).prompt("m", &[b"hello"], None);
        let fleet = [Endpoint::new(EndpointId(0), Role::Both)];
        let mut why = Explanation::default();
        for turn in 0..EVERY + 1 {
            let mut watch = plugins.watch((turn == 1).then_some(&mut why));
            let request = Request::new(&prompt);
            let decided = scheduler.decide_observed(&fleet, &request, turn, &mut watch);
            assert!(decided.is_ok());
            plugins.saw(&watch);
        }
        assert_eq!(why.stages.len(), 1);
        let seen = [
            "DataProducer,plugin_name=approx-prefix-cache-producer,plugin_type=approx-prefix-cache-producer} 2",
            "Picker,plugin_name=max-score-picker,plugin_type=max-score-picker} 2",
            "ProcessProfilesResults,plugin_name=single-profile-handler,plugin_type=single-profile-handler} 2",
            "ProfilePicker,plugin_name=single-profile-handler,plugin_type=single-profile-handler} 2",
            "Scorer,plugin_name=kv-cache-utilization-scorer,plugin_type=kv-cache-utilization-scorer} 2",
            "Scorer,plugin_name=prefix-cache-scorer,plugin_type=prefix-cache-scorer} 2",
            "Scorer,plugin_name=queue-scorer,plugin_type=queue-scorer} 2",
        ];
        assert_eq!(counts(&registry), seen);
    }
}
