//! How a queue is divided and bounded, as data. Defaults are llm-d's, except that tenants are kept apart.

use std::time::Duration;

/// Everything that a [`FlowControl`](super::FlowControl) is told.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowConfig {
    /// Most waiting requests, all bands together.
    pub max_requests: Option<u64>,
    /// Most bytes of waiting requests' bodies, all bands together.
    pub max_bytes: Option<u64>,
    /// How long a request that does not say otherwise may wait while there are servers; `None` as long as its client.
    pub default_ttl: Option<Duration>,
    /// How long a request may wait while there is no server; `None` as long as its client.
    pub no_endpoint_ttl: Option<Duration>,
    /// Bands that are always there.
    pub bands: Vec<(i32, BandConfig)>,
    /// What bands are like that are made when their first request comes.
    pub template: BandConfig,
    /// The same for priorities below 0; `None` as the others.
    pub negative_template: Option<BandConfig>,
    /// The saturation at which nothing is dispatched any more.
    pub ceiling: f64,
    /// Most flows that are told apart; what comes beyond shares one flow a band.
    pub max_flows: usize,
    /// Whether sheddable requests that run are given up for those of higher priority that wait.
    pub eviction: bool,
}

impl Default for FlowConfig {
    fn default() -> Self {
        Self {
            max_requests: None,
            max_bytes: None,
            default_ttl: Some(Duration::from_secs(60)),
            no_endpoint_ttl: Some(Duration::from_secs(60)),
            bands: Vec::new(),
            template: BandConfig::default(),
            negative_template: None,
            ceiling: 1.0,
            max_flows: 1000,
            eviction: false,
        }
    }
}

impl FlowConfig {
    pub(super) fn band(&self, priority: i32) -> BandConfig {
        let own = self.bands.iter().find(|(p, _)| *p == priority);
        match own {
            Some((_, band)) => *band,
            None if priority < 0 => self.negative_template.unwrap_or(self.template),
            None => self.template,
        }
    }

    pub(super) fn is_kept(&self, priority: i32) -> bool {
        priority == 0 || self.bands.iter().any(|(p, _)| *p == priority)
    }
}

/// One priority's part of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BandConfig {
    /// Most waiting requests.
    pub max_requests: u64,
    /// Most bytes of their bodies.
    pub max_bytes: u64,
    /// Whose turn it is.
    pub fairness: Fairness,
    /// Which of a flow's requests goes first.
    pub ordering: Ordering,
}

impl Default for BandConfig {
    fn default() -> Self {
        Self {
            max_requests: 5000,
            max_bytes: 1_000_000_000,
            fairness: Fairness::default(),
            ordering: Ordering::default(),
        }
    }
}

/// Which flow of a band is next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fairness {
    /// The one with the best request by the band's [`Ordering`], as if there were one flow: whoever sends most gets most.
    GlobalStrict,
    /// Each in turn, a request each.
    #[default]
    RoundRobin,
    /// Each in turn, as many prompt tokens each: who sends long prompts gets fewer of them through.
    Tokens,
}

impl Fairness {
    const NAMES: [(&str, Self); 3] = [
        ("global-strict-fairness-policy", Self::GlobalStrict),
        ("round-robin-fairness-policy", Self::RoundRobin),
        ("token-fairness-policy", Self::Tokens),
    ];

    /// The policy of this name in configurations.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        find(&Self::NAMES, name)
    }

    /// Names of all of them.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::NAMES.iter().map(|(name, _)| *name)
    }
}

/// Which of a flow's requests goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ordering {
    /// The one that came first.
    #[default]
    Arrival,
    /// The one that would have to be given up first; those that wait for ever come last.
    Deadline,
    /// The one whose first token is due first; those without a wish come last.
    SloDeadline,
}

impl Ordering {
    const NAMES: [(&str, Self); 3] = [
        ("fcfs-ordering-policy", Self::Arrival),
        ("edf-ordering-policy", Self::Deadline),
        ("slo-deadline-ordering-policy", Self::SloDeadline),
    ];

    /// The policy of this name in configurations.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        find(&Self::NAMES, name)
    }

    /// Names of all of them.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::NAMES.iter().map(|(name, _)| *name)
    }
}

fn find<P: Copy>(names: &[(&str, P)], name: &str) -> Option<P> {
    let found = names.iter().find(|(known, _)| *known == name);
    found.map(|(_, policy)| *policy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_band_is_its_own_or_what_the_templates_say() {
        let of = |max_requests| BandConfig {
            max_requests,
            ..BandConfig::default()
        };
        let config = FlowConfig {
            bands: vec![(7, of(7)), (-2, of(2))],
            template: of(1),
            ..FlowConfig::default()
        };
        let most = |c: &FlowConfig| [9, 7, 0, -1, -2].map(|p| c.band(p).max_requests);
        assert_eq!(most(&config), [1, 7, 1, 1, 2]);
        let negative_template = Some(of(3));
        let config = FlowConfig {
            negative_template,
            ..config
        };
        assert_eq!(most(&config), [1, 7, 1, 3, 2]);
        assert_eq!(
            [9, 7, 0, -2].map(|p| config.is_kept(p)),
            [false, true, true, true]
        );
    }

    #[test]
    fn policies_have_the_names_of_configurations() {
        for name in Fairness::names() {
            assert!(Fairness::named(name).is_some());
        }
        assert_eq!(
            Ordering::named("edf-ordering-policy"),
            Some(Ordering::Deadline)
        );
        assert_eq!(Ordering::named("edf"), None);
        assert_eq!(Fairness::named("program-aware-fairness"), None);
    }
}
