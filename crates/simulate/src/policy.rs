//! Ways to choose a server, side by side: ours and those it is compared with.

use crate::numbers::{Numbers, mix};
use crate::pool::Change;
use baton_kv::{BlockEvent, EngineHash, Removed, Stored};
use baton_scheduler::{
    Backlog, BlockHash, Certainty, Costs, EndpointId, Found, Keys, Match, Pace, PreciseConfig,
    PreciseIndex, PrefixIndex, TokenHasher, TokenPrompt,
};
use std::time::Duration;

/// A way to choose a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Our own, with the approximate index.
    Ours,
    /// Our own, with the precise index.
    OursPrecise,
    /// Any.
    Random,
    /// One after another.
    RoundRobin,
    /// The upstream picker's default: queue 2, KV use 2, prefix 3.
    Upstream,
    /// Matched blocks minus 0.05 times blocks queued there.
    TenLines,
}

impl Policy {
    /// All of them, ours first.
    pub const ALL: [Self; 6] = [
        Self::Ours,
        Self::OursPrecise,
        Self::Random,
        Self::RoundRobin,
        Self::Upstream,
        Self::TenLines,
    ];

    /// The one of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }

    /// Its name in tables and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "baton",
            Self::OursPrecise => "baton-precise",
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::Upstream => "upstream",
            Self::TenLines => "ten-lines",
        }
    }
}

/// What a picker knows of a server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    pub(crate) id: EndpointId,
    pub(crate) decodes: bool,
    pub(crate) prefills: bool,
    pub(crate) here: bool,
    /// What it said when it was last asked.
    pub(crate) said: Said,
    pub(crate) flight: Flight,
}

/// What a server says of itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Said {
    pub(crate) waiting: usize,
    pub(crate) kv_usage: f64,
}

/// Requests that were sent to a server, by the picker's own account.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flight {
    /// That are not over.
    pub(crate) active: u32,
    /// Prompt tokens of those that were not answered yet, as far as they were not cached when they were sent.
    pub(crate) queued: u64,
    /// The same as work.
    pub(crate) backlog: Backlog,
}

/// What was chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Picked {
    /// Where the server is in the list of views.
    pub(crate) at: usize,
    /// Prompt tokens that it probably has to compute.
    pub(crate) uncached: u64,
    /// The same as work.
    pub(crate) work: f64,
}

/// A prompt as the indices see it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Prompt {
    pub(crate) tokens: u32,
    pub(crate) block_tokens: u32,
    pub(crate) blocks: Vec<BlockHash>,
    pub(crate) keys: Keys,
}

/// Chooses.
#[derive(Debug)]
pub(crate) struct Picker {
    policy: Policy,
    costs: Costs,
    /// Of servers that answer, and of those that compute prompts for others.
    pub(crate) paces: [Pace; 2],
    numbers: Numbers,
    turn: usize,
    approximate: PrefixIndex,
    precise: PreciseIndex,
    hasher: TokenHasher,
    candidates: Vec<usize>,
    ids: Vec<EndpointId>,
    matches: Vec<Match>,
    found: Vec<Found>,
}

/// In the precise index a block of the model is a block of two tokens, which are its id.
const TOKENS_OF_ID: u32 = 2;

/// Prompt tokens a second, until servers have shown their pace.
const PACE: f64 = 10_000.0;

/// How long a prompt that was sent is expected to be cached before the server says so, in microseconds.
const EXPECTED_FOR: u64 = 20_000_000;

impl Picker {
    pub(crate) fn new(policy: Policy, costs: Costs, seed: u64) -> Self {
        let hasher = TokenHasher::new(mix(seed));
        Self {
            policy,
            costs,
            paces: [Pace::new(PACE); 2],
            numbers: Numbers::new(seed),
            turn: 0,
            approximate: PrefixIndex::new(1 << 20),
            precise: PreciseIndex::new(hasher, PreciseConfig::default()),
            hasher,
            candidates: Vec::new(),
            ids: Vec::new(),
            matches: Vec::new(),
            found: Vec::new(),
        }
    }

    pub(crate) fn is_precise(&self) -> bool {
        self.policy == Policy::OursPrecise
    }

    /// Blocks remembered of all servers, those that are gone included, if they were not forgotten.
    pub(crate) fn remembered(&self) -> usize {
        self.approximate.size().held + self.precise.len()
    }

    pub(crate) fn prompt(&self, ids: &[u64], tokens: u32, block_tokens: u32) -> Prompt {
        let keys = if self.is_precise() {
            let tokens: Vec<u32> = ids.iter().flat_map(|&id| tokens_of(id)).collect();
            let prompt = TokenPrompt {
                tokens: &tokens,
                ..TokenPrompt::default()
            };
            self.hasher.keys(&prompt, [TOKENS_OF_ID])
        } else {
            Keys::default()
        };
        Prompt {
            tokens,
            block_tokens,
            blocks: ids.iter().map(|&id| BlockHash::new(mix(id))).collect(),
            keys,
        }
    }

    /// Chooses among those of `views` that `may` take it.
    pub(crate) fn pick(
        &mut self,
        views: &[View],
        prompt: &Prompt,
        now: Duration,
        may: fn(&View) -> bool,
    ) -> Option<Picked> {
        self.candidates.clear();
        self.candidates
            .extend((0..views.len()).filter(|&i| views[i].here && may(&views[i])));
        self.candidates.sort_unstable_by_key(|&i| views[i].id);
        self.ids.clear();
        self.ids
            .extend(self.candidates.iter().map(|&i| views[i].id));
        if self.candidates.is_empty() {
            return None;
        }
        self.look_up(prompt);
        let n = self.candidates.len();
        let chosen = match self.policy {
            Policy::Random => self.numbers.below(n),
            Policy::RoundRobin => {
                self.turn += 1;
                self.turn % n
            }
            _ => self.best(views, prompt, now),
        };
        let uncached = self.uncached(chosen, prompt);
        Some(Picked {
            at: self.candidates[chosen],
            uncached,
            work: self.costs.work(prompt.tokens.into(), uncached),
        })
    }

    /// The prompt was sent to a server at some time.
    pub(crate) fn sent(&mut self, server: EndpointId, prompt: &Prompt, now: u64) {
        if self.is_precise() {
            self.precise.expect(server, &prompt.keys, now);
            self.precise.expire(now.saturating_sub(EXPECTED_FOR));
        } else {
            self.approximate
                .insert(server, &prompt.blocks, Certainty::Expected);
        }
    }

    /// A server answered it.
    pub(crate) fn answered(&mut self, server: EndpointId, prompt: &Prompt) {
        if !self.is_precise() {
            self.approximate
                .insert(server, &prompt.blocks, Certainty::Computed);
        }
    }

    /// A server has this many blocks.
    pub(crate) fn capacity(&mut self, server: EndpointId, blocks: usize) {
        self.approximate.set_capacity(server, blocks);
    }

    /// A server is gone.
    pub(crate) fn forget(&mut self, server: EndpointId) {
        self.approximate.forget(server);
        self.precise.remove(server);
    }

    /// A server reports what changed in its cache.
    pub(crate) fn reported(&mut self, server: EndpointId, changes: &[Change]) {
        for change in changes {
            let event = match *change {
                Change::Stored(parent, id) => BlockEvent::Stored(Stored {
                    hashes: vec![EngineHash(id)],
                    parent: parent.map(EngineHash),
                    tokens: tokens_of(id).to_vec(),
                    block_size: TOKENS_OF_ID,
                    ..Stored::default()
                }),
                Change::Removed(id) => BlockEvent::Removed(Removed {
                    hashes: vec![EngineHash(id)],
                    ..Removed::default()
                }),
            };
            self.precise.apply(server, "", &event);
        }
    }

    fn look_up(&mut self, prompt: &Prompt) {
        if self.is_precise() {
            self.precise
                .matches(&prompt.keys, &self.ids, &mut self.found);
            self.matches.clear();
            self.matches.extend(self.found.iter().map(|f| Match {
                expected: f.expected,
                computed: f.computed,
            }));
        } else {
            self.approximate
                .matches(&prompt.blocks, &self.ids, &mut self.matches);
        }
    }

    /// Prompt tokens that a candidate probably has to compute.
    fn uncached(&self, candidate: usize, prompt: &Prompt) -> u64 {
        let cached = self.matches[candidate].expected as u64 * u64::from(prompt.block_tokens);
        u64::from(prompt.tokens).saturating_sub(cached).max(1)
    }

    /// The candidate with the highest score; any of several.
    fn best(&mut self, views: &[View], prompt: &Prompt, now: Duration) -> usize {
        let scores: Vec<f64> = self.scores(views, prompt, now);
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let best: Vec<usize> = (0..scores.len())
            .filter(|&c| scores[c] >= highest)
            .collect();
        best[self.numbers.below(best.len())]
    }

    fn scores(&self, views: &[View], prompt: &Prompt, now: Duration) -> Vec<f64> {
        let all = 0..self.candidates.len();
        match self.policy {
            Policy::Upstream => all.map(self.upstream(views, prompt)).collect(),
            Policy::TenLines => all.map(self.ten_lines(views, prompt)).collect(),
            _ => all.map(self.ours(views, prompt, now)).collect(),
        }
    }

    fn ten_lines(&self, views: &[View], prompt: &Prompt) -> impl Fn(usize) -> f64 {
        let block_tokens = f64::from(prompt.block_tokens);
        move |c| {
            let queued = views[self.candidates[c]].flight.queued as f64 / block_tokens;
            self.matches[c].expected as f64 - 0.05 * queued
        }
    }

    fn upstream(&self, views: &[View], prompt: &Prompt) -> impl Fn(usize) -> f64 {
        let waiting = || self.candidates.iter().map(|&i| views[i].said.waiting);
        let (least, most) = (waiting().min().unwrap_or(0), waiting().max().unwrap_or(0));
        let blocks = prompt.blocks.len().max(1) as f64;
        move |c| {
            let said = &views[self.candidates[c]].said;
            let queue = match most - least {
                0 => 1.0,
                span => (most - said.waiting) as f64 / span as f64,
            };
            let prefix = self.matches[c].expected as f64 / blocks;
            2.0 * queue + 2.0 * (1.0 - said.kv_usage) + 3.0 * prefix
        }
    }

    fn ours(&self, views: &[View], prompt: &Prompt, now: Duration) -> impl Fn(usize) -> f64 {
        let waiting =
            (self.candidates.iter()).map(|&i| f64::from(views[i].flight.backlog.requests()));
        let queued = self
            .costs
            .queued_with(waiting.sum::<f64>() / self.candidates.len() as f64);
        move |c| {
            let view = &views[self.candidates[c]];
            let flight = &view.flight;
            let own = self
                .costs
                .work(prompt.tokens.into(), self.uncached(c, prompt));
            let left = flight
                .backlog
                .left(now, &self.paces[usize::from(view.prefills)]);
            -self.costs.of(own, left, queued, flight.active)
        }
    }
}

fn tokens_of(id: u64) -> [u32; 2] {
    [id as u32, (id >> 32) as u32]
}
