//! Figures by model, tenant and priority: a client may make up any number of names, and only so many get labels.

use crate::metrics::{counters, gauges, histograms};
use parking_lot::Mutex;
use prometheus::{
    Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Most names of models, and of tenants, that have labels of their own.
const MAX_NAMES: usize = 1000;
/// Longest name that does.
const MAX_NAME_BYTES: usize = 256;
/// Priorities are an operator's, but there may be many tenants for each: series in all.
const MAX_SERIES: usize = 10_000;
const OTHER: &str = "other";

/// Labels of every family here.
pub(crate) const LABELS: [&str; 4] = ["model_name", "target_model_name", "fairness_id", "priority"];

const SECONDS: [f64; 34] = [
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0,
    10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0,
    1200.0, 1800.0, 3600.0,
];
const PER_TOKEN: [f64; 13] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
];
/// 32778 is upstream's slip, which dashboards have by now.
const TOKENS: [f64; 19] = [
    1.0,
    8.0,
    16.0,
    32.0,
    64.0,
    128.0,
    256.0,
    512.0,
    1024.0,
    2048.0,
    4096.0,
    8192.0,
    16384.0,
    32778.0,
    65536.0,
    131_072.0,
    262_144.0,
    524_288.0,
    1_048_576.0,
];

/// Names that have labels of their own, and their series.
#[derive(Debug)]
pub(crate) struct Known {
    requests: Requests,
    names: Mutex<Names>,
}

#[derive(Debug, Default)]
struct Names {
    models: BTreeSet<Box<str>>,
    tenants: BTreeSet<Box<str>>,
    series: HashMap<[Box<str>; 4], Arc<Series>>,
}

/// The families.
#[derive(Debug)]
pub(crate) struct Requests {
    total: IntCounterVec,
    running: IntGaugeVec,
    duration: HistogramVec,
    first_token: HistogramVec,
    per_token: HistogramVec,
    request_bytes: HistogramVec,
    response_bytes: HistogramVec,
    input_tokens: HistogramVec,
    output_tokens: HistogramVec,
    cached_tokens: HistogramVec,
}

/// One tenant's requests of one priority for one model.
#[derive(Debug)]
pub(crate) struct Series {
    pub(crate) labels: [Box<str>; 4],
    pub(crate) total: IntCounter,
    pub(crate) running: IntGauge,
    pub(crate) duration: Histogram,
    pub(crate) first_token: Histogram,
    pub(crate) per_token: Histogram,
    pub(crate) request_bytes: Histogram,
    pub(crate) response_bytes: Histogram,
    pub(crate) input_tokens: Histogram,
    pub(crate) output_tokens: Histogram,
    pub(crate) cached_tokens: Histogram,
}

impl Known {
    pub(crate) fn new(requests: Requests) -> Self {
        Self {
            requests,
            names: Mutex::default(),
        }
    }

    /// The series of such requests.
    pub(crate) fn series(
        &self,
        model: &str,
        target: &str,
        tenant: &str,
        priority: i32,
    ) -> Arc<Series> {
        let names = &mut *self.names.lock();
        let labels = [
            label(&mut names.models, model),
            label(&mut names.models, target),
            label(&mut names.tenants, tenant),
            priority.to_string().into(),
        ];
        if let Some(series) = names.series.get(&labels) {
            return series.clone();
        }
        if names.series.len() >= MAX_SERIES {
            return Arc::new(self.requests.series([OTHER; 4].map(Into::into)));
        }
        let series = Arc::new(self.requests.series(labels.clone()));
        names.series.insert(labels, series.clone());
        series
    }

    /// The label that a model's name gets.
    pub(crate) fn model(&self, name: &str) -> Box<str> {
        label(&mut self.names.lock().models, name)
    }
}

/// A name, or what stands for all that are too many.
fn label(known: &mut BTreeSet<Box<str>>, name: &str) -> Box<str> {
    if known.contains(name) {
        return name.into();
    }
    if known.len() >= MAX_NAMES || name.len() > MAX_NAME_BYTES {
        return OTHER.into();
    }
    known.insert(name.into());
    name.into()
}

impl Requests {
    pub(crate) fn new(r: &Registry) -> Self {
        let request_sizes: Vec<f64> = (6..=30).map(|n| f64::from(1u32 << n)).collect();
        let output = &TOKENS[..12];
        let family =
            |name: &str, help: &str, buckets: &[f64]| histograms(r, name, help, &LABELS, buckets);
        Self {
            total: counters(r, "request_total", "Requests.", &LABELS),
            running: gauges(r, "request_running", "Requests at servers.", &LABELS),
            duration: family(
                "request_duration_seconds",
                "From a request's head to its answer's end.",
                &SECONDS,
            ),
            first_token: family(
                "request_ttft_seconds",
                "From a request's head to its answer's first bytes.",
                &SECONDS,
            ),
            per_token: family(
                "request_ntpot_seconds",
                "Duration by tokens of the answer.",
                &PER_TOKEN,
            ),
            request_bytes: family("request_size_bytes", "Bodies of requests.", &request_sizes),
            response_bytes: family("response_size_bytes", "Bodies of answers.", &TOKENS[..15]),
            input_tokens: family("request_input_tokens", "Tokens of prompts.", &TOKENS),
            output_tokens: family("request_output_tokens", "Tokens of answers.", output),
            cached_tokens: family(
                "request_cached_tokens",
                "Tokens of prompts that were cached.",
                &TOKENS,
            ),
        }
    }

    fn series(&self, labels: [Box<str>; 4]) -> Series {
        let values: [&str; 4] = std::array::from_fn(|i| &*labels[i]);
        let of = |family: &HistogramVec| family.with_label_values(&values);
        Series {
            total: self.total.with_label_values(&values),
            running: self.running.with_label_values(&values),
            duration: of(&self.duration),
            first_token: of(&self.first_token),
            per_token: of(&self.per_token),
            request_bytes: of(&self.request_bytes),
            response_bytes: of(&self.response_bytes),
            input_tokens: of(&self.input_tokens),
            output_tokens: of(&self.output_tokens),
            cached_tokens: of(&self.cached_tokens),
            labels,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_clients_make_up_end_in_one_series() {
        let known = Known::new(Requests::new(&Registry::new()));
        for i in 0..2 * MAX_NAMES {
            known.series(&i.to_string(), "", "t", 0).total.inc();
        }
        let other = known.series("one more", "", "t", 0);
        assert_eq!(&*other.labels[0], OTHER);
        assert_eq!(
            other.total.get(),
            2 * MAX_NAMES as u64 - (MAX_NAMES as u64 - 1)
        );
        assert_eq!(&*known.series("7", "", "t", 0).labels[0], "7");
        assert_eq!(&*known.model(&"x".repeat(MAX_NAME_BYTES + 1)), OTHER);
    }
}
