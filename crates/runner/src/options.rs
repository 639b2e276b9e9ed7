//! What a runner is opened with, and the programs that follow from it.

use crate::OpenError;
use baton_graph::hlo::Element;
use baton_graph::{Lowered, Lowerings};
use baton_kv::{DType, KvLayout};
use baton_model::{Config, Ladder, Pool, Program};
use baton_pjrt::Value;
use std::path::PathBuf;

/// How to open a runner.
#[derive(Clone, Debug)]
pub struct Options {
    /// The plugin's shared library.
    pub plugin: PathBuf,
    /// What the plugin's client is told, as `cpu_device_count` or `memory_fraction`.
    pub client: Vec<(String, Value)>,
    /// Compiler settings by name.
    pub compiler: Vec<(String, Value)>,
    /// What the programs are made for.
    pub shapes: Shapes,
    /// Where compiled programs are kept from start to start. They are machine code: the folder must be as trusted as
    /// the program itself. `None` keeps nothing.
    pub cache_dir: Option<PathBuf>,
}

/// What programs are made for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shapes {
    /// Element type of weights, KV and activations: `F32` on CPUs, `BF16` on accelerators.
    pub dtype: DType,
    /// Tokens in a block.
    pub block_size: u32,
    /// How much KV the pool holds.
    pub kv: KvSize,
    /// Most decode rows in a step.
    pub max_batch: usize,
    /// Most tokens in a prefill row.
    pub max_chunk: usize,
    /// Longest sequence, prompt and output together.
    pub max_model_len: usize,
    /// What the server does.
    pub role: Role,
}

/// Size of the KV pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSize {
    /// Room for so many tokens.
    Tokens(usize),
    /// At most so many bytes.
    Bytes(usize),
}

/// What a server does, which decides the programs it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Whole requests; KV stays here.
    Standalone,
    /// Prompts, whose KV then leaves.
    Prefill,
    /// Everything.
    Decode,
}

impl Shapes {
    /// Shape of this model's KV.
    pub fn layout(&self, config: &Config, model_fingerprint: u64) -> KvLayout {
        KvLayout {
            n_layers: narrow(config.n_layers),
            n_kv_heads: narrow(config.n_kv_heads),
            head_dim: narrow(config.head_dim),
            block_size: self.block_size,
            dtype: self.dtype,
            model_fingerprint,
        }
    }

    /// The pool that programs are made for.
    ///
    /// # Errors
    /// Sizes of nothing, or a pool too small for one sequence of full length.
    pub fn pool(&self, config: &Config) -> Result<Pool, OpenError> {
        let sizes = [
            ("block_size", self.block_size as usize),
            ("max_batch", self.max_batch),
            ("max_chunk", self.max_chunk),
            ("max_model_len", self.max_model_len),
        ];
        for (field, found) in sizes {
            if !(1..=1 << 24).contains(&found) {
                return Err(OpenError::Options {
                    field,
                    found,
                    expected: "1 to 16777216".to_owned(),
                });
            }
        }
        let layout = self.layout(config, 0);
        let usable = match self.kv {
            KvSize::Tokens(n) => layout.blocks_for(n),
            KvSize::Bytes(n) => n / layout.block_bytes().max(1),
        };
        let needed = layout.blocks_for(self.max_model_len);
        if !(needed..1 << 30).contains(&usable) {
            let expected = format!("{needed} or more, enough for one sequence of full length");
            return Err(OpenError::Options {
                field: "kv blocks",
                found: usable,
                expected,
            });
        }
        Ok(Pool {
            element: element(self.dtype),
            // One more: block 0 belongs to padding.
            n_blocks: usable + 1,
            block_size: self.block_size as usize,
            max_model_len: self.max_model_len,
        })
    }

    /// The rungs for these sizes.
    pub fn rungs(&self) -> Ladder {
        Ladder::new(self.max_batch, self.max_chunk.min(self.max_model_len))
    }

    /// The programs that the role needs.
    pub fn programs(&self) -> Vec<Program> {
        let Ladder {
            decode,
            prefill,
            transfer,
        } = self.rungs();
        let decode = decode.into_iter().map(Program::Decode);
        let prefill = prefill.into_iter().map(Program::Prefill);
        let export = transfer.clone().into_iter().map(Program::Export);
        let import = transfer.into_iter().map(Program::Import);
        match self.role {
            Role::Standalone => decode.chain(prefill).collect(),
            Role::Prefill => prefill.chain(export).collect(),
            Role::Decode => decode.chain(prefill).chain(export).chain(import).collect(),
        }
    }
}

/// Every program's name and StableHLO text, for compiling ahead of time.
///
/// # Errors
/// Sizes that make no sense.
pub fn ladder(config: &Config, shapes: &Shapes) -> Result<Vec<(String, String)>, OpenError> {
    let lowered = lower_all(config, shapes)?;
    Ok(lowered
        .into_iter()
        .map(|(program, lowered)| (program.to_string(), lowered.text))
        .collect())
}

pub(crate) fn lower_all(
    config: &Config,
    shapes: &Shapes,
) -> Result<Vec<(Program, Lowered)>, OpenError> {
    let pool = shapes.pool(config)?;
    let lowerings = Lowerings::plain();
    let lower = |program: Program| -> Result<_, OpenError> {
        Ok((program, lowerings.lower(&program.graph(config, &pool)?)?))
    };
    shapes.programs().into_iter().map(lower).collect()
}

pub(crate) const fn element(dtype: DType) -> Element {
    match dtype {
        DType::F32 => Element::F32,
        DType::BF16 => Element::BF16,
        DType::F16 => Element::F16,
        DType::Fp8E4M3 => Element::F8E4M3FN,
    }
}

fn narrow(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_model::{Rope, RopeScaling};

    const SHAPES: Shapes = Shapes {
        dtype: DType::F32,
        block_size: 16,
        kv: KvSize::Tokens(256),
        max_batch: 4,
        max_chunk: 64,
        max_model_len: 128,
        role: Role::Prefill,
    };

    fn config() -> Config {
        Config {
            vocab_size: 96,
            hidden_size: 32,
            intermediate_size: 56,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 8,
            rms_norm_eps: 1e-5,
            rope: Rope {
                theta: 10_000.0,
                scaling: RopeScaling::None,
            },
            max_position_embeddings: 512,
            tie_word_embeddings: true,
            attention_bias: false,
            mlp_bias: false,
        }
    }

    #[test]
    fn a_prefill_server_neither_decodes_nor_imports() {
        let names: Vec<_> = ladder(&config(), &SHAPES)
            .unwrap()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["prefill-16", "prefill-64", "export-32"]);
    }

    #[test]
    fn the_pool_has_a_scratch_block_on_top() {
        assert_eq!(SHAPES.pool(&config()).unwrap().n_blocks, 17);
        let bytes = 2 * 2 * 2 * 16 * 8 * 4 * 20;
        let shapes = Shapes {
            kv: KvSize::Bytes(bytes),
            ..SHAPES
        };
        assert_eq!(shapes.pool(&config()).unwrap().n_blocks, 21);
    }

    #[test]
    fn a_pool_too_small_for_one_sequence_is_refused() {
        let shapes = Shapes {
            kv: KvSize::Tokens(100),
            ..SHAPES
        };
        let error = shapes.pool(&config()).unwrap_err().to_string();
        assert_eq!(
            error,
            "kv blocks is 7, expected 8 or more, enough for one sequence of full length"
        );
        assert!(
            Shapes {
                block_size: 0,
                ..SHAPES
            }
            .pool(&config())
            .is_err()
        );
    }
}
