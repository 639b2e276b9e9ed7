//! The picker's metrics: upstream's names, and its older ones beside them if the configuration asks for those. All names
//! and help texts are here; the values of labels are bounded.

use crate::picker::Epp;
use crate::series::{Known, Requests, Series};
use baton_ext_proc::Ended;
use baton_fleet::{FlowMetrics, Route, Server, registered};
use baton_scheduler::{Endpoint, Health, Unschedulable};
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder as _, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
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
/// Names that upstream gave up, by those that took their place.
const LEGACY: [(&str, &str); 22] = [
    ("request_total", "inference_objective_request_total"),
    (
        "request_error_total",
        "inference_objective_request_error_total",
    ),
    (
        "request_duration_seconds",
        "inference_objective_request_duration_seconds",
    ),
    ("request_size_bytes", "inference_objective_request_sizes"),
    ("response_size_bytes", "inference_objective_response_sizes"),
    ("request_input_tokens", "inference_objective_input_tokens"),
    ("request_output_tokens", "inference_objective_output_tokens"),
    (
        "request_cached_tokens",
        "inference_objective_prompt_cached_tokens",
    ),
    ("request_running", "inference_objective_running_requests"),
    (
        "request_ntpot_seconds",
        "inference_objective_normalized_time_per_output_token_seconds",
    ),
    (
        "request_ttft_seconds",
        "inference_objective_request_ttft_seconds",
    ),
    (
        "average_kv_cache_utilization",
        "inference_pool_average_kv_cache_utilization",
    ),
    ("average_queue_size", "inference_pool_average_queue_size"),
    (
        "average_running_requests",
        "inference_pool_average_running_requests",
    ),
    ("ready_endpoints", "inference_pool_ready_pods"),
    (
        "per_endpoint_queue_size",
        "inference_pool_per_pod_queue_size",
    ),
    (
        "scheduler_e2e_duration_seconds",
        "inference_extension_scheduler_e2e_duration_seconds",
    ),
    (
        "scheduler_attempts_total",
        "inference_extension_scheduler_attempts_total",
    ),
    ("info", "inference_extension_info"),
    (
        "model_rewrite_decisions_total",
        "inference_extension_model_rewrite_decisions_total",
    ),
    (
        "disagg_decision_total",
        "llm_d_inference_scheduler_disagg_decision_total",
    ),
    (
        "pd_decision_total",
        "llm_d_inference_scheduler_pd_decision_total",
    ),
];

#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pool: Box<str>,
    legacy: bool,
    known: Known,
    errors: IntCounterVec,
    pub(crate) streams: IntGauge,
    streams_ended: IntCounterVec,
    pub(crate) request_processing: Histogram,
    choices: Choices,
    rewrites: IntCounterVec,
    fleet: FleetGauges,
    pub(crate) flow: Arc<FlowMetrics>,
}

/// What was decided.
#[derive(Debug)]
struct Choices {
    duration: Histogram,
    attempts: IntCounterVec,
    /// Under today's name and the one before.
    disaggregation: [IntCounterVec; 2],
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
        }
    }
}

/// How the pool is; set anew whenever somebody asks.
#[derive(Debug)]
struct FleetGauges {
    mean_and_deviation: [(GaugeVec, GaugeVec); 3],
    ready: IntGaugeVec,
    queues: IntGaugeVec,
    in_flight: IntGaugeVec,
    tokens: IntGaugeVec,
}

impl Metrics {
    /// Nothing has happened yet in the pool of this name.
    pub(crate) fn new(pool: &str, legacy: bool) -> Self {
        let registry = Registry::new();
        let r = &registry;
        let info = gauges(r, "info", "What this picker is.", &["commit", "build_ref"]);
        let version = concat!("baton-", env!("CARGO_PKG_VERSION"));
        info.with_label_values(&["", version]).set(1);
        Self {
            pool: pool.into(),
            legacy,
            known: Known::new(Requests::new(r)),
            errors: counters(
                r,
                "request_error_total",
                "Requests that failed.",
                &[&crate::series::LABELS[..], &["error_code"]].concat(),
            ),
            streams: registered(
                r,
                IntGauge::with_opts(opts("extproc_streams_inflight", "Exchanges in progress.")),
            ),
            streams_ended: counters(
                r,
                "extproc_streams_total",
                "Exchanges that ended.",
                &["code"],
            ),
            request_processing: one_histogram(
                r,
                "request_processing_duration_seconds",
                "From a request's head to where it goes.",
            ),
            choices: Choices::new(r),
            rewrites: counters(
                r,
                "model_rewrite_decisions_total",
                "Models that got another name.",
                &["model_rewrite_name", "model_name", "target_model"],
            ),
            fleet: FleetGauges::new(r),
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
        let fairness = fairness.unwrap_or(crate::names::DEFAULT_FLOW);
        self.known.series(
            model.unwrap_or(""),
            target.unwrap_or(""),
            fairness,
            priority,
        )
    }

    /// A request of `series` failed, for the reason of this name.
    pub(crate) fn failed(&self, series: &Series, code: &str) {
        let mut labels: Vec<&str> = series.labels.iter().map(|l| &**l).collect();
        labels.push(code);
        self.errors.with_label_values(&labels).inc();
    }

    /// A model got another name.
    pub(crate) fn rewritten(&self, object: &str, model: Option<&str>, target: &str) {
        let model = self.known.model(model.unwrap_or(""));
        let target = self.known.model(target);
        self.rewrites
            .with_label_values(&[object, &model, &target])
            .inc();
    }

    /// A decision was made, or could not be.
    pub(crate) fn decided(
        &self,
        decided: &Result<Route, Unschedulable>,
        model: Option<&str>,
        took: Duration,
    ) {
        self.choices.duration.observe(took.as_secs_f64());
        let model = self.known.model(model.unwrap_or(""));
        let Ok(route) = decided else {
            self.choices
                .attempts
                .with_label_values(&["failure", &*model, "", "", ""])
                .inc();
            return;
        };
        let (namespace, name) = parted(&route.decode);
        let port = route.decode.address.authority().port();
        let port = port.as_ref().map_or("", |p| p.as_str());
        self.choices
            .attempts
            .with_label_values(&["success", &*model, name, namespace, port])
            .inc();
        for counter in &self.choices.disaggregation {
            counter
                .with_label_values(&[&*model, route.decision.kind()])
                .inc();
        }
    }

    /// An exchange ended.
    pub(crate) fn ended(&self, why: Ended) {
        let code = match why {
            Ended::Naturally | Ended::Refused | Ended::Evicted => "OK",
            Ended::Disconnected => "Canceled",
            Ended::Broken => "InvalidArgument",
        };
        self.streams_ended.with_label_values(&[code]).inc();
    }

    /// Everything as Prometheus text.
    pub(crate) fn render(&self, epp: &Epp) -> Vec<u8> {
        self.fleet
            .set(&self.pool, &epp.fleet.servers(), &epp.fleet.snapshot());
        if let Some(queue) = &epp.queue {
            self.flow.refresh(&queue.gate);
        }
        let mut families = self.registry.gather();
        if self.legacy {
            let old = families.iter().filter_map(legacy_twin).collect::<Vec<_>>();
            families.extend(old);
        }
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            tracing::error!(%error, "metrics cannot be written");
        }
        text
    }
}

/// The same figures under the name that they had before.
fn legacy_twin(family: &MetricFamily) -> Option<MetricFamily> {
    let name = family.name().strip_prefix(PREFIX)?;
    let (_, old) = LEGACY.iter().find(|(new, _)| *new == name)?;
    let mut twin = family.clone();
    twin.set_name((*old).to_owned());
    Some(twin)
}

/// Namespace and name of a server.
fn parted(server: &Server) -> (&str, &str) {
    server.name().split_once('/').unwrap_or(("", server.name()))
}

impl FleetGauges {
    fn new(r: &Registry) -> Self {
        let pair = |what: &str, help: &str| {
            let one = |kind: &str| {
                let opts = opts(&format!("{kind}_{what}"), help);
                registered(r, GaugeVec::new(opts, &["name"]))
            };
            (one("average"), one("std_dev"))
        };
        Self {
            mean_and_deviation: [
                pair(
                    "kv_cache_utilization",
                    "Part of the KV pools in use, over the endpoints.",
                ),
                pair("queue_size", "Requests that wait, over the endpoints."),
                pair("running_requests", "Requests that run, over the endpoints."),
            ],
            ready: gauges(
                r,
                "ready_endpoints",
                "Endpoints that take requests.",
                &["name"],
            ),
            queues: gauges(
                r,
                "per_endpoint_queue_size",
                "Requests that wait at an endpoint.",
                &["name", "model_server_endpoint"],
            ),
            in_flight: gauges(
                r,
                "inflight_requests",
                "Requests sent to an endpoint that have not ended.",
                &["endpoint_name", "namespace"],
            ),
            tokens: gauges(
                r,
                "inflight_tokens",
                "Tokens of those requests.",
                &["endpoint_name", "namespace"],
            ),
        }
    }

    fn set(&self, pool: &str, servers: &[Arc<Server>], seen: &[Endpoint]) {
        let healthy: Vec<&Endpoint> = seen
            .iter()
            .filter(|e| e.health == Health::Healthy)
            .collect();
        let read: [fn(&Endpoint) -> f64; 3] = [
            |e| e.load.kv_usage.into(),
            |e| e.load.waiting.into(),
            |e| e.load.running.into(),
        ];
        for ((mean, deviation), read) in self.mean_and_deviation.iter().zip(read) {
            let (m, d) = mean_and_deviation(healthy.iter().map(|e| read(e)));
            mean.with_label_values(&[pool]).set(m);
            deviation.with_label_values(&[pool]).set(d);
        }
        self.ready
            .with_label_values(&[pool])
            .set(count(healthy.len() as u64));
        for per_endpoint in [&self.queues, &self.in_flight, &self.tokens] {
            per_endpoint.reset();
        }
        for endpoint in seen {
            let labels = [pool, &*endpoint.identity.name];
            self.queues
                .with_label_values(&labels)
                .set(endpoint.load.waiting.into());
        }
        for server in servers {
            let (namespace, name) = parted(server);
            let labels = [name, namespace];
            self.in_flight
                .with_label_values(&labels)
                .set(server.in_flight().into());
            self.tokens
                .with_label_values(&labels)
                .set(count(server.tokens_in_flight()));
        }
    }
}

fn count(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn mean_and_deviation(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / n;
    let variance = values.map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    (mean, variance.sqrt())
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

fn one_histogram(r: &Registry, name: &str, help: &str) -> Histogram {
    histograms(r, name, help, &[], &DECISION).with_label_values::<&str>(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_are_of_the_whole() {
        assert_eq!(mean_and_deviation([1.0, 3.0].into_iter()), (2.0, 1.0));
        assert_eq!(mean_and_deviation([].into_iter()), (0.0, 0.0));
    }

    #[test]
    fn old_names_carry_the_same_figures() {
        let metrics = Metrics::new("p", true);
        let series = metrics.series((Some("m"), Some("t")), None, 0);
        series.total.inc();
        let families = metrics.registry.gather();
        let old: Vec<String> = families
            .iter()
            .filter_map(legacy_twin)
            .map(|f| f.name().to_owned())
            .collect();
        assert!(old.contains(&"inference_objective_request_total".to_owned()));
    }
}
