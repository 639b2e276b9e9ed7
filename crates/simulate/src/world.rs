//! A fleet in virtual time: requests come, the scheduler sends them somewhere, servers work on them.
//!
//! What stands between them and the scheduler is done as `baton_fleet` does it for real servers: an [`Account`] each, asked
//! for its load at every decision; told when a request is sent, when its answer begins, and when it is over.

use crate::engine::{Engine, EngineModel, Outcome, Task};
use crate::figures::Figures;
use crate::numbers::mix;
use crate::policy::Policy;
use crate::pool::Change;
use crate::workload::Workload;
use baton_kv::{BlockEvent, EngineHash, Removed, Stored};
use baton_scheduler::{
    Account, BlockHash, Costs, Endpoint, EndpointId, Health, Prefill, PrefixIndex, Prompt, Request,
    Role, Said, Scheduler, Shares, TokenHasher, TokenPrompt,
};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// A fleet and its circumstances.
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    /// Servers of both roles.
    pub both: usize,
    /// Servers that compute prompts for others.
    pub prefill: usize,
    /// Servers that answer, and may have prompts computed.
    pub decode: usize,
    /// KV blocks of a server.
    pub blocks: usize,
    /// What a server can do.
    pub model: EngineModel,
    /// Tokens of a step on a prefill server.
    pub prefill_batch_tokens: usize,
    /// The workload comes so many times as fast.
    pub speed: f64,
    /// How old what a server says of itself may get, in microseconds: servers are asked so often.
    pub scrape_every: u64,
    /// How long reports of cached blocks travel, in microseconds.
    pub report_delay: u64,
    /// Whether a prompt is computed elsewhere.
    pub split: Split,
    /// What counts how much in our own score.
    pub costs: Costs,
    /// Servers come and go: one is replaced by an empty one every so many microseconds.
    pub replace_every: Option<u64>,
    /// Decides everything that is left to chance.
    pub seed: u64,
}

/// Whether a prompt is computed on another server than the one that answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Split {
    /// It is not.
    Never,
    /// It is.
    Always,
    /// If it has so many uncached tokens.
    AtLeast(u32),
    /// If the first token is expected sooner that way.
    Sooner,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            both: 8,
            prefill: 0,
            decode: 0,
            blocks: 10_000,
            model: EngineModel::default(),
            prefill_batch_tokens: 8192,
            speed: 1.0,
            scrape_every: 200_000,
            report_delay: 20_000,
            split: Split::AtLeast(128),
            costs: Costs::default(),
            replace_every: None,
            seed: 1,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive(usize),
    StepEnds(usize, u32),
    /// A prompt's KV has reached its decode server.
    Moved(usize),
    Scrape,
    Reports(usize),
    Replace,
}

/// Where a request is.
#[derive(Clone, Copy, Debug, Default)]
struct Way {
    decode: usize,
    prefill: Option<usize>,
    /// Whether its prompt is still being computed elsewhere.
    elsewhere: bool,
    /// What it counts at its servers.
    shares: Shares,
    /// Tokens that the prefill server computed.
    computed: usize,
    first: u64,
}

struct Server {
    engine: Engine,
    account: Account,
    working: bool,
    /// Counts replacements, so that steps of the one before do not count.
    age: u32,
    reports: Vec<Change>,
    reporting: bool,
}

struct World<'a> {
    load: &'a Workload,
    setup: &'a Setup,
    policy: Policy,
    scheduler: Scheduler,
    hasher: TokenHasher,
    turn: u64,
    servers: Vec<Server>,
    /// The servers as the scheduler sees them, in the same order.
    snapshot: Vec<Endpoint>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    count: u64,
    now: u64,
    ways: Vec<Way>,
    /// Of requests that are under way.
    prompts: Vec<Option<Prompt>>,
    open: usize,
    next_id: u32,
    replaced: usize,
    figures: Figures,
    outcomes: Vec<Outcome>,
}

/// Runs `load` through a fleet whose scheduler follows `policy`. The same arguments give the same figures.
#[must_use]
pub fn run(load: &Workload, setup: &Setup, policy: Policy) -> Figures {
    let mut world = World::new(load, setup, policy);
    while let Some(Reverse((now, _, event))) = world.events.pop() {
        world.now = now;
        world.handle(event);
    }
    world.finish()
}

impl<'a> World<'a> {
    fn new(load: &'a Workload, setup: &'a Setup, policy: Policy) -> Self {
        let plan = policy.plan(setup, load.block_tokens);
        let hasher = TokenHasher::new(mix(setup.seed));
        let precise = plan.precise_index(hasher);
        let index = PrefixIndex::new(plan.approximate.per_server);
        let mut scheduler = Scheduler::new(plan, index);
        if let Some(precise) = precise {
            scheduler = scheduler.with_precise(precise);
        }
        let mut world = Self {
            load,
            setup,
            policy,
            scheduler,
            hasher,
            turn: setup.seed,
            servers: Vec::new(),
            snapshot: Vec::new(),
            events: BinaryHeap::new(),
            count: 0,
            now: 0,
            ways: vec![Way::default(); load.asks.len()],
            prompts: vec![None; load.asks.len()],
            open: load.asks.len(),
            next_id: 0,
            replaced: 0,
            figures: Figures::default(),
            outcomes: Vec::new(),
        };
        // Those that do everything have no label, so that no plan has them compute each other's prompts.
        let roles = [
            (setup.prefill, Role::Prefill),
            (setup.decode, Role::Decode),
            (setup.both, Role::Unlabelled),
        ];
        for (n, role) in roles {
            (0..n).for_each(|_| world.add_server(role));
        }
        if !load.asks.is_empty() {
            world.at(world.arrival(0), Event::Arrive(0));
            world.at(0, Event::Scrape);
            if let Some(every) = setup.replace_every {
                world.at(every, Event::Replace);
            }
        }
        world
    }

    fn at(&mut self, time: u64, event: Event) {
        self.count += 1;
        self.events.push(Reverse((time, self.count, event)));
    }

    fn add_server(&mut self, role: Role) {
        let (endpoint, engine) = self.fresh(role);
        self.snapshot.push(endpoint);
        self.servers.push(Server {
            engine,
            account: Account::default(),
            working: false,
            age: 0,
            reports: Vec::new(),
            reporting: false,
        });
    }

    fn fresh(&mut self, role: Role) -> (Endpoint, Engine) {
        let mut model = self.setup.model;
        if role == Role::Prefill {
            model.batch_tokens = self.setup.prefill_batch_tokens;
        }
        let id = EndpointId(self.next_id);
        self.next_id += 1;
        self.scheduler.set_cache_size(id, self.setup.blocks);
        let engine = Engine::new(model, self.setup.blocks, self.policy.is_precise());
        (Endpoint::new(id, role), engine)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive(ask) => self.arrive(ask),
            Event::StepEnds(server, age) if self.servers[server].age == age => {
                self.step_ends(server);
            }
            Event::StepEnds(..) => {}
            Event::Moved(ask) => {
                let at = self.ways[ask].decode;
                self.submit(at, ask, Task::Answer);
            }
            Event::Scrape => self.scrape(),
            Event::Reports(server) => {
                let its = &mut self.servers[server];
                its.reporting = false;
                let reports = std::mem::take(&mut its.reports);
                if self.is_here(server) {
                    self.reported(server, &reports);
                }
            }
            Event::Replace => self.replace(),
        }
    }

    /// When a request comes, at the speed of this run.
    fn arrival(&self, ask: usize) -> u64 {
        (self.load.asks[ask].arrival as f64 / self.setup.speed) as u64
    }

    fn arrive(&mut self, ask: usize) {
        if ask + 1 < self.load.asks.len() {
            self.at(self.arrival(ask + 1), Event::Arrive(ask + 1));
        }
        let its = &self.load.asks[ask];
        let blocks = self.load.blocks(its);
        self.figures.blocks += blocks.len() as u64;
        let hashes = blocks.iter().map(|&id| BlockHash::new(mix(id)));
        let prompt = Prompt::of_blocks(hashes.collect(), self.load.block_tokens, its.input);
        let keys = self.scheduler.precise().map(|index| {
            let tokens: Vec<u32> = (blocks.iter())
                .flat_map(|&id| tokens_of(id, self.load.block_tokens))
                .collect();
            let prompt = TokenPrompt {
                tokens: &tokens,
                ..TokenPrompt::default()
            };
            self.hasher.keys(&prompt, index.block_sizes())
        });
        let request = Request {
            keys: keys.as_ref(),
            now: self.time(),
            ..Request::new(&prompt)
        };
        self.dispatch(ask, &request);
        self.prompts[ask] = Some(prompt);
    }

    /// Chooses servers for a request, and sends it there.
    fn dispatch(&mut self, ask: usize, request: &Request<'_>) {
        self.refresh(request.now);
        self.turn += 1;
        let decided = self.scheduler.decide(&self.snapshot, request, self.turn);
        let Ok(decision) = decided else {
            self.refuse(ask);
            return;
        };
        self.scheduler.sent(request, &decision);
        let shares = self.scheduler.plan().shares(&decision);
        let place = |id| self.snapshot.iter().position(|e| e.id == id);
        let prefill = match decision.prefill {
            Prefill::At(id, _) => place(id),
            _ => None,
        };
        let Some(decode) = place(decision.decode) else {
            return;
        };
        self.servers[decode]
            .account
            .sent(shares.decode, request.now);
        if let Some(at) = prefill {
            self.figures.split += 1;
            self.servers[at].account.sent(shares.prefill, request.now);
        }
        self.ways[ask] = Way {
            decode,
            prefill,
            elsewhere: prefill.is_some(),
            shares,
            ..Way::default()
        };
        match prefill {
            Some(at) => self.submit(at, ask, Task::Prompt),
            None => self.submit(decode, ask, Task::Whole),
        }
    }

    /// Brings what the scheduler sees up to date.
    fn refresh(&mut self, now: Duration) {
        for (endpoint, server) in self.snapshot.iter_mut().zip(&self.servers) {
            endpoint.load = server.account.load(now);
            if !self.policy.knows_a_pace() {
                endpoint.load.queued_work = server.account.queued_work();
            }
        }
    }

    fn time(&self) -> Duration {
        Duration::from_micros(self.now)
    }

    fn is_here(&self, server: usize) -> bool {
        self.snapshot[server].health == Health::Healthy
    }

    /// Seconds that KV is under way after the last token of a prompt is computed: what could not be sent before, and
    /// at least the last step's.
    fn tail(&self, missing: usize, computed: usize) -> f64 {
        let model = &self.setup.model;
        let all = missing as f64 * model.kv_bytes / model.link;
        let last =
            missing.min(self.setup.prefill_batch_tokens) as f64 * model.kv_bytes / model.link;
        // A step's layers are sent while the next ones are computed: of the last step a tenth is left.
        0.001 + (all - computed as f64 / model.prefill_rate).max(last * 0.1)
    }

    fn submit(&mut self, at: usize, ask: usize, task: Task) {
        if !self.servers[at].engine.submit(self.load, ask, task) {
            self.give_up(ask);
        }
        self.work(at);
    }

    /// A request can never fit on its server.
    fn give_up(&mut self, ask: usize) {
        let way = self.ways[ask];
        let shares = [
            (Some(way.decode), way.shares.decode),
            (way.prefill, way.shares.prefill),
        ];
        for (at, share) in shares {
            let Some(at) = at else { continue };
            let account = &mut self.servers[at].account;
            account.given_up(share);
            account.over(share);
            self.renew_if_idle(at);
        }
        self.refuse(ask);
    }

    fn refuse(&mut self, ask: usize) {
        self.figures.failed += 1;
        self.prompts[ask] = None;
        self.open -= 1;
    }

    fn work(&mut self, at: usize) {
        let server = &mut self.servers[at];
        if server.working {
            return;
        }
        if let Some(seconds) = server.engine.begin(self.load) {
            server.working = true;
            let age = server.age;
            self.at(self.now + (seconds * 1e6) as u64, Event::StepEnds(at, age));
        }
        self.collect_reports(at);
    }

    fn step_ends(&mut self, at: usize) {
        let mut outcomes = std::mem::take(&mut self.outcomes);
        let server = &mut self.servers[at];
        server.working = false;
        server.engine.end(self.load, &mut outcomes);
        for outcome in outcomes.drain(..) {
            match outcome {
                Outcome::First(ask, computed) => self.first(at, ask, computed),
                Outcome::Over(ask) => self.over(at, ask),
            }
        }
        self.outcomes = outcomes;
        self.work(at);
    }

    /// The prompt of a request is computed; if that was where it is answered, the answer begins.
    fn first(&mut self, at: usize, ask: usize, computed: usize) {
        if self.ways[ask].elsewhere {
            self.ways[ask].computed = computed;
            return;
        }
        self.ways[ask].first = self.now;
        let (way, now) = (self.ways[ask], self.time());
        self.servers[at].account.answered(way.shares.decode, now);
        if let Some(prefill) = way.prefill {
            let account = &mut self.servers[prefill].account;
            account.answered(way.shares.prefill, now);
            account.over(way.shares.prefill);
            self.renew_if_idle(prefill);
        }
        if let Some(prompt) = self.prompts[ask].as_ref().filter(|_| self.is_here(at)) {
            let id = self.snapshot[at].id;
            self.scheduler.answered(prompt, id);
        }
        self.figures
            .first
            .push((self.now - self.arrival(ask)) as f64 / 1e6);
    }

    fn over(&mut self, at: usize, ask: usize) {
        if std::mem::take(&mut self.ways[ask].elsewhere) {
            self.hand_over(ask);
            return;
        }
        let way = self.ways[ask];
        self.servers[at].account.over(way.shares.decode);
        self.open -= 1;
        self.prompts[ask] = None;
        let output = self.load.asks[ask].output;
        self.figures.tokens += u64::from(output);
        self.figures.last = self.now as f64 / 1e6;
        self.figures.whole += (self.now - self.arrival(ask)) as f64 / 1e6;
        if output > 1 {
            let gap = (self.now - way.first) as f64 / 1e6 / f64::from(output - 1);
            self.figures.gaps.push(gap);
        }
        self.renew_if_idle(at);
    }

    /// A prompt is computed: its KV moves to the server that answers.
    fn hand_over(&mut self, ask: usize) {
        let its = &self.load.asks[ask];
        let way = self.ways[ask];
        let decode = &self.servers[way.decode].engine;
        let there = decode.pool().matched(self.load.blocks(its)) * self.load.block_tokens as usize;
        let missing = (its.input as usize).saturating_sub(there);
        let seconds = self.tail(missing, way.computed);
        self.at(self.now + (seconds * 1e6) as u64, Event::Moved(ask));
    }

    fn scrape(&mut self) {
        for server in &mut self.servers {
            server.account.said(Said {
                waiting: server.engine.waiting() as u32,
                running: server.engine.running() as u32,
                kv_usage: server.engine.pool().usage() as f32,
                sent: server.account.requests(),
                until: Duration::MAX,
            });
        }
        if self.open > 0 {
            self.at(self.now + self.setup.scrape_every.max(1), Event::Scrape);
        }
    }

    /// A server reports what changed in its cache.
    fn reported(&mut self, server: usize, changes: &[Change]) {
        let (id, block_size) = (self.snapshot[server].id, self.load.block_tokens);
        let Some(index) = self.scheduler.precise() else {
            return;
        };
        for change in changes {
            let event = match *change {
                Change::Stored(parent, block) => BlockEvent::Stored(Stored {
                    hashes: vec![EngineHash(block)],
                    parent: parent.map(EngineHash),
                    tokens: tokens_of(block, block_size).collect(),
                    block_size,
                    ..Stored::default()
                }),
                Change::Removed(block) => BlockEvent::Removed(Removed {
                    hashes: vec![EngineHash(block)],
                    ..Removed::default()
                }),
            };
            index.apply(id, "", &event);
        }
    }

    fn collect_reports(&mut self, at: usize) {
        let server = &mut self.servers[at];
        let changes = server.engine.changes();
        if changes.is_empty() {
            return;
        }
        server.reports.extend(changes);
        if !server.reporting {
            server.reporting = true;
            self.at(self.now + self.setup.report_delay, Event::Reports(at));
        }
    }

    /// The next server takes no more requests; when it is done with those that it has, an empty one takes its place.
    fn replace(&mut self) {
        let Some(every) = self.setup.replace_every.filter(|_| self.open > 0) else {
            return;
        };
        self.at(self.now + every, Event::Replace);
        self.note_remembered();
        if (0..self.servers.len()).any(|at| !self.is_here(at)) {
            return;
        }
        let at = self.replaced % self.servers.len();
        self.replaced += 1;
        self.snapshot[at].health = Health::Draining;
        self.scheduler.forget(self.snapshot[at].id);
        self.renew_if_idle(at);
    }

    fn renew_if_idle(&mut self, at: usize) {
        if self.is_here(at) || self.servers[at].account.requests() > 0 {
            return;
        }
        let (endpoint, engine) = self.fresh(self.snapshot[at].role);
        self.snapshot[at] = endpoint;
        let server = &mut self.servers[at];
        self.figures.work_of(at, &server.engine);
        (server.engine, server.account) = (engine, Account::default());
        server.reports.clear();
        (server.working, server.age) = (false, server.age + 1);
    }

    fn note_remembered(&mut self) {
        let reported = self.scheduler.precise().map_or(0, |index| index.len());
        let now = self.scheduler.cached_blocks() + reported;
        self.figures.remembered = self.figures.remembered.max(now);
    }

    fn finish(mut self) -> Figures {
        for (at, server) in self.servers.iter().enumerate() {
            self.figures.work_of(at, &server.engine);
        }
        self.note_remembered();
        self.figures.finish(self.setup)
    }
}

/// The tokens of a block: its id, and zeros.
fn tokens_of(id: u64, block_tokens: u32) -> impl Iterator<Item = u32> {
    let id = [id as u32, (id >> 32) as u32].into_iter();
    id.chain(std::iter::repeat(0)).take(block_tokens as usize)
}
