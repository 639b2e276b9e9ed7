//! The gateway's own metrics. All names and help texts are here; label values are bounded.

use baton_fleet::{Admission, Fleet, FlowMetrics};
use baton_metrics::registered;
use baton_scheduler::{Health, Prefill};
use http::StatusCode;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};
use std::sync::Arc;
use std::time::Instant;

/// Seconds; up to the ten minutes that a long generation takes.
const BUCKETS: [f64; 18] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 240.0,
    480.0, 960.0,
];

/// Paths that have a label of their own.
const PATHS: [&str; 9] = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/health",
    "/metrics",
    "/version",
];

/// Why a request was sent to another server.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Retry {
    /// No connection.
    Unreachable,
    /// The connection failed before the answer was complete.
    Lost,
    /// The server said that it has no room.
    Busy,
}

#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) flow: Option<Arc<FlowMetrics>>,
    requests: IntCounterVec,
    seconds: HistogramVec,
    to_first_byte: HistogramVec,
    decisions: IntCounterVec,
    retries: IntCounterVec,
    in_progress: IntGauge,
    endpoints: IntGaugeVec,
}

/// A request in progress: counts it, and takes its time, until dropped.
#[derive(Debug)]
pub(crate) struct Timer {
    started: Instant,
    seconds: Histogram,
    in_progress: IntGauge,
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.seconds.observe(self.started.elapsed().as_secs_f64());
        self.in_progress.dec();
    }
}

impl Metrics {
    /// `flow`: whether requests wait here.
    pub(crate) fn new(flow: bool) -> Self {
        let registry = Registry::new();
        let r = &registry;
        Self {
            flow: flow.then(|| Arc::new(FlowMetrics::new(r, "gateway"))),
            requests: counters(
                r,
                "baton_gateway_requests_total",
                "Answers given, by path and status.",
                &["path", "code"],
            ),
            decisions: counters(
                r,
                "baton_gateway_pd_decisions_total",
                "Requests by whether a prefill server takes part: prefill-decode, decode-only, no-prefill-server.",
                &["decision"],
            ),
            retries: counters(
                r,
                "baton_gateway_retries_total",
                "Tries that failed, by reason.",
                &["reason"],
            ),
            seconds: seconds(
                r,
                "baton_gateway_request_seconds",
                "From a request's head to the end of its answer.",
            ),
            to_first_byte: seconds(
                r,
                "baton_gateway_time_to_first_byte_seconds",
                "From a request's head to the head of its answer.",
            ),
            in_progress: registered(
                r,
                IntGauge::new(
                    "baton_gateway_requests_in_progress",
                    "Requests in progress.",
                ),
            ),
            endpoints: registered(
                r,
                IntGaugeVec::new(
                    Opts::new("baton_gateway_endpoints", "Servers by role and health."),
                    &["role", "health"],
                ),
            ),
            registry,
        }
    }

    /// A request for `path` has begun.
    pub(crate) fn begin(&self, path: &str) -> Timer {
        self.in_progress.inc();
        let seconds = self.seconds.with_label_values(&[label(path)]);
        Timer {
            started: Instant::now(),
            seconds,
            in_progress: self.in_progress.clone(),
        }
    }

    /// The head of an answer is there.
    pub(crate) fn answered(&self, path: &str, status: StatusCode, started: Instant) {
        self.requests
            .with_label_values(&[label(path), status.as_str()])
            .inc();
        self.to_first_byte
            .with_label_values(&[label(path)])
            .observe(started.elapsed().as_secs_f64());
    }

    /// A request was given its servers.
    pub(crate) fn decided(&self, prefill: &Prefill) {
        let decision = match prefill {
            Prefill::At(..) => "prefill-decode",
            Prefill::NotWorthIt | Prefill::SameServer => "decode-only",
            Prefill::NoneHealthy => "no-prefill-server",
        };
        self.decisions.with_label_values(&[decision]).inc();
    }

    /// A try failed.
    pub(crate) fn retry(&self, reason: Retry) {
        let reason = match reason {
            Retry::Unreachable => "unreachable",
            Retry::Lost => "lost",
            Retry::Busy => "busy",
        };
        self.retries.with_label_values(&[reason]).inc();
    }

    /// Everything as Prometheus text.
    pub(crate) fn render(&self, fleet: &Fleet, gate: Option<&Admission>) -> String {
        if let (Some(flow), Some(gate)) = (&self.flow, gate) {
            flow.refresh(gate, fleet);
        }
        self.endpoints.reset();
        for server in fleet.servers().iter() {
            let health = match server.health() {
                Health::Healthy => "healthy",
                Health::Draining => "draining",
                Health::Unreachable => "unreachable",
            };
            self.endpoints
                .with_label_values(&[server.role.name(), health])
                .inc();
        }
        baton_metrics::text(&self.registry.gather())
    }
}

impl Timer {
    pub(crate) fn started(&self) -> Instant {
        self.started
    }
}

/// What a client makes up must not become a label.
fn label(path: &str) -> &'static str {
    PATHS
        .into_iter()
        .find(|known| *known == path)
        .unwrap_or("other")
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(registry, IntCounterVec::new(Opts::new(name, help), labels))
}

fn seconds(registry: &Registry, name: &str, help: &str) -> HistogramVec {
    let opts = HistogramOpts::new(name, help).buckets(BUCKETS.to_vec());
    registered(registry, HistogramVec::new(opts, &["path"]))
}
