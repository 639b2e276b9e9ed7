//! How the next token is chosen.

/// Parameters of one sequence's sampling, already validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this times the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Key of the random stream. With the token's position it decides the draw, whatever else is in the batch.
    pub seed: u64,
    /// Report the log-probability of the sampled token and of this many likeliest ones.
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// The likeliest token, always.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 0,
        logprobs: None,
    };
}
