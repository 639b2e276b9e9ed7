//! A model as a typed graph of its own operations, and the lowering of each operation to StableHLO.
//!
//! Nodes are what transformers are made of (embedding, norm, projection, attention over paged KV, sampling…), not
//! what a compiler is made of; so a platform can put a kernel in a node's place ([`Lowerings::with`]), or walk the
//! nodes itself. Axes have names: a wrong shape is refused while building, in words. This crate opens no file and
//! knows no device; every lowering here is plain StableHLO with static shapes, good for any platform.
#![forbid(unsafe_code)]

mod build;
mod graph;
pub mod hlo;
mod lower;
mod op;
mod shape;

pub use build::{KvRows, SampleRows};
pub use graph::{Graph, Node, NodeId, ShapeError, Source};
pub use lower::{Arg, Call, Field, LowerFn, Lowered, Lowerings, Packing};
pub use op::{Kind, Op};
pub use shape::{Axis, Shape};
