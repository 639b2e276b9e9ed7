//! What a model is: its configuration, its weights' names and formats, and the graph that computes it.
//!
//! Takes bytes and returns values; callers open files.
#![forbid(unsafe_code)]

mod config;
mod config_json;
pub mod gguf;
mod gguf_llama;
pub mod llama;
mod programs;
mod quant;
mod rope;
pub mod safetensors;

pub use config::{Config, Rope, RopeScaling};
pub use config_json::ConfigError;
pub use gguf_llama::{RowOrder, gguf_name};
pub use llama::{Pool, Weight, weights};
pub use programs::{Ladder, Program};
pub use quant::Storage;
pub use rope::inverse_frequencies;
