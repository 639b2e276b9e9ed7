//! The default model's runner, made for a bench, and steps for it.

use baton_checkpoint::Checkpoint;
use baton_cpu::{Arithmetic, CpuRunner, Model, Options, WeightCache, Weights};
use baton_engine::{Batch, Row, Sampling};
use baton_graph::hlo::Element;
use baton_kv::{BlockId, DType, KvLayout};
use baton_model::{Pool, Storage};
use std::error::Error;
use std::ops::Range;
use std::path::PathBuf;

pub(crate) type Failure = Box<dyn Error + Send + Sync>;

const BLOCK: usize = 16;

/// The file that `BATON_SMOLLM2` names.
pub(crate) fn file() -> PathBuf {
    PathBuf::from(std::env::var_os("BATON_SMOLLM2").expect("BATON_SMOLLM2 names a file"))
}

pub(crate) struct Files(pub(crate) Checkpoint);

impl Weights for Files {
    fn storage(&self, name: &str) -> Result<Storage, Failure> {
        Ok(self.0.storage(name)?)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Failure> {
        Ok(self.0.read(name)?)
    }
}

fn narrow(n: usize) -> u32 {
    u32::try_from(n).unwrap()
}

/// A runner of one sequence of at most `max_tokens`, in chunks of at most `max_chunk`; `key` names its packed weights.
pub(crate) fn runner(
    files: &Files,
    weights: &dyn Weights,
    [max_tokens, max_chunk]: [usize; 2],
    threads: usize,
    key: &str,
) -> CpuRunner {
    let config = files.0.config();
    let model = Model {
        config,
        fingerprint: 1,
        weights,
    };
    let options = Options {
        pool: Pool {
            element: Element::F32,
            n_blocks: max_tokens / BLOCK + 1,
            block_size: BLOCK,
            max_model_len: max_tokens,
        },
        layout: KvLayout {
            n_layers: narrow(config.n_layers),
            n_kv_heads: narrow(config.n_kv_heads),
            head_dim: narrow(config.head_dim),
            block_size: narrow(BLOCK),
            dtype: DType::BF16,
            model_fingerprint: 1,
        },
        max_batch: 1,
        max_chunk,
        arithmetic: Arithmetic::Quantized,
        threads,
        weight_cache: Some(WeightCache {
            folder: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
            key: key.to_owned(),
        }),
    };
    CpuRunner::open(model, &options, None, &|_, _| ()).unwrap()
}

/// The step that computes `tokens` at `places` of a sequence in the first blocks.
pub(crate) fn step(tokens: Vec<u32>, places: Range<usize>) -> Batch {
    let n_blocks = places.end.div_ceil(BLOCK);
    Batch {
        blocks: (1..=n_blocks).map(|b| BlockId(narrow(b))).collect(),
        rows: vec![Row {
            tokens: 0..tokens.len(),
            blocks: 0..n_blocks,
            start: places.start,
            sampling: Some(Sampling::GREEDY),
        }],
        tokens,
    }
}
