//! What is counted of one request, from its first byte to its last.

use crate::metrics::Metrics;
use crate::refusals;
use crate::series::Series;
use crate::usage::Usage;
use baton_ext_proc::{Ended, Refusal};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One request's figures until it ends.
#[derive(Debug)]
pub(crate) struct Account {
    began: Instant,
    /// Where they go, once it is known whose request it is.
    series: Option<Arc<Series>>,
    /// When the answer's head came.
    answered: Option<Instant>,
    /// When the first bytes of its body came, and the last ones so far.
    body: Option<(Instant, Instant)>,
    /// Whether it is a stream of events.
    streams: bool,
    sent: bool,
    status: u16,
    response_bytes: usize,
    /// What its pieces took here.
    handling: Duration,
}

impl Account {
    pub(crate) fn begin(metrics: &Metrics) -> Self {
        metrics.exchanges.in_progress.inc();
        Self {
            began: Instant::now(),
            series: None,
            answered: None,
            body: None,
            streams: false,
            sent: false,
            status: 0,
            response_bytes: 0,
            handling: Duration::ZERO,
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

    pub(crate) fn series(&mut self, metrics: &Metrics) -> &Arc<Series> {
        self.series
            .get_or_insert_with(|| metrics.series((None, None), None, 0))
    }

    /// It goes to a server, with a body of `bytes`.
    pub(crate) fn sent(&mut self, metrics: &Metrics, bytes: usize) {
        let began = self.began;
        let series = self.series(metrics);
        series.total.inc();
        series.running.inc();
        series.request_bytes.observe(bytes as f64);
        metrics
            .exchanges
            .request
            .observe(began.elapsed().as_secs_f64());
        self.sent = true;
    }

    /// It goes nowhere.
    pub(crate) fn refused(&mut self, metrics: &Metrics, refusal: &Refusal) {
        self.series(metrics).total.inc();
        self.failed(metrics, refusals::code(refusal));
    }

    /// It was at its server, and is given up for others.
    pub(crate) fn evicted(&mut self, metrics: &Metrics, refusal: &Refusal) {
        self.failed(metrics, refusals::code(refusal));
    }

    fn failed(&mut self, metrics: &Metrics, code: &str) {
        metrics.failed(self.series(metrics), code);
    }

    /// The answer begins; `streams` says whether it is a stream of events.
    pub(crate) fn answered(&mut self, metrics: &Metrics, status: u16, streams: bool) {
        (self.status, self.streams) = (status, streams);
        self.answered = Some(Instant::now());
        if self.sent && !(200..300).contains(&status) {
            self.failed(metrics, "ModelServerError");
        }
    }

    /// A piece of the answer's body came at `now`.
    pub(crate) fn piece(&mut self, metrics: &Metrics, bytes: usize, now: Instant) {
        self.response_bytes += bytes;
        if bytes == 0 {
            return;
        }
        let (began, streams, body) = (self.began, self.streams, self.body);
        self.body = Some((body.map_or(now, |(first, _)| first), now));
        let series = self.series(metrics);
        match body {
            None => series.first_token[usize::from(streams)].observe(seconds(began, now)),
            Some((_, last)) if streams => series.between_pieces.observe(seconds(last, now)),
            Some(_) => {}
        }
    }

    /// What came at `came` is done with.
    pub(crate) fn handled(&mut self, came: Instant) {
        self.handling += came.elapsed();
    }

    /// Nothing follows.
    pub(crate) fn ended(&mut self, metrics: &Metrics, why: Ended, usage: Usage) {
        let now = Instant::now();
        metrics.exchanges.ended(why, seconds(self.began, now));
        if !std::mem::take(&mut self.sent) {
            return;
        }
        self.series(metrics).running.dec();
        if why == Ended::Naturally && (200..300).contains(&self.status) {
            self.done(metrics, usage, now);
        }
    }

    /// A good answer has passed.
    fn done(&mut self, metrics: &Metrics, usage: Usage, now: Instant) {
        let processing = match (self.streams, self.answered) {
            (false, Some(answered)) => seconds(answered, now),
            _ => self.handling.as_secs_f64(),
        };
        metrics.exchanges.response.observe(processing);
        let (took, bytes) = (seconds(self.began, now), self.response_bytes);
        let first = self.body.filter(|_| self.streams).map(|(first, _)| first);
        let series = self.series(metrics);
        series.duration.observe(took);
        series.response_bytes.observe(bytes as f64);
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
        let output = usage.output.unwrap_or(0);
        if output > 0 {
            series.per_token.observe(took / output as f64);
        }
        if let Some(first) = first.filter(|_| output > 1) {
            let per_token = seconds(first, now) / (output - 1) as f64;
            series.between_tokens.observe(per_token);
        }
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}
