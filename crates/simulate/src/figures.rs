//! What a run brought, in numbers.

use crate::engine::Engine;
use crate::workload::Workload;
use crate::world::Setup;

/// What a run brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Seconds to the first token of each request, in the order in which they came.
    pub(crate) first: Vec<f64>,
    /// Mean seconds between tokens of each answer.
    pub(crate) gaps: Vec<f64>,
    /// Seconds to the last token, of all requests together.
    pub(crate) whole: f64,
    /// Prompt blocks asked for.
    pub(crate) blocks: u64,
    /// Those that were cached where the prompt was computed.
    pub(crate) cached: u64,
    /// Prompt tokens computed, by place of the server.
    pub(crate) computed: Vec<u64>,
    /// Tokens of answers.
    pub(crate) tokens: u64,
    /// When the last answer ended, in seconds.
    pub(crate) last: f64,
    /// Requests whose prompt was computed elsewhere.
    pub(crate) split: u64,
    /// Requests that no server could take.
    pub(crate) failed: u64,
    /// Blocks of all servers that the picker remembered at most, looked at when servers were replaced and at the end.
    pub(crate) remembered: usize,
    /// Servers that compute prompts: the first so many.
    computing: usize,
}

/// A line of a report.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Line {
    /// Part of all prompt blocks that were cached where they were needed.
    pub cached: f64,
    /// Prompt tokens computed by the busiest server, beside the mean of those that compute prompts.
    pub busiest: f64,
    /// Seconds to the first token: median, 90th and 99th percentile.
    pub first: [f64; 3],
    /// Mean seconds to the first token.
    pub first_mean: f64,
    /// Mean seconds to the last token.
    pub whole_mean: f64,
    /// Seconds between tokens, mean of each answer: median and 99th percentile.
    pub gap: [f64; 2],
    /// Tokens of answers a second, from the first request to the end of the last answer.
    pub rate: f64,
    /// Part of the requests whose prompt was computed elsewhere.
    pub split: f64,
    /// Requests that no server could take.
    pub failed: u64,
    /// Blocks of all servers that the picker remembered at most, looked at when servers were replaced and at the end.
    pub remembered: usize,
}

impl Figures {
    pub(crate) fn work_of(&mut self, at: usize, engine: &Engine) {
        if self.computed.len() <= at {
            self.computed.resize(at + 1, 0);
        }
        self.computed[at] += engine.computed;
        self.cached += engine.cached_blocks;
    }

    pub(crate) fn finish(mut self, setup: &Setup) -> Self {
        // With nobody else to compute prompts, or with nobody who always does, all of them count.
        self.computing = match setup.prefill {
            0 => usize::MAX,
            n => n,
        };
        self.first.sort_by(f64::total_cmp);
        self.gaps.sort_by(f64::total_cmp);
        self
    }

    /// The figures in short.
    #[must_use]
    pub fn line(&self, load: &Workload) -> Line {
        let computing = &self.computed[..self.computing.min(self.computed.len())];
        let sum: u64 = computing.iter().sum();
        let most = computing.iter().copied().max().unwrap_or(0);
        let requests = load.asks.len().max(1) as f64;
        Line {
            cached: self.cached as f64 / self.blocks.max(1) as f64,
            busiest: most as f64 * computing.len() as f64 / sum.max(1) as f64,
            first: [0.5, 0.9, 0.99].map(|p| percentile(&self.first, p)),
            first_mean: self.first.iter().sum::<f64>() / self.first.len().max(1) as f64,
            whole_mean: self.whole / self.first.len().max(1) as f64,
            gap: [0.5, 0.99].map(|p| percentile(&self.gaps, p)),
            rate: self.tokens as f64 / self.last.max(1e-9),
            split: self.split as f64 / requests,
            failed: self.failed,
            remembered: self.remembered,
        }
    }
}

/// The value that a part `p` of the sorted numbers do not exceed.
fn percentile(sorted: &[f64], p: f64) -> f64 {
    let at = (p * sorted.len() as f64).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(0.0)
}
