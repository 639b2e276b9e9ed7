//! Building: one method an operation, each of which refuses shapes that do not fit.

use crate::graph::{Graph, NodeId, ShapeError, Source};
use crate::hlo::Element;
use crate::op::Op;
use crate::shape::{Axis, Shape};

type Built = Result<NodeId, ShapeError>;

/// Where a step's sequences stand, and their blocks.
#[derive(Clone, Copy, Debug)]
pub struct KvRows {
    /// `[seq]` i32: position of each sequence's first token in this step.
    pub start: NodeId,
    /// `[seq]` i32: tokens of each sequence in this step; 0 for padding.
    pub len: NodeId,
    /// `[seq, page]` i32: each sequence's blocks, padded with any valid block.
    pub tables: NodeId,
}

/// How each sequence of a step is sampled.
#[derive(Clone, Copy, Debug)]
pub struct SampleRows {
    /// `[seq]` f32; 0 is greedy.
    pub temperature: NodeId,
    /// `[seq]` i32; 0 keeps all.
    pub top_k: NodeId,
    /// `[seq]` f32; 1 keeps all.
    pub top_p: NodeId,
    /// `[seq]` f32; 0 keeps all.
    pub min_p: NodeId,
    /// `[seq, part 2]` u32: low word, high word.
    pub seed: NodeId,
}

impl Graph {
    /// A value from outside.
    pub fn param(
        &mut self,
        name: &str,
        source: Source,
        element: Element,
        axes: &[(Axis, usize)],
    ) -> NodeId {
        self.push(
            Op::Param {
                name: name.to_owned(),
                source,
            },
            &[],
            Shape::new(axes),
            element,
        )
    }

    /// See [`Op::Embed`].
    pub fn embed(&mut self, ids: NodeId, table: NodeId) -> Built {
        let [seq, token] = self.sizes("embed", "ids", ids, [Axis::Seq, Axis::Token])?;
        let [_, hidden] = self.sizes("embed", "table", table, [Axis::Vocab, Axis::Hidden])?;
        let shape = Shape::new(&[
            (Axis::Seq, seq),
            (Axis::Token, token),
            (Axis::Hidden, hidden),
        ]);
        Ok(self.push(Op::Embed, &[ids, table], shape, self.node(table).element))
    }

    /// See [`Op::RmsNorm`].
    pub fn rms_norm(&mut self, x: NodeId, weight: NodeId, eps: f32) -> Built {
        let like = self.node(x);
        let last = Shape::new(&like.shape.axes()[like.shape.axes().len().saturating_sub(1)..]);
        self.expect_shape("rms_norm", "weight", weight, &last)?;
        let (shape, element) = (like.shape.clone(), like.element);
        Ok(self.push(Op::RmsNorm { eps }, &[x, weight], shape, element))
    }

    /// See [`Op::Project`].
    pub fn project(&mut self, x: NodeId, weight: NodeId, bias: Option<NodeId>) -> Built {
        let shape = self.projected("project", x, weight)?;
        let mut inputs = vec![x, weight];
        if let Some(bias) = bias {
            self.expect_bias("project", weight, x, bias)?;
            inputs.push(bias);
        }
        Ok(self.push(Op::Project, &inputs, shape, self.node(x).element))
    }

    /// See [`Op::RopeTable`].
    pub fn rope_table(&mut self, start: NodeId, n_tokens: usize, inv_freq: Vec<f32>) -> Built {
        let [seq] = self.sizes("rope_table", "start", start, [Axis::Seq])?;
        let shape = [
            (Axis::Seq, seq),
            (Axis::Token, n_tokens),
            (Axis::HeadDim, 2 * inv_freq.len()),
        ];
        Ok(self.push(
            Op::RopeTable { inv_freq, n_tokens },
            &[start],
            Shape::new(&shape),
            Element::F32,
        ))
    }

    /// See [`Op::Rope`].
    pub fn rope(&mut self, x: NodeId, table: NodeId) -> Built {
        let [seq, token, dim] = self.sizes(
            "rope",
            "table",
            table,
            [Axis::Seq, Axis::Token, Axis::HeadDim],
        )?;
        let node = self.node(x);
        let (shape, element) = (node.shape.clone(), node.element);
        let heads = match shape.axes() {
            [
                (Axis::Seq, s),
                (Axis::Token, t),
                (Axis::Head | Axis::KvHead, _),
                (Axis::HeadDim, d),
            ] => (*s, *t, *d),
            _ => (0, 0, 0),
        };
        if heads != (seq, token, dim) {
            let expected = format!("[seq {seq}, token {token}, head or kv_head, head_dim {dim}]");
            return Err(self.mistake("rope", "x", shape.to_string(), expected));
        }
        Ok(self.push(Op::Rope, &[x, table], shape, element))
    }

    /// See [`Op::KvSlots`]; `cache` is the shape of every layer's cache.
    pub fn kv_slots(&mut self, rows: KvRows, n_tokens: usize, cache: &Shape) -> Built {
        let [seq] = self.sizes("kv_slots", "start", rows.start, [Axis::Seq])?;
        self.expect_shape(
            "kv_slots",
            "len",
            rows.len,
            &Shape::new(&[(Axis::Seq, seq)]),
        )?;
        self.expect_axis("kv_slots", "tables", rows.tables, (Axis::Seq, seq))?;
        let size = |axis| cache.size(axis).filter(|&n| n > 0);
        let (Some(n_blocks), Some(block_size)) = (size(Axis::Block), size(Axis::Slot)) else {
            let expected = "blocks of slots".to_owned();
            return Err(self.mistake("kv_slots", "cache", cache.to_string(), expected));
        };
        let shape = Shape::new(&[(Axis::Seq, seq), (Axis::Token, n_tokens), (Axis::Part, 2)]);
        let op = Op::KvSlots {
            block_size,
            n_blocks,
            n_tokens,
        };
        Ok(self.push(
            op,
            &[rows.start, rows.len, rows.tables],
            shape,
            Element::I32,
        ))
    }

    /// See [`Op::WriteKv`].
    pub fn write_kv(&mut self, cache: NodeId, k: NodeId, v: NodeId, slots: NodeId) -> Built {
        let [_, _, heads, _, dim] = self.sizes("write_kv", "cache", cache, CACHE)?;
        let [seq, token, _] = self.sizes(
            "write_kv",
            "slots",
            slots,
            [Axis::Seq, Axis::Token, Axis::Part],
        )?;
        let fresh = Shape::new(&[
            (Axis::Seq, seq),
            (Axis::Token, token),
            (Axis::KvHead, heads),
            (Axis::HeadDim, dim),
        ]);
        self.expect_shape("write_kv", "k", k, &fresh)?;
        self.expect_shape("write_kv", "v", v, &fresh)?;
        let (shape, element) = (self.shape(cache).clone(), self.node(cache).element);
        Ok(self.push(Op::WriteKv, &[cache, k, v, slots], shape, element))
    }

    /// See [`Op::Attend`].
    pub fn attend(
        &mut self,
        q: NodeId,
        cache: NodeId,
        rows: KvRows,
        pages_per_turn: usize,
    ) -> Built {
        let axes = [Axis::Seq, Axis::Token, Axis::Head, Axis::HeadDim];
        let [seq, _, heads, dim] = self.sizes("attend", "q", q, axes)?;
        let [_, _, kv_heads, _, _] = self.sizes("attend", "cache", cache, CACHE)?;
        self.expect_axis("attend", "cache", cache, (Axis::HeadDim, dim))?;
        let [_, pages] = self.sizes("attend", "tables", rows.tables, [Axis::Seq, Axis::Page])?;
        for (what, id) in [("start", rows.start), ("len", rows.len)] {
            self.expect_shape("attend", what, id, &Shape::new(&[(Axis::Seq, seq)]))?;
        }
        self.expect_axis("attend", "tables", rows.tables, (Axis::Seq, seq))?;
        if kv_heads == 0 || heads % kv_heads != 0 {
            let expected = format!("head a multiple of kv_head {kv_heads}");
            return Err(self.mistake("attend", "q", self.shape(q).to_string(), expected));
        }
        if pages_per_turn == 0 || pages % pages_per_turn != 0 {
            let expected = format!("page a multiple of {pages_per_turn}");
            return Err(self.mistake(
                "attend",
                "tables",
                self.shape(rows.tables).to_string(),
                expected,
            ));
        }
        let (shape, element) = (self.shape(q).clone(), self.node(q).element);
        let inputs = [q, cache, rows.start, rows.len, rows.tables];
        Ok(self.push(Op::Attend { pages_per_turn }, &inputs, shape, element))
    }

    /// See [`Op::GatedMlp`]; `weights` and `biases` are gate, up, down.
    pub fn gated_mlp(
        &mut self,
        x: NodeId,
        weights: [NodeId; 3],
        biases: Option<[NodeId; 3]>,
    ) -> Built {
        let [gate, up, down] = weights;
        let inner = self.projected("gated_mlp gate", x, gate)?;
        self.expect_shape("gated_mlp", "up", up, &self.shape(gate).clone())?;
        let x_node = self.node(x);
        let (shape, element) = (x_node.shape.clone(), x_node.element);
        let width = |s: &Shape| s.axes()[s.axes().len() - 1];
        let back = Shape::new(&[width(&shape), width(&inner)]);
        self.expect_shape("gated_mlp", "down", down, &back)?;
        let mut inputs = vec![x, gate, up, down];
        if let Some([gate_bias, up_bias, down_bias]) = biases {
            self.expect_shape(
                "gated_mlp",
                "gate bias",
                gate_bias,
                &Shape::new(&[width(&inner)]),
            )?;
            self.expect_shape(
                "gated_mlp",
                "up bias",
                up_bias,
                &Shape::new(&[width(&inner)]),
            )?;
            self.expect_shape(
                "gated_mlp",
                "down bias",
                down_bias,
                &Shape::new(&[width(&shape)]),
            )?;
            inputs.extend([gate_bias, up_bias, down_bias]);
        }
        Ok(self.push(Op::GatedMlp, &inputs, shape, element))
    }

    /// See [`Op::Add`].
    pub fn add(&mut self, a: NodeId, b: NodeId) -> Built {
        let (shape, element) = (self.shape(a).clone(), self.node(a).element);
        self.expect_shape("add", "b", b, &shape)?;
        Ok(self.push(Op::Add, &[a, b], shape, element))
    }

    /// See [`Op::LastToken`].
    pub fn last_token(&mut self, x: NodeId, len: NodeId) -> Built {
        let [seq, _, hidden] =
            self.sizes("last_token", "x", x, [Axis::Seq, Axis::Token, Axis::Hidden])?;
        self.expect_shape("last_token", "len", len, &Shape::new(&[(Axis::Seq, seq)]))?;
        let shape = Shape::new(&[(Axis::Seq, seq), (Axis::Hidden, hidden)]);
        Ok(self.push(Op::LastToken, &[x, len], shape, self.node(x).element))
    }

    /// See [`Op::Logits`].
    pub fn logits(&mut self, x: NodeId, table: NodeId) -> Built {
        self.sizes("logits", "table", table, [Axis::Vocab, Axis::Hidden])?;
        let shape = self.projected("logits", x, table)?;
        Ok(self.push(Op::Logits, &[x, table], shape, Element::F32))
    }

    /// See [`Op::Sample`].
    pub fn sample(&mut self, logits: NodeId, how: SampleRows, rows: KvRows) -> Built {
        let [seq, _] = self.sizes("sample", "logits", logits, [Axis::Seq, Axis::Vocab])?;
        let per_seq = Shape::new(&[(Axis::Seq, seq)]);
        let scalars = [
            ("temperature", how.temperature),
            ("top_k", how.top_k),
            ("top_p", how.top_p),
            ("min_p", how.min_p),
            ("start", rows.start),
            ("len", rows.len),
        ];
        for (what, id) in scalars {
            self.expect_shape("sample", what, id, &per_seq)?;
        }
        self.expect_shape(
            "sample",
            "seed",
            how.seed,
            &Shape::new(&[(Axis::Seq, seq), (Axis::Part, 2)]),
        )?;
        let inputs = [
            logits,
            how.temperature,
            how.top_k,
            how.top_p,
            how.min_p,
            how.seed,
            rows.start,
            rows.len,
        ];
        Ok(self.push(Op::Sample, &inputs, per_seq, Element::I32))
    }

    /// See [`Op::GatherBlocks`].
    pub fn gather_blocks(&mut self, ids: NodeId, caches: &[NodeId]) -> Built {
        let [pages] = self.sizes("gather_blocks", "ids", ids, [Axis::Page])?;
        let Some(&first) = caches.first() else {
            return Err(self.mistake(
                "gather_blocks",
                "caches",
                "none".to_owned(),
                "one or more".to_owned(),
            ));
        };
        let (like, element) = (self.shape(first).clone(), self.node(first).element);
        for &cache in caches {
            self.expect_shape("gather_blocks", "cache", cache, &like)?;
        }
        let shape = self.host_blocks("gather_blocks", first, pages, caches.len())?;
        let inputs: Vec<NodeId> = std::iter::once(ids).chain(caches.iter().copied()).collect();
        Ok(self.push(Op::GatherBlocks, &inputs, shape, element))
    }

    /// See [`Op::ScatterBlocks`].
    pub fn scatter_blocks(
        &mut self,
        cache: NodeId,
        ids: NodeId,
        data: NodeId,
        layer: usize,
    ) -> Built {
        let [pages] = self.sizes("scatter_blocks", "ids", ids, [Axis::Page])?;
        let layers = self.shape(data).size(Axis::Layer).unwrap_or(0);
        let expected = self.host_blocks("scatter_blocks", cache, pages, layers.max(layer + 1))?;
        self.expect_shape("scatter_blocks", "data", data, &expected)?;
        let (shape, element) = (self.shape(cache).clone(), self.node(cache).element);
        Ok(self.push(
            Op::ScatterBlocks { layer },
            &[cache, ids, data],
            shape,
            element,
        ))
    }

    /// Shape of blocks in canonical host order.
    fn host_blocks(
        &self,
        op: &str,
        cache: NodeId,
        pages: usize,
        layers: usize,
    ) -> Result<Shape, ShapeError> {
        let [_, two, heads, slots, dim] = self.sizes(op, "cache", cache, CACHE)?;
        Ok(Shape::new(&[
            (Axis::Layer, layers),
            (Axis::KvHead, heads),
            (Axis::Page, pages),
            (Axis::KeyValue, two),
            (Axis::Slot, slots),
            (Axis::HeadDim, dim),
        ]))
    }

    /// Shape of `x` times `weight` over the axes that both end with.
    fn projected(&self, op: &str, x: NodeId, weight: NodeId) -> Result<Shape, ShapeError> {
        let (xs, ws) = (self.shape(x), self.shape(weight));
        let shared = xs.shared_tail(ws);
        if shared == 0 || shared == ws.axes().len() {
            let expected = format!("output axes, then the last axes of {xs}");
            return Err(self.mistake(op, "weight", ws.to_string(), expected));
        }
        let kept = &xs.axes()[..xs.axes().len() - shared];
        let out = &ws.axes()[..ws.axes().len() - shared];
        Ok(Shape::new(&[kept, out].concat()))
    }

    fn expect_bias(
        &self,
        op: &str,
        weight: NodeId,
        x: NodeId,
        bias: NodeId,
    ) -> Result<(), ShapeError> {
        let ws = self.shape(weight);
        let out = ws.axes().len() - self.shape(x).shared_tail(ws);
        self.expect_shape(op, "bias", bias, &Shape::new(&ws.axes()[..out]))
    }

    fn expect_shape(
        &self,
        op: &str,
        what: &'static str,
        id: NodeId,
        expected: &Shape,
    ) -> Result<(), ShapeError> {
        let found = self.shape(id);
        if found == expected {
            return Ok(());
        }
        Err(self.mistake(op, what, found.to_string(), expected.to_string()))
    }

    fn expect_axis(
        &self,
        op: &str,
        what: &'static str,
        id: NodeId,
        axis: (Axis, usize),
    ) -> Result<(), ShapeError> {
        let found = self.shape(id);
        if found.size(axis.0) == Some(axis.1) {
            return Ok(());
        }
        Err(self.mistake(
            op,
            what,
            found.to_string(),
            format!("one with {}", Shape::new(&[axis])),
        ))
    }

    /// The sizes of a value that must have exactly these axes.
    fn sizes<const N: usize>(
        &self,
        op: &str,
        what: &'static str,
        id: NodeId,
        axes: [Axis; N],
    ) -> Result<[usize; N], ShapeError> {
        let found = self.shape(id);
        if !found.axes().iter().map(|&(a, _)| a).eq(axes) {
            let expected = format!("axes {axes:?}");
            return Err(self.mistake(op, what, found.to_string(), expected));
        }
        Ok(std::array::from_fn(|i| found.axes()[i].1))
    }
}

const CACHE: [Axis; 5] = [
    Axis::Block,
    Axis::KeyValue,
    Axis::KvHead,
    Axis::Slot,
    Axis::HeadDim,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(g: &mut Graph, axes: &[(Axis, usize)]) -> NodeId {
        g.param("w", Source::Weight, Element::F32, axes)
    }

    fn tokens(g: &mut Graph, axes: &[(Axis, usize)]) -> NodeId {
        g.param("x", Source::Step, Element::F32, axes)
    }

    const X: [(Axis, usize); 3] = [(Axis::Seq, 2), (Axis::Token, 3), (Axis::Hidden, 8)];

    #[test]
    fn a_projection_contracts_the_axes_that_both_end_with() {
        let mut g = Graph::new("g");
        let x = tokens(&mut g, &X);
        let q = weight(
            &mut g,
            &[(Axis::Head, 4), (Axis::HeadDim, 2), (Axis::Hidden, 8)],
        );
        let heads = g.project(x, q, None).unwrap();
        assert_eq!(
            g.shape(heads).to_string(),
            "[seq 2, token 3, head 4, head_dim 2]"
        );
        let o = weight(
            &mut g,
            &[(Axis::Hidden, 8), (Axis::Head, 4), (Axis::HeadDim, 2)],
        );
        let back = g.project(heads, o, None).unwrap();
        assert_eq!(g.shape(back), g.shape(x));
    }

    #[test]
    fn a_wrong_axis_is_refused_with_names() {
        let mut g = Graph::new("g");
        let x = tokens(&mut g, &X);
        let w = weight(&mut g, &[(Axis::Head, 4), (Axis::Inner, 8)]);
        g.at("layer 3 q_proj");
        let error = g.project(x, w, None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "layer 3 q_proj: project: weight is [head 4, inner 8], expected output axes, then the last axes of \
             [seq 2, token 3, hidden 8]"
        );
    }

    #[test]
    fn a_wrong_size_is_refused() {
        let mut g = Graph::new("g");
        let x = tokens(&mut g, &X);
        let w = weight(&mut g, &[(Axis::Hidden, 9)]);
        let error = g.rms_norm(x, w, 1e-5).unwrap_err();
        assert_eq!(
            error.to_string(),
            "g: rms_norm: weight is [hidden 9], expected [hidden 8]"
        );
    }

    #[test]
    fn query_heads_must_divide_among_kv_heads() {
        let mut g = Graph::new("g");
        let q = tokens(
            &mut g,
            &[
                (Axis::Seq, 1),
                (Axis::Token, 1),
                (Axis::Head, 3),
                (Axis::HeadDim, 8),
            ],
        );
        let cache = g.param(
            "kv",
            Source::Cache,
            Element::F32,
            &[
                (Axis::Block, 4),
                (Axis::KeyValue, 2),
                (Axis::KvHead, 2),
                (Axis::Slot, 4),
                (Axis::HeadDim, 8),
            ],
        );
        let start = tokens(&mut g, &[(Axis::Seq, 1)]);
        let tables = tokens(&mut g, &[(Axis::Seq, 1), (Axis::Page, 4)]);
        let rows = KvRows {
            start,
            len: start,
            tables,
        };
        assert!(
            g.attend(q, cache, rows, 2)
                .unwrap_err()
                .to_string()
                .contains("multiple of kv_head 2")
        );
    }

    #[test]
    fn a_loop_turn_must_divide_the_block_table() {
        let mut g = Graph::new("g");
        let q = tokens(
            &mut g,
            &[
                (Axis::Seq, 1),
                (Axis::Token, 1),
                (Axis::Head, 2),
                (Axis::HeadDim, 8),
            ],
        );
        let cache = g.param(
            "kv",
            Source::Cache,
            Element::F32,
            &[
                (Axis::Block, 4),
                (Axis::KeyValue, 2),
                (Axis::KvHead, 2),
                (Axis::Slot, 4),
                (Axis::HeadDim, 8),
            ],
        );
        let start = tokens(&mut g, &[(Axis::Seq, 1)]);
        let tables = tokens(&mut g, &[(Axis::Seq, 1), (Axis::Page, 5)]);
        let rows = KvRows {
            start,
            len: start,
            tables,
        };
        assert!(
            g.attend(q, cache, rows, 2)
                .unwrap_err()
                .to_string()
                .contains("page a multiple of 2")
        );
    }
}
