//! What is counted of one request, from its first byte to its last.

use crate::metrics::Metrics;
use crate::refusals;
use crate::series::Series;
use crate::usage::Usage;
use baton_ext_proc::{Ended, Refusal};
use std::sync::Arc;
use std::time::Instant;

/// One request's figures until it ends.
#[derive(Debug)]
pub(crate) struct Account {
    began: Instant,
    /// Where they go, once it is known whose request it is.
    series: Option<Arc<Series>>,
    /// When the first byte of the answer's body came.
    first: Option<Instant>,
    sent: bool,
    status: u16,
    response_bytes: usize,
    refused: bool,
}

impl Account {
    pub(crate) fn begin(metrics: &Metrics) -> Self {
        metrics.streams.inc();
        Self {
            began: Instant::now(),
            series: None,
            first: None,
            sent: false,
            status: 0,
            response_bytes: 0,
            refused: false,
        }
    }

    /// Whose request it is; `names` are the model asked for and the one that servers are asked for.
    pub(crate) fn knows(
        &mut self,
        metrics: &Metrics,
        names: (Option<&str>, Option<&str>),
        fairness: Option<&str>,
        priority: i32,
    ) {
        self.series = Some(metrics.series(names, fairness, priority));
    }

    fn series(&mut self, metrics: &Metrics) -> Arc<Series> {
        self.series
            .get_or_insert_with(|| metrics.series((None, None), None, 0))
            .clone()
    }

    /// It goes to a server, with a body of `bytes`.
    pub(crate) fn sent(&mut self, metrics: &Metrics, bytes: usize) {
        let series = self.series(metrics);
        series.total.inc();
        series.running.inc();
        series.request_bytes.observe(bytes as f64);
        metrics
            .request_processing
            .observe(self.began.elapsed().as_secs_f64());
        self.sent = true;
    }

    /// It goes nowhere.
    pub(crate) fn refused(&mut self, metrics: &Metrics, refusal: &Refusal) {
        let series = self.series(metrics);
        series.total.inc();
        metrics.failed(&series, refusals::code(refusal));
        self.refused = true;
    }

    /// It was at its server, and is given up for others.
    pub(crate) fn evicted(&mut self, metrics: &Metrics, refusal: &Refusal) {
        let series = self.series(metrics);
        metrics.failed(&series, refusals::code(refusal));
    }

    /// The answer begins.
    pub(crate) fn answered(&mut self, metrics: &Metrics, status: u16) {
        self.status = status;
        if self.sent && !(200..300).contains(&status) {
            let series = self.series(metrics);
            metrics.failed(&series, "ModelServerError");
        }
    }

    /// A piece of the answer's body came.
    pub(crate) fn piece(&mut self, metrics: &Metrics, bytes: usize) {
        self.response_bytes += bytes;
        if self.first.is_none() && bytes > 0 {
            let now = Instant::now();
            self.first = Some(now);
            let series = self.series(metrics);
            series.first_token.observe((now - self.began).as_secs_f64());
        }
    }

    /// Nothing follows.
    pub(crate) fn ended(&mut self, metrics: &Metrics, why: Ended, usage: Usage) {
        metrics.streams.dec();
        metrics.ended(why);
        if !std::mem::take(&mut self.sent) {
            return;
        }
        let series = self.series(metrics);
        series.running.dec();
        if why != Ended::Naturally || !(200..300).contains(&self.status) {
            return;
        }
        let took = self.began.elapsed().as_secs_f64();
        series.duration.observe(took);
        series.response_bytes.observe(self.response_bytes as f64);
        let tokens = [
            (&series.input_tokens, usage.prompt),
            (&series.output_tokens, usage.output),
            (&series.cached_tokens, usage.cached),
        ];
        for (histogram, tokens) in tokens {
            if let Some(tokens) = tokens {
                histogram.observe(tokens as f64);
            }
        }
        if let Some(output) = usage.output.filter(|&n| n > 0) {
            series.per_token.observe(took / output as f64);
        }
    }
}
