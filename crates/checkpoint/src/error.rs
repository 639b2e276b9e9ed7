//! What can be wrong with a model on disk.

use std::path::PathBuf;

/// Why a model cannot be opened or read. Messages say which file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// No such model.
    #[error(
        "no model at {model}: give a folder with config.json and safetensors, a .gguf file, smollm2, or a Hugging Face repo id that is in the local hub cache"
    )]
    NotFound {
        /// As the user gave it.
        model: String,
    },
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// A tensor could not be read.
    #[error("tensor {name}: {source}")]
    Read {
        /// Which one.
        name: String,
        /// What the file system said.
        source: std::io::Error,
    },
    /// The caller's buffer does not fit the tensor.
    #[error("tensor {name} has {elements} elements; {bytes} bytes were offered for it")]
    Size {
        /// Which one.
        name: String,
        /// Its elements.
        elements: usize,
        /// The buffer's bytes.
        bytes: usize,
    },
    /// A weight that the configuration asks for is absent, or of an element type we do not read.
    #[error("the model has no usable tensor {0}")]
    NoTensor(String),
    /// A weight of other sizes than the configuration says.
    #[error("tensor {name} has shape {shape:?}, the configuration asks for {wanted:?}")]
    Shape {
        /// Which one.
        name: String,
        /// In the file.
        shape: Vec<usize>,
        /// By the configuration.
        wanted: Vec<usize>,
    },
    /// A file that is not what its name says.
    #[error("{path}: {reason}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Neither tokenizer.json nor a GGUF vocabulary.
    #[error("the model has no tokenizer.json")]
    NoTokenizer,
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] baton_text::TokenizerError),
    /// The chat template cannot be used.
    #[error(transparent)]
    Template(#[from] baton_text::TemplateError),
}

/// What goes wrong while one tensor is read; the caller knows its name.
#[derive(Debug)]
pub(crate) enum TensorError {
    Read(std::io::Error),
    Size { elements: usize, bytes: usize },
}

impl TensorError {
    pub(crate) fn in_tensor(self, name: &str) -> CheckpointError {
        let name = name.to_owned();
        match self {
            Self::Read(source) => CheckpointError::Read { name, source },
            Self::Size { elements, bytes } => CheckpointError::Size {
                name,
                elements,
                bytes,
            },
        }
    }
}

/// Gives an I/O error its file.
pub(crate) fn in_file(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io { path, source }
}

/// Gives a parser's complaint its file.
pub(crate) fn damaged(path: &std::path::Path, reason: &dyn std::fmt::Display) -> CheckpointError {
    CheckpointError::Damaged {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}
