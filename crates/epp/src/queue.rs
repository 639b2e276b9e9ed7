//! The queue before the servers, if the configuration wants one: what a request asks of it.

use crate::intent;
use crate::names;
use crate::refusals;
use crate::series::Series;
use baton_ext_proc::{Headers, Refusal};
use baton_fleet::{Admission, Asking, Fleet, FlowMetrics, Permit, Surroundings};
use baton_scheduler::config::FlowControl;
use baton_scheduler::flow::{Arrival, Gauge, Need};
use baton_scheduler::{Decider, Handler, Plan};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// A request in the queue: ends with leave to go, or with the reason why not.
pub(crate) type Waiting = Pin<Box<dyn Future<Output = Result<Permit, Refusal>> + Send>>;

/// The queue.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) gate: Arc<Admission>,
    /// Prompts from this length on probably need a prefill server.
    prefill_from: Option<u32>,
}

/// What a request asks of the queue.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    pub(crate) headers: &'a Headers,
    /// Where its figures go: by its models.
    pub(crate) series: Arc<Series>,
    pub(crate) fairness: &'a str,
    pub(crate) priority: i32,
    pub(crate) tokens: u32,
    /// Of its body.
    pub(crate) bytes: usize,
}

impl Queue {
    pub(crate) fn new(
        config: &FlowControl,
        plan: &Plan,
        fleet: &Arc<Fleet>,
        metrics: Arc<FlowMetrics>,
    ) -> Self {
        let (fleet, detector) = (fleet.clone(), config.detector);
        let around = Surroundings {
            room: Box::new(move || fleet.room(&detector, Gauge::Slots)),
            witness: metrics,
        };
        Self {
            gate: Admission::new(config.queue.clone(), around),
            prefill_from: prefill_from(plan),
        }
    }

    /// Takes a request in.
    pub(crate) fn enter(&self, claim: &Claim<'_>) -> Waiting {
        let needs_prefill = self.prefill_from.is_some_and(|from| claim.tokens >= from);
        let slo = intent::first(claim.headers, &names::SLO_TTFT);
        let slo = slo.and_then(|ms| ms.parse::<u32>().ok());
        let (priority, tokens, bytes) = (claim.priority, claim.tokens, claim.bytes as u64);
        let (gate, flow) = (self.gate.clone(), claim.fairness.to_owned());
        let series = claim.series.clone();
        Box::pin(async move {
            let arrival = Arrival {
                flow: &flow,
                priority,
                bytes,
                tokens,
                need: match needs_prefill {
                    true => Need::PrefillAndDecode,
                    false => Need::Decode,
                },
                ttl: None,
                slo: slo.map(|ms| Duration::from_millis(ms.into())),
            };
            let [model, target, ..] = series.labels.each_ref().map(|label| &**label);
            let asking = Asking {
                model,
                target,
                arrival,
            };
            gate.admit(&asking).await.map_err(refusals::turned_away)
        })
    }
}

/// The shortest prompt that a plan may send through a prefill server.
fn prefill_from(plan: &Plan) -> Option<u32> {
    let Handler::Disaggregated(stages) = &plan.handler.is else {
        return None;
    };
    match stages.prefill_if {
        Decider::Uncached {
            at_least,
            prompt_at_least,
            ..
        } => Some(at_least.max(prompt_at_least).max(1)),
        Decider::Sooner(way) => Some(way.at_least.max(1)),
        Decider::Always => Some(1),
        Decider::Never | Decider::Multimodal => None,
    }
}
