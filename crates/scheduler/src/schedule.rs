//! The decision: filter, score, pick; decode first, then prefill if it is worth it.

use crate::policy::Extremes;
use crate::{
    BlockHash, Certainty, Endpoint, EndpointId, Match, Policy, PrefixIndex, Prompt, Role, Score,
    Weights,
};

/// What a decision needs to know of a request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The model asked for; `None` is whatever the server serves first.
    pub model: Option<&'a str>,
    /// Its prompt; empty for requests that have none.
    pub prompt: &'a Prompt,
    /// Servers that failed this request already. Deciding again with them here gives the next best.
    pub avoid: &'a [EndpointId],
}

/// Where a request goes, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The server that answers.
    pub decode: EndpointId,
    /// Why that one.
    pub score: Score,
    /// Tokens of the prompt that are probably not cached there.
    pub uncached_tokens: u32,
    /// Whether another server computes the prompt.
    pub prefill: Prefill,
}

/// Whether a prefill server takes part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Prefill {
    /// Too little of the prompt is uncached: sending KV would cost more than computing it.
    NotWorthIt,
    /// It would be worth it, and no prefill server is healthy: decode computes the prompt.
    NoneHealthy,
    /// This one.
    At(EndpointId, Score),
}

impl Prefill {
    /// The server, if one takes part.
    #[must_use]
    pub fn server(&self) -> Option<EndpointId> {
        match self {
            Self::At(id, _) => Some(*id),
            Self::NotWorthIt | Self::NoneHealthy => None,
        }
    }
}

/// Why no server can answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unschedulable {
    /// Servers told what they serve, and none of them, healthy or not, serves this model.
    #[error("no server serves this model")]
    UnknownModel,
    /// Every server that could answer is down, draining, or failed this request already.
    #[error("no server can answer now")]
    NoneHealthy,
}

/// Decides, and remembers where prompts went.
#[derive(Debug)]
pub struct Scheduler {
    policy: Policy,
    index: PrefixIndex,
    workspace: Workspace,
}

/// What one choice needs and the next one uses again.
#[derive(Debug, Default)]
struct Workspace {
    candidates: Vec<usize>,
    ids: Vec<EndpointId>,
    found: Vec<Match>,
    scores: Vec<Score>,
}

/// The winner of one choice.
struct Picked {
    id: EndpointId,
    score: Score,
    found: Match,
}

impl Scheduler {
    /// A scheduler that knows of no prompt yet.
    #[must_use]
    pub fn new(policy: Policy, index: PrefixIndex) -> Self {
        Self {
            policy,
            index,
            workspace: Workspace::default(),
        }
    }

    /// Decides where `request` goes. `turn` breaks ties: counting it up uses equal servers in turn.
    ///
    /// # Errors
    /// [`Unschedulable`], if no server may answer.
    pub fn decide(
        &mut self,
        fleet: &[Endpoint],
        request: &Request<'_>,
        turn: u64,
    ) -> Result<Decision, Unschedulable> {
        let blocks = &request.prompt.blocks;
        let mut pick = |role: fn(Role) -> bool, weights: &Weights| {
            let may_take = |e: &Endpoint| role(e.role) && may_take(e, request);
            self.workspace.gather(fleet, may_take);
            self.workspace
                .pick(fleet, &self.index, blocks, weights, turn)
        };
        let decode =
            pick(Role::decodes, &self.policy.decode).ok_or_else(|| why_nobody(fleet, request))?;
        // What is merely expected there may be far back in a queue, and asking a prefill server that has it costs little.
        let uncached_tokens = request.prompt.tokens_beyond(decode.found.computed);
        let worth_it = |threshold: u32| uncached_tokens > 0 && uncached_tokens >= threshold;
        let prefill = if !self.policy.pd_threshold.is_some_and(worth_it) {
            Prefill::NotWorthIt
        } else if let Some(picked) = pick(Role::prefills_for_others, &self.policy.prefill) {
            Prefill::At(picked.id, picked.score)
        } else {
            Prefill::NoneHealthy
        };
        Ok(Decision {
            decode: decode.id,
            score: decode.score,
            uncached_tokens,
            prefill,
        })
    }

    /// Notes that a request with `prompt` was sent where `decision` says.
    pub fn sent(&mut self, prompt: &Prompt, decision: &Decision) {
        let servers = [Some(decision.decode), decision.prefill.server()];
        for server in servers.into_iter().flatten() {
            self.index
                .insert(server, &prompt.blocks, Certainty::Expected);
        }
    }

    /// Notes that `decode` has begun to answer a request with `prompt`, and so has its KV.
    pub fn answered(&mut self, prompt: &Prompt, decode: EndpointId) {
        self.index
            .insert(decode, &prompt.blocks, Certainty::Computed);
    }

    /// Notes that `server` is gone, or lost its cache.
    pub fn forget(&mut self, server: EndpointId) {
        self.index.forget(server);
    }

    /// Notes that `server` has room for about `blocks` prefix blocks.
    pub fn set_cache_size(&mut self, server: EndpointId, blocks: usize) {
        self.index.set_capacity(server, blocks);
    }
}

impl Workspace {
    /// Makes the endpoints that `may_take` a request the candidates, in the order of their names: the order in which
    /// they were found does not matter.
    fn gather(&mut self, fleet: &[Endpoint], may_take: impl Fn(&Endpoint) -> bool) {
        self.candidates.clear();
        self.candidates
            .extend((0..fleet.len()).filter(|&i| may_take(&fleet[i])));
        self.candidates.sort_unstable_by_key(|&i| fleet[i].id);
        self.ids.clear();
        self.ids
            .extend(self.candidates.iter().map(|&i| fleet[i].id));
    }

    /// The best of the candidates.
    fn pick(
        &mut self,
        fleet: &[Endpoint],
        index: &PrefixIndex,
        blocks: &[BlockHash],
        weights: &Weights,
        turn: u64,
    ) -> Option<Picked> {
        index.matches(blocks, &self.ids, &mut self.found);
        let extremes = Extremes::of(self.candidates.iter().map(|&i| &fleet[i]));
        self.scores.clear();
        self.scores.extend(
            (self.candidates.iter().zip(&self.found)).map(|(&i, found)| {
                weights.score(&fleet[i], extremes, found.expected, blocks.len())
            }),
        );
        let best = best(&self.scores, turn)?;
        Some(Picked {
            id: self.ids[best],
            score: self.scores[best],
            found: self.found[best],
        })
    }
}

/// The index of the highest score; of several, the one whose turn it is.
fn best(scores: &[Score], turn: u64) -> Option<usize> {
    let highest = scores.iter().map(|s| s.total).max_by(f32::total_cmp)?;
    let is_best = |s: &&Score| s.total.total_cmp(&highest).is_eq();
    let n_best = scores.iter().filter(is_best).count();
    let chosen = usize::try_from(turn % n_best as u64).ok()?;
    scores
        .iter()
        .enumerate()
        .filter(|(_, s)| is_best(s))
        .nth(chosen)
        .map(|(i, _)| i)
}

fn may_take(endpoint: &Endpoint, request: &Request<'_>) -> bool {
    endpoint.is_healthy() && endpoint.serves(request.model) && !request.avoid.contains(&endpoint.id)
}

fn why_nobody(fleet: &[Endpoint], request: &Request<'_>) -> Unschedulable {
    let mut decoders = fleet.iter().filter(|e| e.role.decodes()).peekable();
    if decoders.peek().is_some() && decoders.all(|e| !e.serves(request.model)) {
        Unschedulable::UnknownModel
    } else {
        Unschedulable::NoneHealthy
    }
}

#[cfg(test)]
mod tests;
