//! The runner: weights, KV and plan of one model, and a team that runs a batch through them.

use crate::attention::How;
use crate::forward::{Arithmetic, Forward, PARTS, Step};
use crate::kv_cache::KvCache;
use crate::plan::Plan;
use crate::team::Team;
use crate::turns::Turns;
use crate::weights::{WeightCache, Weights, load};
use crate::{OpenError, PlanError};
use baton_engine::{
    Batch, Row, Runner, RunnerError, RunnerSpec, Sampled, Sampling, StepOutput, TokenLogprobs,
};
use baton_kv::{BlockId, KvLayout};
use baton_model::{Config, Pool, Program};
use std::ops::Range;

/// What a runner runs.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// Its hyper-parameters, [validated](Config::validate).
    pub config: &'a Config,
    /// Tells its KV from other models'.
    pub fingerprint: u64,
    /// Its weights.
    pub weights: &'a dyn Weights,
}

/// How to open a runner.
#[derive(Clone, Debug)]
pub struct Options {
    /// The KV pool; its element type is that of the KV.
    pub pool: Pool,
    /// Shape of the KV.
    pub layout: KvLayout,
    /// Most decode rows in a step.
    pub max_batch: usize,
    /// Most tokens in a prefill row.
    pub max_chunk: usize,
    /// How products are computed.
    pub arithmetic: Arithmetic,
    /// Threads that compute; at least one.
    pub threads: usize,
    /// Where packed weights are kept; `None` packs into memory of this process.
    pub weight_cache: Option<WeightCache>,
}

/// A model on the CPU.
pub struct CpuRunner {
    spec: RunnerSpec,
    team: Team,
    step: Step,
    forward: Forward,
}

impl CpuRunner {
    /// Reads or maps the weights, and makes an empty KV pool. `turns` are taken with other servers of this machine, if there
    /// are any. `progress` is told bytes of weights: so far, in the end.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(
        model: Model<'_>,
        options: &Options,
        turns: Option<Turns>,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Self, OpenError> {
        let graph = Program::Decode(1)
            .graph(model.config, &options.pool)
            .map_err(|e| PlanError(e.to_string()))?;
        let plan = Plan::new(&graph)?;
        let (matrices, vectors) = load(
            &plan,
            model.weights,
            options.weight_cache.as_ref(),
            progress,
        )?;
        let team = Team::new(options.threads, turns).map_err(OpenError::Threads)?;
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let n_blocks = narrow(options.pool.n_blocks);
        let spec = RunnerSpec {
            layout: options.layout.clone(),
            n_blocks,
            max_batch: options.max_batch,
            max_chunk: options.max_chunk,
            max_model_len: options.pool.max_model_len,
            vocab_size: narrow(model.config.vocab_size),
        };
        let cache = KvCache::new(&options.layout, n_blocks).map_err(OpenError::Kv)?;
        let group = model.config.n_heads / model.config.n_kv_heads.max(1);
        let forward = Forward::new(
            plan,
            (matrices, vectors),
            (cache, group.max(1)),
            options,
            team.len(),
        );
        Ok(Self {
            spec,
            team,
            step: Step::default(),
            forward,
        })
    }

    /// The logits of the last step's `place`-th row that wanted a token; for tests and evaluations.
    #[doc(hidden)]
    pub fn logits(&mut self, place: usize) -> &[f32] {
        let n = self.spec.vocab_size as usize;
        &self.forward.logits_of(place)[..n]
    }

    /// Runs some of the batch's rows.
    fn launch(&mut self, batch: &Batch, rows: Range<usize>, out: &mut StepOutput) {
        self.step.fill(batch, rows, &self.spec);
        let how = How {
            group: self.forward.group,
            parts: self.team.len() * PARTS,
        };
        let shape = &self.forward.cache.shape;
        let Step {
            attention, spans, ..
        } = &mut self.step;
        attention.plan(spans, &batch.blocks, shape, how);
        let (forward, step) = (&self.forward, &self.step);
        self.team.run(&|member| forward.run(member, batch, step));
        for place in 0..self.step.wanting.len() {
            let i = self.step.wanting[place];
            out.rows[i] = batch.rows[i]
                .sampling
                .as_ref()
                .map(|sampling| self.sampled(place, sampling));
        }
    }

    fn sampled(&mut self, place: usize, sampling: &Sampling) -> Sampled {
        let vocab_size = self.spec.vocab_size;
        let mut token = self.forward.drawn.all()[place];
        if token >= vocab_size {
            // KV from elsewhere may hold anything, and must not stop the others.
            tracing::warn!("logits of a sequence are not numbers");
            token = vocab_size - 1;
        }
        let logprobs = sampling.logprobs.map(|n| {
            let logits = self.forward.logits_of(place);
            Box::new(TokenLogprobs::of(
                &logits[..vocab_size as usize],
                token,
                n as usize,
            ))
        });
        Sampled { token, logprobs }
    }

    /// The end of the rows from `first` on that one launch has room for; at least one.
    fn fitting(&self, batch: &Batch, first: usize) -> usize {
        let most = self.spec.max_chunk + self.spec.max_batch;
        let mut tokens = 0;
        let fits = |row: &&Row| {
            tokens += row.tokens.len();
            tokens <= most
        };
        let n = batch.rows[first..]
            .iter()
            .take(self.spec.max_batch)
            .take_while(fits)
            .count();
        first + n.max(1)
    }
}

impl Runner for CpuRunner {
    fn spec(&self) -> &RunnerSpec {
        &self.spec
    }

    fn execute(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<(), RunnerError> {
        batch.check(&self.spec)?;
        out.rows.clear();
        out.rows.resize(batch.rows.len(), None);
        let mut first = 0;
        while first < batch.rows.len() {
            let end = self.fitting(batch, first);
            self.launch(batch, first..end, out);
            first = end;
        }
        Ok(())
    }

    fn export(&mut self, blocks: &[BlockId], out: &mut [u8]) -> Result<(), RunnerError> {
        self.spec.check_blocks(blocks, out.len())?;
        self.forward.cache.export(&mut self.team, blocks, out);
        Ok(())
    }

    fn import(&mut self, blocks: &[BlockId], data: &[u8]) -> Result<(), RunnerError> {
        self.spec.check_blocks(blocks, data.len())?;
        self.forward.cache.import(blocks, data);
        Ok(())
    }
}
