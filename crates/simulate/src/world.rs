//! A fleet in virtual time: requests come, a picker sends them somewhere, servers work on them.

use crate::engine::{Engine, EngineModel, Outcome, Task};
use crate::figures::Figures;
use crate::policy::{Flight, Picked, Picker, Policy, Prompt, Said, View};
use crate::pool::Change;
use crate::workload::Workload;
use baton_scheduler::{Costs, EndpointId};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// What a second counts by which an answer that runs already is delayed, beside one before a first token.
const DELAY_OF_OTHERS: f64 = 0.1;

/// Seconds between a prompt's KV being there and the first token: the step under way, and one for the last prompt token.
const HAND_OVER: f64 = 0.03;

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
    AtLeast(u64),
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
    /// The prefill server, while it computes the prompt.
    prefill: Option<usize>,
    /// What counts as queued for it.
    queued: u64,
    /// The same as work, until there is an answer.
    work: Option<f64>,
    first: u64,
}

struct Server {
    engine: Engine,
    working: bool,
    /// Counts replacements, so that steps of the one before do not count.
    age: u32,
    reports: Vec<Change>,
    reporting: bool,
}

struct World<'a> {
    load: &'a Workload,
    setup: &'a Setup,
    picker: Picker,
    servers: Vec<Server>,
    views: Vec<View>,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    count: u64,
    now: u64,
    ways: Vec<Way>,
    prompts: Vec<Option<Prompt>>,
    open: usize,
    next_id: u32,
    replaced: usize,
    figures: Figures,
    outcomes: Vec<Outcome>,
}

/// Runs `load` through a fleet whose picker follows `policy`. The same arguments give the same figures.
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
        let mut world = Self {
            load,
            setup,
            picker: Picker::new(policy, setup.costs, setup.seed),
            servers: Vec::new(),
            views: Vec::new(),
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
        let roles = [
            (setup.prefill, true, false),
            (setup.decode, false, true),
            (setup.both, false, true),
        ];
        for (n, prefills, decodes) in roles {
            (0..n).for_each(|_| world.add_server(prefills, decodes));
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

    fn add_server(&mut self, prefills: bool, decodes: bool) {
        let (id, engine) = self.fresh(prefills);
        self.servers.push(Server {
            engine,
            working: false,
            age: 0,
            reports: Vec::new(),
            reporting: false,
        });
        self.views.push(View {
            id,
            decodes,
            prefills,
            here: true,
            said: Said::default(),
            flight: Flight::default(),
        });
    }

    fn fresh(&mut self, prefills: bool) -> (EndpointId, Engine) {
        let mut model = self.setup.model;
        if prefills {
            model.batch_tokens = self.setup.prefill_batch_tokens;
        }
        let id = EndpointId(self.next_id);
        self.next_id += 1;
        self.picker.capacity(id, self.setup.blocks);
        (
            id,
            Engine::new(model, self.setup.blocks, self.picker.is_precise()),
        )
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
                if self.views[server].here {
                    self.picker.reported(self.views[server].id, &reports);
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
        let prompt = self
            .picker
            .prompt(self.load.blocks(its), its.input, self.load.block_tokens);
        self.prompts[ask] = Some(prompt);
        self.figures.blocks += self.load.blocks(its).len() as u64;
        self.dispatch(ask);
    }

    /// Chooses servers for a request, and sends it there.
    fn dispatch(&mut self, ask: usize) {
        let Some(prompt) = self.prompts[ask].take() else {
            return;
        };
        let now = self.time();
        let picked = self.picker.pick(&self.views, &prompt, now, |v| v.decodes);
        let Some(decode) = picked else {
            self.refuse(ask);
            return;
        };
        self.views[decode.at].flight.active += 1;
        let prefill = self
            .picker
            .pick(&self.views, &prompt, now, |v| v.prefills)
            .filter(|prefill| match self.setup.split {
                Split::Never => false,
                Split::Always => true,
                Split::AtLeast(least) => decode.uncached >= least,
                Split::Sooner => self.is_sooner_there(prefill, &decode),
            });
        let worker = prefill.unwrap_or(decode);
        let flight = &mut self.views[worker.at].flight;
        flight.queued += worker.uncached;
        flight.backlog.send(worker.work, now);
        self.ways[ask] = Way {
            decode: decode.at,
            prefill: prefill.map(|p| p.at),
            queued: worker.uncached,
            work: Some(worker.work),
            first: 0,
        };
        self.picker
            .sent(self.views[decode.at].id, &prompt, self.now);
        if let Some(prefill) = prefill {
            self.figures.split += 1;
            self.views[prefill.at].flight.active += 1;
            self.picker
                .sent(self.views[prefill.at].id, &prompt, self.now);
        }
        self.prompts[ask] = Some(prompt);
        let task = if prefill.is_some() {
            Task::Prompt
        } else {
            Task::Whole
        };
        self.submit(worker.at, ask, task);
    }

    fn time(&self) -> Duration {
        Duration::from_micros(self.now)
    }

    /// Seconds until a server would have computed a prompt, as far as a picker can know.
    fn time_to_first(&self, picked: &Picked) -> f64 {
        let view = &self.views[picked.at];
        let pace = &self.picker.paces[usize::from(view.prefills)];
        (view.flight.backlog.left(self.time(), pace) + picked.work) / pace.per_second()
    }

    /// Whether a prompt is better computed on its prefill server. Beside running answers it would delay all of them, too.
    fn is_sooner_there(&self, prefill: &Picked, decode: &Picked) -> bool {
        let view = &self.views[decode.at];
        let pace = self.picker.paces[0].per_second();
        let others = f64::from(view.flight.active) * decode.work / pace * DELAY_OF_OTHERS;
        let there = self.time_to_first(prefill) + self.tail(decode.uncached, prefill.uncached);
        there + HAND_OVER < self.time_to_first(decode) + others
    }

    /// Seconds that KV is under way after the last token of a prompt is computed: what could not be sent before, and
    /// at least the last step's.
    fn tail(&self, missing: u64, computed: u64) -> f64 {
        let model = &self.setup.model;
        let all = missing as f64 * model.kv_bytes / model.link;
        let last = missing.min(self.setup.prefill_batch_tokens as u64) as f64 * model.kv_bytes
            / model.link;
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
        self.release_queued(ask);
        let way = self.ways[ask];
        for at in [Some(way.decode), way.prefill].into_iter().flatten() {
            self.views[at].flight.active -= 1;
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
                Outcome::First(ask) => self.first(at, ask),
                Outcome::Over(ask) => self.over(at, ask),
            }
        }
        self.outcomes = outcomes;
        self.work(at);
    }

    fn first(&mut self, at: usize, ask: usize) {
        self.release_queued(ask);
        if self.ways[ask].prefill.is_some() {
            return;
        }
        self.ways[ask].first = self.now;
        if let Some(prompt) = self.prompts[ask].as_ref().filter(|_| self.views[at].here) {
            self.picker.answered(self.views[at].id, prompt);
        }
        self.figures
            .first
            .push((self.now - self.arrival(ask)) as f64 / 1e6);
    }

    fn over(&mut self, at: usize, ask: usize) {
        self.views[at].flight.active -= 1;
        if self.ways[ask].prefill.take().is_some() {
            self.hand_over(at, ask);
            self.renew_if_idle(at);
            return;
        }
        let way = self.ways[ask];
        self.open -= 1;
        self.prompts[ask] = None;
        let output = self.load.asks[ask].output;
        self.figures.tokens += u64::from(output);
        self.figures.last = self.now as f64 / 1e6;
        if output > 1 {
            let gap = (self.now - way.first) as f64 / 1e6 / f64::from(output - 1);
            self.figures.gaps.push(gap);
        }
        self.renew_if_idle(at);
    }

    /// A prompt is computed: its KV moves to the server that answers.
    fn hand_over(&mut self, prefill: usize, ask: usize) {
        let its = &self.load.asks[ask];
        if let Some(prompt) = self.prompts[ask]
            .as_ref()
            .filter(|_| self.views[prefill].here)
        {
            self.picker.answered(self.views[prefill].id, prompt);
        }
        let decode = &self.servers[self.ways[ask].decode].engine;
        let there =
            decode.pool().matched(self.load.blocks(its)) as u64 * u64::from(self.load.block_tokens);
        let missing = u64::from(its.input).saturating_sub(there);
        let seconds = self.tail(missing, self.ways[ask].queued);
        self.at(self.now + (seconds * 1e6) as u64, Event::Moved(ask));
    }

    fn release_queued(&mut self, ask: usize) {
        let way = &mut self.ways[ask];
        let at = way.prefill.unwrap_or(way.decode);
        let now = Duration::from_micros(self.now);
        let View {
            flight, prefills, ..
        } = &mut self.views[at];
        if let Some(work) = way.work.take() {
            flight.queued -= way.queued.min(flight.queued);
            let pace = &mut self.picker.paces[usize::from(*prefills)];
            flight.backlog.answer(work, now, pace);
        }
    }

    fn scrape(&mut self) {
        for (view, server) in self.views.iter_mut().zip(&self.servers) {
            view.said = Said {
                waiting: server.engine.waiting(),
                kv_usage: server.engine.pool().usage(),
            };
        }
        if self.open > 0 {
            self.at(self.now + self.setup.scrape_every.max(1), Event::Scrape);
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
        self.figures.remembered = self.figures.remembered.max(self.picker.remembered());
        if self.views.iter().any(|v| !v.here) {
            return;
        }
        let at = self.replaced % self.servers.len();
        self.replaced += 1;
        self.views[at].here = false;
        self.picker.forget(self.views[at].id);
        self.renew_if_idle(at);
    }

    fn renew_if_idle(&mut self, at: usize) {
        let view = self.views[at];
        if view.here || view.flight.active > 0 {
            return;
        }
        let (id, engine) = self.fresh(view.prefills);
        let server = &mut self.servers[at];
        self.figures.work_of(at, &server.engine);
        server.engine = engine;
        server.reports.clear();
        (server.working, server.age) = (false, server.age + 1);
        self.views[at] = View {
            id,
            here: true,
            said: Said::default(),
            ..view
        };
    }

    fn finish(mut self) -> Figures {
        for (at, server) in self.servers.iter().enumerate() {
            self.figures.work_of(at, &server.engine);
        }
        self.figures.remembered = self.figures.remembered.max(self.picker.remembered());
        self.figures.finish(self.setup)
    }
}
