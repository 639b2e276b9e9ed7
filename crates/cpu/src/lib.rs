//! The model's graph run by kernels of our own on the CPU: [`CpuRunner`] is an [`baton_engine::Runner`] without plugin
//! and without compilation.
//!
//! The graph becomes a plan of sections ([`plan`]), which a team of threads ([`team`]) runs for all tokens of a step at
//! once; weights are multiplied as they lie in the model's file ([`matrix`]), and attention reads the paged pool in place
//! ([`attention`]).
#![deny(unsafe_op_in_unsafe_fn)]

mod attention;
mod error;
mod forward;
mod kv_cache;
mod matrix;
mod plan;
mod row_ops;
mod rows;
mod runner;
mod sample;
mod shared;
mod simd;
mod team;
mod turns;
mod weights;

pub use error::{OpenError, PlanError};
pub use forward::Arithmetic;
pub use runner::{CpuRunner, Model, Options};
pub use simd::Isa;
pub use turns::{Side, Turns};
pub use weights::{WeightCache, Weights};
