//! The canonical host form of KV blocks: what leaves one device and enters another.
//!
//! For a list of blocks the bytes lie as `[layer][kv head][block][K, V][token][dim]`, little-endian in the
//! cache's dtype. Splitting by head first makes any tensor-parallel ratio a selection of heads.

use std::fmt;

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16.
    BF16,
    /// IEEE half.
    F16,
    /// Eight bits: a sign, four of exponent, three of mantissa, no infinity ("e4m3fn").
    Fp8E4M3,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
            Self::Fp8E4M3 => 1,
        }
    }

    /// The short name used on the wire (`f32`, `bf16`, `f16`, `fp8_e4m3`).
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8E4M3 => "fp8_e4m3",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Shape of a model's KV cache, and a fingerprint of what produced it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Transformer layers.
    pub n_layers: u32,
    /// KV heads of the whole model.
    pub n_kv_heads: u32,
    /// Elements of one head's key or value.
    pub head_dim: u32,
    /// Tokens in a block.
    pub block_size: u32,
    /// Element type.
    pub dtype: DType,
    /// Identifies the weights that the KV was computed with; equal on servers that may exchange KV.
    pub model_fingerprint: u64,
}

/// Two layouts between which no KV can move.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kv layouts differ: ours is {ours}, theirs is {theirs}")]
pub struct LayoutError {
    /// The layout of the server that refused.
    pub ours: String,
    /// The layout of its peer.
    pub theirs: String,
}

impl KvLayout {
    /// Bytes of one head of one layer of one block: K then V, `[token][dim]`.
    pub const fn head_block_bytes(&self) -> usize {
        2 * self.block_size as usize * self.head_dim as usize * self.dtype.bytes()
    }

    /// Bytes of one whole block over all layers and heads.
    pub const fn block_bytes(&self) -> usize {
        self.head_block_bytes() * self.n_kv_heads as usize * self.n_layers as usize
    }

    /// Blocks that hold `n_tokens`, the last one perhaps in part.
    pub const fn blocks_for(&self, n_tokens: usize) -> usize {
        n_tokens.div_ceil(self.block_size as usize)
    }
}
