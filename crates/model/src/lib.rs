//! What a model is: its configuration, its weights' names and formats, and the graph that computes it.
//!
//! Takes bytes and returns values; callers open files.

mod config;

pub use config::{Config, Rope, RopeScaling};
