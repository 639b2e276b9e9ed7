//! The decision: run the plan's profiles; decode first, then prefill if it is worth it, unless the plan says otherwise.

use crate::picker::Dice;
use crate::plan::{
    Decider, Handler, OnUnavailable, ProfileIdx, SessionStrategy, Shedding, Sooner, Source,
    StageOrder, Stages,
};
use crate::recent::{Recency, Sessions};
use crate::saturation::{Saturation, Utilization};
use crate::work::UNKNOWN_PACE;
use crate::workspace::{Context, Held, Indices, Means, Workspace};
use crate::{
    BlockHash, Certainty, Decision, Endpoint, EndpointId, Load, Observer, Plan, PreciseIndex,
    Prefill, PrefixIndex, Prompt, Request, Step, Unschedulable,
};
use std::time::Duration;

/// Decides, and remembers where prompts went.
#[derive(Debug)]
pub struct Scheduler {
    plan: Plan,
    index: PrefixIndex,
    precise: Option<PreciseIndex>,
    recency: Recency,
    sessions: Sessions,
    workspace: Workspace,
}

/// A decision being made.
struct Run<'a, O> {
    plan: &'a Plan,
    cx: Context<'a>,
    workspace: &'a mut Workspace,
    means: Means<'a, O>,
    /// Who knows what is cached.
    knows: Source,
}

/// The winner of a stage.
#[derive(Clone, Copy)]
struct Picked<'a> {
    endpoint: &'a Endpoint,
    score: f64,
    held: Held,
}

impl Scheduler {
    /// A scheduler that knows of no prompt yet.
    #[must_use]
    pub fn new(plan: impl Into<Plan>, index: PrefixIndex) -> Self {
        let plan = plan.into();
        Self {
            recency: Recency::new(plan.recently_used),
            plan,
            index,
            precise: None,
            sessions: Sessions::default(),
            workspace: Workspace::default(),
        }
    }

    /// The same scheduler with an index of what servers report, which the plan's sources may name.
    #[must_use]
    pub fn with_precise(self, precise: PreciseIndex) -> Self {
        Self {
            precise: Some(precise),
            ..self
        }
    }

    /// The index of what servers report: whoever hears of events tells it.
    pub fn precise(&mut self) -> Option<&mut PreciseIndex> {
        self.precise.as_mut()
    }

    /// Decides by another plan from now on. What is known of servers' caches stays; if blocks get another size, prompts
    /// are to be hashed accordingly, and are found again after they have been sent once.
    pub fn set_plan(&mut self, plan: impl Into<Plan>) {
        self.plan = plan.into();
        self.recency = Recency::new(self.plan.recently_used);
    }

    /// How it decides.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Decides where `request` goes. `turn` is chance, and breaks ties: where a picker uses equals in turn, it should be
    /// counted up.
    ///
    /// # Errors
    /// [`Unschedulable`], if no server may answer.
    pub fn decide(
        &mut self,
        fleet: &[Endpoint],
        request: &Request<'_>,
        turn: u64,
    ) -> Result<Decision, Unschedulable> {
        self.decide_observed(fleet, request, turn, &mut ())
    }

    /// Decides as [`Scheduler::decide`] does, and tells `observer` how; an [`Explanation`] is one.
    ///
    /// # Errors
    /// Likewise; the observer knows how far it came.
    pub fn decide_observed<O: Observer>(
        &mut self,
        fleet: &[Endpoint],
        request: &Request<'_>,
        turn: u64,
        observer: &mut O,
    ) -> Result<Decision, Unschedulable> {
        let pinned = self.pinned(fleet, request);
        self.workspace.gather(fleet, request);
        if let (Some(precise), Some(ttl)) = (&mut self.precise, self.plan.speculative()) {
            precise.expire(millis(request.now.saturating_sub(ttl)));
        }
        let precise = self.precise.as_mut().zip(request.keys);
        let mut run = Run {
            plan: &self.plan,
            cx: Context {
                fleet,
                request,
                recency: &self.recency,
                pinned,
                turn,
                costs: &self.plan.costs,
                precise: precise.is_some(),
            },
            workspace: &mut self.workspace,
            knows: match precise {
                Some(_) => best_source(&self.plan),
                None => Source::Approximate,
            },
            means: Means {
                indices: Indices {
                    approximate: &self.index,
                    precise,
                },
                dice: Dice::new(turn),
                observer,
            },
        };
        run.means.observer.did(Step::Other);
        let decided = run.decide();
        run.means.observer.did(Step::Results);
        let decision = decided.map_err(|why| {
            if knows_nobody(fleet, request) {
                Unschedulable::UnknownModel
            } else {
                why
            }
        })?;
        if request.if_cached && decision.uncached_tokens >= request.prompt.tokens() {
            return Err(Unschedulable::NotCached);
        }
        Ok(decision)
    }

    /// The server that the request's session is at.
    fn pinned(&self, fleet: &[Endpoint], request: &Request<'_>) -> Option<EndpointId> {
        match &self.plan.session.as_ref()?.strategy {
            SessionStrategy::Token { .. } => {
                let name = request.session_endpoint?;
                let named = |e: &&Endpoint| *e.identity.name == *name;
                fleet.iter().find(named).map(|e| e.id)
            }
            SessionStrategy::Id { idle, .. } => {
                (self.sessions).find(request.session?, request.now, *idle)
            }
        }
    }

    /// Notes that `request` was sent where `decision` says.
    pub fn sent(&mut self, request: &Request<'_>, decision: &Decision) {
        let servers = [Some(decision.decode), decision.prefill.server()];
        for server in servers.into_iter().flatten() {
            for chain in request.prompt.chains() {
                self.index.insert(server, chain, Certainty::Expected);
            }
            if decision.cold {
                self.recency.used(server);
            }
        }
        self.expect(request, servers);
        let (Some(of), Some(session)) = (&self.plan.session, request.session) else {
            return;
        };
        let server = match (&self.plan.handler.is, of.profile) {
            (Handler::Disaggregated(stages), Some(profile)) if stages.prefill == Some(profile) => {
                decision.prefill.server()
            }
            _ => Some(decision.decode),
        };
        if let Some(server) = server {
            self.sessions.stays(session, server, request.now);
        }
    }

    /// Expects that servers report the request's blocks soon, if the plan says so.
    fn expect(&mut self, request: &Request<'_>, servers: [Option<EndpointId>; 2]) {
        let (Some(precise), Some(keys), Some(_)) =
            (&mut self.precise, request.keys, self.plan.speculative())
        else {
            return;
        };
        for server in servers.into_iter().flatten() {
            precise.expect(server, keys, millis(request.now));
        }
    }

    /// Notes that `decode` has begun to answer a request with `prompt`, and so has its KV.
    pub fn answered(&mut self, prompt: &Prompt, decode: EndpointId) {
        for chain in prompt.chains() {
            self.index.insert(decode, chain, Certainty::Computed);
        }
    }

    /// Notes that somebody else sent a prompt of `blocks` to `server`, or had it answered.
    pub fn heard(&mut self, server: EndpointId, blocks: &[BlockHash], certainty: Certainty) {
        self.index.insert(server, blocks, certainty);
    }

    /// Notes that `server` is gone, or lost its cache.
    pub fn forget(&mut self, server: EndpointId) {
        self.forget_sent(server);
        if let Some(precise) = &mut self.precise {
            precise.remove(server);
        }
    }

    /// Forgets what was sent to `server`, though not what it reported itself.
    pub fn forget_sent(&mut self, server: EndpointId) {
        self.index.forget(server);
        self.recency.forget(server);
    }

    /// Notes that `server` has room for about `blocks` prefix blocks.
    pub fn set_cache_size(&mut self, server: EndpointId, blocks: usize) {
        if self.plan.approximate.auto_tune {
            self.index.set_capacity(server, blocks);
        }
    }

    /// Blocks that servers are taken to have by what was sent to them, over all servers.
    #[must_use]
    pub fn cached_blocks(&self) -> usize {
        self.index.held()
    }

    /// How busy the fleet is.
    #[must_use]
    pub fn saturation(&self, fleet: &[Endpoint]) -> Saturation {
        self.plan.saturation.of_fleet(fleet)
    }

    /// Whether a request of this priority is let in where nobody queues: all are, unless it is below 0 and servers are
    /// busy.
    ///
    /// # Errors
    /// [`Unschedulable::Saturated`], if it is not.
    pub fn admit(
        &self,
        fleet: &[Endpoint],
        priority: i32,
        chance: u64,
    ) -> Result<(), Unschedulable> {
        if priority >= 0 {
            return Ok(());
        }
        let refuse = match self.plan.shedding {
            Shedding::AtSaturation => self.saturation(fleet).effective() >= 1.0,
            Shedding::Probabilistic {
                queue_depth,
                kv_usage,
                power,
                factor,
            } => {
                let by = crate::Detector::Utilization(Utilization {
                    queue_depth,
                    kv_usage,
                    headroom: 0.0,
                });
                let busy = by.of(fleet.iter().filter(|e| e.is_healthy()));
                Dice::new(chance).fraction() <= factor * busy.powf(power)
            }
        };
        if refuse {
            Err(Unschedulable::Saturated)
        } else {
            Ok(())
        }
    }
}

impl<'a, O: Observer> Run<'a, O> {
    fn decide(&mut self) -> Result<Decision, Unschedulable> {
        match &self.plan.handler.is {
            Handler::Single(profile) => self.alone(*profile, None),
            Handler::DataParallel {
                profile,
                primary_port,
            } => self.alone(*profile, Some(*primary_port)),
            Handler::Disaggregated(stages) => match stages.order {
                StageOrder::DecodeFirst => self.decode_first(stages),
                StageOrder::PrefillFirst => self.prefill_first(stages),
            },
        }
    }

    /// One server does it all.
    fn alone(
        &mut self,
        profile: ProfileIdx,
        primary_port: Option<u16>,
    ) -> Result<Decision, Unschedulable> {
        let picked = self.stage(profile, |_| true)?;
        Ok(self.decision(picked, primary_port))
    }

    fn decode_first(&mut self, stages: &Stages) -> Result<Decision, Unschedulable> {
        let decode = self.stage(stages.decode, |_| true)?;
        let mut decision = self.decision(decode, stages.primary_port);
        decision.encode = self.encode(stages, decision.uncached_tokens);
        if let Some(profile) = stages.prefill
            && self.says_yes(stages.prefill_if, decision.uncached_tokens)
        {
            self.prefill(stages, profile, decode, &mut decision)?;
        }
        Ok(decision)
    }

    fn prefill_first(&mut self, stages: &Stages) -> Result<Decision, Unschedulable> {
        let first = match stages.prefill {
            Some(profile) => self.stage(profile, |_| true).ok(),
            None => None,
        };
        let encode = self.encode(stages, self.cx.request.prompt.tokens());
        let (decode, prefill) = match (&first, stages.prefill) {
            (Some(first), _) => {
                match self.stage(stages.decode, |e| agree(stages, first.endpoint, e)) {
                    Ok(decode) => (decode, at(*first, decode.endpoint)),
                    // Nobody may take its KV.
                    Err(_) => (self.stage(stages.decode, |_| true)?, nobody(stages)?),
                }
            }
            (None, Some(_)) => (self.stage(stages.decode, |_| true)?, nobody(stages)?),
            (None, None) => (self.stage(stages.decode, |_| true)?, Prefill::NotWorthIt),
        };
        let decision = self.decision(decode, stages.primary_port);
        let computes = first.filter(|_| prefill.server().is_some());
        Ok(Decision {
            work: computes.map_or(decision.work, |first| self.work(first)),
            prefill,
            encode,
            ..decision
        })
    }

    /// Runs a profile over the eligible endpoints that `of_these` takes.
    fn stage(
        &mut self,
        profile: ProfileIdx,
        of_these: impl Fn(&Endpoint) -> bool,
    ) -> Result<Picked<'a>, Unschedulable> {
        self.means.observer.did(Step::Profile(profile));
        let profile = &self.plan.profiles[profile];
        self.workspace
            .run(profile, &self.cx, of_these, &mut self.means, self.knows)?;
        let best = self.workspace.best(self.cx.fleet);
        let (endpoint, score, held) = best.ok_or(Unschedulable::NoneHealthy)?;
        Ok(Picked {
            endpoint,
            score,
            held,
        })
    }

    /// A decision for the decode server that was just picked.
    fn decision(&self, picked: Picked<'_>, primary_port: Option<u16>) -> Decision {
        let others = self.workspace.picked(self.cx.fleet).skip(1);
        Decision {
            decode: picked.endpoint.id,
            others: others.map(|e| e.id).collect(),
            score: picked.score,
            // What is merely expected there may be far back in a queue, and asking a prefill server that has it costs
            // little.
            uncached_tokens: self.uncached(picked.held),
            work: self.work(picked),
            prefill: Prefill::NotWorthIt,
            encode: Vec::new(),
            primary_port,
            cold: self.workspace.is_cold(),
        }
    }

    /// The prompt's work at a server.
    fn work(&self, picked: Picked<'_>) -> f64 {
        self.cx.work(self.knows, &picked.held)
    }

    /// Tokens of the prompt that a server has to compute.
    fn uncached(&self, held: Held) -> u32 {
        let prompt = self.cx.request.prompt;
        match self.knows {
            Source::Approximate => prompt.tokens_beyond(held.computed as usize),
            Source::Precise => {
                let cached = held.computed.saturating_mul(held.block_tokens);
                prompt.tokens().saturating_sub(cached)
            }
        }
    }

    /// Has the best prefill server compute the prompt of `decision`, unless that would take longer, where that counts.
    fn prefill(
        &mut self,
        stages: &Stages,
        profile: ProfileIdx,
        decode: Picked<'_>,
        decision: &mut Decision,
    ) -> Result<(), Unschedulable> {
        let Ok(picked) = self.stage(profile, |e| agree(stages, e, decode.endpoint)) else {
            decision.prefill = nobody(stages)?;
            return Ok(());
        };
        if let Decider::Sooner(way) = stages.prefill_if
            && !self.is_sooner(&way, picked, decode)
        {
            return Ok(());
        }
        decision.prefill = at(picked, decode.endpoint);
        if decision.prefill.server().is_some() {
            decision.work = self.work(picked);
        }
        Ok(())
    }

    /// Whether the first token is expected sooner if `prefill` computes the prompt than if `decode` does.
    fn is_sooner(&self, way: &Sooner, prefill: Picked<'_>, decode: Picked<'_>) -> bool {
        let (there, here) = (&prefill.endpoint.load, &decode.endpoint.load);
        // A server that never computes a prompt never shows how fast it is: it is taken for a machine as the other.
        let pace = |load: &Load, other: &Load| load.pace.or(other.pace).unwrap_or(UNKNOWN_PACE);
        let (pace_there, pace_here) = (pace(there, here), pace(here, there));
        let computing = self.work(prefill) / pace_there;
        let sending = self.cx.uncached(self.knows, &decode.held) * way.per_token;
        let sent_after = (sending - computing).max(0.0);
        let by_way = there.queued_work / pace_there + computing + sent_after + way.hand_over;
        let own = self.work(decode) / pace_here;
        let others = f64::from(here.active) * own * way.delay;
        by_way < here.queued_work / pace_here + own + others
    }

    fn encode(&mut self, stages: &Stages, uncached: u32) -> Vec<EndpointId> {
        match stages.encode {
            Some(profile) if self.says_yes(stages.encode_if, uncached) => {
                match self.stage(profile, |_| true) {
                    Ok(_) => (self.workspace.picked(self.cx.fleet))
                        .map(|e| e.id)
                        .collect(),
                    Err(_) => Vec::new(),
                }
            }
            _ => Vec::new(),
        }
    }

    fn says_yes(&self, decider: Decider, uncached: u32) -> bool {
        match decider {
            Decider::Never => false,
            Decider::Always => true,
            Decider::Multimodal => self.cx.request.multimodal,
            Decider::Uncached {
                at_least,
                prompt_at_least,
                ..
            } => {
                uncached > 0
                    && uncached >= at_least
                    && self.cx.request.prompt.tokens() >= prompt_at_least
            }
            Decider::Sooner(way) => uncached > 0 && uncached >= way.at_least,
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Whom the decider asks what is cached; without one, the best there is.
fn best_source(plan: &Plan) -> Source {
    match &plan.handler.is {
        Handler::Disaggregated(Stages {
            prefill_if: Decider::Uncached { source, .. } | Decider::Sooner(Sooner { source, .. }),
            ..
        }) => *source,
        _ => Source::Precise,
    }
}

/// A server that would compute a prompt for itself is not asked to.
fn at(picked: Picked<'_>, decode: &Endpoint) -> Prefill {
    if picked.endpoint.id == decode.id {
        Prefill::SameServer
    } else {
        Prefill::At(picked.endpoint.id, picked.score)
    }
}

/// No prefill server can take it.
fn nobody(stages: &Stages) -> Result<Prefill, Unschedulable> {
    match stages.on_unavailable {
        OnUnavailable::Fallback => Ok(Prefill::NoneHealthy),
        OnUnavailable::Fail => Err(Unschedulable::NoPrefill),
    }
}

/// Whether two servers may exchange KV. Asked of every endpoint, by code that is compiled in observers' crates: a call
/// would cost a twentieth of the decision.
#[inline]
fn agree(stages: &Stages, a: &Endpoint, b: &Endpoint) -> bool {
    let label = stages.same_label.as_deref();
    label.is_none_or(|label| a.identity.label(label) == b.identity.label(label))
}

/// Whether there are servers that could generate, and none of them, healthy or not, serves the model.
fn knows_nobody(fleet: &[Endpoint], request: &Request<'_>) -> bool {
    let mut decoders = fleet.iter().filter(|e| e.role.decodes()).peekable();
    decoders.peek().is_some() && decoders.all(|e| !e.serves(request.served_name()))
}

#[cfg(test)]
mod tests;
