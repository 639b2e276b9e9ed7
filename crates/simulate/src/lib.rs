//! A modelled fleet in virtual time: what a way to choose servers is worth, without servers.
//!
//! Everything is decided by the arguments and a seed: the same call gives the same figures on every machine. The pickers
//! know what real ones would: their own account of what is under way, what servers last said of themselves, and an index
//! of prefixes; the model's servers know no more than real ones either.
#![forbid(unsafe_code)]

mod engine;
mod figures;
mod numbers;
mod policy;
mod pool;
mod study;
mod workload;
mod world;

pub use engine::EngineModel;
pub use figures::{Figures, Line};
pub use policy::Policy;
pub use study::{Study, capacity};
pub use workload::{Ask, Conversations, TraceError, Workload};
pub use world::{Setup, Split, run};
