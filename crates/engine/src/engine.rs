//! The step: plan who runs, execute on the device, commit what came out.
//!
//! A sequence is in exactly one of three lists. `waiting` owns no blocks. `fetching` owns blocks whose KV is on its way
//! and takes no part in steps. `running` owns blocks and is in every step that has room for it. Blocks change hands only
//! here, so whatever way a sequence leaves a list, its blocks go back to the pool in the same call.

use crate::block_pool::BlockPool;
use crate::sequence::Sequence;
use crate::{
    Batch, Handover, NewSequence, Row, Runner, RunnerError, RunnerSpec, Sampled, SeqId, Stats,
    StepOutput,
};
use baton_kv::{BlockHasher, BlockId};
use std::collections::VecDeque;

/// Limits of one engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    pub max_num_batched_tokens: usize,
    /// Most sequences that wait for a place.
    pub max_waiting: usize,
    /// Whether blocks are found again by what they hold.
    pub prefix_caching: PrefixCaching,
    /// Seed of the block hashes' chain; equal on servers whose hashes are compared.
    pub hash_seed: String,
}

/// Whether prompts share blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixCaching {
    /// A prompt's leading full blocks are taken from earlier ones.
    On,
    /// Every prompt is computed in full.
    Off,
}

/// Why a sequence was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// As many as allowed are waiting already.
    #[error("{waiting} sequences are waiting already")]
    QueueFull {
        /// How many.
        waiting: usize,
    },
    /// It leaves no room for an answer.
    #[error("the prompt has {prompt} tokens, and {max} with at least one of the answer fit")]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens that fit, prompt and answer together.
        max: usize,
    },
    /// No tokens, or no tokens wanted.
    #[error("the prompt is empty or no token is asked for")]
    Empty,
    /// A token id that the model does not have.
    #[error("token id {token} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Ids are below this.
        vocab_size: u32,
    },
    /// A live sequence has this name.
    #[error("a sequence of this id is live")]
    Duplicate,
}

/// A device too small for the configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// A pool of scratch and nothing else.
    #[error("the device has room for {n_blocks} KV blocks; at least 2 are needed")]
    NoBlocks {
        /// Blocks of the device, scratch included.
        n_blocks: u32,
    },
    /// Zero sequences, tokens or block size.
    #[error("max_num_seqs, max_num_batched_tokens and block size must be at least 1")]
    Zero,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// `max_tokens`, or the context, is full.
    Length,
    /// A token that ends it.
    Stop {
        /// `None`: an end-of-sequence token; else the stop token.
        token: Option<u32>,
    },
}

/// What a step tells its caller.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Please fetch KV for these of the sequence's blocks (counted from its start) and answer with
    /// [`Engine::kv_arrived`] or [`Engine::kv_failed`]. Blocks before `first_block` were found here.
    FetchKv {
        /// Whose.
        seq: SeqId,
        /// The first block to fetch.
        first_block: u32,
        /// How many.
        n_blocks: u32,
    },
    /// The prompt's KV in canonical host order; comes before the token that ends the sequence.
    Export {
        /// Whose.
        seq: SeqId,
        /// Where the blocks lay; handles without meaning elsewhere.
        blocks: Vec<BlockId>,
        /// Tokens that the blocks hold.
        n_tokens: u32,
        /// All blocks' bytes.
        data: Vec<u8>,
    },
    /// A token of the answer.
    Token {
        /// Whose.
        seq: SeqId,
        /// The token.
        sampled: Sampled,
        /// Present on the last token.
        finish: Option<FinishReason>,
        /// Prompt tokens whose KV was found or fetched.
        cached_tokens: u32,
    },
}

/// Whether a step did anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The device ran, or events were produced.
    Worked,
    /// Nothing can run until something is added or KV arrives.
    Idle,
}

/// Continuous batching over one device.
pub struct Engine {
    runner: Box<dyn Runner>,
    spec: RunnerSpec,
    cfg: EngineConfig,
    hasher: BlockHasher,
    pool: BlockPool,
    waiting: VecDeque<Sequence>,
    fetching: Vec<Sequence>,
    /// In order of admission, oldest first.
    running: Vec<Sequence>,
    batch: Batch,
    output: StepOutput,
    /// Index into `running` of each row.
    rows: Vec<usize>,
    stats: Stats,
}

impl Engine {
    /// An engine that owns the device.
    pub fn new(runner: Box<dyn Runner>, cfg: EngineConfig) -> Result<Self, EngineError> {
        let spec = runner.spec().clone();
        if spec.n_blocks < 2 {
            return Err(EngineError::NoBlocks {
                n_blocks: spec.n_blocks,
            });
        }
        if cfg.max_num_seqs == 0
            || cfg.max_num_batched_tokens == 0
            || spec.layout.block_size == 0
            || spec.max_chunk == 0
        {
            return Err(EngineError::Zero);
        }
        let stats = Stats {
            blocks_total: spec.n_blocks - 1,
            ..Stats::default()
        };
        Ok(Self {
            hasher: BlockHasher::new(&cfg.hash_seed),
            pool: BlockPool::new(spec.n_blocks),
            waiting: VecDeque::new(),
            fetching: Vec::new(),
            running: Vec::new(),
            batch: Batch::default(),
            output: StepOutput::default(),
            rows: Vec::new(),
            runner,
            spec,
            cfg,
            stats,
        })
    }

    /// What the device can do.
    pub fn spec(&self) -> &RunnerSpec {
        &self.spec
    }

    /// Longest sequence, prompt and answer together: the model's limit or the whole pool.
    pub fn max_len(&self) -> usize {
        self.spec
            .max_model_len
            .min(self.pool.capacity() * self.block_size())
    }

    /// Takes a sequence into the queue.
    pub fn add(&mut self, new: NewSequence) -> Result<(), AdmitError> {
        if self.waiting.len() >= self.cfg.max_waiting {
            return Err(AdmitError::QueueFull {
                waiting: self.waiting.len(),
            });
        }
        if new.prompt.is_empty() || new.limits.max_tokens == 0 {
            return Err(AdmitError::Empty);
        }
        let max = self.max_len();
        if new.prompt.len() >= max {
            return Err(AdmitError::TooLong {
                prompt: new.prompt.len(),
                max,
            });
        }
        let vocab_size = self.spec.vocab_size;
        if let Some(&token) = new.prompt.iter().find(|&&token| token >= vocab_size) {
            return Err(AdmitError::UnknownToken { token, vocab_size });
        }
        let live = self
            .waiting
            .iter()
            .chain(&self.fetching)
            .chain(&self.running);
        if live.into_iter().any(|seq| seq.id == new.id) {
            return Err(AdmitError::Duplicate);
        }
        self.waiting
            .push_back(Sequence::new(new, max, self.block_size()));
        Ok(())
    }

    /// Ends a sequence, wherever it is; its blocks are free when this returns.
    pub fn cancel(&mut self, id: SeqId) {
        self.waiting.retain(|seq| seq.id != id);
        if let Some(i) = self.fetching.iter().position(|seq| seq.id == id) {
            let mut seq = self.fetching.remove(i);
            self.free_blocks(&mut seq);
        }
        if let Some(i) = self.running.iter().position(|seq| seq.id == id) {
            let mut seq = self.running.remove(i);
            self.free_blocks(&mut seq);
        }
    }

    /// Places fetched KV: verified bytes of whole blocks in canonical order, perhaps fewer than were asked for; the
    /// rest is computed. Bytes for a sequence that no longer waits for them are dropped.
    pub fn kv_arrived(
        &mut self,
        id: SeqId,
        first_block: u32,
        data: &[u8],
    ) -> Result<(), RunnerError> {
        let Some(at) = self.fetching.iter().position(|seq| seq.id == id) else {
            return Ok(());
        };
        let block_size = self.block_size();
        let seq = &mut self.fetching[at];
        let first = first_block as usize;
        let Handover::Import { n_tokens } = seq.handover else {
            return Ok(());
        };
        let wanted = (n_tokens as usize)
            .div_ceil(block_size)
            .saturating_sub(first);
        let n_blocks = (data.len() / self.spec.layout.block_bytes()).min(wanted);
        let in_place = first * block_size == seq.computed
            && data.len() == n_blocks * self.spec.layout.block_bytes();
        if n_blocks > 0 && in_place {
            self.runner
                .import(&seq.blocks[first..first + n_blocks], data)?;
            let reach = ((first + n_blocks) * block_size)
                .min(n_tokens as usize)
                .min(seq.n_prompt - 1);
            self.stats.external_hits += (reach - seq.computed) as u64;
            seq.computed = reach;
            seq.cached = reach;
        }
        self.start_fetched(at);
        Ok(())
    }

    /// The KV cannot be had; what is missing is computed here.
    pub fn kv_failed(&mut self, id: SeqId) {
        if let Some(at) = self.fetching.iter().position(|seq| seq.id == id) {
            self.start_fetched(at);
        }
    }

    fn start_fetched(&mut self, at: usize) {
        let mut seq = self.fetching.remove(at);
        // One import a sequence: should it be preempted later, the lease is gone.
        seq.handover = Handover::None;
        register(
            &mut seq,
            &mut self.pool,
            &self.hasher,
            &self.cfg,
            self.spec.layout.block_size as usize,
        );
        self.running.push(seq);
    }

    /// Runs one step. `events` is appended to.
    ///
    /// # Errors
    /// The device failed; the engine must not be used any more.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<Progress, RunnerError> {
        let before = events.len();
        self.plan(events);
        if self.batch.rows.is_empty() {
            return Ok(if events.len() > before {
                Progress::Worked
            } else {
                Progress::Idle
            });
        }
        self.runner.execute(&self.batch, &mut self.output)?;
        if self.output.rows.len() != self.rows.len() {
            return Err(RunnerError(format!(
                "{} rows went in, {} came out",
                self.rows.len(),
                self.output.rows.len()
            )));
        }
        self.commit(events)?;
        Ok(Progress::Worked)
    }

    /// A snapshot of the counters.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            awaiting_kv: self.fetching.len() as u32,
            blocks_used: self.pool.n_used() as u32,
            ..self.stats
        }
    }

    fn block_size(&self) -> usize {
        self.spec.layout.block_size as usize
    }

    // ---- plan ------------------------------------------------------------------------------------------------------

    /// Fills `batch`: decodes first, so that a long prompt does not hold up answers, then prompts with what is left of
    /// the budget, then sequences from the queue.
    fn plan(&mut self, events: &mut Vec<Event>) {
        self.batch.rows.clear();
        self.batch.tokens.clear();
        self.batch.blocks.clear();
        self.rows.clear();
        let mut budget = self.cfg.max_num_batched_tokens;
        self.secure_decode_blocks();
        for i in 0..self.running.len() {
            if self.running[i].pending() == 1 {
                self.schedule(i, &mut budget);
            }
        }
        for i in 0..self.running.len() {
            if self.running[i].pending() > 1 {
                self.schedule(i, &mut budget);
            }
        }
        self.admit(&mut budget, events);
    }

    /// Gives every decode the block its next token needs, taking from the youngest sequences when the pool is dry.
    fn secure_decode_blocks(&mut self) {
        let block_size = self.block_size();
        let mut i = 0;
        while i < self.running.len() {
            let seq = &mut self.running[i];
            if seq.tokens.len().div_ceil(block_size) <= seq.blocks.len() {
                i += 1;
            } else if let Some(block) = self.pool.allocate() {
                seq.blocks.push(block);
            } else {
                self.preempt_youngest();
            }
        }
    }

    /// The youngest running sequence goes back to the front of the queue with its tokens and without its blocks.
    fn preempt_youngest(&mut self) {
        if let Some(mut seq) = self.running.pop() {
            self.free_blocks(&mut seq);
            seq.computed = 0;
            seq.registered = 0;
            self.stats.preemptions += 1;
            self.waiting.push_front(seq);
        }
    }

    /// Adds a row for `running[i]` if the step has room for it.
    fn schedule(&mut self, i: usize, budget: &mut usize) {
        let seq = &mut self.running[i];
        let n = seq.pending().min(*budget).min(self.spec.max_chunk);
        if n == 0 || self.rows.len() >= self.cfg.max_num_seqs.min(self.spec.max_batch) {
            return;
        }
        *budget -= n;
        seq.scheduled = n;
        let reach = seq.computed + n;
        let tokens = self.batch.tokens.len();
        self.batch
            .tokens
            .extend_from_slice(&seq.tokens[seq.computed..reach]);
        let blocks = self.batch.blocks.len();
        let n_blocks = reach.div_ceil(self.spec.layout.block_size as usize);
        self.batch.blocks.extend_from_slice(&seq.blocks[..n_blocks]);
        self.batch.rows.push(Row {
            tokens: tokens..tokens + n,
            blocks: blocks..blocks + n_blocks,
            start: seq.computed,
            sampling: (reach == seq.tokens.len()).then(|| seq.sampling.clone()),
        });
        self.rows.push(i);
    }

    /// Takes sequences from the queue while places, blocks and budget last. The first that does not fit blocks the rest:
    /// a long prompt is not overtaken for ever.
    fn admit(&mut self, budget: &mut usize, events: &mut Vec<Event>) {
        while *budget > 0
            && self.running.len() + self.fetching.len()
                < self.cfg.max_num_seqs.min(self.spec.max_batch)
        {
            let Some(mut seq) = self.waiting.pop_front() else {
                return;
            };
            if !self.take_blocks(&mut seq) {
                self.waiting.push_front(seq);
                return;
            }
            match self.missing_import(&seq) {
                Some(n_tokens) => {
                    events.push(seq.fetch_event(
                        seq.computed / self.block_size(),
                        n_tokens,
                        self.block_size(),
                    ));
                    self.stats.external_queries += (n_tokens - seq.computed) as u64;
                    self.fetching.push(seq);
                }
                None => {
                    if matches!(seq.handover, Handover::Import { .. }) {
                        seq.handover = Handover::None;
                    }
                    self.running.push(seq);
                    self.schedule(self.running.len() - 1, budget);
                }
            }
        }
    }

    /// Tokens the peer holds, if fetching them spares any computing.
    fn missing_import(&self, seq: &Sequence) -> Option<usize> {
        let Handover::Import { n_tokens } = seq.handover else {
            return None;
        };
        let n_tokens = (n_tokens as usize).min(seq.n_prompt);
        // The last prompt token is computed here in any case: its logits are needed.
        (n_tokens.min(seq.n_prompt - 1) > seq.computed).then_some(n_tokens)
    }

    /// Gives a sequence blocks for all its tokens: what the prefix cache has, the rest fresh. All or nothing.
    fn take_blocks(&mut self, seq: &mut Sequence) -> bool {
        let block_size = self.block_size();
        let hits = self.find_prefix(seq);
        let n_blocks = seq.tokens.len().div_ceil(block_size);
        let from_free = seq.hashes[..hits]
            .iter()
            .filter_map(|h| self.pool.find(h))
            .filter(|&b| self.pool.is_free(b));
        if n_blocks - hits + from_free.count() > self.pool.n_free() {
            return false;
        }
        for hash in &seq.hashes[..hits] {
            if let Some(block) = self.pool.find(hash) {
                self.pool.share(block);
                seq.blocks.push(block);
            }
        }
        while seq.blocks.len() < n_blocks {
            // Counted above.
            let Some(block) = self.pool.allocate() else {
                break;
            };
            seq.blocks.push(block);
        }
        seq.computed = hits * block_size;
        seq.registered = hits;
        seq.cached = seq.computed.min(seq.n_prompt);
        self.stats.prefix_queries += seq.tokens.len() as u64;
        self.stats.prefix_hits += seq.computed as u64;
        true
    }

    /// Leading blocks that the pool already holds, never all tokens: the last one is computed for its logits.
    fn find_prefix(&self, seq: &mut Sequence) -> usize {
        if self.cfg.prefix_caching == PrefixCaching::Off {
            return 0;
        }
        let most = (seq.tokens.len() - 1) / self.block_size();
        seq.hash_blocks(&self.hasher, most, self.block_size());
        seq.hashes[..most]
            .iter()
            .take_while(|hash| self.pool.find(hash).is_some())
            .count()
    }

    // ---- commit ----------------------------------------------------------------------------------------------------

    fn commit(&mut self, events: &mut Vec<Event>) -> Result<(), RunnerError> {
        self.stats.iterations += 1;
        self.stats.iteration_tokens += self.batch.tokens.len() as u64;
        self.stats.last_iteration_tokens = self.batch.tokens.len() as u32;
        for row in 0..self.rows.len() {
            let i = self.rows[row];
            let sampled = self.output.rows[row].take();
            self.commit_row(i, sampled, events)?;
        }
        let max_len = self.max_len();
        let (pool, stats) = (&mut self.pool, &mut self.stats);
        self.running.retain_mut(|seq| {
            let over = seq.tokens.len() > seq.n_prompt
                && seq.pending() == 1
                && seq.finish(max_len).is_some();
            if over {
                release(pool, seq);
                stats.finished += 1;
            }
            !over
        });
        Ok(())
    }

    fn commit_row(
        &mut self,
        i: usize,
        sampled: Option<Sampled>,
        events: &mut Vec<Event>,
    ) -> Result<(), RunnerError> {
        let max_len = self.max_len();
        let block_size = self.block_size();
        let seq = &mut self.running[i];
        let prompt_before = seq.n_prompt - seq.computed.min(seq.n_prompt);
        seq.computed += std::mem::take(&mut seq.scheduled);
        self.stats.prompt_tokens +=
            (prompt_before - (seq.n_prompt - seq.computed.min(seq.n_prompt))) as u64;
        register(seq, &mut self.pool, &self.hasher, &self.cfg, block_size);
        if seq.pending() > 0 {
            return Ok(());
        }
        let sampled = sampled
            .ok_or_else(|| RunnerError("a row that asked for a token got none".to_owned()))?;
        if sampled.token >= self.spec.vocab_size {
            return Err(RunnerError(format!(
                "sampled token {} is outside the vocabulary",
                sampled.token
            )));
        }
        seq.tokens.push(sampled.token);
        self.stats.generation_tokens += 1;
        let finish = seq.finish(max_len);
        if finish.is_some() && seq.handover == Handover::Export {
            let blocks = seq.blocks[..seq.n_prompt.div_ceil(block_size)].to_vec();
            let mut data = vec![0; blocks.len() * self.spec.layout.block_bytes()];
            self.runner.export(&blocks, &mut data)?;
            events.push(Event::Export {
                seq: seq.id,
                blocks,
                n_tokens: seq.n_prompt as u32,
                data,
            });
        }
        events.push(Event::Token {
            seq: seq.id,
            sampled,
            finish,
            cached_tokens: seq.cached as u32,
        });
        Ok(())
    }

    fn free_blocks(&mut self, seq: &mut Sequence) {
        release(&mut self.pool, seq);
    }
}

/// Gives the blocks back, the last first: a prefix is worth more than what follows it.
fn release(pool: &mut BlockPool, seq: &mut Sequence) {
    while let Some(block) = seq.blocks.pop() {
        pool.release(block);
    }
}

/// Offers the blocks that became full to the prefix cache.
fn register(
    seq: &mut Sequence,
    pool: &mut BlockPool,
    hasher: &BlockHasher,
    cfg: &EngineConfig,
    block_size: usize,
) {
    if cfg.prefix_caching == PrefixCaching::Off {
        return;
    }
    let full = seq.computed / block_size;
    seq.hash_blocks(hasher, full, block_size);
    for i in seq.registered..full {
        pool.register(seq.blocks[i], seq.hashes[i]);
    }
    seq.registered = seq.registered.max(full);
}
