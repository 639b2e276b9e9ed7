//! Where decisions are made: the fleet, the scheduler, and whose turn it is.

use crate::config::{ConfigError, GatewayConfig};
use crate::facts::Facts;
use crate::fleet::{Flight, Server};
use arc_swap::ArcSwap;
use baton_scheduler::{
    BLOCK_BYTES, Decision, Endpoint, EndpointId, PrefixIndex, Prompt, PromptHasher, Request,
    Scheduler, Unschedulable,
};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::Arc;

/// The servers there are, in the order of the configuration.
pub(crate) type Servers = Vec<Arc<Server>>;

/// Tokens of a prefix block, at four bytes a token.
const TOKENS_PER_BLOCK: u64 = BLOCK_BYTES as u64 / 4;

/// Decides. The list of servers has one writer, [`crate::endpoints`]; the lock is held for a decision, never longer.
#[derive(Debug)]
pub(crate) struct Desk {
    servers: ArcSwap<Servers>,
    hasher: PromptHasher,
    deciding: Mutex<Deciding>,
}

#[derive(Debug)]
struct Deciding {
    scheduler: Scheduler,
    snapshot: Vec<Endpoint>,
    turn: u64,
}

/// A decision, with the servers that it names counted as busy.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) decode: Flight,
    pub(crate) prefill: Option<Flight>,
    pub(crate) decision: Decision,
}

impl Desk {
    /// A desk without servers.
    pub(crate) fn new(config: &GatewayConfig) -> Result<Self, ConfigError> {
        let index = PrefixIndex::new(config.limits.prefix_blocks_per_server);
        let scheduler = Scheduler::new(config.policy(), index);
        Ok(Self {
            servers: ArcSwap::default(),
            hasher: PromptHasher::new(getrandom::u64().map_err(|_| ConfigError::Random)?),
            deciding: Mutex::new(Deciding {
                scheduler,
                snapshot: Vec::new(),
                turn: 0,
            }),
        })
    }

    /// The servers there are now.
    pub(crate) fn servers(&self) -> Arc<Servers> {
        self.servers.load_full()
    }

    /// Replaces the servers.
    pub(crate) fn set_servers(&self, servers: Servers) {
        self.servers.store(Arc::new(servers));
    }

    /// `server` has begun to answer a request with `prompt`.
    pub(crate) fn answered(&self, server: EndpointId, prompt: &Prompt) {
        self.deciding.lock().scheduler.answered(prompt, server);
    }

    /// `server` lost its cache, or is gone.
    pub(crate) fn forget(&self, server: EndpointId) {
        self.deciding.lock().scheduler.forget(server);
    }

    /// `server` has room for the KV of about `tokens` tokens.
    pub(crate) fn set_cache_size(&self, server: EndpointId, tokens: u64) {
        let blocks = usize::try_from(tokens / TOKENS_PER_BLOCK).unwrap_or(usize::MAX);
        self.deciding
            .lock()
            .scheduler
            .set_cache_size(server, blocks);
    }

    /// Names of the models that can be asked for, at most `n` of them, each once, in order.
    pub(crate) fn models(&self, n: usize) -> Vec<Box<str>> {
        let servers = self.servers();
        let lists: Vec<_> = servers
            .iter()
            .filter(|s| s.role.decodes())
            .filter_map(|s| s.endpoint().models)
            .collect();
        let names: BTreeSet<&str> = lists
            .iter()
            .flat_map(|list| list.iter().map(|name| &**name))
            .collect();
        names.into_iter().take(n).map(Into::into).collect()
    }

    /// The prompt of a request with these facts.
    pub(crate) fn prompt(&self, facts: &Facts<'_>) -> Prompt {
        self.hasher.prompt(
            facts.model.as_deref().unwrap_or(""),
            &facts.prompt,
            facts.tokens,
        )
    }

    /// Decides where a request goes; `avoid` has failed it already.
    pub(crate) fn route(
        &self,
        model: Option<&str>,
        prompt: &Prompt,
        avoid: &[EndpointId],
    ) -> Result<Route, Unschedulable> {
        let servers = self.servers();
        let mut deciding = self.deciding.lock();
        let Deciding {
            scheduler,
            snapshot,
            turn,
        } = &mut *deciding;
        snapshot.clear();
        snapshot.extend(servers.iter().map(|s| s.endpoint()));
        *turn = turn.wrapping_add(1);
        let request = Request {
            model,
            avoid,
            ..Request::new(prompt)
        };
        let decision = scheduler.decide(snapshot, &request, *turn)?;
        scheduler.sent(&request, &decision);
        // Counted before the lock is released, so that the next decision sees it.
        let flight = |id| servers.iter().find(|s| s.id == id).map(Flight::to);
        let decode = flight(decision.decode).ok_or(Unschedulable::NoneHealthy)?;
        let prefill = decision.prefill.server().and_then(flight);
        Ok(Route {
            decode,
            prefill,
            decision,
        })
    }
}
