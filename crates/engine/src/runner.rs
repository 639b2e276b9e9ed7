//! What a device does for the engine.

use crate::Sampling;
use baton_kv::{BlockId, KvLayout};
use std::ops::Range;

/// One step's work: rows of tokens, each with the blocks its sequence owns. Reused from step to step.
#[derive(Debug, Default)]
pub struct Batch {
    /// One row a sequence; prefill chunks (more than one token) and decodes (one token) in any order.
    pub rows: Vec<Row>,
    /// Input tokens of all rows, back to back.
    pub tokens: Vec<u32>,
    /// Block tables of all rows, back to back. Each covers positions `0..start + n_tokens` of its row.
    pub blocks: Vec<BlockId>,
}

/// One sequence's share of a [`Batch`].
#[derive(Debug, Clone)]
pub struct Row {
    /// Where the row's input tokens lie in [`Batch::tokens`]; never empty.
    pub tokens: Range<usize>,
    /// Where the row's block table lies in [`Batch::blocks`].
    pub blocks: Range<usize>,
    /// Position of the first input token: the number of tokens whose KV is already in the blocks.
    pub start: usize,
    /// How to sample the token after the row's last; `None` in the middle of a prompt.
    pub sampling: Option<Sampling>,
}

/// What a step produced, row by row in the batch's order. Reused from step to step.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// One entry a row; `None` where the row asked for no token.
    pub rows: Vec<Option<Sampled>>,
}

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Present if the row's sampling asked for it.
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// Log-probabilities (natural log, of the model's own distribution before temperature) at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the sampled token.
    pub sampled: f32,
    /// Rank of the sampled token, 1 being the likeliest.
    pub rank: u32,
    /// The likeliest tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// What the engine must know of a device.
#[derive(Debug, Clone)]
pub struct RunnerSpec {
    /// Shape of the KV cache.
    pub layout: KvLayout,
    /// Blocks in the pool, block 0 included. Block 0 is the device's scratch (padding writes there): the engine
    /// never hands it out.
    pub n_blocks: u32,
    /// Most decode rows in a step.
    pub max_batch: usize,
    /// Most tokens in one prefill row.
    pub max_chunk: usize,
    /// Longest sequence, prompt and output together.
    pub max_model_len: usize,
    /// Size of the vocabulary: every token id is below it.
    pub vocab_size: u32,
}

/// The device failed. The engine cannot go on: what its KV holds is unknown.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RunnerError(pub String);

impl Batch {
    /// Refuses what no device can run: a device may trust the rest.
    ///
    /// # Errors
    /// A row without tokens, longer than a chunk, past the model's length, outside its blocks, or with tokens or blocks
    /// that do not exist.
    pub fn check(&self, spec: &RunnerSpec) -> Result<(), RunnerError> {
        for (i, row) in self.rows.iter().enumerate() {
            self.check_row(row, spec)
                .map_err(|wrong| RunnerError(format!("row {i}: {wrong}")))?;
        }
        Ok(())
    }

    fn check_row(&self, row: &Row, spec: &RunnerSpec) -> Result<(), String> {
        let end = row.start + row.tokens.len();
        let tokens = self.tokens.get(row.tokens.clone()).unwrap_or_default();
        let blocks = self.blocks.get(row.blocks.clone()).unwrap_or_default();
        let fits = (1..=spec.max_chunk).contains(&tokens.len())
            && end <= spec.max_model_len
            && blocks.len() >= spec.layout.blocks_for(end);
        if !fits {
            return Err(format!(
                "{} tokens from position {} in {} blocks: at most {} tokens up to position {} in blocks of {}",
                tokens.len(),
                row.start,
                blocks.len(),
                spec.max_chunk,
                spec.max_model_len,
                spec.layout.block_size,
            ));
        }
        if let Some(token) = tokens.iter().find(|&&t| t >= spec.vocab_size) {
            return Err(format!("there is no token {token}"));
        }
        match blocks.iter().find(|b| b.0 >= spec.n_blocks) {
            Some(block) => Err(format!("there is no block {}", block.0)),
            None => Ok(()),
        }
    }
}

impl RunnerSpec {
    /// Refuses blocks that do not exist, and a number of bytes that is not theirs.
    ///
    /// # Errors
    /// As it says.
    pub fn check_blocks(&self, blocks: &[BlockId], bytes: usize) -> Result<(), RunnerError> {
        let expected = blocks.len() * self.layout.block_bytes();
        if bytes != expected {
            let n = blocks.len();
            return Err(RunnerError(format!(
                "{n} blocks are {expected} bytes, not {bytes}"
            )));
        }
        match blocks.iter().find(|b| b.0 >= self.n_blocks) {
            Some(block) => Err(RunnerError(format!("there is no block {}", block.0))),
            None => Ok(()),
        }
    }
}

/// A device that runs the model: PJRT, the native CPU executor, or a simulation.
pub trait Runner: Send {
    /// What it can do. Constant.
    fn spec(&self) -> &RunnerSpec;

    /// Computes KV for every row's tokens and samples where asked. `out` is overwritten.
    fn execute(&mut self, batch: &Batch, out: &mut StepOutput) -> Result<(), RunnerError>;

    /// Copies blocks to host memory in canonical order (see [`KvLayout`]); `out` has exactly
    /// `blocks.len() * block_bytes` bytes.
    fn export(&mut self, blocks: &[BlockId], out: &mut [u8]) -> Result<(), RunnerError>;

    /// Overwrites blocks from host memory in canonical order; `data` has exactly `blocks.len() * block_bytes` bytes.
    fn import(&mut self, blocks: &[BlockId], data: &[u8]) -> Result<(), RunnerError>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_kv::DType;

    const SPEC: RunnerSpec = RunnerSpec {
        layout: KvLayout {
            n_layers: 1,
            n_kv_heads: 1,
            head_dim: 8,
            block_size: 4,
            dtype: DType::F32,
            model_fingerprint: 0,
        },
        n_blocks: 9,
        max_batch: 2,
        max_chunk: 8,
        max_model_len: 16,
        vocab_size: 200,
    };

    fn batch() -> Batch {
        let row = |tokens: Range<usize>, block: usize, start| Row {
            tokens,
            blocks: block..block + 1,
            start,
            sampling: None,
        };
        Batch {
            rows: vec![row(0..1, 0, 0), row(1..4, 1, 1)],
            tokens: vec![0, 100, 101, 102],
            blocks: vec![BlockId(1), BlockId(2)],
        }
    }

    #[test]
    fn rows_that_no_device_can_run_are_refused() {
        assert!(batch().check(&SPEC).is_ok());
        let layout = KvLayout {
            block_size: 2,
            ..SPEC.layout
        };
        let refusing = [
            RunnerSpec {
                max_chunk: 2,
                ..SPEC
            },
            RunnerSpec {
                max_model_len: 3,
                ..SPEC
            },
            RunnerSpec {
                vocab_size: 102,
                ..SPEC
            },
            RunnerSpec {
                n_blocks: 2,
                ..SPEC
            },
            RunnerSpec { layout, ..SPEC },
        ];
        for spec in refusing {
            assert!(batch().check(&spec).is_err(), "{spec:?}");
        }
        let mut empty = batch();
        empty.rows[0].tokens = 0..0;
        assert!(empty.check(&SPEC).is_err());
    }

    #[test]
    fn blocks_that_do_not_exist_and_wrong_sizes_are_refused() {
        let each = SPEC.layout.block_bytes();
        assert!(SPEC.check_blocks(&[BlockId(8)], each).is_ok());
        assert!(SPEC.check_blocks(&[BlockId(9)], each).is_err());
        assert!(SPEC.check_blocks(&[BlockId(8)], each + 1).is_err());
    }
}
