//! A folder as Hugging Face writes it: config.json, safetensors (perhaps in shards), tokenizer.json and their company.

use crate::error::{damaged, in_file};
use crate::tensor::Tensor;
use crate::{Checkpoint, CheckpointError, GenerationDefaults, TextSource, TokenizerSource};
use baton_model::safetensors::{PREFIX, header_len, parse_header};
use baton_model::{Config, RowOrder};
use rustc_hash::FxHashMap;
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Files other than weights are small; one larger than this is not what its name says.
const MAX_TEXT: u64 = 256 << 20;

pub(crate) fn open(folder: &Path) -> Result<Checkpoint, CheckpointError> {
    let config_path = folder.join("config.json");
    let config_text = read(&config_path)?;
    let config = Config::from_json(&config_text).map_err(|e| damaged(&config_path, &e))?;
    let (mut tensors, mut files) = (FxHashMap::default(), Vec::new());
    for path in shards(folder)? {
        let file = File::open(&path).map_err(in_file(&path))?;
        add_shard(&file, &path, files.len(), &mut tensors)?;
        files.push(Arc::new(file));
    }
    let generation = read_json(&folder.join("generation_config.json"))?.unwrap_or_default();
    let config_json: Value = serde_json::from_slice(&config_text).unwrap_or_default();
    let mut eos = ids(&generation["eos_token_id"]);
    if eos.is_empty() {
        eos = ids(&config_json["eos_token_id"]);
    }
    let text = text_source(folder)?;
    Checkpoint {
        config,
        tensors,
        files,
        text,
        defaults: defaults(&generation),
        eos,
    }
    .check()
}

/// The files that hold the weights: those the index names, else every `.safetensors` file.
fn shards(folder: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: FxHashMap<String, String>,
    }
    let index_path = folder.join("model.safetensors.index.json");
    if let Some(index) = read_json(&index_path)? {
        let index: Index = serde_json::from_value(index).map_err(|e| damaged(&index_path, &e))?;
        let mut names: Vec<String> = index.weight_map.into_values().collect();
        names.sort_unstable();
        names.dedup();
        // An index may not lead out of its folder.
        if let Some(bad) = names
            .iter()
            .find(|name| Path::new(name).file_name() != Some(name.as_ref()))
        {
            return Err(damaged(&index_path, &format!("{bad} is no file name")));
        }
        return Ok(names.into_iter().map(|name| folder.join(name)).collect());
    }
    let entries = std::fs::read_dir(folder).map_err(in_file(folder))?;
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    paths.sort_unstable();
    if paths.is_empty() {
        return Err(damaged(folder, &"the folder has no .safetensors file"));
    }
    Ok(paths)
}

fn add_shard(
    file: &File,
    path: &Path,
    index: usize,
    tensors: &mut FxHashMap<String, Tensor>,
) -> Result<(), CheckpointError> {
    let file_len = file.metadata().map_err(in_file(path))?.len();
    let mut prefix = [0; PREFIX];
    file.read_exact_at(&mut prefix, 0).map_err(in_file(path))?;
    let mut header = vec![0; header_len(prefix, file_len).map_err(|e| damaged(path, &e))?];
    file.read_exact_at(&mut header, PREFIX as u64)
        .map_err(in_file(path))?;
    for (name, tensor) in parse_header(&header, file_len).map_err(|e| damaged(path, &e))? {
        let tensor = Tensor {
            file: index,
            shape: tensor.shape,
            storage: tensor.storage,
            offset: tensor.offset,
            n_bytes: tensor.n_bytes,
            order: RowOrder::Same,
        };
        tensors.insert(name, tensor);
    }
    Ok(())
}

pub(crate) fn text_source(folder: &Path) -> Result<TextSource, CheckpointError> {
    let config = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let tokenizer = match read_optional(&folder.join("tokenizer.json"))? {
        Some(json) => TokenizerSource::Json(json),
        None => TokenizerSource::Missing,
    };
    let of_its_own = read_optional(&folder.join("chat_template.jinja"))?;
    let template = match of_its_own {
        Some(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        None => template_in(&config["chat_template"]),
    };
    let (bos_token, eos_token) = (token(&config["bos_token"]), token(&config["eos_token"]));
    Ok(TextSource {
        tokenizer,
        template,
        bos_token,
        eos_token,
    })
}

/// A template, or the one called `default` of several.
fn template_in(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    let named = value
        .as_array()?
        .iter()
        .find(|entry| entry["name"] == "default")?;
    named["template"].as_str().map(str::to_owned)
}

/// A special token's text, written plainly or as an object.
fn token(value: &Value) -> String {
    value
        .as_str()
        .or_else(|| value["content"].as_str())
        .unwrap_or_default()
        .to_owned()
}

fn ids(value: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

fn defaults(generation: &Value) -> GenerationDefaults {
    let number = |key: &str| generation[key].as_f64().map(|x| x as f32);
    let top_k = generation["top_k"]
        .as_u64()
        .and_then(|k| u32::try_from(k).ok());
    GenerationDefaults {
        temperature: number("temperature"),
        top_k,
        top_p: number("top_p"),
        min_p: number("min_p"),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let len = std::fs::metadata(path).map_err(in_file(path))?.len();
    if len > MAX_TEXT {
        return Err(damaged(path, &format!("{len} bytes are too many")));
    }
    std::fs::read(path).map_err(in_file(path))
}

fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, CheckpointError> {
    if path.exists() {
        read(path).map(Some)
    } else {
        Ok(None)
    }
}

fn read_json(path: &Path) -> Result<Option<Value>, CheckpointError> {
    let Some(bytes) = read_optional(path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| damaged(path, &e))
}
