//! A modelled server: prompts in chunks beside running answers, one step after another, and a KV pool.
//!
//! A step reads all weights once, computes up to a budget of prompt tokens, and gives every running answer a token. It
//! takes as long as the weights take to read or the prompt tokens to compute, whichever is longer, and then as long as the
//! KV that it reads. Blocks for the whole answer are set aside when a request begins, so nothing is ever taken back.

use crate::pool::{Change, Pool};
use crate::workload::{Ask, Workload};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// What a server can do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineModel {
    /// Prompt tokens a second, in long chunks and short contexts.
    pub prefill_rate: f64,
    /// Seconds for each pair of a prompt token and a token that it attends to.
    pub attention: f64,
    /// Seconds that a step takes at least.
    pub step: f64,
    /// Seconds for each token of context of a running answer.
    pub context: f64,
    /// Seconds for each running answer.
    pub sequence: f64,
    /// Tokens of a step at most.
    pub batch_tokens: usize,
    /// Requests at a time at most.
    pub sequences: usize,
    /// Bytes of KV for a token.
    pub kv_bytes: f64,
    /// Bytes a second from a prefill server to a decode server.
    pub link: f64,
}

/// Llama-3.3-70B in bf16 on eight TPU v6e: half of the peak in prefill; decode fitted to 25 ms at 64 answers and
/// 35 ms at 128, of 1000 tokens after 1000; 100 Gb/s between hosts.
impl Default for EngineModel {
    fn default() -> Self {
        Self {
            prefill_rate: 26_600.0,
            attention: 0.714e-9,
            step: 0.0165,
            context: 39e-9,
            sequence: 80e-6,
            batch_tokens: 2048,
            sequences: 256,
            kv_bytes: 327_680.0,
            link: 12.5e9,
        }
    }
}

/// What a request wants of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Prompt and answer.
    Whole,
    /// The prompt, for another server.
    Prompt,
    /// The answer; the prompt's KV came from another server.
    Answer,
}

/// What a step brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The prompt of a request is computed, and its first token with it; and how many of its tokens were not cached.
    First(usize, usize),
    /// A request is over.
    Over(usize),
}

#[derive(Debug)]
struct Job {
    ask: usize,
    task: Task,
    /// Prompt tokens that were there when it began, and that are there.
    cached: usize,
    done: usize,
    /// Prompt blocks that can be found and are in use by it.
    named: usize,
    /// Blocks of its own that cannot be found.
    unnamed: usize,
}

/// A modelled server.
#[derive(Debug)]
pub(crate) struct Engine {
    model: EngineModel,
    pool: Pool,
    waiting: VecDeque<(usize, Task)>,
    computing: VecDeque<Job>,
    /// Running answers, by the step in which they end.
    answering: BinaryHeap<Reverse<(u64, usize, usize)>>,
    jobs: Vec<Option<Job>>,
    free_jobs: Vec<usize>,
    /// Prompt tokens that the step under way computes, for the first of `computing`.
    chunks: Vec<usize>,
    steps: u64,
    context: u64,
    /// Prompt tokens computed, and found in the cache.
    pub(crate) computed: u64,
    pub(crate) cached_blocks: u64,
    pub(crate) busy: f64,
}

impl Engine {
    pub(crate) fn new(model: EngineModel, blocks: usize, watched: bool) -> Self {
        Self {
            model,
            pool: Pool::new(blocks, watched),
            waiting: VecDeque::new(),
            computing: VecDeque::new(),
            answering: BinaryHeap::new(),
            jobs: Vec::new(),
            free_jobs: Vec::new(),
            chunks: Vec::new(),
            steps: 0,
            context: 0,
            computed: 0,
            cached_blocks: 0,
            busy: 0.0,
        }
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn running(&self) -> usize {
        self.computing.len() + self.answering.len()
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(crate) fn changes(&mut self) -> Vec<Change> {
        self.pool.changes()
    }

    /// Queues a request. False if it can never fit.
    pub(crate) fn submit(&mut self, load: &Workload, ask: usize, task: Task) -> bool {
        let fits = blocks_of(load, &load.asks[ask], task) <= self.pool.capacity();
        if fits {
            self.waiting.push_back((ask, task));
        }
        fits
    }

    /// Begins a step: how long it takes, in seconds. `None` if there is nothing to do.
    pub(crate) fn begin(&mut self, load: &Workload) -> Option<f64> {
        let (mut compute, mut next) = (0.0, 0);
        let mut room = self.model.batch_tokens.saturating_sub(self.answering.len());
        self.chunks.clear();
        // A request begins when there is room for some of its prompt; only then is it known what is cached.
        while room > 0 && (next < self.computing.len() || self.admit(load)) {
            let job = &self.computing[next];
            let chunk = (load.asks[job.ask].input as usize - job.done).min(room);
            let pairs = chunk as f64 * (job.done as f64 + chunk as f64 / 2.0);
            compute += chunk as f64 / self.model.prefill_rate + pairs * self.model.attention;
            self.chunks.push(chunk);
            (next, room) = (next + 1, room - chunk);
        }
        if self.running() == 0 {
            return None;
        }
        let seconds = self.model.step.max(compute)
            + self.context as f64 * self.model.context
            + self.answering.len() as f64 * self.model.sequence;
        self.busy += seconds;
        Some(seconds)
    }

    /// Ends the step that was begun.
    pub(crate) fn end(&mut self, load: &Workload, outcomes: &mut Vec<Outcome>) {
        self.steps += 1;
        self.context += self.answering.len() as u64;
        while let Some(&Reverse((end, _, at))) = self.answering.peek()
            && end <= self.steps
        {
            self.answering.pop();
            let Some(job) = self.jobs[at].take() else {
                continue;
            };
            self.free_jobs.push(at);
            let ask = &load.asks[job.ask];
            self.context -= u64::from(ask.input) + u64::from(ask.output);
            self.finish(load, &job, outcomes);
        }
        let mut chunks = std::mem::take(&mut self.chunks);
        for chunk in chunks.drain(..) {
            let Some(mut job) = self.computing.pop_front() else {
                break;
            };
            job.done += chunk;
            self.computed += chunk as u64;
            self.name_computed(load, &mut job);
            if job.done < load.asks[job.ask].input as usize {
                // Only the last chunk of a step can leave something of its prompt.
                self.computing.push_front(job);
                break;
            }
            self.answer(load, job, outcomes);
        }
        self.chunks = chunks;
    }

    /// Lets the first of the queue begin, if there is room.
    fn admit(&mut self, load: &Workload) -> bool {
        let Some(&(ask, task)) = self.waiting.front() else {
            return false;
        };
        if self.running() >= self.model.sequences {
            return false;
        }
        let its = &load.asks[ask];
        let blocks = load.blocks(its);
        let found = self.pool.matched(blocks);
        let all = blocks_of(load, its, task);
        if !self.pool.take(&blocks[..found], all - found) {
            return false;
        }
        self.waiting.pop_front();
        let input = its.input as usize;
        // At least one token is computed, for its logits.
        let cached = (found * load.block_tokens as usize).min(input - 1);
        let mut job = Job {
            ask,
            task,
            cached,
            done: cached,
            named: found,
            unnamed: all - found,
        };
        if task == Task::Answer {
            (job.cached, job.done) = (input - 1, input - 1);
            self.name_computed(load, &mut job);
            let rest = blocks.len() - job.named;
            for _ in 0..rest {
                self.name_next(load, &mut job);
            }
        } else {
            self.cached_blocks += found as u64;
        }
        self.computing.push_back(job);
        true
    }

    /// Makes the blocks that are complete findable.
    fn name_computed(&mut self, load: &Workload, job: &mut Job) {
        let ask = &load.asks[job.ask];
        let complete = if job.done >= ask.input as usize {
            load.blocks(ask).len()
        } else {
            job.done / load.block_tokens as usize
        };
        while job.named < complete {
            self.name_next(load, job);
        }
    }

    fn name_next(&mut self, load: &Workload, job: &mut Job) {
        let blocks = load.blocks(&load.asks[job.ask]);
        let parent = job.named.checked_sub(1).map(|i| blocks[i]);
        self.pool.name(parent, blocks[job.named]);
        job.named += 1;
        job.unnamed -= 1;
    }

    /// The prompt is computed: the first token is there.
    fn answer(&mut self, load: &Workload, job: Job, outcomes: &mut Vec<Outcome>) {
        let ask = &load.asks[job.ask];
        outcomes.push(Outcome::First(job.ask, ask.input as usize - job.cached));
        if job.task == Task::Prompt || ask.output <= 1 {
            self.finish(load, &job, outcomes);
            return;
        }
        self.context += u64::from(ask.input) + 1;
        let end = self.steps + u64::from(ask.output) - 1;
        let number = job.ask;
        let at = match self.free_jobs.pop() {
            Some(at) => {
                self.jobs[at] = Some(job);
                at
            }
            None => {
                self.jobs.push(Some(job));
                self.jobs.len() - 1
            }
        };
        self.answering.push(Reverse((end, number, at)));
    }

    fn finish(&mut self, load: &Workload, job: &Job, outcomes: &mut Vec<Outcome>) {
        let blocks = load.blocks(&load.asks[job.ask]);
        self.pool.free(&blocks[..job.named], job.unnamed);
        outcomes.push(Outcome::Over(job.ask));
    }
}

/// Blocks that a request takes in all.
fn blocks_of(load: &Workload, ask: &Ask, task: Task) -> usize {
    let output = if task == Task::Prompt { 0 } else { ask.output };
    let tokens = ask.input as usize + output as usize;
    tokens
        .div_ceil(load.block_tokens as usize)
        .max(load.blocks(ask).len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Conversations;

    fn load() -> Workload {
        let made = Conversations {
            systems: 1,
            turns: 2,
            again: false,
            system: 512,
            question: 512,
            answer: 64,
            requests: 2,
            rate: 1.0,
            block_tokens: 64,
            seed: 1,
        };
        made.workload()
    }

    fn run(engine: &mut Engine, load: &Workload) -> (f64, Vec<Outcome>) {
        let (mut time, mut outcomes) = (0.0, Vec::new());
        while let Some(seconds) = engine.begin(load) {
            time += seconds;
            engine.end(load, &mut outcomes);
        }
        (time, outcomes)
    }

    #[test]
    fn an_answer_takes_a_step_a_token_and_leaves_its_prompt_in_the_cache() {
        let load = load();
        let mut engine = Engine::new(EngineModel::default(), 100, false);
        assert!(engine.submit(&load, 0, Task::Whole));
        let (time, outcomes) = run(&mut engine, &load);
        assert_eq!(outcomes, [Outcome::First(0, 1024), Outcome::Over(0)]);
        assert!((1.0..1.4).contains(&time), "{time}");
        assert!(engine.submit(&load, 1, Task::Whole));
        run(&mut engine, &load);
        // 1024 of 1600 tokens were there.
        assert_eq!((engine.computed, engine.cached_blocks), (1024 + 576, 16));
        assert!(engine.pool().usage() < 1e-9 && engine.context == 0);
    }

    #[test]
    fn a_prompt_that_came_from_elsewhere_costs_one_token() {
        let load = load();
        let mut engine = Engine::new(EngineModel::default(), 100, false);
        assert!(engine.submit(&load, 0, Task::Answer));
        run(&mut engine, &load);
        assert_eq!((engine.computed, engine.pool().len()), (1, 16));
    }

    #[test]
    fn what_does_not_fit_waits_and_what_never_fits_is_refused() {
        let load = load();
        let mut engine = Engine::new(EngineModel::default(), 26, false);
        assert!(engine.submit(&load, 0, Task::Whole) && engine.submit(&load, 1, Task::Whole));
        engine.begin(&load);
        assert_eq!((engine.waiting(), engine.running()), (1, 1));
        engine.end(&load, &mut Vec::new());
        run(&mut engine, &load);
        assert_eq!(engine.waiting(), 0);
        assert!(!Engine::new(EngineModel::default(), 20, false).submit(&load, 1, Task::Whole));
    }
}
