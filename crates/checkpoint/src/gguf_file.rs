//! A single GGUF file: weights, vocabulary and chat template in one.

use crate::error::{damaged, in_file};
use crate::tensor::Tensor;
use crate::{Checkpoint, CheckpointError, GenerationDefaults, TextSource, TokenizerSource};
use baton_model::gguf::{Gguf, GgufError, GgufTensor};
use baton_model::{Config, RowOrder, gguf_name, weights};
use baton_text::{GgufVocab, TokenKind, VocabModel};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

/// First guess at a header's length; a vocabulary of 128 000 takes about 5 MB.
const FIRST_READ: usize = 8 << 20;
/// No header is longer.
const MAX_HEADER: usize = 256 << 20;

pub(crate) fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let file = File::open(path).map_err(in_file(path))?;
    let gguf = read_header(&file, path)?;
    let config =
        Config::from_gguf(&gguf, rope_freqs(&file, &gguf)?).map_err(|e| damaged(path, &e))?;
    let named = weights(&config).into_iter().filter_map(|weight| {
        let tensor = gguf.tensors.get(&gguf_name(&weight.name)?)?;
        let order = RowOrder::of(&weight.name, &config);
        Some((weight.name, tensor_of(tensor, order)))
    });
    let tensors = named.collect();
    let text = text_source(&gguf).map_err(|e| damaged(path, &e))?;
    let eos = ["eos", "eot", "eom"]
        .iter()
        .filter_map(|which| gguf.unsigned(&format!("tokenizer.ggml.{which}_token_id")))
        .filter_map(|id| u32::try_from(id).ok());
    let mut eos: Vec<u32> = eos.collect();
    eos.sort_unstable();
    eos.dedup();
    let files = vec![Arc::new(file)];
    Checkpoint {
        config,
        tensors,
        files,
        text,
        defaults: GenerationDefaults::default(),
        eos,
    }
    .check()
}

/// The vocabulary and the chat template alone.
pub(crate) fn open_text(path: &Path) -> Result<TextSource, CheckpointError> {
    let file = File::open(path).map_err(in_file(path))?;
    let gguf = read_header(&file, path)?;
    text_source(&gguf).map_err(|e| damaged(path, &e))
}

fn tensor_of(tensor: &GgufTensor, order: RowOrder) -> Tensor {
    Tensor {
        file: 0,
        shape: tensor.shape.clone(),
        storage: tensor.storage,
        offset: tensor.offset,
        n_bytes: tensor.n_bytes,
        order,
    }
}

fn read_header(file: &File, path: &Path) -> Result<Gguf, CheckpointError> {
    let file_len = file.metadata().map_err(in_file(path))?.len();
    let mut want = FIRST_READ;
    loop {
        let n = usize::try_from(file_len).unwrap_or(usize::MAX).min(want);
        let mut bytes = vec![0; n];
        file.read_exact_at(&mut bytes, 0).map_err(in_file(path))?;
        match Gguf::parse(&bytes, file_len) {
            Err(GgufError::NeedMore { .. }) if (n as u64) < file_len && want < MAX_HEADER => {
                want *= 2;
            }
            Err(GgufError::NeedMore { .. }) => {
                return Err(damaged(path, &"the file ends before its header does"));
            }
            other => return other.map_err(|e| damaged(path, &e)),
        }
    }
}

/// Llama 3.1's stretched frequencies, which converters store as a tensor.
fn rope_freqs(file: &File, gguf: &Gguf) -> Result<Option<Vec<f32>>, CheckpointError> {
    const NAME: &str = "rope_freqs.weight";
    let Some(tensor) = gguf.tensors.get(NAME) else {
        return Ok(None);
    };
    let mut bytes = vec![0; tensor.n_bytes];
    tensor_of(tensor, RowOrder::Same)
        .read(file, 0, &mut bytes)
        .map_err(|e| e.in_tensor(NAME))?;
    let mut out = vec![0.0; tensor.shape.iter().product()];
    tensor.storage.dequantize(&bytes, &mut out);
    Ok(Some(out))
}

fn text_source(gguf: &Gguf) -> Result<TextSource, GgufError> {
    let token = |which: &str| {
        let id = gguf.unsigned(&format!("tokenizer.ggml.{which}_token_id"))?;
        gguf.texts("tokenizer.ggml.tokens")?
            .get(usize::try_from(id).ok()?)
            .cloned()
    };
    Ok(TextSource {
        template: gguf.text("tokenizer.chat_template").map(str::to_owned),
        bos_token: token("bos").unwrap_or_default(),
        eos_token: token("eos").unwrap_or_default(),
        tokenizer: match gguf.text("tokenizer.ggml.model") {
            None => TokenizerSource::Missing,
            Some(model) => TokenizerSource::Gguf(Box::new(vocab(gguf, model)?)),
        },
    })
}

fn vocab(gguf: &Gguf, model: &str) -> Result<GgufVocab, GgufError> {
    let model = match model {
        "gpt2" => VocabModel::Gpt2,
        "llama" => VocabModel::Llama,
        other => {
            let (key, found) = ("tokenizer.ggml.model", other.to_owned());
            return Err(GgufError::Unsupported {
                key,
                found,
                supported: "gpt2 and llama",
            });
        }
    };
    let id = |key: &str| gguf.unsigned(key).and_then(|id| u32::try_from(id).ok());
    let tokens = gguf.texts("tokenizer.ggml.tokens");
    Ok(GgufVocab {
        model,
        pre: gguf
            .text("tokenizer.ggml.pre")
            .unwrap_or_default()
            .to_owned(),
        tokens: tokens
            .ok_or_else(|| GgufError::Missing("tokenizer.ggml.tokens".to_owned()))?
            .to_vec(),
        merges: gguf
            .texts("tokenizer.ggml.merges")
            .unwrap_or_default()
            .to_vec(),
        scores: gguf
            .floats("tokenizer.ggml.scores")
            .unwrap_or_default()
            .to_vec(),
        kinds: gguf
            .integers("tokenizer.ggml.token_type")
            .unwrap_or_default()
            .iter()
            .map(|&n| kind(n))
            .collect(),
        bos: id("tokenizer.ggml.bos_token_id"),
        unknown: id("tokenizer.ggml.unknown_token_id"),
        add_bos: gguf.flag("tokenizer.ggml.add_bos_token"),
        add_space_prefix: gguf.flag("tokenizer.ggml.add_space_prefix"),
    })
}

/// llama.cpp's numbers of token types.
fn kind(number: i64) -> TokenKind {
    match number {
        2 => TokenKind::Unknown,
        3 => TokenKind::Control,
        4 => TokenKind::UserDefined,
        6 => TokenKind::Byte,
        _ => TokenKind::Normal,
    }
}
