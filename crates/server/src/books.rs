//! When a sequence came, how far it got and how long that took: what its metrics are made of.

use std::time::Instant;

use crate::metrics::{Finished, Metrics};

/// One sequence's times and counts.
#[derive(Debug)]
pub(crate) struct Books {
    arrived: Instant,
    admitted: Instant,
    first: Option<Instant>,
    last: Instant,
    n_prompt: usize,
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
            n_prompt,
            n_generated: 0,
        }
    }

    /// Enters a token.
    pub(crate) fn token(&mut self, now: Instant, cached_tokens: u32, metrics: &Metrics) {
        self.n_generated += 1;
        metrics.tokens.generated.inc();
        if self.first.is_none() {
            self.first = Some(now);
            metrics.tokens.prompt.inc_by(self.n_prompt as u64);
            metrics.tokens.cached.inc_by(u64::from(cached_tokens));
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
