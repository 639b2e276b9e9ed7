//! Flow control of the gateway: what its configuration may say, what that means, and what a request asks for.

use crate::forward::Asked;
use crate::refusal::Refusal;
use baton_fleet::headers::{FAIRNESS, OBJECTIVE, SLO_TTFT};
use baton_fleet::{Admission, Asking, Fleet, FlowMetrics, Permit, Surroundings};
use baton_scheduler::flow::{
    Arrival, BandConfig, DEFAULT_FLOW, Fairness, FlowConfig, Gauge, Need, Ordering, Outcome,
};
use baton_scheduler::{Concurrency, Counted, Detector, Utilization};
use http::HeaderMap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Most priorities with a band of their own in the configuration.
const MAX_BANDS: usize = 64;
/// Longest wait that can be configured, in seconds.
const MAX_SECONDS: f64 = 86_400.0;

/// How requests wait while servers are busy. Every field has a default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FlowControlConfig {
    /// Most waiting requests.
    pub max_requests: Option<u64>,
    /// Most bytes of waiting requests' bodies.
    pub max_bytes: Option<u64>,
    /// Seconds that a request may wait for a server with room; 0 as long as its client.
    pub default_request_ttl_s: f64,
    /// Seconds that a request may wait while there is no server at all; 0 as long as its client.
    pub no_endpoint_request_ttl_s: f64,
    /// What priorities are like that have no band of their own.
    pub default_priority_band: BandSection,
    /// The same for priorities below 0, if they differ.
    pub default_negative_priority_band: Option<BandSection>,
    /// Bands of single priorities.
    pub priority_bands: Vec<PriorityBand>,
    /// Priorities by name: what clients ask for with `x-llm-d-inference-objective`. An unknown name is priority 0.
    pub objectives: BTreeMap<String, i32>,
    /// Tenants that are told apart.
    pub max_flows: usize,
    /// When servers count as busy.
    pub saturation_detector: DetectorSection,
    /// The saturation at which nothing goes any more.
    pub usage_limit: f64,
    /// Whether requests of priorities below 0 that run are ended for those of higher ones that wait.
    pub eviction: bool,
}

impl Default for FlowControlConfig {
    fn default() -> Self {
        let plain = FlowConfig::default();
        Self {
            max_requests: plain.max_requests,
            max_bytes: plain.max_bytes,
            default_request_ttl_s: 60.0,
            no_endpoint_request_ttl_s: 60.0,
            default_priority_band: BandSection::default(),
            default_negative_priority_band: None,
            priority_bands: Vec::new(),
            objectives: BTreeMap::new(),
            max_flows: plain.max_flows,
            saturation_detector: DetectorSection::default(),
            usage_limit: plain.ceiling,
            eviction: plain.eviction,
        }
    }
}

/// One priority's part of the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BandSection {
    /// Most waiting requests.
    pub max_requests: u64,
    /// Most bytes of their bodies.
    pub max_bytes: u64,
    /// Whose turn it is: `round-robin-fairness-policy`, `token-fairness-policy`, `global-strict-fairness-policy`.
    pub fairness_policy: String,
    /// Which of a tenant's requests goes first: `fcfs-ordering-policy`, `edf-ordering-policy`,
    /// `slo-deadline-ordering-policy`.
    pub ordering_policy: String,
}

impl Default for BandSection {
    fn default() -> Self {
        let plain = BandConfig::default();
        Self {
            max_requests: plain.max_requests,
            max_bytes: plain.max_bytes,
            fairness_policy: "round-robin-fairness-policy".to_owned(),
            ordering_policy: "fcfs-ordering-policy".to_owned(),
        }
    }
}

/// The band of one priority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PriorityBand {
    /// The priority.
    pub priority: i32,
    /// What it is like.
    #[serde(flatten)]
    pub band: BandSection,
}

/// When servers count as busy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "type", rename_all = "kebab-case")]
pub enum DetectorSection {
    /// By what they say of themselves, and what was sent to them since.
    #[serde(rename = "utilization-detector")]
    Utilization {
        /// Waiting requests that make a server busy.
        #[serde(default = "queue_depth")]
        queue_depth_threshold: f64,
        /// Part of the KV pool in use that makes a server busy.
        #[serde(default = "kv_usage")]
        kv_cache_util_threshold: f64,
    },
    /// By what was sent to them.
    #[serde(rename = "concurrency-detector")]
    Concurrency {
        /// What counts.
        #[serde(default)]
        concurrency_mode: Mode,
        /// Most requests at a server.
        #[serde(default = "max_concurrency")]
        max_concurrency: f64,
        /// Most tokens at a server.
        #[serde(default = "max_tokens")]
        max_token_concurrency: f64,
    },
}

/// What `concurrency-detector` counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Requests.
    #[default]
    Requests,
    /// Tokens.
    Tokens,
    /// Whichever is nearer to its bound.
    Hybrid,
}

fn queue_depth() -> f64 {
    Utilization::default().queue_depth
}

fn kv_usage() -> f64 {
    Utilization::default().kv_usage
}

fn max_concurrency() -> f64 {
    Concurrency::default().requests
}

fn max_tokens() -> f64 {
    Concurrency::default().tokens
}

impl Default for DetectorSection {
    fn default() -> Self {
        Self::Utilization {
            queue_depth_threshold: queue_depth(),
            kv_cache_util_threshold: kv_usage(),
        }
    }
}

/// Why a `flow_control` section makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// A policy that there is not.
    #[error("flow_control: no policy {0:?}; there are {1}")]
    Policy(String, String),
    /// A number out of its range.
    #[error("flow_control: {0} must be {1}")]
    Range(&'static str, &'static str),
    /// One priority twice.
    #[error("flow_control: priority {0} has two bands")]
    Twice(i32),
}

/// What a `flow_control` section means.
#[derive(Clone, Debug)]
pub(crate) struct FlowPlan {
    pub(crate) queue: FlowConfig,
    pub(crate) detector: Detector,
    pub(crate) gauge: Gauge,
}

/// What a request asks of the queue.
#[derive(Debug)]
pub(crate) struct Claim {
    flow: Arc<str>,
    priority: i32,
    slo: Option<Duration>,
}

/// The queue before the servers.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) gate: Arc<Admission>,
    config: FlowControlConfig,
    /// Prompts from this length on probably need a prefill server.
    prefill_from: Option<u32>,
}

/// The first of these headers that is there.
fn first<'a>(headers: &'a HeaderMap, names: [&str; 2]) -> Option<&'a str> {
    names
        .into_iter()
        .find_map(|name| headers.get(name)?.to_str().ok())
        .filter(|value| !value.is_empty())
}

impl Flow {
    pub(crate) fn new(
        config: &FlowControlConfig,
        prefill_from: Option<u32>,
        fleet: &Arc<Fleet>,
        metrics: Arc<FlowMetrics>,
    ) -> Result<Self, FlowError> {
        let plan = config.plan()?;
        let fleet = fleet.clone();
        let around = Surroundings {
            room: Box::new(move || fleet.room(&plan.detector, plan.gauge)),
            witness: metrics,
        };
        Ok(Self {
            gate: Admission::new(plan.queue, around),
            config: config.clone(),
            prefill_from,
        })
    }

    /// What a request with these headers asks for; a tenant that is known by its key is not asked who it is.
    pub(crate) fn claim(&self, headers: &HeaderMap, tenant: Option<Arc<str>>) -> Claim {
        let flow = tenant.or_else(|| first(headers, FAIRNESS).map(Into::into));
        let slo = first(headers, SLO_TTFT).and_then(|ms| ms.parse::<u32>().ok());
        Claim {
            flow: flow.unwrap_or_else(|| DEFAULT_FLOW.into()),
            priority: self.config.priority(first(headers, OBJECTIVE)),
            slo: slo.map(|ms| Duration::from_millis(ms.into())),
        }
    }

    /// Waits until a request for what is `asked`, whose body has `bytes`, may go.
    pub(crate) async fn admit(
        &self,
        claim: &Claim,
        asked: &Asked,
        bytes: usize,
    ) -> Result<Permit, Refusal> {
        let tokens = asked.prompt.tokens();
        let needs_prefill = self.prefill_from.is_some_and(|from| tokens >= from.max(1));
        let arrival = Arrival {
            flow: &claim.flow,
            priority: claim.priority,
            bytes: bytes as u64,
            tokens,
            need: if needs_prefill {
                Need::PrefillAndDecode
            } else {
                Need::Decode
            },
            ttl: None,
            slo: claim.slo,
        };
        // Nobody gets another name here.
        let model = asked.model.as_deref().unwrap_or("");
        let asking = Asking {
            model,
            target: model,
            arrival,
        };
        self.gate
            .admit(&asking)
            .await
            .map_err(|outcome: Outcome| outcome.refusal().map_or(Refusal::Full, Refusal::Queue))
    }
}

impl FlowControlConfig {
    /// The priority of an objective.
    pub(crate) fn priority(&self, objective: Option<&str>) -> i32 {
        let known = objective.and_then(|name| self.objectives.get(name));
        known.copied().unwrap_or(0)
    }

    pub(crate) fn plan(&self) -> Result<FlowPlan, FlowError> {
        let mut bands: Vec<(i32, BandConfig)> = Vec::new();
        for PriorityBand { priority, band } in &self.priority_bands {
            if bands.iter().any(|(p, _)| p == priority) {
                return Err(FlowError::Twice(*priority));
            }
            bands.push((*priority, band.plan()?));
        }
        let within = |ok: bool, name, range| {
            if ok {
                Ok(())
            } else {
                Err(FlowError::Range(name, range))
            }
        };
        within(bands.len() <= MAX_BANDS, "priority_bands", "at most 64")?;
        within(self.max_flows > 0, "max_flows", "greater than zero")?;
        let share = self.usage_limit > 0.0 && self.usage_limit <= 1.0;
        within(share, "usage_limit", "above 0 and at most 1")?;
        let negative = self.default_negative_priority_band.as_ref();
        Ok(FlowPlan {
            queue: FlowConfig {
                max_requests: self.max_requests,
                max_bytes: self.max_bytes,
                default_ttl: seconds("default_request_ttl_s", self.default_request_ttl_s)?,
                no_endpoint_ttl: seconds(
                    "no_endpoint_request_ttl_s",
                    self.no_endpoint_request_ttl_s,
                )?,
                bands,
                template: self.default_priority_band.plan()?,
                negative_template: negative.map(BandSection::plan).transpose()?,
                ceiling: self.usage_limit,
                max_flows: self.max_flows,
                eviction: self.eviction,
            },
            detector: self.saturation_detector.plan()?,
            gauge: Gauge::Slots,
        })
    }
}

/// 0 for ever.
fn seconds(name: &'static str, value: f64) -> Result<Option<Duration>, FlowError> {
    if !(0.0..=MAX_SECONDS).contains(&value) {
        return Err(FlowError::Range(name, "from 0 to 86400"));
    }
    Ok((value > 0.0).then(|| Duration::from_secs_f64(value)))
}

impl BandSection {
    fn plan(&self) -> Result<BandConfig, FlowError> {
        let unknown =
            |name: &String, known: Vec<&str>| FlowError::Policy(name.clone(), known.join(", "));
        Ok(BandConfig {
            max_requests: self.max_requests,
            max_bytes: self.max_bytes,
            fairness: Fairness::named(&self.fairness_policy)
                .ok_or_else(|| unknown(&self.fairness_policy, Fairness::names().collect()))?,
            ordering: Ordering::named(&self.ordering_policy)
                .ok_or_else(|| unknown(&self.ordering_policy, Ordering::names().collect()))?,
        })
    }
}

impl DetectorSection {
    fn plan(&self) -> Result<Detector, FlowError> {
        let above_zero = |name, value: f64| {
            if value > 0.0 && value.is_finite() {
                Ok(value)
            } else {
                Err(FlowError::Range(name, "greater than zero"))
            }
        };
        match *self {
            Self::Utilization {
                queue_depth_threshold,
                kv_cache_util_threshold,
            } => {
                if !(kv_cache_util_threshold > 0.0 && kv_cache_util_threshold <= 1.0) {
                    let range = "above 0 and at most 1";
                    return Err(FlowError::Range("kv_cache_util_threshold", range));
                }
                Ok(Detector::Utilization(Utilization {
                    queue_depth: above_zero("queue_depth_threshold", queue_depth_threshold)?,
                    kv_usage: kv_cache_util_threshold,
                    headroom: 0.0,
                }))
            }
            Self::Concurrency {
                concurrency_mode,
                max_concurrency,
                max_token_concurrency,
            } => Ok(Detector::Concurrency(Concurrency {
                mode: match concurrency_mode {
                    Mode::Requests => Counted::Requests,
                    Mode::Tokens => Counted::Tokens,
                    Mode::Hybrid => Counted::Both,
                },
                requests: above_zero("max_concurrency", max_concurrency)?,
                tokens: above_zero("max_token_concurrency", max_token_concurrency)?,
                headroom: 0.0,
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<FlowPlan, String> {
        let config: FlowControlConfig = serde_json::from_str(json).map_err(|e| e.to_string())?;
        config.plan().map_err(|e| e.to_string())
    }

    #[test]
    fn nothing_said_is_the_default() {
        let plan = plan("{}").unwrap();
        assert_eq!(plan.queue, FlowConfig::default());
        assert_eq!(plan.detector, Detector::default());
    }

    #[test]
    fn what_is_said_counts() {
        let json = r#"{"max_requests": 9, "eviction": true, "default_request_ttl_s": 0, "no_endpoint_request_ttl_s": 0.5,
            "default_negative_priority_band": {"max_requests": 1},
            "priority_bands": [{"priority": 7, "fairness_policy": "token-fairness-policy",
                                "ordering_policy": "slo-deadline-ordering-policy"}],
            "saturation_detector": {"type": "concurrency-detector", "max_concurrency": 3, "concurrency_mode": "hybrid"}}"#;
        let FlowPlan {
            queue, detector, ..
        } = plan(json).unwrap();
        assert_eq!((queue.max_requests, queue.default_ttl), (Some(9), None));
        assert!(queue.eviction);
        assert_eq!(queue.no_endpoint_ttl, Some(Duration::from_millis(500)));
        assert_eq!(queue.negative_template.unwrap().max_requests, 1);
        let (priority, band) = queue.bands[0];
        assert_eq!(
            (priority, band.fairness, band.ordering, band.max_requests),
            (7, Fairness::Tokens, Ordering::SloDeadline, 5000)
        );
        let Detector::Concurrency(c) = detector else {
            panic!("{detector:?}");
        };
        assert_eq!((c.mode, c.requests), (Counted::Both, 3.0));
    }

    #[test]
    fn nonsense_is_refused_with_its_reason() {
        for (json, reason) in [
            (r#"{"max_request": 1}"#, "unknown field"),
            (r#"{"max_flows": 0}"#, "max_flows"),
            (r#"{"usage_limit": 1.5}"#, "usage_limit"),
            (r#"{"default_request_ttl_s": -1}"#, "default_request_ttl_s"),
            (
                r#"{"default_priority_band": {"fairness_policy": "fair"}}"#,
                "there are global-strict-fairness-policy, round-robin-fairness-policy",
            ),
            (
                r#"{"priority_bands": [{"priority": 1}, {"priority": 1}]}"#,
                "two bands",
            ),
            (
                r#"{"saturation_detector": {"type": "utilization-detector", "kv_cache_util_threshold": 2}}"#,
                "kv_cache_util_threshold",
            ),
            (
                r#"{"saturation_detector": {"type": "concurrency-detector", "max_concurrency": 0}}"#,
                "max_concurrency",
            ),
            (
                r#"{"saturation_detector": {"type": "guess"}}"#,
                "unknown variant",
            ),
        ] {
            let error = plan(json).unwrap_err();
            assert!(error.contains(reason), "{json}: {error}");
        }
    }
}
