//! The picker as the proxy's protocol calls it: a request begins here.

use crate::decisions::Decisions;
use crate::exchange::Request;
use crate::metrics::Metrics;
use crate::objects::Objects;
use crate::queue::Queue;
use crate::words::Words;
use arc_swap::ArcSwap;
use baton_ext_proc::{Picker, Refusal, RequestHead};
use baton_fleet::Fleet;
use baton_scheduler::SessionStrategy;
use baton_scheduler::config::PickerConfig;
use baton_telemetry::Tracer;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Everything that requests share.
#[derive(Debug)]
pub(crate) struct Epp {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) objects: ArcSwap<Objects>,
    pub(crate) config: PickerConfig,
    pub(crate) metrics: Metrics,
    /// Where requests wait for servers with room, if they do.
    pub(crate) queue: Option<Queue>,
    /// What reads prompts, if anybody asks what servers report.
    pub(crate) words: Option<Arc<Words>>,
    /// The last decisions, if they are kept.
    pub(crate) decisions: Option<Decisions>,
    /// What traces requests, if anything does.
    pub(crate) tracer: Option<Arc<Tracer>>,
    /// Whether the proxy may restrict the choice.
    pub(crate) heeds_subset: bool,
    /// Whether the proxy is told the candidates' scores.
    pub(crate) emits_scores: bool,
    /// The header in which the token of a session travels.
    pub(crate) session_header: Option<&'static str>,
    /// Draws among equal choices that are not the scheduler's.
    chance: AtomicU64,
}

/// What of [`Epp`] is a matter of flags.
#[derive(Clone, Debug)]
pub(crate) struct Manners {
    pub(crate) heeds_subset: bool,
    pub(crate) emits_scores: bool,
    /// Decisions that are kept; 0 keeps none.
    pub(crate) decisions: usize,
    pub(crate) tracer: Option<Arc<Tracer>>,
}

impl Epp {
    pub(crate) fn new(
        fleet: Arc<Fleet>,
        config: PickerConfig,
        pool: &str,
        manners: Manners,
        words: Option<Arc<Words>>,
    ) -> Self {
        let session_header = match config.plan.session.as_ref().map(|s| &s.strategy) {
            // Headers are written by names that live for ever; there is one picker in a process.
            Some(SessionStrategy::Token { header }) => {
                let header: &'static str = Box::leak(header.to_lowercase().into_boxed_str());
                Some(header)
            }
            _ => None,
        };
        let metrics = Metrics::new(pool, &config);
        let queue = (config.flow_control.as_ref())
            .map(|flow| Queue::new(flow, &config.plan, &fleet, metrics.flow.clone()));
        Self {
            session_header,
            queue,
            words,
            metrics,
            fleet,
            objects: ArcSwap::default(),
            config,
            decisions: (manners.decisions > 0).then(|| Decisions::new(manners.decisions)),
            tracer: manners.tracer,
            heeds_subset: manners.heeds_subset,
            emits_scores: manners.emits_scores,
            chance: AtomicU64::new(0),
        }
    }

    /// A number that spreads choices; counting is enough.
    pub(crate) fn chance(&self) -> u64 {
        self.chance
            .fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed)
            .rotate_left(31)
    }
}

/// What the protocol is given: the picker is shared with the server of metrics.
#[derive(Clone, Debug)]
pub(crate) struct Shared(pub(crate) Arc<Epp>);

impl Picker for Shared {
    type Exchange = Request;

    fn begin(&self, head: RequestHead) -> Result<Request, Refusal> {
        Ok(Request::new(self.0.clone(), head))
    }
}
