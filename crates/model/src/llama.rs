//! The Llama family as a graph: what a step computes, and which weights it needs.
//!
//! A step takes `seqs` sequences of `tokens` tokens each: with one token each it is a decode, with one sequence a
//! prefill. Models differ in data only (sizes, grouping of heads, ties, biases, rope), never in code.

use crate::Config;
use crate::rope::inverse_frequencies;
use baton_graph::hlo::Element;
use baton_graph::{Axis, Graph, KvRows, NodeId, SampleRows, Shape, ShapeError, Source};
use rustc_hash::FxHashMap;

/// Context tokens that one turn of the plain attention's loop reads.
const CONTEXT_PER_TURN: usize = 256;

/// The KV pool that programs are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Element type of weights, KV and activations.
    pub element: Element,
    /// Blocks, block 0 included.
    pub n_blocks: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Longest sequence.
    pub max_model_len: usize,
}

impl Pool {
    /// Pages that one loop turn reads.
    fn pages_per_turn(&self) -> usize {
        let needed = self.max_model_len.div_ceil(self.block_size).max(1);
        (CONTEXT_PER_TURN / self.block_size).clamp(1, needed)
    }

    /// Entries of every block table: enough for the longest sequence, in whole loop turns.
    pub fn table_len(&self) -> usize {
        self.max_model_len
            .div_ceil(self.block_size)
            .max(1)
            .next_multiple_of(self.pages_per_turn())
    }

    /// Named sizes of one layer's cache.
    pub(crate) fn cache_axes(&self, config: &Config) -> [(Axis, usize); 5] {
        [
            (Axis::Block, self.n_blocks),
            (Axis::KeyValue, 2),
            (Axis::KvHead, config.n_kv_heads),
            (Axis::Slot, self.block_size),
            (Axis::HeadDim, config.head_dim),
        ]
    }
}

/// One weight: its Hugging Face name and named sizes. A matrix is `[out, in]`, where heads and their elements are
/// two axes of one dimension in the file; the bytes are the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Hugging Face's name.
    pub name: String,
    /// Named sizes.
    pub axes: Vec<(Axis, usize)>,
}

/// All weights, in the order in which a step uses them first.
pub fn weights(config: &Config) -> Vec<Weight> {
    let mut list = vec![Weight {
        name: EMBED.to_owned(),
        axes: table_axes(config),
    }];
    for layer in 0..config.n_layers {
        for part in LayerPart::ALL {
            list.push(Weight {
                name: part.name(layer, "weight"),
                axes: part.axes(config),
            });
            if part.has_bias(config) {
                list.push(Weight {
                    name: part.name(layer, "bias"),
                    axes: part.bias_axes(config),
                });
            }
        }
    }
    list.push(Weight {
        name: NORM.to_owned(),
        axes: vec![(Axis::Hidden, config.hidden_size)],
    });
    if !config.tie_word_embeddings {
        list.push(Weight {
            name: HEAD.to_owned(),
            axes: table_axes(config),
        });
    }
    list
}

const EMBED: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

fn table_axes(config: &Config) -> Vec<(Axis, usize)> {
    vec![
        (Axis::Vocab, config.vocab_size),
        (Axis::Hidden, config.hidden_size),
    ]
}

/// The weights of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum LayerPart {
    InputNorm,
    Query,
    Key,
    Value,
    Output,
    PostNorm,
    Gate,
    Up,
    Down,
}

impl LayerPart {
    const ALL: [Self; 9] = [
        Self::InputNorm,
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Output,
        Self::PostNorm,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    fn name(self, layer: usize, what: &str) -> String {
        let part = match self {
            Self::InputNorm => "input_layernorm",
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::PostNorm => "post_attention_layernorm",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        };
        format!("model.layers.{layer}.{part}.{what}")
    }

    fn axes(self, c: &Config) -> Vec<(Axis, usize)> {
        let hidden = (Axis::Hidden, c.hidden_size);
        let inner = (Axis::Inner, c.intermediate_size);
        let dim = (Axis::HeadDim, c.head_dim);
        match self {
            Self::InputNorm | Self::PostNorm => vec![hidden],
            Self::Query => vec![(Axis::Head, c.n_heads), dim, hidden],
            Self::Key | Self::Value => vec![(Axis::KvHead, c.n_kv_heads), dim, hidden],
            Self::Output => vec![hidden, (Axis::Head, c.n_heads), dim],
            Self::Gate | Self::Up => vec![inner, hidden],
            Self::Down => vec![hidden, inner],
        }
    }

    fn bias_axes(self, c: &Config) -> Vec<(Axis, usize)> {
        let axes = self.axes(c);
        let out = if matches!(self, Self::Query | Self::Key | Self::Value) {
            2
        } else {
            1
        };
        axes[..out].to_vec()
    }

    fn has_bias(self, c: &Config) -> bool {
        match self {
            Self::InputNorm | Self::PostNorm => false,
            Self::Query | Self::Key | Self::Value | Self::Output => c.attention_bias,
            Self::Gate | Self::Up | Self::Down => c.mlp_bias,
        }
    }
}

/// Names of a step's small inputs.
pub mod input {
    /// `[seq, token]` i32 token ids.
    pub const TOKENS: &str = "tokens";
    /// `[seq]` i32 position of each sequence's first token.
    pub const START: &str = "start";
    /// `[seq]` i32 tokens of each sequence; 0 for padding.
    pub const LEN: &str = "len";
    /// `[seq, page]` i32 block tables.
    pub const TABLES: &str = "tables";
    /// `[seq]` f32.
    pub const TEMPERATURE: &str = "temperature";
    /// `[seq]` i32.
    pub const TOP_K: &str = "top_k";
    /// `[seq]` f32.
    pub const TOP_P: &str = "top_p";
    /// `[seq]` f32.
    pub const MIN_P: &str = "min_p";
    /// `[seq, 2]` u32, low word first.
    pub const SEED: &str = "seed";
    /// `[block]` i32: the blocks that are exported or imported.
    pub const IDS: &str = "ids";
}

/// A step of `seqs` sequences with `tokens` tokens each. It returns sampled tokens `[seq]`, logits `[seq, vocab]` and
/// every layer's cache.
///
/// # Errors
/// Sizes that contradict each other: the configuration was not [validated](Config::validate).
pub fn step(config: &Config, pool: &Pool, seqs: usize, tokens: usize) -> Result<Graph, ShapeError> {
    let mut b = Step::new(config, pool, seqs, tokens)?;
    let mut x = b.embedded()?;
    let mut caches = Vec::with_capacity(config.n_layers);
    for layer in 0..config.n_layers {
        let (out, cache) = b.layer(layer, x)?;
        x = out;
        caches.push(cache);
    }
    let (sampled, logits) = b.sampled(x)?;
    let mut graph = b.graph;
    graph.set_outputs([vec![sampled, logits], caches].concat());
    Ok(graph)
}

/// A step's graph under construction.
struct Step<'a> {
    config: &'a Config,
    pages_per_turn: usize,
    graph: Graph,
    weights: FxHashMap<String, NodeId>,
    caches: Vec<NodeId>,
    ids: NodeId,
    rows: KvRows,
    how: SampleRows,
    /// What all layers share: rotations of the positions, and where the new KV goes.
    rope: NodeId,
    slots: NodeId,
}

impl<'a> Step<'a> {
    fn new(
        config: &'a Config,
        pool: &Pool,
        seqs: usize,
        tokens: usize,
    ) -> Result<Self, ShapeError> {
        let mut graph = Graph::new(&format!("step_{seqs}x{tokens}"));
        let seq = (Axis::Seq, seqs);
        let mut small =
            |name, element, axes: &[(Axis, usize)]| graph.param(name, Source::Step, element, axes);
        let ids = small(input::TOKENS, Element::I32, &[seq, (Axis::Token, tokens)]);
        let rows = KvRows {
            start: small(input::START, Element::I32, &[seq]),
            len: small(input::LEN, Element::I32, &[seq]),
            tables: small(
                input::TABLES,
                Element::I32,
                &[seq, (Axis::Page, pool.table_len())],
            ),
        };
        let how = SampleRows {
            temperature: small(input::TEMPERATURE, Element::F32, &[seq]),
            top_k: small(input::TOP_K, Element::I32, &[seq]),
            top_p: small(input::TOP_P, Element::F32, &[seq]),
            min_p: small(input::MIN_P, Element::F32, &[seq]),
            seed: small(input::SEED, Element::U32, &[seq, (Axis::Part, 2)]),
        };
        let caches = cache_params(&mut graph, config, pool);
        let weight = |w: Weight| {
            (
                w.name.clone(),
                graph.param(&w.name, Source::Weight, pool.element, &w.axes),
            )
        };
        let weights = weights(config).into_iter().map(weight).collect();
        let frequencies = inverse_frequencies(&config.rope, config.head_dim);
        let rope = graph.rope_table(rows.start, tokens, frequencies)?;
        let slots = graph.kv_slots(rows, tokens, &Shape::new(&pool.cache_axes(config)))?;
        let pages_per_turn = pool.pages_per_turn();
        Ok(Self {
            config,
            pages_per_turn,
            graph,
            weights,
            caches,
            ids,
            rows,
            how,
            rope,
            slots,
        })
    }

    fn weight(&self, name: &str) -> NodeId {
        self.weights[name]
    }

    fn embedded(&mut self) -> Result<NodeId, ShapeError> {
        self.graph.at("embedding");
        self.graph.embed(self.ids, self.weight(EMBED))
    }

    fn layer(&mut self, layer: usize, x: NodeId) -> Result<(NodeId, NodeId), ShapeError> {
        let eps = self.config.rms_norm_eps;
        self.graph.at(format!("layer {layer} attention"));
        let normed = self.graph.rms_norm(
            x,
            self.weight(&LayerPart::InputNorm.name(layer, "weight")),
            eps,
        )?;
        let (attended, cache) = self.attention(layer, normed)?;
        let x = self.graph.add(x, attended)?;
        self.graph.at(format!("layer {layer} mlp"));
        let normed = self.graph.rms_norm(
            x,
            self.weight(&LayerPart::PostNorm.name(layer, "weight")),
            eps,
        )?;
        let parts = [LayerPart::Gate, LayerPart::Up, LayerPart::Down];
        let matrices = parts.map(|p| self.weight(&p.name(layer, "weight")));
        let biases = self
            .config
            .mlp_bias
            .then(|| parts.map(|p| self.weight(&p.name(layer, "bias"))));
        let mlp = self.graph.gated_mlp(normed, matrices, biases)?;
        Ok((self.graph.add(x, mlp)?, cache))
    }

    fn attention(&mut self, layer: usize, x: NodeId) -> Result<(NodeId, NodeId), ShapeError> {
        let q = self.projected(layer, LayerPart::Query, x)?;
        let k = self.projected(layer, LayerPart::Key, x)?;
        let v = self.projected(layer, LayerPart::Value, x)?;
        let q = self.graph.rope(q, self.rope)?;
        let k = self.graph.rope(k, self.rope)?;
        let cache = self.graph.write_kv(self.caches[layer], k, v, self.slots)?;
        let attended = self
            .graph
            .attend(q, cache, self.rows, self.pages_per_turn)?;
        Ok((self.projected(layer, LayerPart::Output, attended)?, cache))
    }

    fn projected(
        &mut self,
        layer: usize,
        part: LayerPart,
        x: NodeId,
    ) -> Result<NodeId, ShapeError> {
        let weight = self.weight(&part.name(layer, "weight"));
        let bias = part
            .has_bias(self.config)
            .then(|| self.weight(&part.name(layer, "bias")));
        self.graph.project(x, weight, bias)
    }

    fn sampled(&mut self, x: NodeId) -> Result<(NodeId, NodeId), ShapeError> {
        self.graph.at("output");
        let last = self.graph.last_token(x, self.rows.len)?;
        let last = self
            .graph
            .rms_norm(last, self.weight(NORM), self.config.rms_norm_eps)?;
        let head = if self.config.tie_word_embeddings {
            EMBED
        } else {
            HEAD
        };
        let logits = self.graph.logits(last, self.weight(head))?;
        Ok((self.graph.sample(logits, self.how, self.rows)?, logits))
    }
}

/// One cache parameter a layer.
pub(crate) fn cache_params(graph: &mut Graph, config: &Config, pool: &Pool) -> Vec<NodeId> {
    let axes = pool.cache_axes(config);
    (0..config.n_layers)
        .map(|layer| graph.param(&format!("kv.{layer}"), Source::Cache, pool.element, &axes))
        .collect()
}
