//! The sidecar's metrics. All names and help texts are here; label values are bounded.

use crate::fallback::Failure;
use crate::route::Route;
use baton_metrics::registered;
use http::StatusCode;
use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, Registry};
use std::time::Instant;

/// Seconds; up to the ten minutes that a long generation takes.
const BUCKETS: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0,
    240.0, 960.0,
];

#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    seconds: HistogramVec,
    in_progress: IntGauge,
    prefills: IntCounterVec,
    prefill_seconds: Histogram,
    retries: IntCounterVec,
    fallbacks: IntCounterVec,
    releases: IntCounterVec,
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
    pub(crate) fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        Self {
            requests: counters(
                r,
                "baton_sidecar_requests_total",
                "Answers given, by route and status.",
                &["route", "code"],
            ),
            prefills: counters(
                r,
                "baton_sidecar_prefills_total",
                "Prefill servers asked, by what came of it.",
                &["outcome"],
            ),
            retries: counters(
                r,
                "baton_sidecar_prefill_retries_total",
                "Further tries after a failed prefill: of the same server, or of another.",
                &["server"],
            ),
            fallbacks: counters(
                r,
                "baton_sidecar_fallbacks_total",
                "Prompts that decode computed though prefill was wanted, by reason.",
                &["reason"],
            ),
            releases: counters(
                r,
                "baton_sidecar_releases_total",
                "Held KV given back unused, by whether prefill took note.",
                &["outcome"],
            ),
            seconds: registered(
                r,
                HistogramVec::new(
                    histogram(
                        "baton_sidecar_request_seconds",
                        "From a request's head to the end of its answer.",
                    ),
                    &["route"],
                ),
            ),
            prefill_seconds: registered(
                r,
                Histogram::with_opts(histogram(
                    "baton_sidecar_prefill_seconds",
                    "Time that a successful prefill took.",
                )),
            ),
            in_progress: registered(
                r,
                IntGauge::new(
                    "baton_sidecar_requests_in_progress",
                    "Requests in progress.",
                ),
            ),
            registry,
        }
    }

    /// A request has begun.
    pub(crate) fn begin(&self, route: Option<Route>) -> Timer {
        self.in_progress.inc();
        Timer {
            started: Instant::now(),
            seconds: self.seconds.with_label_values(&[label(route)]),
            in_progress: self.in_progress.clone(),
        }
    }

    /// The head of an answer is there.
    pub(crate) fn answered(&self, route: Option<Route>, status: StatusCode) {
        self.requests
            .with_label_values(&[label(route), status.as_str()])
            .inc();
    }

    pub(crate) fn prefilled(&self, started: Instant) {
        self.prefills.with_label_values(&["done"]).inc();
        self.prefill_seconds
            .observe(started.elapsed().as_secs_f64());
    }

    pub(crate) fn prefill_failed(&self, failure: Failure) {
        self.prefills.with_label_values(&[failure.name()]).inc();
    }

    /// Prefill is tried again: on the `same` server or on `another`.
    pub(crate) fn retry(&self, server: &'static str) {
        self.retries.with_label_values(&[server]).inc();
    }

    pub(crate) fn fallback(&self, reason: &'static str) {
        self.fallbacks.with_label_values(&[reason]).inc();
    }

    pub(crate) fn released(&self, outcome: &'static str) {
        self.releases.with_label_values(&[outcome]).inc();
    }

    /// Everything as Prometheus text.
    pub(crate) fn render(&self) -> String {
        baton_metrics::text(&self.registry.gather())
    }
}

fn label(route: Option<Route>) -> &'static str {
    route.map_or("other", Route::path)
}

fn histogram(name: &str, help: &str) -> HistogramOpts {
    HistogramOpts::new(name, help).buckets(BUCKETS.to_vec())
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(registry, IntCounterVec::new(Opts::new(name, help), labels))
}
