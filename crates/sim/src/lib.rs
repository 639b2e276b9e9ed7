//! A runner without a device. Its KV holds bytes that depend on token, position, layer and head, and the next token is a
//! hash of all the KV that the block table leads to: a block in the wrong place, a missing import or a stale byte changes
//! the tokens. Deterministic; no clock, no threads.
#![forbid(unsafe_code)]

use baton_engine::{
    Batch, Row, Runner, RunnerError, RunnerSpec, Sampled, Sampling, StepOutput, TokenLogprobs,
};
use baton_kv::{BlockId, DType, KvLayout};

/// What a simulated device is like.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// What it says of itself.
    pub spec: RunnerSpec,
    /// A step in so many (by hash) ends with this token; `None` never does.
    pub eos: Option<(u32, u64)>,
    /// The step, counted from 1, that fails; `None` never does.
    pub fail_at: Option<u64>,
}

impl Default for SimConfig {
    /// Two layers of two heads of four elements in f32, 256 blocks of 16 tokens, a vocabulary of 256.
    fn default() -> Self {
        let layout = KvLayout {
            n_layers: 2,
            n_kv_heads: 2,
            head_dim: 4,
            block_size: 16,
            dtype: DType::F32,
            model_fingerprint: 7,
        };
        let spec = RunnerSpec {
            layout,
            n_blocks: 256,
            max_batch: 8,
            max_chunk: 64,
            max_model_len: 2048,
            vocab_size: 256,
        };
        Self {
            spec,
            eos: None,
            fail_at: None,
        }
    }
}

/// Called with the tokens of a step before it "runs": sleep here to imitate a device's speed.
pub type Pace = Box<dyn FnMut(usize) + Send>;

/// The simulated device.
pub struct SimRunner {
    cfg: SimConfig,
    /// Blocks one after another, each in canonical order for one block.
    kv: Vec<u8>,
    steps: u64,
    pace: Pace,
}

impl SimRunner {
    /// A device that answers at once.
    pub fn new(cfg: SimConfig) -> Self {
        Self::paced(cfg, Box::new(|_| {}))
    }

    /// A device that calls `pace` in every step.
    pub fn paced(cfg: SimConfig, pace: Pace) -> Self {
        let kv = vec![0; cfg.spec.n_blocks as usize * cfg.spec.layout.block_bytes()];
        Self {
            cfg,
            kv,
            steps: 0,
            pace,
        }
    }

    fn layout(&self) -> &KvLayout {
        &self.cfg.spec.layout
    }

    /// Where the element run of (layer, head, key or value) of a token begins in `kv`.
    fn place(&self, block: BlockId, layer: usize, head: usize, part: usize, slot: usize) -> usize {
        let layout = self.layout();
        let run = layout.head_dim as usize * layout.dtype.bytes();
        block.0 as usize * layout.block_bytes()
            + (layer * layout.n_kv_heads as usize + head) * layout.head_block_bytes()
            + (part * layout.block_size as usize + slot) * run
    }

    fn write(&mut self, row: &Row, batch: &Batch) {
        let layout = self.layout().clone();
        let block_size = layout.block_size as usize;
        let run = layout.head_dim as usize * layout.dtype.bytes();
        for (i, &token) in batch.tokens[row.tokens.clone()].iter().enumerate() {
            let position = row.start + i;
            let block = batch.blocks[row.blocks.start + position / block_size];
            for layer in 0..layout.n_layers as usize {
                for head in 0..layout.n_kv_heads as usize {
                    for part in 0..2 {
                        let at = self.place(block, layer, head, part, position % block_size);
                        let seed = [
                            u64::from(token),
                            position as u64,
                            layer as u64,
                            (head * 2 + part) as u64,
                        ];
                        let value = mix(seed.iter().fold(1, |h, &x| mix(h ^ x))).to_le_bytes();
                        for (j, byte) in self.kv[at..at + run].iter_mut().enumerate() {
                            *byte = value[j % 8] ^ j as u8;
                        }
                    }
                }
            }
        }
    }

    /// Hash of the KV of the first `n` positions, read through the row's block table.
    fn read(&self, row: &Row, batch: &Batch, n: usize) -> u64 {
        let layout = self.layout();
        let block_size = layout.block_size as usize;
        let run = layout.head_dim as usize * layout.dtype.bytes();
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for position in 0..n {
            let block = batch.blocks[row.blocks.start + position / block_size];
            for layer in 0..layout.n_layers as usize {
                for head in 0..layout.n_kv_heads as usize {
                    for part in 0..2 {
                        let at = self.place(block, layer, head, part, position % block_size);
                        for chunk in self.kv[at..at + run].chunks(8) {
                            let mut word = [0; 8];
                            word[..chunk.len()].copy_from_slice(chunk);
                            hash = mix(hash ^ u64::from_le_bytes(word));
                        }
                    }
                }
            }
        }
        hash
    }

    fn sample(&self, hash: u64, sampling: &Sampling) -> Sampled {
        let draw = if sampling.temperature > 0.0 {
            mix(hash ^ mix(sampling.seed))
        } else {
            hash
        };
        let vocab = u64::from(self.cfg.spec.vocab_size);
        let token = match self.cfg.eos {
            Some((eos, one_in)) if draw % one_in.max(1) == 0 => eos,
            // The end token comes by its own odds only.
            Some((eos, _)) if draw / 7 % vocab == u64::from(eos) => {
                (eos + 1) % self.cfg.spec.vocab_size
            }
            _ => (draw / 7 % vocab) as u32,
        };
        let logprobs = sampling.logprobs.map(|n| {
            let others = (0..).map(|i| (token + i) % self.cfg.spec.vocab_size);
            let top = others
                .zip(0..n)
                .map(|(id, i)| (id, -0.25 - i as f32))
                .collect();
            Box::new(TokenLogprobs {
                sampled: -0.25,
                rank: 1,
                top,
            })
        });
        Sampled { token, logprobs }
    }

    /// Copies between blocks and canonical order, head by head; `f` gets the range in `kv` and in the host bytes.
    fn for_each_head(&self, blocks: &[BlockId], mut f: impl FnMut(usize, usize, usize)) {
        let layout = self.layout();
        let bytes = layout.head_block_bytes();
        for layer in 0..layout.n_layers as usize {
            for head in 0..layout.n_kv_heads as usize {
                let row = layer * layout.n_kv_heads as usize + head;
                for (i, &block) in blocks.iter().enumerate() {
                    f(
                        self.place(block, layer, head, 0, 0),
                        (row * blocks.len() + i) * bytes,
                        bytes,
                    );
                }
            }
        }
    }

    fn check(&self, blocks: &[BlockId], n_bytes: usize) -> Result<(), RunnerError> {
        let known = blocks.iter().all(|b| b.0 < self.cfg.spec.n_blocks);
        if known && n_bytes == blocks.len() * self.layout().block_bytes() {
            Ok(())
        } else {
            Err(RunnerError(format!(
                "{} blocks and {n_bytes} bytes do not fit together",
                blocks.len()
            )))
        }
    }
}

impl Runner for SimRunner {
    fn spec(&self) -> &RunnerSpec {
        &self.cfg.spec
    }

    fn execute(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<(), RunnerError> {
        self.steps += 1;
        (self.pace)(batch.tokens.len());
        if self.cfg.fail_at == Some(self.steps) {
            return Err(RunnerError(
                "the simulated device failed, as configured".to_owned(),
            ));
        }
        out.rows.clear();
        for row in &batch.rows {
            self.write(row, batch);
            let reach = row.start + row.tokens.len();
            let sampled = row
                .sampling
                .as_ref()
                .map(|sampling| self.sample(self.read(row, batch, reach), sampling));
            out.rows.push(sampled);
        }
        Ok(())
    }

    fn export(&mut self, blocks: &[BlockId], out: &mut [u8]) -> Result<(), RunnerError> {
        self.check(blocks, out.len())?;
        self.for_each_head(blocks, |kv, host, n| {
            out[host..host + n].copy_from_slice(&self.kv[kv..kv + n]);
        });
        Ok(())
    }

    fn import(&mut self, blocks: &[BlockId], data: &[u8]) -> Result<(), RunnerError> {
        self.check(blocks, data.len())?;
        let mut kv = std::mem::take(&mut self.kv);
        self.for_each_head(blocks, |at, host, n| {
            kv[at..at + n].copy_from_slice(&data[host..host + n]);
        });
        self.kv = kv;
        Ok(())
    }
}

/// A 64-bit mixer (splitmix's finalizer).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(runner: &mut SimRunner, tokens: &[u32], start: usize, blocks: &[u32]) -> Option<u32> {
        let row = Row {
            tokens: 0..tokens.len(),
            blocks: 0..blocks.len(),
            start,
            sampling: Some(Sampling::GREEDY),
        };
        let batch = Batch {
            rows: vec![row],
            tokens: tokens.to_vec(),
            blocks: blocks.iter().map(|&b| BlockId(b)).collect(),
        };
        let mut out = StepOutput::default();
        runner.execute(&batch, &mut out).unwrap();
        out.rows[0].as_ref().map(|s| s.token)
    }

    #[test]
    fn chunks_and_places_do_not_change_the_token() {
        let tokens: Vec<u32> = (0..40).collect();
        let whole = run(
            &mut SimRunner::new(SimConfig::default()),
            &tokens,
            0,
            &[1, 2, 3],
        );
        let mut other = SimRunner::new(SimConfig::default());
        run(&mut other, &tokens[..23], 0, &[9, 4]);
        assert_eq!(run(&mut other, &tokens[23..], 23, &[9, 4, 5]), whole);
    }

    #[test]
    fn exported_blocks_give_the_same_token_elsewhere_and_wrong_ones_do_not() {
        let tokens: Vec<u32> = (0..40).collect();
        let mut a = SimRunner::new(SimConfig::default());
        let whole = run(&mut a, &tokens, 0, &[1, 2, 3]);
        let mut data = vec![0; 3 * a.spec().layout.block_bytes()];
        a.export(&[BlockId(1), BlockId(2), BlockId(3)], &mut data)
            .unwrap();
        let mut b = SimRunner::new(SimConfig::default());
        b.import(&[BlockId(7), BlockId(8), BlockId(6)], &data)
            .unwrap();
        assert_eq!(run(&mut b, &tokens[39..], 39, &[7, 8, 6]), whole);
        assert_ne!(run(&mut b, &tokens[39..], 39, &[8, 7, 6]), whole);
    }

    fn sample(cfg: SimConfig, sampling: &Sampling, hash: u64) -> Sampled {
        SimRunner::new(cfg).sample(hash, sampling)
    }

    #[test]
    fn a_seed_counts_above_zero_temperature_only() {
        let with = |temperature, seed| {
            let sampling = Sampling {
                temperature,
                seed,
                ..Sampling::GREEDY
            };
            (0..50)
                .map(|hash| sample(SimConfig::default(), &sampling, mix(hash)).token)
                .collect::<Vec<_>>()
        };
        assert_eq!(with(0.0, 1), with(0.0, 2));
        assert_eq!(with(1.0, 1), with(1.0, 1));
        assert_ne!(with(1.0, 1), with(1.0, 2));
        assert_ne!(with(1.0, 1), with(0.0, 1));
    }

    #[test]
    fn the_end_token_comes_by_its_own_odds_only() {
        let ends = |eos| {
            let cfg = SimConfig {
                eos,
                ..SimConfig::default()
            };
            (1..=1000)
                .filter(|&hash| sample(cfg.clone(), &Sampling::GREEDY, hash).token == 9)
                .count()
        };
        assert_eq!(ends(Some((9, 10))), 100);
        assert_eq!(ends(Some((9, u64::MAX))), 0);
        assert_eq!(ends(Some((9, 1))), 1000);
        assert!(ends(None) > 0, "a token as any other");
    }

    #[test]
    fn log_probabilities_are_told_if_asked_for() {
        let sampling = Sampling {
            logprobs: Some(3),
            ..Sampling::GREEDY
        };
        let sampled = sample(SimConfig::default(), &sampling, 5);
        let logprobs = sampled.logprobs.unwrap();
        assert_eq!(logprobs.top.len(), 3);
        assert_eq!(logprobs.top[0], (sampled.token, logprobs.sampled));
        assert_eq!(
            sample(SimConfig::default(), &Sampling::GREEDY, 5).logprobs,
            None
        );
    }

    #[test]
    fn blocks_and_bytes_that_do_not_fit_are_refused() {
        let mut runner = SimRunner::new(SimConfig::default());
        let mut data = vec![0; runner.spec().layout.block_bytes()];
        assert!(runner.import(&[BlockId(1)], &data).is_ok());
        assert!(runner.import(&[BlockId(1)], &data[1..]).is_err());
        assert!(runner.import(&[BlockId(1), BlockId(2)], &data).is_err());
        assert!(runner.import(&[BlockId(256)], &data).is_err());
        assert!(runner.export(&[BlockId(256)], &mut data).is_err());
    }

    #[test]
    fn the_pace_is_told_the_tokens_of_every_step() {
        let (told, seen) = std::sync::mpsc::channel();
        let pace = Box::new(move |n| told.send(n).unwrap());
        let mut runner = SimRunner::paced(SimConfig::default(), pace);
        run(&mut runner, &[1, 2, 3], 0, &[1]);
        run(&mut runner, &[4], 3, &[1]);
        drop(runner);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [3, 1]);
    }

    #[test]
    fn it_fails_when_told_to() {
        let mut runner = SimRunner::new(SimConfig {
            fail_at: Some(1),
            ..SimConfig::default()
        });
        assert!(
            runner
                .execute(&Batch::default(), &mut StepOutput::default())
                .is_err()
        );
    }
}
