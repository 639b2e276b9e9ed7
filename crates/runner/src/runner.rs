//! The runner: weights, KV and programs on one device.

use crate::OpenError;
use crate::compile::{Loaded, compile_all, zeros};
use crate::launch::{Launch, Plan, pack};
use crate::options::{Options, element, lower_all};
use crate::transfer::{cut, pad, unpad};
use crate::weights::{self, LoadWeight};
use baton_engine::{Batch, Runner, RunnerError, RunnerSpec, Sampled, StepOutput, TokenLogprobs};
use baton_kv::BlockId;
use baton_model::{Config, Ladder, Program};
use baton_pjrt::{Arg, Buffer, Client, Device, Plugin};
use std::collections::BTreeMap;

/// What a runner runs.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// Its hyper-parameters, [validated](Config::validate).
    pub config: &'a Config,
    /// Tells its KV from other models'.
    pub fingerprint: u64,
    /// Its weights.
    pub weights: LoadWeight<'a>,
}

/// How far opening has come. Weights and programs come at the same time, from several threads.
#[derive(Clone, Copy, Debug)]
pub enum Loading<'a> {
    /// Bytes of weights on the device.
    Weights {
        /// So far.
        loaded: usize,
        /// In the end.
        total: usize,
    },
    /// One more program is ready.
    Program {
        /// Its rung on the ladder.
        name: &'a str,
        /// It came from the disk.
        cached: bool,
        /// Ready so far.
        loaded: usize,
        /// In the end.
        total: usize,
    },
}

/// A model on one PJRT device.
pub struct PjrtRunner {
    spec: RunnerSpec,
    ladder: Ladder,
    programs: BTreeMap<Program, Loaded>,
    weights: Vec<Buffer>,
    /// One a layer; empty after a launch failed, since it took them.
    caches: Vec<Buffer>,
    plan: Plan,
    words: Vec<i32>,
    bytes: Vec<u8>,
    device: Device,
    client: Client,
}

impl PjrtRunner {
    /// Opens the plugin's first device, and brings weights, programs and an empty KV pool onto it.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(
        model: Model<'_>,
        options: &Options,
        progress: &(dyn Fn(Loading<'_>) + Sync),
    ) -> Result<Self, OpenError> {
        let plugin = Plugin::load(&options.plugin)?;
        let settings: Vec<_> = options
            .client
            .iter()
            .map(|(name, value)| (name.as_str(), value.clone()))
            .collect();
        let client = Client::create(&plugin, &settings)?;
        let device = client
            .addressable_devices()?
            .into_iter()
            .next()
            .ok_or(OpenError::NoDevice)?;
        let shapes = options.shapes;
        let lowered = lower_all(model.config, &shapes)?;
        let (programs, weights) = rayon::join(
            || compile_all(lowered, (&client, &device), options, progress),
            || {
                weights::load(
                    model.weights,
                    model.config,
                    shapes.dtype,
                    (&client, &device),
                    progress,
                )
            },
        );
        let pool = shapes.pool(model.config)?;
        let dims = [
            pool.n_blocks,
            2,
            model.config.n_kv_heads,
            pool.block_size,
            model.config.head_dim,
        ];
        let spec = RunnerSpec {
            layout: shapes.layout(model.config, model.fingerprint),
            n_blocks: u32::try_from(pool.n_blocks).unwrap_or(u32::MAX),
            max_batch: shapes.max_batch,
            max_chunk: shapes.rungs().prefill.last().copied().unwrap_or(1),
            max_model_len: shapes.max_model_len,
            vocab_size: u32::try_from(model.config.vocab_size).unwrap_or(u32::MAX),
        };
        let caches = empty_caches(&client, &dims, &spec)?;
        let (programs, weights) = (programs?, weights?);
        let ladder = needed_rungs(&programs, shapes.rungs());
        let (plan, words, bytes) = Default::default();
        Ok(Self {
            spec,
            ladder,
            programs,
            weights,
            caches,
            plan,
            words,
            bytes,
            device,
            client,
        })
    }

    /// Starts one launch and takes the new KV over; what is left is tokens and logits.
    fn launch(&mut self, batch: &Batch, launch: &Launch) -> Result<Vec<Buffer>, RunnerError> {
        let loaded = program(&self.programs, launch.program)?;
        pack(
            batch,
            &self.plan.order[launch.rows.clone()],
            &loaded.packing,
            &mut self.words,
        );
        let step = upload_words(&self.client, &self.device, &self.words)?;
        let caches = std::mem::take(&mut self.caches);
        let args = std::iter::once(Arg::Borrow(&step))
            .chain(caches.into_iter().map(Arg::Donate))
            .chain(self.weights.iter().map(Arg::Borrow));
        let mut out = loaded.executable.execute(args).map_err(failed)?;
        self.caches = out.split_off(2.min(out.len()));
        Ok(out)
    }

    /// Waits for one launch and writes its rows' tokens.
    fn collect(
        &mut self,
        batch: &Batch,
        launch: &Launch,
        results: &[Buffer],
        out: &mut StepOutput,
    ) -> Result<(), RunnerError> {
        let [tokens, logits] = results else {
            return Err(RunnerError(format!(
                "{} gave {} results",
                launch.program,
                results.len()
            )));
        };
        let rows = &self.plan.order[launch.rows.clone()];
        download(tokens, &mut self.bytes)?;
        for (&i, word) in rows.iter().zip(self.bytes.chunks_exact(4)) {
            let token = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            if batch.rows[i].sampling.is_some() {
                out.rows[i] = Some(Sampled {
                    token: self.known(token),
                    logprobs: None,
                });
            }
        }
        let wanted = |i: usize| batch.rows[i].sampling.as_ref().and_then(|s| s.logprobs);
        if !rows.iter().any(|&i| wanted(i).is_some()) {
            return Ok(());
        }
        download(logits, &mut self.bytes)?;
        let row_bytes = 4 * self.spec.vocab_size as usize;
        for (&i, row) in rows.iter().zip(self.bytes.chunks_exact(row_bytes)) {
            if let (Some(n), Some(sampled)) = (wanted(i), &mut out.rows[i]) {
                let logits: Vec<f32> = row
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect();
                sampled.logprobs = Some(Box::new(TokenLogprobs::of(
                    &logits,
                    sampled.token,
                    n as usize,
                )));
            }
        }
        Ok(())
    }

    /// The programs give the vocabulary's size where logits are not numbers: KV from elsewhere may hold anything, and
    /// must not stop the others.
    fn known(&self, token: u32) -> u32 {
        if token < self.spec.vocab_size {
            return token;
        }
        tracing::warn!("logits of a sequence are not numbers");
        self.spec.vocab_size - 1
    }

    fn alive(&self) -> Result<(), RunnerError> {
        if self.caches.len() == self.spec.layout.n_layers as usize {
            return Ok(());
        }
        Err(RunnerError(
            "an earlier launch failed and took the kv with it".to_owned(),
        ))
    }
}

impl Runner for PjrtRunner {
    fn spec(&self) -> &RunnerSpec {
        &self.spec
    }

    fn execute(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<(), RunnerError> {
        self.alive()?;
        batch.check(&self.spec)?;
        out.rows.clear();
        out.rows.resize(batch.rows.len(), None);
        self.plan.make(batch, &self.ladder);
        // All launches are under way before the first result is waited for.
        let launches = std::mem::take(&mut self.plan.launches);
        let started: Result<Vec<_>, _> = launches
            .iter()
            .map(|launch| self.launch(batch, launch))
            .collect();
        for (launch, results) in launches.iter().zip(started?) {
            self.collect(batch, launch, &results, out)?;
        }
        self.plan.launches = launches;
        Ok(())
    }

    fn export(&mut self, blocks: &[BlockId], out: &mut [u8]) -> Result<(), RunnerError> {
        self.alive()?;
        self.spec.check_blocks(blocks, out.len())?;
        for (range, rung) in cut(blocks.len(), &self.ladder.transfer) {
            let loaded = program(&self.programs, Program::Export(rung))?;
            self.words.clear();
            self.words
                .extend(blocks[range.clone()].iter().map(|b| b.0.cast_signed()));
            self.words.resize(rung, 0);
            let ids = upload_words(&self.client, &self.device, &self.words)?;
            let args = std::iter::once(&ids).chain(&self.caches).map(Arg::Borrow);
            let results = loaded.executable.execute(args).map_err(failed)?;
            let data = results
                .first()
                .ok_or_else(|| RunnerError("an export gave nothing".to_owned()))?;
            download(data, &mut self.bytes)?;
            unpad(
                &self.spec.layout,
                &self.bytes,
                rung,
                range,
                out,
                blocks.len(),
            );
        }
        Ok(())
    }

    fn import(&mut self, blocks: &[BlockId], data: &[u8]) -> Result<(), RunnerError> {
        self.alive()?;
        self.spec.check_blocks(blocks, data.len())?;
        let layout = &self.spec.layout;
        let dtype = crate::compile::pjrt_dtype(layout.dtype);
        for (range, rung) in cut(blocks.len(), &self.ladder.transfer) {
            let loaded = program(&self.programs, Program::Import(rung))?;
            self.words.clear();
            self.words
                .extend(blocks[range.clone()].iter().map(|b| b.0.cast_signed()));
            // Ids past the pool are skipped; they differ because all ids must.
            let past = self.spec.n_blocks.cast_signed();
            self.words.extend((past..).take(rung - range.len()));
            let ids = upload_words(&self.client, &self.device, &self.words)?;
            self.bytes.clear();
            self.bytes.resize(rung * layout.block_bytes(), 0);
            pad(layout, data, blocks.len(), range, &mut self.bytes, rung);
            let dims = [
                i64::from(layout.n_layers),
                i64::from(layout.n_kv_heads),
                i64::try_from(rung).unwrap_or(i64::MAX),
                2,
                i64::from(layout.block_size),
                i64::from(layout.head_dim),
            ];
            let data = self
                .client
                .buffer_from_bytes(&self.bytes, dtype, &dims, &self.device)
                .map_err(failed)?;
            let caches = std::mem::take(&mut self.caches);
            let args = [&ids, &data]
                .into_iter()
                .map(Arg::Borrow)
                .chain(caches.into_iter().map(Arg::Donate));
            self.caches = loaded.executable.execute(args).map_err(failed)?;
        }
        Ok(())
    }
}

/// The ladder without the rungs whose programs the role does not need.
fn needed_rungs(programs: &BTreeMap<Program, Loaded>, all: Ladder) -> Ladder {
    let kept = |rungs: Vec<usize>, program: fn(usize) -> Program| -> Vec<usize> {
        rungs
            .into_iter()
            .filter(|&n| programs.contains_key(&program(n)))
            .collect()
    };
    Ladder {
        decode: kept(all.decode, Program::Decode),
        prefill: kept(all.prefill, Program::Prefill),
        transfer: all.transfer,
    }
}

fn empty_caches(
    client: &Client,
    dims: &[usize],
    spec: &RunnerSpec,
) -> Result<Vec<Buffer>, OpenError> {
    let zeros = zeros(client, element(spec.layout.dtype), dims)?;
    let mut caches = Vec::with_capacity(spec.layout.n_layers as usize);
    for _ in 0..spec.layout.n_layers {
        caches.extend(zeros.execute([])?);
    }
    Ok(caches)
}

fn program(programs: &BTreeMap<Program, Loaded>, program: Program) -> Result<&Loaded, RunnerError> {
    programs
        .get(&program)
        .ok_or_else(|| RunnerError(format!("{program} is not a program of this server's role")))
}

fn upload_words(client: &Client, device: &Device, words: &[i32]) -> Result<Buffer, RunnerError> {
    let n = i64::try_from(words.len()).unwrap_or(i64::MAX);
    client
        .buffer_from_slice(words, &[n], device)
        .map_err(failed)
}

fn download(from: &Buffer, to: &mut Vec<u8>) -> Result<(), RunnerError> {
    to.resize(from.host_size().map_err(failed)?, 0);
    from.copy_to_host(to).map_err(failed)
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn failed(error: baton_pjrt::Error) -> RunnerError {
    RunnerError(error.to_string())
}
