//! Figures by model, tenant and priority: a client may make up any number of names, and only so many get labels.

use crate::metrics::{counters, gauges, histograms};
use baton_metrics::{Names, OTHER};
use parking_lot::Mutex;
use prometheus::{
    Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
};
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

/// Priorities are an operator's, but there may be many tenants for each: series in all.
const MAX_SERIES: usize = 10_000;

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

/// Names that have labels of their own, and their series. Finding those of a request that is like another costs no
/// allocation.
#[derive(Debug)]
pub(crate) struct Known {
    requests: Requests,
    models: Names,
    tenants: Names,
    series: Mutex<HashMap<Key<'static>, Arc<Series>>>,
    /// Of all requests whose own would be one too many.
    rest: OnceLock<Arc<Series>>,
}

/// What tells series apart: owned where they are kept, borrowed where they are looked for.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key<'a> {
    model: Cow<'a, str>,
    target: Cow<'a, str>,
    tenant: Cow<'a, str>,
    priority: i32,
}

impl<'a> Key<'a> {
    fn of(model: &'a str, target: &'a str, tenant: &'a str, priority: i32) -> Self {
        Self {
            model: model.into(),
            target: target.into(),
            tenant: tenant.into(),
            priority,
        }
    }

    fn into_owned(self) -> Key<'static> {
        let own = |text: Cow<'a, str>| Cow::Owned(text.into_owned());
        Key {
            model: own(self.model),
            target: own(self.target),
            tenant: own(self.tenant),
            priority: self.priority,
        }
    }

    fn labels(&self) -> [Box<str>; 4] {
        let own = |text: &str| text.into();
        let priority = self.priority.to_string().into();
        [
            own(&self.model),
            own(&self.target),
            own(&self.tenant),
            priority,
        ]
    }
}

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

impl Known {
    pub(crate) fn new(requests: Requests) -> Self {
        Self {
            requests,
            models: Names::default(),
            tenants: Names::default(),
            series: Mutex::default(),
            rest: OnceLock::new(),
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
        let mut made = self.series.lock();
        if let Some(series) = find(&made, &Key::of(model, target, tenant, priority)) {
            return series;
        }
        let (model, target) = (self.models.label(model), self.models.label(target));
        let key = Key::of(model, target, self.tenants.label(tenant), priority);
        if let Some(series) = find(&made, &key) {
            return series;
        }
        if made.len() >= MAX_SERIES {
            let rest = || Arc::new(self.requests.series([OTHER; 4].map(Into::into)));
            return self.rest.get_or_init(rest).clone();
        }
        let series = Arc::new(self.requests.series(key.labels()));
        made.insert(key.into_owned(), series.clone());
        series
    }

    /// The label that a model's name gets.
    pub(crate) fn model<'a>(&self, name: &'a str) -> &'a str {
        self.models.label(name)
    }
}

fn find<'a>(made: &HashMap<Key<'a>, Arc<Series>>, key: &Key<'a>) -> Option<Arc<Series>> {
    made.get(key).cloned()
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

    fn series(&self, labels: [Box<str>; 4]) -> Series {
        let values: [&str; 4] = std::array::from_fn(|i| &*labels[i]);
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
            labels,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        Known::new(Requests::new(&Registry::new()))
    }

    #[test]
    fn requests_that_are_alike_share_their_series() {
        let known = known();
        let of = |tenant, priority| known.series("m", "t", tenant, priority);
        assert!(Arc::ptr_eq(&of("a", 0), &of("a", 0)));
        assert!(!Arc::ptr_eq(&of("a", 0), &of("b", 0)) && !Arc::ptr_eq(&of("a", 0), &of("a", 1)));
        assert_eq!(
            of("a", -1).labels.each_ref().map(|l| &**l),
            ["m", "t", "a", "-1"]
        );
    }

    #[test]
    fn names_that_clients_make_up_end_in_one_series() {
        let known = known();
        for i in 0..2000 {
            known.series(&i.to_string(), "", "t", 0).total.inc();
        }
        let other = known.series("one more", "", "t", 0);
        assert_eq!(&*other.labels[0], OTHER);
        // The empty name is one of the thousand.
        assert_eq!(other.total.get(), 1001);
        assert_eq!(&*known.series("7", "", "t", 0).labels[0], "7");
        assert!(known.series.lock().len() <= 1001);
    }

    #[test]
    fn series_end_where_priorities_do_not() {
        let known = known();
        for priority in 0..i32::try_from(MAX_SERIES).unwrap() + 2 {
            known.series("m", "m", "t", priority).total.inc();
        }
        let rest = known.series("m", "m", "t", -1);
        assert_eq!((&*rest.labels[3], rest.total.get()), (OTHER, 2));
        assert!(Arc::ptr_eq(&rest, &known.series("m", "m", "t", -2)));
    }
}
