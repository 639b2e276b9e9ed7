//! When a sequence came, how far it got and how long that took: what its metrics are made of.

use std::time::Instant;

use crate::inbox::Lost;
use crate::metrics::{Finished, Metrics, Source};

/// One sequence's times and counts.
#[derive(Debug)]
pub(crate) struct Books {
    arrived: Instant,
    admitted: Instant,
    first: Option<Instant>,
    last: Instant,
    n_prompt: u64,
    /// Prompt tokens found here, if more were fetched.
    n_found: Option<u64>,
    /// Why KV that was to come did not.
    lost: Option<Lost>,
    n_generated: u32,
}

impl Books {
    /// Of a sequence that comes to the engine now.
    pub(crate) fn open(n_prompt: usize, arrived: Instant) -> Self {
        let admitted = Instant::now();
        Self {
            arrived,
            admitted,
            first: None,
            last: arrived,
            n_prompt: n_prompt as u64,
            n_found: None,
            lost: None,
            n_generated: 0,
        }
    }

    /// Enters that KV was asked of another server, beyond that of `n_found` tokens.
    pub(crate) fn fetch(&mut self, n_found: u32) {
        self.n_found = Some(u64::from(n_found));
    }

    /// Enters that the prompt, or its rest, is computed because its KV did not come.
    pub(crate) fn lose(&mut self, lost: Lost) {
        self.lost = Some(lost);
    }

    /// Enters a token.
    pub(crate) fn token(&mut self, now: Instant, cached_tokens: u32, metrics: &Metrics) {
        self.n_generated += 1;
        metrics.tokens.generated.inc();
        if self.first.is_none() {
            self.first = Some(now);
            self.prompt(u64::from(cached_tokens), metrics);
            metrics
                .times
                .to_first_token
                .observe((now - self.arrived).as_secs_f64());
            metrics
                .times
                .prefill
                .observe((now - self.admitted).as_secs_f64());
        } else {
            metrics
                .times
                .between_tokens
                .observe((now - self.last).as_secs_f64());
        }
        self.last = now;
    }

    /// Counts the prompt, of which so many tokens were not computed.
    fn prompt(&self, n_cached: u64, metrics: &Metrics) {
        let tokens = &metrics.tokens;
        tokens.prompt.inc_by(self.n_prompt);
        tokens.cached.inc_by(n_cached);
        let n_found = self.n_found.unwrap_or(n_cached).min(n_cached);
        tokens.prompt_from(Source::Found, n_found);
        tokens.prompt_from(Source::Fetched, n_cached - n_found);
        let n_computed = self.n_prompt.saturating_sub(n_cached);
        tokens.prompt_from(Source::Computed, n_computed);
        if let Some(Lost(reason)) = self.lost {
            // The last token would have been computed in any case.
            metrics.kv.recomputed(reason, n_computed.saturating_sub(1));
        }
    }

    /// Closes them.
    pub(crate) fn close(&self, reason: Finished, metrics: &Metrics) {
        metrics.finished(reason);
        let Some(first) = self.first else {
            return;
        };
        #[expect(
            clippy::cast_precision_loss,
            reason = "prompts are far below 2^53 tokens"
        )]
        metrics.sizes.prompt.observe(self.n_prompt as f64);
        metrics.sizes.generated.observe(f64::from(self.n_generated));
        metrics
            .times
            .queue
            .observe((self.admitted - self.arrived).as_secs_f64());
        metrics
            .times
            .end_to_end
            .observe((self.last - self.arrived).as_secs_f64());
        let decode = (self.last - first).as_secs_f64();
        metrics.times.decode.observe(decode);
        if self.n_generated > 1 {
            metrics
                .times
                .per_output_token
                .observe(decode / f64::from(self.n_generated - 1));
        }
    }
}
