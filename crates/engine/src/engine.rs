//! The step: plan who runs, execute on the device, commit what came out.
//!
//! A sequence is in exactly one of three lists. `waiting` owns no blocks. `fetching` owns blocks whose KV is on its way
//! and takes no part in steps. `running` owns blocks and is in every step that has room for it. Blocks change hands only
//! here, so whatever way a sequence leaves a list, its blocks go back to the pool in the same call.

mod commit;
mod plan;

use crate::block_pool::BlockPool;
use crate::cache_log::CacheLog;
use crate::pace::Pace;
use crate::sequence::Sequence;
use crate::{
    Batch, Handover, NewSequence, Runner, RunnerError, RunnerSpec, Sampled, SeqId, Stats,
    StepOutput,
};
use baton_kv::{BlockHash, BlockHasher, BlockId, CacheChange};
use std::collections::VecDeque;
use std::time::Duration;

/// Limits of one engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    pub max_num_batched_tokens: usize,
    /// Prompt tokens in a step that decodes as well. Few keep answers flowing while long prompts are computed, which then
    /// takes longer.
    pub prefill_beside_decode: Beside,
    /// The end of a prompt whose KV leaves, in tokens, that a step computes alone: all before it travels meanwhile, and
    /// little is left to wait for. 0 where small steps are dear.
    pub export_tail: usize,
    /// Most sequences that wait for a place.
    pub max_waiting: usize,
    /// Whether blocks are found again by what they hold.
    pub prefix_caching: PrefixCaching,
    /// Seed of the block hashes' chain; equal on servers whose hashes are compared.
    pub hash_seed: String,
    /// Whether [`Engine::take_cache_changes`] has anything to give.
    pub log_cache_changes: bool,
}

/// How many prompt tokens a step takes beside decodes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Beside {
    /// At most so many, and at least 1.
    Tokens(usize),
    /// As many as let steps take so many times as long as without them, on average; more than 1. Whoever runs the steps
    /// tells [how long each took](Engine::took).
    Stretch(f64),
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
    /// Nothing would ever run.
    #[error(
        "sequences, batch, tokens (also beside decodes) and chunk of a step, and bytes of a block, must be at least 1"
    )]
    Zero,
    /// Prompts would never be computed beside decodes.
    #[error("a step with prompts must be allowed more time than its decodes take alone")]
    Stretch,
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
    /// The next of the prompt's KV can be [exported](Engine::export). The first block of the first one is the prompt's
    /// first; the last one comes before the first token and reaches the prompt's end.
    Export {
        /// Whose.
        seq: SeqId,
        /// Where the blocks lie until the next step; handles without meaning elsewhere. At least one.
        blocks: Vec<BlockId>,
        /// Tokens of the prompt that have left by now.
        n_tokens: u32,
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

/// What follows KV that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// More of it.
    Fetch,
    /// The sequence runs.
    Compute,
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
    /// In the order in which they could begin, oldest first: the last is preempted first.
    running: Vec<Sequence>,
    batch: Batch,
    output: StepOutput,
    /// Index into `running` of each row.
    rows: Vec<usize>,
    /// Rows of the batch that are decodes.
    n_decodes: usize,
    /// Present if prompts are to be paced.
    pace: Option<Pace>,
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
            || cfg.prefill_beside_decode == Beside::Tokens(0)
            || spec.layout.block_bytes() == 0
            || spec.max_chunk == 0
            || spec.max_batch == 0
        {
            return Err(EngineError::Zero);
        }
        let pace = match cfg.prefill_beside_decode {
            Beside::Tokens(_) => None,
            Beside::Stretch(stretch) if stretch > 1.0 => {
                Some(Pace::new(stretch, cfg.max_num_seqs.min(spec.max_batch)))
            }
            Beside::Stretch(_) => return Err(EngineError::Stretch),
        };
        let stats = Stats {
            blocks_total: spec.n_blocks - 1,
            ..Stats::default()
        };
        Ok(Self {
            hasher: BlockHasher::new(&cfg.hash_seed),
            pool: BlockPool::new(spec.n_blocks, CacheLog::new(cfg.log_cache_changes)),
            waiting: VecDeque::new(),
            fetching: Vec::new(),
            running: Vec::new(),
            batch: Batch::default(),
            output: StepOutput::default(),
            rows: Vec::new(),
            n_decodes: 0,
            pace,
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

    /// Copies the blocks of an [`Event::Export`] of the last step to `out`, in canonical order.
    ///
    /// # Errors
    /// When the device fails, or `out` has another length than the blocks.
    pub fn export(&mut self, blocks: &[BlockId], out: &mut [u8]) -> Result<(), RunnerError> {
        self.runner.export(blocks, out)
    }

    /// Leading tokens of a prompt whose KV is here already, as it would be found now.
    pub fn found(&self, prompt: &[u32]) -> usize {
        let block_size = self.block_size();
        if self.cfg.prefix_caching == PrefixCaching::Off {
            return 0;
        }
        // The last token is computed in any case.
        let most = prompt.len().saturating_sub(1) / block_size;
        let mut parent = self.hasher.root();
        let is_here = |tokens: &&[u32]| {
            parent = self.hasher.block(&parent, tokens, None);
            self.pool.find(&parent).is_some()
        };
        let blocks = prompt.chunks_exact(block_size).take(most);
        blocks.take_while(is_here).count() * block_size
    }

    /// Moves what became findable and what no longer is since the last call to `out`, in order. Whoever never calls it
    /// has [`EngineConfig::log_cache_changes`] off.
    pub fn take_cache_changes(&mut self, out: &mut Vec<CacheChange>) {
        self.pool.log.take(out);
    }

    /// Everything that can be found in the prefix cache, in no order.
    pub fn findable(&self) -> impl Iterator<Item = &BlockHash> {
        self.pool.findable()
    }

    /// Tokens whose KV a sequence still waits for; none if it does not wait.
    pub fn awaited(&self, id: SeqId) -> usize {
        let seq = self.fetching.iter().find(|seq| seq.id == id);
        seq.map_or(0, |seq| seq.importable().saturating_sub(seq.computed))
    }

    /// Places fetched KV: verified bytes of whole blocks in canonical order, perhaps fewer than were asked for. If `then`
    /// says so, the next call brings those that follow; else the rest is computed. Bytes for a sequence that no longer
    /// waits for them are dropped.
    pub fn kv_arrived(
        &mut self,
        id: SeqId,
        first_block: u32,
        data: &[u8],
        then: Then,
    ) -> Result<(), RunnerError> {
        let Some(at) = self.fetching.iter().position(|seq| seq.id == id) else {
            return Ok(());
        };
        let block_size = self.block_size();
        let block_bytes = self.spec.layout.block_bytes();
        let seq = &mut self.fetching[at];
        let (first, importable) = (first_block as usize, seq.importable());
        let n_blocks = data.len() / block_bytes;
        let as_asked = first * block_size == seq.computed
            && first + n_blocks <= importable.div_ceil(block_size)
            && data.len() == n_blocks * block_bytes;
        if as_asked && n_blocks > 0 {
            self.runner
                .import(&seq.blocks[first..first + n_blocks], data)?;
            let reach = ((first + n_blocks) * block_size).min(importable);
            self.stats.external_hits += (reach - seq.computed) as u64;
            seq.computed = reach;
            seq.cached = Some(reach);
        }
        if then == Then::Compute {
            self.start_fetched(at);
        }
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

    /// Takes how long the last step took, by its caller's clock.
    pub fn took(&mut self, time: Duration) {
        let (n_decodes, n_tokens) = (self.n_decodes, self.batch.tokens.len());
        if let Some(pace) = &mut self.pace {
            pace.took(n_decodes, n_tokens, time.as_secs_f64());
        }
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
        if pool.register(seq.blocks[i], seq.hashes[i]) {
            let parent = i.checked_sub(1).map(|before| seq.hashes[before]);
            let tokens = &seq.tokens[i * block_size..(i + 1) * block_size];
            pool.log.stored(parent, seq.hashes[i], tokens);
        }
    }
    seq.registered = full;
}
