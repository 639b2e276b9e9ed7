//! One prompt and its answer: tokens, the blocks that hold their KV, and how far each has come.
//!
//! Three counters say everything: `tokens.len()`, `computed` (tokens whose KV is in the blocks) and `registered` (full
//! blocks that can be found by hash). One pending token is a decode, more are a prefill.

use crate::{Event, FinishReason, Sampling};
use baton_kv::{BlockHash, BlockHasher, BlockId};

/// Names a sequence; chosen by the caller, unique among live ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// A prompt to answer.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Its name.
    pub id: SeqId,
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// When it ends.
    pub limits: Limits,
    /// What is to be done with KV that moves between servers.
    pub handover: Handover,
}

/// When a sequence ends.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Most tokens to generate, at least one.
    pub max_tokens: u32,
    /// Before this many tokens an end or stop token is kept as any other. (vLLM keeps such tokens from being sampled.)
    pub min_tokens: u32,
    /// Tokens that end a sequence by themselves, unless ignored.
    pub eos: Box<[u32]>,
    /// Tokens that the request wants to stop at.
    pub stop_token_ids: Box<[u32]>,
    /// Generate on past the end-of-sequence token.
    pub ignore_eos: bool,
}

/// Where a sequence's KV comes from or goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// Computed and used here.
    None,
    /// The prompt's blocks leave as [`Event::Export`]s, as they are computed.
    Export,
    /// KV of the first `n_tokens` of the prompt can be fetched from elsewhere.
    Import {
        /// Tokens whose KV the peer holds.
        n_tokens: u32,
    },
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    /// Prompt, then generated tokens.
    pub(crate) tokens: Vec<u32>,
    pub(crate) n_prompt: usize,
    /// Tokens whose KV is in `blocks`.
    pub(crate) computed: usize,
    pub(crate) blocks: Vec<BlockId>,
    /// Hashes of the full blocks of `tokens`, as far as they were needed.
    pub(crate) hashes: Vec<BlockHash>,
    /// Leading blocks that were offered to the prefix cache.
    pub(crate) registered: usize,
    /// Leading blocks that have left; a preempted sequence does not send them again.
    pub(crate) exported: usize,
    pub(crate) sampling: Sampling,
    pub(crate) limits: Limits,
    pub(crate) handover: Handover,
    /// Prompt tokens whose KV was found or fetched, for the answer's usage; `None` until blocks were first taken.
    pub(crate) cached: Option<usize>,
    /// Tokens of this step's row.
    pub(crate) scheduled: usize,
    /// Only the end of a prompt that leaves is still to be computed.
    pub(crate) is_at_tail: bool,
}

impl Sequence {
    pub(crate) fn new(new: NewSequence, max_len: usize, block_size: usize) -> Self {
        let n_prompt = new.prompt.len();
        let most = max_len.min(n_prompt + new.limits.max_tokens as usize);
        let mut tokens = new.prompt;
        // The answer then grows without an allocation on the per-token path.
        tokens.reserve_exact(most - n_prompt);
        Self {
            id: new.id,
            tokens,
            n_prompt,
            computed: 0,
            blocks: Vec::with_capacity(most.div_ceil(block_size)),
            hashes: Vec::with_capacity(most / block_size),
            registered: 0,
            exported: 0,
            sampling: new.sampling,
            limits: new.limits,
            handover: new.handover,
            cached: None,
            scheduled: 0,
            is_at_tail: false,
        }
    }

    /// Tokens that still have to go through the model.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Leading blocks that may leave: full ones, and the last of the prompt when the prompt is computed.
    pub(crate) fn exportable(&self, block_size: usize) -> usize {
        match self.handover {
            Handover::Export if self.computed >= self.n_prompt => {
                self.n_prompt.div_ceil(block_size)
            }
            Handover::Export => self.computed / block_size,
            Handover::None | Handover::Import { .. } => 0,
        }
    }

    /// How many of `most` tokens come next, so that the end of a prompt that leaves, of `tail` tokens and up to a block
    /// more, is not among them if it would end a step of many.
    pub(crate) fn before_tail(&self, most: usize, tail: usize, block_size: usize) -> usize {
        let leaves = self.handover == Handover::Export && self.computed < self.n_prompt;
        if !leaves || tail == 0 || most < self.pending() || most < 2 * tail {
            return most;
        }
        let reach = (self.tokens.len() - tail) / block_size * block_size;
        match reach.saturating_sub(self.computed) {
            0 => most,
            n => n,
        }
    }

    /// Leading tokens whose KV is worth fetching. The last of the prompt is computed here in any case: its logits are
    /// needed. The peer's own count is a claim, not a fact.
    pub(crate) fn importable(&self) -> usize {
        match self.handover {
            Handover::Import { n_tokens } => (n_tokens as usize).min(self.n_prompt - 1),
            Handover::None | Handover::Export => 0,
        }
    }

    /// What there is to import, if that is more than was found here.
    pub(crate) fn missing_import(&self) -> Option<usize> {
        let n_tokens = self.importable();
        (n_tokens > self.computed).then_some(n_tokens)
    }

    /// Extends `hashes` to the first `n_blocks` blocks, all of which are full.
    pub(crate) fn hash_blocks(&mut self, hasher: &BlockHasher, n_blocks: usize, block_size: usize) {
        while self.hashes.len() < n_blocks {
            let start = self.hashes.len() * block_size;
            let parent = self.hashes.last().copied().unwrap_or(hasher.root());
            self.hashes
                .push(hasher.block(&parent, &self.tokens[start..start + block_size], None));
        }
    }

    /// Why the sequence ends after its newest token, if it does.
    pub(crate) fn finish(&self, max_len: usize) -> Option<FinishReason> {
        let generated = self.tokens.len() - self.n_prompt;
        let last = *self.tokens.last()?;
        if generated >= self.limits.min_tokens as usize {
            if !self.limits.ignore_eos && self.limits.eos.contains(&last) {
                return Some(FinishReason::Stop { token: None });
            }
            if self.limits.stop_token_ids.contains(&last) {
                return Some(FinishReason::Stop { token: Some(last) });
            }
        }
        let full = generated >= self.limits.max_tokens as usize || self.tokens.len() >= max_len;
        full.then_some(FinishReason::Length)
    }

    /// The event that asks for the blocks from `first_block` on that hold the first `n_tokens`.
    pub(crate) fn fetch_event(
        &self,
        first_block: usize,
        n_tokens: usize,
        block_size: usize,
    ) -> Event {
        let n_blocks = n_tokens.div_ceil(block_size) - first_block;
        Event::FetchKv {
            seq: self.id,
            first_block: first_block as u32,
            n_blocks: n_blocks as u32,
        }
    }
}
