//! Continuous batching over paged KV: which sequences run, which blocks they own, when they end.
//!
//! Synchronous and deterministic: no clock, no threads, no I/O. The one effect, the device, is behind [`Runner`].
//! A server drives it from one plain thread: take new sequences in, [`Engine::step`], publish the events.
#![forbid(unsafe_code)]

mod block_pool;
mod cache_log;
mod engine;
mod logprobs;
mod pace;
mod runner;
mod sampling;
mod sequence;
mod stats;

pub use engine::{
    AdmitError, Beside, Engine, EngineConfig, EngineError, Event, FinishReason, PrefixCaching,
    Progress, Then,
};
pub use runner::{Batch, Row, Runner, RunnerError, RunnerSpec, Sampled, StepOutput, TokenLogprobs};
pub use sampling::Sampling;
pub use sequence::{Handover, Limits, NewSequence, SeqId};
pub use stats::Stats;
