//! The decision: filter, score, pick; decode first, then prefill if it is worth it.

use crate::policy::Extremes;
use crate::{BlockHash, Endpoint, EndpointId, Policy, PrefixIndex, Prompt, Score, Weights};

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
    candidates: Vec<usize>,
    ids: Vec<EndpointId>,
    matched: Vec<usize>,
    scores: Vec<Score>,
}

/// The winner of one profile.
struct Picked {
    id: EndpointId,
    score: Score,
    matched: usize,
}

impl Scheduler {
    /// A scheduler that knows of no prompt yet.
    #[must_use]
    pub fn new(policy: Policy, index: PrefixIndex) -> Self {
        let (candidates, ids, matched, scores) = <_>::default();
        Self {
            policy,
            index,
            candidates,
            ids,
            matched,
            scores,
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
        let candidates = fleet
            .iter()
            .enumerate()
            .filter(|(_, e)| e.role.decodes() && may_take(e, request));
        let decode = {
            self.candidates.clear();
            self.candidates.extend(candidates.map(|(i, _)| i));
            let weights = self.policy.decode;
            self.pick(fleet, blocks, &weights, turn)
                .ok_or_else(|| why_nobody(fleet, request))?
        };
        let uncached_tokens = request.prompt.tokens_beyond(decode.matched);
        let prefill = match self.policy.pd_threshold {
            Some(threshold) if uncached_tokens > 0 && uncached_tokens >= threshold => {
                self.prefill(fleet, request, turn)
            }
            _ => Prefill::NotWorthIt,
        };
        Ok(Decision {
            decode: decode.id,
            score: decode.score,
            uncached_tokens,
            prefill,
        })
    }

    /// Notes that a request with `prompt` went where `decision` says.
    pub fn record(&mut self, prompt: &Prompt, decision: &Decision) {
        self.index.insert(decision.decode, &prompt.blocks);
        if let Some(prefill) = decision.prefill.server() {
            self.index.insert(prefill, &prompt.blocks);
        }
    }

    /// Notes that `server` is gone, or lost its cache.
    pub fn forget(&mut self, server: EndpointId) {
        self.index.forget(server);
    }

    /// Notes that `server` has room for about `blocks` prefix blocks.
    pub fn set_cache_size(&mut self, server: EndpointId, blocks: usize) {
        self.index.set_capacity(server, blocks);
    }

    fn prefill(&mut self, fleet: &[Endpoint], request: &Request<'_>, turn: u64) -> Prefill {
        let candidates = fleet
            .iter()
            .enumerate()
            .filter(|(_, e)| e.role.prefills_for_others() && may_take(e, request));
        self.candidates.clear();
        self.candidates.extend(candidates.map(|(i, _)| i));
        let weights = self.policy.prefill;
        match self.pick(fleet, &request.prompt.blocks, &weights, turn) {
            Some(picked) => Prefill::At(picked.id, picked.score),
            None => Prefill::NoneHealthy,
        }
    }

    /// The best of `self.candidates`.
    fn pick(
        &mut self,
        fleet: &[Endpoint],
        blocks: &[BlockHash],
        weights: &Weights,
        turn: u64,
    ) -> Option<Picked> {
        // The order of names, so that the order in which endpoints were found does not matter.
        self.candidates.sort_unstable_by_key(|&i| fleet[i].id);
        self.ids.clear();
        self.ids
            .extend(self.candidates.iter().map(|&i| fleet[i].id));
        self.index.matches(blocks, &self.ids, &mut self.matched);

        let extremes = Extremes::of(self.candidates.iter().map(|&i| &fleet[i]));
        self.scores.clear();
        self.scores.extend(
            (self.candidates.iter().zip(&self.matched))
                .map(|(&i, &matched)| weights.score(&fleet[i], extremes, matched, blocks.len())),
        );
        let best = best(&self.scores, turn)?;
        Some(Picked {
            id: self.ids[best],
            score: self.scores[best],
            matched: self.matched[best],
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
