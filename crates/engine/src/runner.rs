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
