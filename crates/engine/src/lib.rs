//! Continuous batching over paged KV: which sequences run, which blocks they own, when they end.
//!
//! Synchronous and deterministic: no clock, no threads, no I/O. The one effect, the device, is behind [`Runner`].
//! A server drives it from one plain thread: take new sequences in, [`Engine::step`], publish the events.

mod runner;
mod sampling;

pub use runner::{Batch, Row, Runner, RunnerError, RunnerSpec, Sampled, StepOutput, TokenLogprobs};
pub use sampling::Sampling;
