//! The programs that a server compiles: a small ladder of shapes, and KV's way in and out.
//!
//! Shapes are static, so each rung costs a compilation at start; work is padded up to the next rung.

use crate::Config;
use crate::llama::{Pool, cache_params, input, step};
use baton_graph::hlo::Element;
use baton_graph::{Axis, Graph, ShapeError, Source};
use std::fmt;

/// Sequences in a decode grow by this from rung to rung.
const DECODE_GROWTH: usize = 4;
/// The smallest prefill, and how it grows.
const PREFILL_FIRST: usize = 16;
const PREFILL_GROWTH: usize = 8;
/// Blocks moved by one export or import.
const TRANSFER: [usize; 1] = [32];

/// One program's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Program {
    /// So many sequences of one token each.
    Decode(usize),
    /// One sequence of so many tokens.
    Prefill(usize),
    /// So many blocks to host order.
    Export(usize),
    /// So many blocks from host order.
    Import(usize),
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Decode(n) => write!(f, "decode-{n}"),
            Self::Prefill(n) => write!(f, "prefill-{n}"),
            Self::Export(n) => write!(f, "export-{n}"),
            Self::Import(n) => write!(f, "import-{n}"),
        }
    }
}

impl Program {
    /// Its graph.
    ///
    /// # Errors
    /// Sizes that contradict each other.
    pub fn graph(self, config: &Config, pool: &Pool) -> Result<Graph, ShapeError> {
        match self {
            Self::Decode(seqs) => step(config, pool, seqs, 1),
            Self::Prefill(tokens) => step(config, pool, 1, tokens),
            Self::Export(blocks) => export(config, pool, blocks),
            Self::Import(blocks) => import(config, pool, blocks),
        }
    }
}

/// The rungs, each list ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ladder {
    /// Sequences of a decode.
    pub decode: Vec<usize>,
    /// Tokens of a prefill.
    pub prefill: Vec<usize>,
    /// Blocks of an export or import.
    pub transfer: Vec<usize>,
}

impl Ladder {
    /// Rungs up to the most sequences and tokens a step may have; both at least 1.
    pub fn new(max_batch: usize, max_chunk: usize) -> Self {
        Self {
            decode: rungs(1, DECODE_GROWTH, max_batch),
            prefill: rungs(PREFILL_FIRST, PREFILL_GROWTH, max_chunk),
            transfer: TRANSFER.to_vec(),
        }
    }

    /// The smallest rung that holds `n`, or else the greatest.
    pub fn rung(rungs: &[usize], n: usize) -> usize {
        rungs
            .iter()
            .copied()
            .find(|&r| r >= n)
            .or(rungs.last().copied())
            .unwrap_or(1)
    }
}

fn rungs(first: usize, growth: usize, last: usize) -> Vec<usize> {
    let mut list: Vec<usize> = std::iter::successors(Some(first), |&n| n.checked_mul(growth))
        .take_while(|&n| n < last)
        .collect();
    list.push(last.max(1));
    list
}

fn export(config: &Config, pool: &Pool, blocks: usize) -> Result<Graph, ShapeError> {
    let mut graph = Graph::new(&format!("export_{blocks}"));
    let ids = graph.param(
        input::IDS,
        Source::Step,
        Element::I32,
        &[(Axis::Page, blocks)],
    );
    let caches = cache_params(&mut graph, config, pool);
    let data = graph.gather_blocks(ids, &caches)?;
    graph.set_outputs(vec![data]);
    Ok(graph)
}

fn import(config: &Config, pool: &Pool, blocks: usize) -> Result<Graph, ShapeError> {
    let mut graph = Graph::new(&format!("import_{blocks}"));
    let ids = graph.param(
        input::IDS,
        Source::Step,
        Element::I32,
        &[(Axis::Page, blocks)],
    );
    let axes = [
        (Axis::Layer, config.n_layers),
        (Axis::KvHead, config.n_kv_heads),
        (Axis::Page, blocks),
        (Axis::KeyValue, 2),
        (Axis::Slot, pool.block_size),
        (Axis::HeadDim, config.head_dim),
    ];
    let data = graph.param("data", Source::Bulk, pool.element, &axes);
    let caches = cache_params(&mut graph, config, pool);
    let filled: Result<Vec<_>, _> = caches
        .into_iter()
        .enumerate()
        .map(|(layer, cache)| graph.scatter_blocks(cache, ids, data, layer))
        .collect();
    graph.set_outputs(filled?);
    Ok(graph)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rope, RopeScaling};
    use baton_graph::{Arg, Lowerings};

    fn tiny() -> Config {
        Config {
            vocab_size: 96,
            hidden_size: 64,
            intermediate_size: 80,
            n_layers: 2,
            n_heads: 8,
            n_kv_heads: 2,
            head_dim: 16,
            rms_norm_eps: 1e-5,
            rope: Rope {
                theta: 10_000.0,
                scaling: RopeScaling::None,
            },
            max_position_embeddings: 128,
            tie_word_embeddings: false,
            attention_bias: true,
            mlp_bias: true,
        }
    }

    const POOL: Pool = Pool {
        element: Element::F32,
        n_blocks: 9,
        block_size: 4,
        max_model_len: 30,
    };

    #[test]
    fn rungs_grow_up_to_the_limit() {
        let ladder = Ladder::new(8, 512);
        assert_eq!(ladder.decode, [1, 4, 8]);
        assert_eq!(ladder.prefill, [16, 128, 512]);
        assert_eq!(
            Ladder::new(1, 4),
            Ladder {
                decode: vec![1],
                prefill: vec![4],
                transfer: TRANSFER.to_vec()
            }
        );
        assert_eq!(Ladder::rung(&ladder.decode, 3), 4);
        assert_eq!(Ladder::rung(&ladder.decode, 8), 8);
        assert_eq!(Ladder::rung(&ladder.decode, 99), 8);
    }

    #[test]
    fn every_program_builds_and_lowers_for_every_kind_of_llama() {
        let tied = Config {
            tie_word_embeddings: true,
            attention_bias: false,
            mlp_bias: false,
            ..tiny()
        };
        for config in [tiny(), tied] {
            for program in [
                Program::Decode(3),
                Program::Prefill(16),
                Program::Export(2),
                Program::Import(2),
            ] {
                let graph = program.graph(&config, &POOL).unwrap();
                Lowerings::plain().lower(&graph).unwrap();
            }
        }
    }

    #[test]
    fn programs_are_plain_stablehlo_with_static_shapes_for_any_platform() {
        for program in [
            Program::Decode(3),
            Program::Prefill(16),
            Program::Export(2),
            Program::Import(2),
        ] {
            let graph = program.graph(&tiny(), &POOL).unwrap();
            let text = Lowerings::plain().lower(&graph).unwrap().text;
            assert!(
                !text.contains("custom_call") && !text.contains("tensor<?"),
                "{program}"
            );
            let of_stablehlo =
                |line: &str| !line.trim_start().starts_with('%') || line.contains("stablehlo.");
            assert!(text.lines().all(of_stablehlo), "{program}");
        }
    }

    #[test]
    fn half_precision_programs_lower_too() {
        let pool = Pool {
            element: Element::BF16,
            ..POOL
        };
        let graph = Program::Prefill(16).graph(&tiny(), &pool).unwrap();
        assert!(
            Lowerings::plain()
                .lower(&graph)
                .unwrap()
                .text
                .contains("bf16")
        );
    }

    #[test]
    fn a_step_takes_every_weight_once_and_gives_every_cache_back() {
        let lowered = Lowerings::plain()
            .lower(&Program::Decode(1).graph(&tiny(), &POOL).unwrap())
            .unwrap();
        let names: Vec<_> = lowered
            .args
            .iter()
            .filter_map(|a| {
                if let Arg::Weight { name, .. } = a {
                    Some(name.clone())
                } else {
                    None
                }
            })
            .collect();
        let expected: Vec<_> = crate::weights(&tiny())
            .into_iter()
            .map(|w| w.name)
            .collect();
        assert_eq!(names, expected);
        let donated: Vec<_> = lowered
            .args
            .iter()
            .filter_map(|a| {
                if let Arg::Cache { donated_to, .. } = a {
                    Some(*donated_to)
                } else {
                    None
                }
            })
            .collect();
        assert_eq!(donated, [Some(2), Some(3)]);
    }

    #[test]
    fn an_unchecked_configuration_is_refused_in_words() {
        let config = Config {
            n_kv_heads: 3,
            ..tiny()
        };
        let error = Program::Decode(1)
            .graph(&config, &POOL)
            .unwrap_err()
            .to_string();
        assert!(error.contains("layer 0 attention: attend: q is"), "{error}");
    }
}
