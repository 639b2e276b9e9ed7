//! The model's graph on PJRT devices: [`PjrtRunner`] is an [`baton_engine::Runner`].
//!
//! It owns what lives on the device (weights, KV, compiled programs) and how a batch becomes launches: rungs of the
//! ladder, padding, packing. It decides nothing about sequences. Shapes are fixed when it opens; nothing is compiled
//! later.
#![forbid(unsafe_code)]

mod compile;
mod error;
mod launch;
mod options;
mod program_cache;
mod runner;
mod transfer;
mod weights;

pub use error::OpenError;
pub use options::{KvSize, Options, Role, Shapes, ladder};
pub use runner::{Loading, Model, PjrtRunner};
pub use weights::LoadWeight;
