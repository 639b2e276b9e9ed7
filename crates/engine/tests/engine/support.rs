//! A device that notes and checks what it is given, a driver that knows what every sequence must answer, and KV to hand
//! over. Any sequence's answer is compared with that of the same sequence alone in a fresh engine.

use baton_engine::{
    Batch, Beside, Engine, EngineConfig, Event, FinishReason, Handover, Limits, NewSequence,
    PrefixCaching, Progress, Runner, RunnerError, RunnerSpec, Sampling, SeqId, StepOutput, Then,
};
use baton_kv::{BlockHash, BlockHasher, BlockId, CacheChange, DType, KvLayout};
use baton_sim::{SimConfig, SimRunner};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// An engine and its device in numbers.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Blocks that can be handed out.
    pub(crate) blocks: u32,
    pub(crate) block_size: u32,
    pub(crate) seqs: usize,
    pub(crate) rows: usize,
    pub(crate) tokens: usize,
    /// Prompt tokens beside decodes.
    pub(crate) beside: Beside,
    /// Of prompts that leave.
    pub(crate) tail: usize,
    pub(crate) chunk: usize,
    pub(crate) len: usize,
    pub(crate) waiting: usize,
    pub(crate) caching: PrefixCaching,
    /// A token and its odds (one in so many), as in [`SimConfig::eos`].
    pub(crate) eos: Option<(u32, u64)>,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            block_size: 4,
            ..Self::LARGE_BLOCKS
        }
    }
}

impl Shape {
    /// Room for everything, in blocks of 16 tokens.
    pub(crate) const LARGE_BLOCKS: Self = Self {
        blocks: 64,
        block_size: 16,
        seqs: 8,
        rows: 8,
        tokens: 64,
        beside: Beside::Tokens(64),
        tail: 0,
        chunk: 64,
        len: 256,
        waiting: 64,
        caching: PrefixCaching::On,
        eos: None,
    };

    pub(crate) fn sim(&self) -> SimConfig {
        let layout = KvLayout {
            n_layers: 2,
            n_kv_heads: 2,
            head_dim: 2,
            block_size: self.block_size,
            dtype: DType::F32,
            model_fingerprint: 1,
        };
        let spec = RunnerSpec {
            layout,
            n_blocks: self.blocks + 1,
            max_batch: self.rows,
            max_chunk: self.chunk,
            max_model_len: self.len,
            vocab_size: 256,
        };
        SimConfig {
            spec,
            eos: self.eos,
            fail_at: None,
        }
    }

    pub(crate) fn config(&self) -> EngineConfig {
        EngineConfig {
            max_num_seqs: self.seqs,
            max_num_batched_tokens: self.tokens,
            prefill_beside_decode: self.beside,
            export_tail: self.tail,
            max_waiting: self.waiting,
            prefix_caching: self.caching,
            hash_seed: "0".to_owned(),
            log_cache_changes: true,
        }
    }

    pub(crate) fn engine(&self) -> Engine {
        Engine::new(Box::new(SimRunner::new(self.sim())), self.config()).unwrap()
    }
}

/// A row as the device saw it.
pub(crate) struct SeenRow {
    /// Position of the first token.
    pub(crate) start: usize,
    pub(crate) tokens: Vec<u32>,
    wants_token: bool,
}

/// The simulated device behind an inspection of every batch.
struct Watched {
    sim: SimRunner,
    shape: Shape,
    /// Rows of the newest step.
    seen: Arc<Mutex<Vec<SeenRow>>>,
}

impl Watched {
    fn inspect(&self, batch: &Batch) {
        let shape = &self.shape;
        let block_size = shape.block_size as usize;
        assert!(!batch.rows.is_empty(), "an empty step");
        assert!(batch.tokens.len() <= shape.tokens, "over the token budget");
        assert!(
            batch.rows.len() <= shape.seqs.min(shape.rows),
            "too many rows"
        );
        // Block -> place in its table, and whether this step writes to it.
        let mut users: HashMap<BlockId, (usize, bool)> = HashMap::new();
        for row in &batch.rows {
            let reach = row.start + row.tokens.len();
            assert!(
                (1..=shape.chunk).contains(&row.tokens.len()),
                "a row of {:?}",
                row.tokens
            );
            assert!(reach <= shape.len, "past the context");
            let table = &batch.blocks[row.blocks.clone()];
            assert_eq!(
                table.len(),
                reach.div_ceil(block_size),
                "the table covers the row"
            );
            for (place, &block) in table.iter().enumerate() {
                assert!(
                    (1..=shape.blocks).contains(&block.0),
                    "handed out {block:?}"
                );
                let written = (place + 1) * block_size > row.start;
                if let Some((there, also_written)) = users.insert(block, (place, written)) {
                    assert_eq!(there, place, "{block:?} at two places");
                    assert!(!written && !also_written, "{block:?} is shared and written");
                }
            }
        }
        let mut seen = self.seen.lock().unwrap();
        seen.clear();
        seen.extend(batch.rows.iter().map(|row| SeenRow {
            start: row.start,
            tokens: batch.tokens[row.tokens.clone()].to_vec(),
            wants_token: row.sampling.is_some(),
        }));
    }
}

impl Runner for Watched {
    fn spec(&self) -> &RunnerSpec {
        self.sim.spec()
    }

    fn execute(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<(), RunnerError> {
        self.inspect(batch);
        self.sim.execute(batch, out)
    }

    fn export(&mut self, blocks: &[BlockId], out: &mut [u8]) -> Result<(), RunnerError> {
        self.sim.export(blocks, out)
    }

    fn import(&mut self, blocks: &[BlockId], data: &[u8]) -> Result<(), RunnerError> {
        self.sim.import(blocks, data)
    }
}

/// A sequence's answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    pub(crate) finish: FinishReason,
}

/// A live sequence, as the driver knows it.
#[derive(Debug)]
pub(crate) struct Live {
    new: NewSequence,
    pub(crate) answer: Vec<u32>,
    cached: Option<u32>,
    /// What was asked for and has not been answered: first block and how many.
    pub(crate) fetch: Option<(u32, u32)>,
    exported: u32,
}

impl Live {
    /// Prompt and answer so far.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        [self.new.prompt.as_slice(), &self.answer].concat()
    }
}

/// An engine on a watched device, and all that is known of its sequences.
pub(crate) struct Driver {
    pub(crate) shape: Shape,
    pub(crate) engine: Engine,
    pub(crate) seen: Arc<Mutex<Vec<SeenRow>>>,
    pub(crate) live: BTreeMap<SeqId, Live>,
    pub(crate) ended: BTreeMap<SeqId, Answer>,
    /// What the engine's log says can be found.
    pub(crate) findable: BTreeSet<BlockHash>,
}

impl Driver {
    pub(crate) fn new(shape: Shape) -> Self {
        let seen = Arc::default();
        let device = Watched {
            sim: SimRunner::new(shape.sim()),
            shape: shape.clone(),
            seen: Arc::clone(&seen),
        };
        let engine = Engine::new(Box::new(device), shape.config()).unwrap();
        Self {
            shape,
            engine,
            seen,
            live: BTreeMap::new(),
            ended: BTreeMap::new(),
            findable: BTreeSet::new(),
        }
    }

    pub(crate) fn add(&mut self, new: NewSequence) -> Result<(), baton_engine::AdmitError> {
        self.engine.add(new.clone())?;
        let live = Live {
            new,
            answer: Vec::new(),
            cached: None,
            fetch: None,
            exported: 0,
        };
        self.live.insert(live.new.id, live);
        Ok(())
    }

    pub(crate) fn cancel(&mut self, id: SeqId) {
        self.engine.cancel(id);
        self.live.remove(&id);
    }

    /// Answers the sequence's fetch with at most `n_blocks` blocks of true KV.
    pub(crate) fn arrive(&mut self, id: SeqId, n_blocks: u32) {
        let Some(live) = self.live.get_mut(&id) else {
            return;
        };
        let Some((first, asked)) = live.fetch.take() else {
            return;
        };
        let kv = kv_of(
            &self.shape,
            &live.new.prompt,
            first..first + asked.min(n_blocks),
        );
        self.engine
            .kv_arrived(id, first, &kv, Then::Compute)
            .unwrap();
    }

    pub(crate) fn fail(&mut self, id: SeqId) {
        if let Some(live) = self.live.get_mut(&id) {
            live.fetch = None;
        }
        self.engine.kv_failed(id);
    }

    /// One step, its events checked against what is known.
    pub(crate) fn step(&mut self) -> (Progress, Vec<Event>) {
        self.seen.lock().unwrap().clear();
        let mut events = Vec::new();
        let progress = self.engine.step(&mut events).unwrap();
        let n_tokens = self.engine.stats().last_iteration_tokens;
        self.engine.took(step_time(n_tokens));
        for event in &events {
            self.note(event);
        }
        let wanted = self
            .seen
            .lock()
            .unwrap()
            .iter()
            .filter(|row| row.wants_token)
            .count();
        let came = events
            .iter()
            .filter(|event| matches!(event, Event::Token { .. }))
            .count();
        assert_eq!(wanted, came, "every token that was asked for is told");
        self.check_stats();
        self.check_log();
        (progress, events)
    }

    /// Whoever follows the log knows exactly what can be found, and from which tokens it comes.
    fn check_log(&mut self) {
        let mut changes = Vec::new();
        self.engine.take_cache_changes(&mut changes);
        for change in changes {
            match change {
                CacheChange::Stored {
                    parent,
                    hashes,
                    tokens,
                } => {
                    let size = self.shape.block_size as usize;
                    assert_eq!(tokens.len(), hashes.len() * size);
                    let hasher = BlockHasher::new("0");
                    let mut before = parent.unwrap_or(hasher.root());
                    for (hash, tokens) in hashes.iter().zip(tokens.chunks(size)) {
                        before = hasher.block(&before, tokens, None);
                        assert_eq!(*hash, before, "the hash is of these tokens");
                        assert!(self.findable.insert(*hash), "stored twice");
                    }
                }
                CacheChange::Removed(hashes) => {
                    for hash in hashes {
                        assert!(self.findable.remove(&hash), "removed, and never there");
                    }
                }
                CacheChange::Cleared => self.findable.clear(),
            }
        }
        let findable: BTreeSet<_> = self.engine.findable().copied().collect();
        assert_eq!(findable, self.findable);
    }

    fn note(&mut self, event: &Event) {
        match event {
            Event::FetchKv {
                seq,
                first_block,
                n_blocks,
            } => {
                let live = self.live.get_mut(seq).expect("a live sequence fetches");
                assert!(*n_blocks > 0 && live.fetch.is_none() && live.answer.is_empty());
                live.fetch = Some((*first_block, *n_blocks));
            }
            Event::Export {
                seq,
                blocks,
                n_tokens,
            } => {
                let live = self.live.get_mut(seq).expect("a live sequence exports");
                assert!(!blocks.is_empty() && live.answer.is_empty());
                assert!(live.exported < *n_tokens, "nothing leaves twice");
                let before = live.exported / self.shape.block_size;
                assert_eq!(
                    live.exported % self.shape.block_size,
                    0,
                    "only the last is filled in part"
                );
                live.exported = *n_tokens;
                assert_eq!(
                    before + blocks.len() as u32,
                    n_tokens.div_ceil(self.shape.block_size)
                );
            }
            Event::Token {
                seq,
                sampled,
                finish,
                cached_tokens,
            } => {
                let live = self.live.get_mut(seq).expect("a live sequence answers");
                live.answer.push(sampled.token);
                let cached = *live.cached.get_or_insert(*cached_tokens);
                assert_eq!(cached, *cached_tokens, "the count of cached tokens changed");
                assert!((cached as usize) < live.new.prompt.len());
                if let Some(finish) = *finish {
                    self.end(*seq, finish);
                }
            }
        }
    }

    fn end(&mut self, id: SeqId, finish: FinishReason) {
        let live = self.live.remove(&id).unwrap();
        let leaves = match live.new.handover {
            Handover::Export => live.new.prompt.len(),
            Handover::None | Handover::Import { .. } => 0,
        };
        assert_eq!(live.exported as usize, leaves);
        let answer = Answer {
            tokens: live.answer,
            finish,
        };
        assert_eq!(
            answer,
            alone(&self.shape, &live.new),
            "{id:?} answers as if alone"
        );
        self.ended.insert(id, answer);
    }

    fn check_stats(&self) {
        let stats = self.engine.stats();
        let counted = stats.running + stats.waiting + stats.awaiting_kv;
        assert_eq!(
            counted as usize,
            self.live.len(),
            "every sequence is in one list"
        );
        let places = self.shape.seqs.min(self.shape.rows);
        assert!(
            (stats.running + stats.awaiting_kv) as usize <= places,
            "{stats:?}"
        );
        let fetching = self.live.values().filter(|live| live.fetch.is_some());
        assert_eq!(stats.awaiting_kv as usize, fetching.count());
        assert_eq!(stats.finished as usize, self.ended.len());
        assert_eq!(stats.blocks_total, self.shape.blocks);
        assert!(stats.blocks_used <= stats.blocks_total);
        assert!(stats.prefix_hits <= stats.prefix_queries);
        assert!(stats.external_hits <= stats.external_queries);
        assert!(
            stats.running + stats.awaiting_kv > 0 || stats.blocks_used == 0,
            "{stats:?}"
        );
    }
}

/// What a step of so many tokens takes, of a device that computes four together.
pub(crate) fn step_time(n_tokens: u32) -> Duration {
    Duration::from_millis(2 + u64::from(n_tokens.div_ceil(4)))
}

/// What a sequence answers when it has a fresh engine for itself and computes everything.
pub(crate) fn alone(shape: &Shape, new: &NewSequence) -> Answer {
    let mut engine = shape.engine();
    let new = NewSequence {
        handover: Handover::None,
        ..new.clone()
    };
    engine.add(new).unwrap();
    let (mut events, mut tokens) = (Vec::new(), Vec::new());
    loop {
        assert_eq!(engine.step(&mut events).unwrap(), Progress::Worked);
        for event in events.drain(..) {
            let Event::Token {
                sampled, finish, ..
            } = event
            else {
                panic!("{event:?} of a sequence without handover");
            };
            tokens.push(sampled.token);
            if let Some(finish) = finish {
                return Answer { tokens, finish };
            }
        }
    }
}

/// The KV of some of a prompt's blocks, as another server hands it over.
pub(crate) fn kv_of(shape: &Shape, prompt: &[u32], range: std::ops::Range<u32>) -> Vec<u8> {
    let mut engine = shape.engine();
    engine
        .add(sequence(0, prompt, 1, Handover::Export))
        .unwrap();
    let (mut events, mut parts) = (Vec::new(), Vec::new());
    loop {
        engine.step(&mut events).unwrap();
        for event in events.drain(..) {
            match event {
                Event::Export { blocks, .. } => {
                    let mut data = vec![0; blocks.len() * shape.sim().spec.layout.block_bytes()];
                    engine.export(&blocks, &mut data).unwrap();
                    parts.push(data);
                }
                _ => return select(&shape.sim().spec.layout, &parts, range),
            }
        }
    }
}

/// Some blocks out of all that came in parts; each part, and the result, in canonical order.
fn select(layout: &KvLayout, parts: &[Vec<u8>], range: std::ops::Range<u32>) -> Vec<u8> {
    let bytes = layout.head_block_bytes();
    let n_heads = (layout.n_layers * layout.n_kv_heads) as usize;
    let range = range.start as usize * bytes..range.end as usize * bytes;
    let of_head = |part: &Vec<u8>, head: usize| {
        let per_head = part.len() / n_heads;
        part[head * per_head..(head + 1) * per_head].to_vec()
    };
    (0..n_heads)
        .map(|head| {
            parts
                .iter()
                .flat_map(|part| of_head(part, head))
                .collect::<Vec<u8>>()
        })
        .flat_map(|head| head[range.clone()].to_vec())
        .collect()
}

/// A greedy sequence that ends after `max_tokens`.
pub(crate) fn sequence(
    id: u64,
    prompt: &[u32],
    max_tokens: u32,
    handover: Handover,
) -> NewSequence {
    NewSequence {
        id: SeqId(id),
        prompt: prompt.to_vec(),
        sampling: Sampling::GREEDY,
        limits: Limits {
            max_tokens,
            ..Limits::default()
        },
        handover,
    }
}
