//! Figures of requests by model, tenant and priority.

use crate::metrics::{counters, gauges, histograms};
use prometheus::{
    Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
};

/// Labels of every family here.
pub(crate) const LABELS: [&str; 4] = ["model_name", "target_model_name", "fairness_id", "priority"];

const SECONDS: [f64; 34] = [
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0,
    10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0,
    1200.0, 1800.0, 3600.0,
];
/// Duration by all tokens.
const PER_TOKEN: [f64; 13] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
];
/// Between tokens, as a mean.
const BETWEEN_TOKENS: [f64; 19] = [
    0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.6, 0.8, 1.0, 2.0,
];
/// Between pieces of an answer.
const BETWEEN_PIECES: [f64; 15] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0,
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

/// The families.
#[derive(Debug)]
pub(crate) struct Requests {
    total: IntCounterVec,
    running: IntGaugeVec,
    duration: HistogramVec,
    first_token: HistogramVec,
    per_token: HistogramVec,
    between_tokens: HistogramVec,
    between_pieces: HistogramVec,
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
    /// Of answers that come as a whole, and of those that stream.
    pub(crate) first_token: [Histogram; 2],
    pub(crate) per_token: Histogram,
    pub(crate) between_tokens: Histogram,
    pub(crate) between_pieces: Histogram,
    pub(crate) request_bytes: Histogram,
    pub(crate) response_bytes: Histogram,
    pub(crate) input_tokens: Histogram,
    pub(crate) output_tokens: Histogram,
    pub(crate) cached_tokens: Histogram,
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
            first_token: histograms(
                r,
                "request_ttft_seconds",
                "From a request's head to its answer's first bytes.",
                &[&LABELS[..], &["streaming"]].concat(),
                &SECONDS[..24],
            ),
            per_token: family(
                "request_ntpot_seconds",
                "Duration by tokens of the answer.",
                &PER_TOKEN,
            ),
            between_tokens: family(
                "request_streaming_tpot_seconds",
                "From a streamed answer's first bytes to its end, by its further tokens.",
                &BETWEEN_TOKENS,
            ),
            between_pieces: family(
                "request_streaming_itl_seconds",
                "Between pieces of a streamed answer.",
                &BETWEEN_PIECES,
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

    /// Those with these values of [`LABELS`].
    pub(crate) fn series(&self, values: [&str; 4]) -> Series {
        let of = |family: &HistogramVec| family.with_label_values(&values);
        Series {
            total: self.total.with_label_values(&values),
            running: self.running.with_label_values(&values),
            duration: of(&self.duration),
            first_token: ["false", "true"].map(|streaming| {
                let [model, target, tenant, priority] = values;
                let values = [model, target, tenant, priority, streaming];
                self.first_token.with_label_values(&values)
            }),
            per_token: of(&self.per_token),
            between_tokens: of(&self.between_tokens),
            between_pieces: of(&self.between_pieces),
            request_bytes: of(&self.request_bytes),
            response_bytes: of(&self.response_bytes),
            input_tokens: of(&self.input_tokens),
            output_tokens: of(&self.output_tokens),
            cached_tokens: of(&self.cached_tokens),
            labels: values.map(Into::into),
        }
    }
}
