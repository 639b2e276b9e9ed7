//! What a decision is asked, and what it says.

use crate::{EndpointId, Keys, Prompt};
use std::time::Duration;

/// What a decision needs to know of a request. [`Request::new`] makes the plainest one.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The model asked for; `None` is whatever the server serves first.
    pub model: Option<&'a str>,
    /// The name that servers are asked for, if it is another than `model`: a model after rewriting, or an adapter.
    pub target: Option<&'a str>,
    /// Its prompt; empty for requests that have none.
    pub prompt: &'a Prompt,
    /// Its blocks by tokens, for the precise index; without them the approximate index is asked instead.
    pub keys: Option<&'a Keys>,
    /// Servers that failed this request already. Deciding again with them here gives the next best.
    pub avoid: &'a [EndpointId],
    /// The only servers that may be chosen, in ascending order, if the proxy named any.
    pub subset: Option<&'a [EndpointId]>,
    /// The only servers that a test's filter keeps, in ascending order, if the request named any.
    pub selection: Option<&'a [EndpointId]>,
    /// Name of the endpoint that the client's session token names.
    pub session_endpoint: Option<&'a str>,
    /// The client's session, as [`PromptHasher::session`](crate::PromptHasher::session) hashes its name.
    pub session: Option<u64>,
    /// Whether pictures, films or sound are part of the prompt.
    pub multimodal: bool,
    /// How important it is; below 0 it may be refused when servers are busy.
    pub priority: i32,
    /// Whether it is to go nowhere unless the server that answers has some of the prompt.
    pub if_cached: bool,
    /// The time since any fixed moment, for what is remembered for a while.
    pub now: Duration,
}

impl<'a> Request<'a> {
    /// A request with `prompt` for whatever model a server serves first.
    #[must_use]
    pub fn new(prompt: &'a Prompt) -> Self {
        Self {
            model: None,
            target: None,
            prompt,
            keys: None,
            avoid: &[],
            subset: None,
            selection: None,
            session_endpoint: None,
            session: None,
            multimodal: false,
            priority: 0,
            if_cached: false,
            now: Duration::ZERO,
        }
    }

    /// The name that servers know.
    pub(crate) fn served_name(&self) -> Option<&'a str> {
        self.target.or(self.model)
    }
}

/// Where a request goes, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The server that answers.
    pub decode: EndpointId,
    /// Servers to try after it, best first; empty unless the picker was told to take several.
    pub others: Vec<EndpointId>,
    /// The weighted sum of what scorers gave it.
    pub score: f64,
    /// Tokens of the prompt that are probably not cached there.
    pub uncached_tokens: u32,
    /// Work of the prompt at the server that computes it, as [`Costs::work`](crate::Costs::work) counts it, what was sent
    /// there before taken for cached.
    pub work: f64,
    /// Whether another server computes the prompt.
    pub prefill: Prefill,
    /// Servers that encode pictures and sound; empty if none are asked.
    pub encode: Vec<EndpointId>,
    /// The port that the proxy connects to instead of the endpoint's own, which then travels in
    /// `x-data-parallel-host-port`.
    pub primary_port: Option<u16>,
    /// Whether no candidate had anything of the prompt.
    pub cold: bool,
}

impl Decision {
    /// The decision in a word, as metrics have it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match (self.encode.is_empty(), self.prefill.server().is_some()) {
            (true, false) => "decode-only",
            (true, true) => "prefill-decode",
            (false, false) => "encode-decode",
            (false, true) => "encode-prefill-decode",
        }
    }
}

/// Whether a prefill server takes part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Prefill {
    /// Too little of the prompt is uncached: sending KV would cost more than computing it.
    NotWorthIt,
    /// It would be worth it, and no prefill server is healthy: decode computes the prompt.
    NoneHealthy,
    /// The best server for it is the one that answers.
    SameServer,
    /// This one, with the weighted sum of what scorers gave it.
    At(EndpointId, f64),
}

impl Prefill {
    /// The server, if one takes part.
    #[must_use]
    pub fn server(&self) -> Option<EndpointId> {
        match self {
            Self::At(id, _) => Some(*id),
            Self::NotWorthIt | Self::NoneHealthy | Self::SameServer => None,
        }
    }
}

/// Why no server can answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unschedulable {
    /// Servers told what they serve, and none of them, healthy or not, serves this model: 404.
    #[error("no server serves this model")]
    UnknownModel,
    /// Every server that could answer is down, draining, or failed this request already: 503.
    #[error("no server can answer now")]
    NoneHealthy,
    /// Servers could answer, and every one of them is too busy: 429.
    #[error("every server that could answer is busy")]
    Saturated,
    /// The prompt had to go through a prefill server, and none can take it: 503.
    #[error("no prefill server can take the prompt now")]
    NoPrefill,
    /// The server that would answer has nothing of the prompt, and that was asked for: 412.
    #[error("no decode worker has the requested KV cache")]
    NotCached,
}

/// Why a decision is what it is: one entry for each profile that ran.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Explanation {
    /// In the order in which they ran.
    pub stages: Vec<Stage>,
}

/// What one profile made of the candidates.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Stage {
    /// The profile's name.
    pub profile: Box<str>,
    /// Its scorers and their weights.
    pub scorers: Vec<(Box<str>, f64)>,
    /// All candidates, in the order of their ids.
    pub candidates: Vec<Candidate>,
    /// Those that were picked, best first.
    pub picked: Vec<EndpointId>,
}

/// What became of one candidate.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Candidate {
    /// Who.
    pub id: EndpointId,
    /// The filter that dropped it.
    pub dropped_by: Option<Box<str>>,
    /// What each scorer gave it, 0 to 1, before its weight.
    pub values: Vec<f64>,
    /// The weighted sum.
    pub total: f64,
}
