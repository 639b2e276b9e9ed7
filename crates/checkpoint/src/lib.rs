//! A model on disk: a GGUF file, or a folder as Hugging Face writes it. Opens files, reads a tensor at a time with
//! positioned reads, and gives everything in Hugging Face's names and order.
//!
//! No memory maps (a file that shrinks would end the process) and no network.
#![forbid(unsafe_code)]

mod error;
mod folder;
mod gguf_file;
mod resolve;
mod tensor;

pub use error::CheckpointError;
pub use resolve::{ModelPath, hub_snapshot, resolve};

use baton_kv::DType;
use baton_model::{Config, Storage};
use baton_text::{ChatTemplate, Tokenizer};
use rustc_hash::FxHashMap;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use tensor::Tensor;

/// A model's files, open.
pub struct Checkpoint {
    config: Config,
    tensors: FxHashMap<String, Tensor>,
    files: Vec<Arc<File>>,
    text: TextSource,
    defaults: GenerationDefaults,
    eos: Vec<u32>,
}

/// Where the tokenizer and the chat template come from.
struct TextSource {
    tokenizer: TokenizerSource,
    template: Option<String>,
    bos_token: String,
    eos_token: String,
}

enum TokenizerSource {
    Json(Vec<u8>),
    Gguf(Box<baton_text::GgufVocab>),
    Missing,
}

impl TextSource {
    fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        match &self.tokenizer {
            TokenizerSource::Json(json) => Ok(Tokenizer::from_json(json)?),
            TokenizerSource::Gguf(vocab) => Ok(Tokenizer::from_gguf(vocab)?),
            TokenizerSource::Missing => Err(CheckpointError::NoTokenizer),
        }
    }

    fn chat_template(&self) -> Result<Option<ChatTemplate>, CheckpointError> {
        let template = self.template.as_deref();
        template.map(|s| self.chat_template_from(s)).transpose()
    }

    fn chat_template_from(&self, source: &str) -> Result<ChatTemplate, CheckpointError> {
        Ok(ChatTemplate::new(source, &self.bos_token, &self.eos_token)?)
    }
}

/// The tokenizer and the chat template of the model at `path`, for who needs no weights: a `.gguf` file, or a folder with
/// `tokenizer.json` and what belongs to it.
pub fn open_text(path: &Path) -> Result<(Tokenizer, Option<ChatTemplate>), CheckpointError> {
    let text = if path.is_dir() {
        folder::text_source(path)
    } else {
        gguf_file::open_text(path)
    }?;
    Ok((text.tokenizer()?, text.chat_template()?))
}

/// Sampling that the model's makers recommend; a request's own values win.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Likeliest tokens kept.
    pub top_k: Option<u32>,
    /// Probability mass kept.
    pub top_p: Option<f32>,
    /// Least share of the likeliest token's probability.
    pub min_p: Option<f32>,
}

/// Bytes of each tensor that go into the fingerprint.
const SAMPLE: usize = 4096;

impl Checkpoint {
    /// Opens a `.gguf` file or a folder with `config.json` and safetensors. Reads headers only.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        if path.is_dir() {
            folder::open(path)
        } else {
            gguf_file::open(path)
        }
    }

    /// Sizes and kinds.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Tokens that end an answer.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Sampling defaults.
    pub fn generation_defaults(&self) -> GenerationDefaults {
        self.defaults
    }

    /// The tokenizer; takes about a second for a large vocabulary.
    pub fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        self.text.tokenizer()
    }

    /// The model's chat template, if it has one.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, CheckpointError> {
        self.text.chat_template()
    }

    /// Another template, with this model's special tokens.
    pub fn chat_template_from(&self, source: &str) -> Result<ChatTemplate, CheckpointError> {
        self.text.chat_template_from(source)
    }

    /// Reads a weight by its Hugging Face name into `out`: row-major elements of `dtype`, little-endian, filling it
    /// exactly. Uses memory for a few rows. Callable from many threads at once.
    pub fn load(&self, name: &str, dtype: DType, out: &mut [u8]) -> Result<(), CheckpointError> {
        let tensor = self.tensor(name)?;
        tensor
            .load(&self.files[tensor.file], dtype, out)
            .map_err(|error| error.in_tensor(name))
    }

    /// How a weight is stored.
    pub fn storage(&self, name: &str) -> Result<Storage, CheckpointError> {
        Ok(self.tensor(name)?.storage)
    }

    /// Reads a weight's rows as they are stored, in Hugging Face's order.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let tensor = self.tensor(name)?;
        tensor
            .rows(&self.files[tensor.file])
            .map_err(|error| error.in_tensor(name))
    }

    fn tensor(&self, name: &str) -> Result<&Tensor, CheckpointError> {
        self.tensors
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor(name.to_owned()))
    }

    /// Changes when a file is replaced: sizes and times of all of them.
    pub fn stamp(&self) -> std::io::Result<u64> {
        let mut sha = Sha256::new();
        for file in &self.files {
            let about = file.metadata()?;
            sha.update(format!("{} {:?}", about.len(), about.modified()?));
        }
        Ok(first_word(sha))
    }

    /// Tells this model from others, fine-tunes of it included: a hash of configuration, tensor table and the first bytes
    /// of every tensor. KV computed with one fingerprint must not be used with another.
    pub fn fingerprint(&self) -> Result<u64, CheckpointError> {
        let mut sha = Sha256::new();
        sha.update(format!("{:?}", self.config));
        let mut names: Vec<&String> = self.tensors.keys().collect();
        names.sort_unstable();
        let mut sample = [0; SAMPLE];
        for name in names {
            let tensor = &self.tensors[name];
            sha.update(format!("{name} {:?} {:?}", tensor.shape, tensor.storage));
            let n = tensor.n_bytes.min(SAMPLE);
            tensor
                .read(&self.files[tensor.file], 0, &mut sample[..n])
                .map_err(|error| error.in_tensor(name))?;
            sha.update(&sample[..n]);
        }
        Ok(first_word(sha))
    }

    /// Every weight that the configuration asks for is there, in the right shape.
    fn check(self) -> Result<Self, CheckpointError> {
        for weight in baton_model::weights(&self.config) {
            let tensor = self
                .tensors
                .get(&weight.name)
                .ok_or_else(|| CheckpointError::NoTensor(weight.name.clone()))?;
            let wanted: usize = weight.axes.iter().map(|&(_, n)| n).product();
            let found: usize = tensor.shape.iter().product();
            let n_rows = tensor.shape.first().copied().unwrap_or(1);
            if wanted != found || !tensor.order.suits(n_rows) {
                let (name, shape) = (weight.name, tensor.shape.clone());
                return Err(CheckpointError::Shape {
                    name,
                    shape,
                    wanted: weight.axes.iter().map(|a| a.1).collect(),
                });
            }
        }
        Ok(self)
    }
}

fn first_word(sha: Sha256) -> u64 {
    let digest: [u8; 32] = sha.finalize().into();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(first)
}
