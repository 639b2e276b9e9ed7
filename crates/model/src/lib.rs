//! What a model is: its configuration, its weights' names and formats, and the graph that computes it.
//!
//! Takes bytes and returns values; callers open files.

mod config;
mod config_json;
pub mod llama;
mod programs;
mod rope;

pub use config::{Config, Rope, RopeScaling};
pub use config_json::ConfigError;
pub use llama::{Pool, Weight, weights};
pub use programs::{Ladder, Program};
pub use rope::inverse_frequencies;
