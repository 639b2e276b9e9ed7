//! The picker's metrics: upstream's names, and its older ones beside them if the configuration asks for those. Names and
//! help texts are here, in `index`, `plugins`, `pool` and `series`; the values of labels are bounded.

mod index;
mod legacy;
mod plugins;
mod pool;

use crate::picker::Epp;
use crate::series::{Requests, Series};
use baton_ext_proc::Ended;
use baton_fleet::{FlowMetrics, Route, Server};
use baton_metrics::{Known, Whose, registered};
use baton_scheduler::config::PickerConfig;
use baton_scheduler::{Prompt, Unschedulable};
use index::Index;
use plugins::Plugins;
use pool::Pool;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};
use std::sync::Arc;
use std::time::Duration;

/// What all names begin with.
const PREFIX: &str = "llm_d_epp_";
/// Seconds of decisions; upstream's begin at a tenth of a millisecond, which says nothing of these.
const DECISION: [f64; 13] = [
    0.000_01, 0.000_02, 0.000_05, 0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05,
    0.1,
];
/// Seconds of exchanges.
const STREAM: [f64; 14] = [
    0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
];
/// Seconds from a request's head to where it goes, waiting included.
const REQUEST: [f64; 16] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0,
];
/// Seconds of what a response takes.
const RESPONSE: [f64; 15] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
];
/// Parts of a prompt.
const RATIO: [f64; 11] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
const HIT_BYTES: [f64; 14] = [
    0.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0,
];
/// What a token is taken for, in bytes, where upstream counts bytes.
const BYTES_PER_TOKEN: f64 = 4.0;
/// Which index a figure is of: name and type of its plugin.
const PLUGIN: [&str; 2] = ["plugin_name", "plugin_type"];
const APPROXIMATE: [&str; 2] = ["approx-prefix-cache-producer"; 2];
const PRECISE: [&str; 2] = ["precise-prefix-cache-producer"; 2];

#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    name: Box<str>,
    legacy: bool,
    requests: Requests,
    known: Known<Series>,
    errors: IntCounterVec,
    pub(crate) exchanges: Exchanges,
    choices: Choices,
    rewrites: IntCounterVec,
    pub(crate) plugins: Plugins,
    index: Option<Index>,
    pool: Pool,
    pub(crate) flow: Arc<FlowMetrics>,
}

/// Streams of the proxy.
#[derive(Debug)]
pub(crate) struct Exchanges {
    pub(crate) in_progress: IntGauge,
    ended: IntCounterVec,
    took: Histogram,
    pub(crate) request: Histogram,
    pub(crate) response: Histogram,
}

/// What was decided.
#[derive(Debug)]
struct Choices {
    duration: Histogram,
    attempts: IntCounterVec,
    /// Under today's name and the one before.
    disaggregation: [IntCounterVec; 2],
    /// Of the prompt, what the server that answers has of it.
    hit_ratio: HistogramVec,
    hit_bytes: HistogramVec,
}

/// One decision, as metrics see it.
#[derive(Debug)]
pub(crate) struct Choice<'a> {
    pub(crate) decided: &'a Result<Route, Unschedulable>,
    /// The model that servers are asked for.
    pub(crate) model: Option<&'a str>,
    pub(crate) prompt: &'a Prompt,
    /// Whether what servers report was asked.
    pub(crate) precise: bool,
    pub(crate) took: Duration,
}

impl Exchanges {
    fn new(r: &Registry) -> Self {
        Self {
            in_progress: registered(
                r,
                IntGauge::with_opts(opts("extproc_streams_inflight", "Exchanges in progress.")),
            ),
            ended: counters(
                r,
                "extproc_streams_total",
                "Exchanges that ended.",
                &["code"],
            ),
            took: one_histogram(
                r,
                "extproc_stream_duration_seconds",
                "How long exchanges took.",
                &STREAM,
            ),
            request: one_histogram(
                r,
                "request_processing_duration_seconds",
                "From a request's head to where it goes.",
                &REQUEST,
            ),
            response: one_histogram(
                r,
                "response_processing_duration_seconds",
                "What a streamed answer's pieces took here; of any other, from its head to its end.",
                &RESPONSE,
            ),
        }
    }

    /// One ended after so many seconds.
    pub(crate) fn ended(&self, why: Ended, took: f64) {
        self.in_progress.dec();
        self.took.observe(took);
        let code = match why {
            Ended::Naturally | Ended::Refused | Ended::Evicted => "OK",
            Ended::Disconnected => "Canceled",
            Ended::Broken => "InvalidArgument",
        };
        self.ended.with_label_values(&[code]).inc();
    }
}

impl Choices {
    fn new(r: &Registry) -> Self {
        let names = ["disagg_decision_total", "pd_decision_total"];
        let help = "Which servers take part.";
        Self {
            duration: one_histogram(
                r,
                "scheduler_e2e_duration_seconds",
                "How long decisions took.",
                &DECISION,
            ),
            attempts: counters(
                r,
                "scheduler_attempts_total",
                "Decisions.",
                &[
                    "status",
                    "target_model_name",
                    "endpoint_name",
                    "namespace",
                    "port",
                ],
            ),
            disaggregation: names
                .map(|name| counters(r, name, help, &["model_name", "decision_type"])),
            hit_ratio: histograms(
                r,
                "prefix_indexer_hit_ratio",
                "Part of the prompt that the server has which answers.",
                &PLUGIN,
                &RATIO,
            ),
            hit_bytes: histograms(
                r,
                "prefix_indexer_hit_bytes",
                "The same in bytes, four for a token.",
                &PLUGIN,
                &HIT_BYTES,
            ),
        }
    }

    fn found(&self, choice: &Choice<'_>, route: &Route) {
        let tokens = f64::from(choice.prompt.tokens());
        if tokens == 0.0 {
            return;
        }
        let hit = tokens - f64::from(route.decision.uncached_tokens);
        let plugin = if choice.precise {
            &PRECISE
        } else {
            &APPROXIMATE
        };
        self.hit_ratio
            .with_label_values(plugin)
            .observe(hit / tokens);
        self.hit_bytes
            .with_label_values(plugin)
            .observe(hit * BYTES_PER_TOKEN);
    }
}

impl Metrics {
    /// Nothing has happened yet in the pool of this name.
    pub(crate) fn new(pool: &str, config: &PickerConfig) -> Self {
        let registry = Registry::new();
        let r = &registry;
        let precise = config.plan.precise.as_ref();
        let index = precise.filter(|p| p.metrics).map(|_| Index::new(r));
        let lookups = index.as_ref().map(|index| index.lookups.clone());
        let info = gauges(r, "info", "What this picker is.", &["commit", "build_ref"]);
        let version = concat!("baton-", env!("CARGO_PKG_VERSION"));
        info.with_label_values(&["", version]).set(1);
        Self {
            name: pool.into(),
            legacy: config.gates.legacy_metrics,
            requests: Requests::new(r),
            known: Known::default(),
            errors: counters(
                r,
                "request_error_total",
                "Requests that failed.",
                &[&crate::series::LABELS[..], &["error_code"]].concat(),
            ),
            exchanges: Exchanges::new(r),
            choices: Choices::new(r),
            rewrites: counters(
                r,
                "model_rewrite_decisions_total",
                "Models that got another name.",
                &["model_rewrite_name", "model_name", "target_model"],
            ),
            plugins: Plugins::new(r, &config.plan, lookups),
            index,
            pool: Pool::new(r),
            flow: Arc::new(FlowMetrics::new(r, pool)),
            registry,
        }
    }

    /// Where the figures of such requests go.
    pub(crate) fn series(
        &self,
        (model, target): (Option<&str>, Option<&str>),
        fairness: Option<&str>,
        priority: i32,
    ) -> Arc<Series> {
        let whose = Whose {
            model: model.unwrap_or(""),
            target: target.unwrap_or(""),
            tenant: fairness.unwrap_or(crate::names::DEFAULT_FLOW),
            priority,
        };
        (self.known).series(whose, |labels| self.requests.series(labels))
    }

    /// A request of `series` failed, for the reason of this name.
    pub(crate) fn failed(&self, series: &Series, code: &str) {
        let [model, target, tenant, priority] = series.labels.each_ref().map(|label| &**label);
        let labels = [model, target, tenant, priority, code];
        self.errors.with_label_values(&labels).inc();
    }

    /// A model got another name.
    pub(crate) fn rewritten(&self, object: &str, model: Option<&str>, target: &str) {
        let model = self.known.model(model.unwrap_or(""));
        let target = self.known.model(target);
        self.rewrites
            .with_label_values(&[object, model, target])
            .inc();
    }

    /// A decision was made, or could not be.
    pub(crate) fn decided(&self, choice: &Choice<'_>) {
        self.choices.duration.observe(choice.took.as_secs_f64());
        let model = self.known.model(choice.model.unwrap_or(""));
        let Ok(route) = choice.decided else {
            self.choices
                .attempts
                .with_label_values(&["failure", model, "", "", ""])
                .inc();
            return;
        };
        let (namespace, name) = parted(&route.decode);
        let port = route.decode.address.authority().port();
        let port = port.as_ref().map_or("", |p| p.as_str());
        self.choices
            .attempts
            .with_label_values(&["success", model, name, namespace, port])
            .inc();
        for counter in &self.choices.disaggregation {
            counter
                .with_label_values(&[model, route.decision.kind()])
                .inc();
        }
        self.choices.found(choice, route);
    }

    /// Everything as Prometheus text.
    pub(crate) fn render(&self, epp: &Epp) -> String {
        self.pool.set(&self.name, &epp.fleet);
        self.index.iter().for_each(|index| index.set(&epp.fleet));
        if let Some(queue) = &epp.queue {
            self.flow.refresh(&queue.gate, &epp.fleet);
        }
        let mut families = self.registry.gather();
        if self.legacy {
            let old = families.iter().filter_map(legacy::twin).collect::<Vec<_>>();
            families.extend(old);
        }
        baton_metrics::text(&families)
    }
}

/// Namespace and name of a server.
fn parted(server: &Server) -> (&str, &str) {
    server.name().split_once('/').unwrap_or(("", server.name()))
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("{PREFIX}{name}"), help)
}

pub(crate) fn counters(r: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(r, IntCounterVec::new(opts(name, help), labels))
}

pub(crate) fn gauges(r: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    registered(r, IntGaugeVec::new(opts(name, help), labels))
}

pub(crate) fn histograms(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
    buckets: &[f64],
) -> HistogramVec {
    let opts = HistogramOpts::new(format!("{PREFIX}{name}"), help).buckets(buckets.to_vec());
    registered(r, HistogramVec::new(opts, labels))
}

fn one_histogram(r: &Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    histograms(r, name, help, &[], buckets).with_label_values::<&str>(&[])
}
