//! The operations a model is made of.

use crate::graph::Source;

/// What a node computes. The inputs' order is stated with each; shapes are named in [`crate::Axis`]'s words.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// A value from outside; no inputs.
    Param {
        /// A weight's name is Hugging Face's.
        name: String,
        /// Where it comes from.
        source: Source,
    },
    /// Rows of a table: `ids [seq, token]`, `table [vocab, hidden]`.
    Embed,
    /// `x / sqrt(mean(x²) + eps) * weight` over the last axis, in f32: `x`, `weight`.
    RmsNorm {
        /// Added to the mean square.
        eps: f32,
    },
    /// Product with a matrix over the axes that both end with: `x`, `weight`, and perhaps `bias`.
    Project,
    /// Cosines, then sines, of position times inverse frequency: `start [seq]` → `[seq, token, head_dim]`, f32.
    RopeTable {
        /// One for each pair of a head's elements.
        inv_freq: Vec<f32>,
        /// Positions from each sequence's start.
        n_tokens: usize,
    },
    /// Rotates the two halves of each head: `x [seq, token, heads, head_dim]`, `table` of [`Op::RopeTable`].
    Rope,
    /// Where each token's KV lies: `start [seq]`, `len [seq]`, `tables [seq, page]` → `[seq, token, part 2]` of block
    /// and slot. Tokens past `len` get blocks past the pool's end, all different: writes to them are dropped.
    KvSlots {
        /// Tokens in a block.
        block_size: usize,
        /// Blocks in the pool.
        n_blocks: usize,
        /// Tokens of each sequence.
        n_tokens: usize,
    },
    /// Puts keys and values into the pool: `cache [block, key_value, kv_head, slot, head_dim]`, `k`, `v`, `slots`.
    WriteKv,
    /// Causal attention of `q [seq, token, head, head_dim]` over the pool: `q`, `cache`, `start`, `len`, `tables`.
    /// Query head `h` reads KV head `h / (heads / kv heads)`; scores are scaled by `1 / sqrt(head_dim)`.
    Attend {
        /// Pages read in one turn of the plain lowering's loop; divides the page axis.
        pages_per_turn: usize,
    },
    /// `down(silu(gate(x)) * up(x))`: `x`, `gate`, `up`, `down`, and perhaps a bias of each.
    GatedMlp,
    /// Elementwise sum of two.
    Add,
    /// Each sequence's last token: `x [seq, token, hidden]`, `len [seq]` → `[seq, hidden]`.
    LastToken,
    /// Scores of every token id, in f32: `x [seq, hidden]`, `table [vocab, hidden]`.
    Logits,
    /// Draws a token id a sequence: `logits`, `temperature`, `top_k`, `top_p`, `min_p`, `seed [seq, part 2]`, `start`,
    /// `len`. The draw depends on seed, position and logits only. The id is `vocab` where all logits are not numbers.
    Sample,
    /// Blocks in canonical host order: `ids [page]`, then every layer's cache →
    /// `[layer, kv_head, page, key_value, slot, head_dim]`. Ids past the pool's end give the last block.
    GatherBlocks,
    /// One layer's blocks from canonical host order: `cache`, `ids [page]`, `data`. Ids must differ; those past the
    /// pool's end are skipped.
    ScatterBlocks {
        /// Which layer of the data.
        layer: usize,
    },
}

/// Key of the lowering table: an operation without its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each is the operation of the same name")]
pub enum Kind {
    Param,
    Embed,
    RmsNorm,
    Project,
    RopeTable,
    Rope,
    KvSlots,
    WriteKv,
    Attend,
    GatedMlp,
    Add,
    LastToken,
    Logits,
    Sample,
    GatherBlocks,
    ScatterBlocks,
}

impl Op {
    /// Its kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Param { .. } => Kind::Param,
            Self::Embed => Kind::Embed,
            Self::RmsNorm { .. } => Kind::RmsNorm,
            Self::Project => Kind::Project,
            Self::RopeTable { .. } => Kind::RopeTable,
            Self::Rope => Kind::Rope,
            Self::KvSlots { .. } => Kind::KvSlots,
            Self::WriteKv => Kind::WriteKv,
            Self::Attend { .. } => Kind::Attend,
            Self::GatedMlp => Kind::GatedMlp,
            Self::Add => Kind::Add,
            Self::LastToken => Kind::LastToken,
            Self::Logits => Kind::Logits,
            Self::Sample => Kind::Sample,
            Self::GatherBlocks => Kind::GatherBlocks,
            Self::ScatterBlocks { .. } => Kind::ScatterBlocks,
        }
    }
}
