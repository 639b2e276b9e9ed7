//! The hyper-parameters of a Llama-family model.

/// A Llama-family model's hyper-parameters, from `config.json` or GGUF metadata.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Longest position the model was made for.
    pub max_position_embeddings: usize,
    /// The output projection is the embedding table.
    pub tie_word_embeddings: bool,
    /// q, k, v and o projections have biases.
    pub attention_bias: bool,
    /// Gate, up and down projections have biases.
    pub mlp_bias: bool,
}

/// Rotary position embedding, rotating the two halves of a head (Hugging Face's order).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the inverse frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// Changes to the inverse frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's rule: low frequencies divided, high ones kept, between them a smooth passage.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths longer than `original_max_position / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths shorter than `original_max_position / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before scaling.
        original_max_position: usize,
    },
    /// One divisor per frequency (`head_dim / 2` of them), as GGUF's `rope_freqs.weight` holds them.
    Factors(Vec<f32>),
}
