//! Why a runner cannot open.

use std::error::Error;

/// The device, the model or the sizes asked for do not go together.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The plugin or its device failed.
    #[error("device: {0}")]
    Device(#[from] baton_pjrt::Error),
    /// The plugin has no device for this process.
    #[error("the plugin shows no device")]
    NoDevice,
    /// Sizes of the model that contradict each other.
    #[error("model: {0}")]
    Shape(#[from] baton_graph::ShapeError),
    /// A lowering that does not type-check.
    #[error("program: {0}")]
    Program(#[from] baton_graph::hlo::HloError),
    /// A program that the device's compiler refuses.
    #[error("program {name} does not compile: {source}")]
    Compile {
        /// Its rung on the ladder.
        name: String,
        /// The compiler's words.
        source: baton_pjrt::Error,
    },
    /// A weight that cannot be read.
    #[error("weight {name}: {source}")]
    Weight {
        /// Hugging Face's name.
        name: String,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
    /// Options that make no sense.
    #[error("{field} is {found}, expected {expected}")]
    Options {
        /// Which.
        field: &'static str,
        /// Its value.
        found: usize,
        /// What would do.
        expected: String,
    },
}
