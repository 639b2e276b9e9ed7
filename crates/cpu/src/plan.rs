//! From the model's graph to sections: what the team does between two meetings.
//!
//! The graph is built for one token of one sequence; here every node of it is a *row*, and a step runs it for as many
//! rows as it has tokens. Nodes that look at one row only join into one section; products that read the same rows join;
//! a sum joins the product it adds to. Nothing here computes.

use crate::PlanError;
use crate::matrix::padded;
use baton_graph::{Axis, Graph, Node, NodeId, Op, Source};
use rustc_hash::FxHashMap;

/// A buffer of f32 rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Buffer(pub(crate) usize);

/// A matrix of [`Plan::matrices`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MatrixId(pub(crate) usize);

/// A vector of [`Plan::vectors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VectorId(pub(crate) usize);

/// Whose rows a section runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// Every token of the step.
    Tokens,
    /// The last token of every sequence that wants a new one.
    Last,
}

/// Something done to one row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RowOp {
    /// A row of a table.
    Embed { table: MatrixId, out: Buffer },
    /// See [`Op::RmsNorm`].
    Norm {
        x: Buffer,
        weight: VectorId,
        eps: f32,
        out: Buffer,
    },
    /// Brings a row into the forms that the next products want.
    Prepare { x: Buffer },
    /// See [`Op::RopeTable`].
    RopeTable { frequencies: Vec<f32>, out: Buffer },
    /// See [`Op::Rope`]; in place.
    Rope {
        x: Buffer,
        table: Buffer,
        head_dim: usize,
    },
    /// See [`Op::WriteKv`].
    WriteKv { layer: usize, k: Buffer, v: Buffer },
    /// `a + b`, over `a`.
    Add { a: Buffer, b: Buffer },
    /// The row of a sequence's last token.
    Last { x: Buffer, out: Buffer },
}

/// A product with the prepared rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProductOp {
    pub(crate) matrix: MatrixId,
    pub(crate) bias: Option<VectorId>,
    pub(crate) out: Buffer,
    pub(crate) then: Then,
}

pub(crate) use crate::matrix::Then;

/// What is done between two meetings.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Work {
    /// Each row by whoever is free.
    Rows(Vec<RowOp>),
    /// Products of the same rows, one after another over all tiles.
    Products { x: Buffer, list: Vec<ProductOp> },
    /// Products of the same rows that want the same tile of both at once.
    Gated { x: Buffer, pair: [ProductOp; 2] },
    /// See [`Op::Attend`].
    Attend {
        layer: usize,
        q: Buffer,
        out: Buffer,
    },
    /// Draws tokens.
    Sample { logits: Buffer },
}

impl Work {
    /// The products that are done here.
    pub(crate) fn products(&self) -> &[ProductOp] {
        match self {
            Self::Products { list, .. } => list,
            Self::Gated { pair, .. } => pair,
            _ => &[],
        }
    }
}

/// A section: work over some rows.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Section {
    pub(crate) space: Space,
    pub(crate) work: Work,
}

impl Section {
    /// Whether every member may do all of its few rows for itself, in rows of its own, instead of meeting the others
    /// afterwards: it only makes what products read, and nothing that they write.
    pub(crate) fn is_private(&self, next: Option<&Self>) -> bool {
        let (Work::Rows(list), Some(next)) = (&self.work, next) else {
            return false;
        };
        let written = next.work.products();
        let read = |op: &RowOp| match op {
            RowOp::Norm { x, .. } | RowOp::Prepare { x } => Some(*x),
            _ => None,
        };
        let is_free = |x| written.iter().all(|product| product.out != x);
        !written.is_empty() && list.iter().all(|op| read(op).is_some_and(is_free))
    }

    /// Whether a private run of this section leaves its own version of these rows.
    pub(crate) fn makes(&self, buffer: Buffer) -> bool {
        matches!(&self.work, Work::Rows(list)
            if list.iter().any(|op| matches!(op, RowOp::Norm { out, .. } if *out == buffer)))
    }
}

/// A weight that is multiplied with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MatrixUse {
    pub(crate) name: String,
    pub(crate) n_out: usize,
    pub(crate) n_in: usize,
}

/// A weight that is added or scaled by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VectorUse {
    pub(crate) name: String,
    pub(crate) len: usize,
}

/// A whole step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    pub(crate) sections: Vec<Section>,
    pub(crate) matrices: Vec<MatrixUse>,
    pub(crate) vectors: Vec<VectorUse>,
    /// Elements of each buffer's rows.
    pub(crate) widths: Vec<usize>,
    /// The same, padding included.
    pub(crate) strides: Vec<usize>,
}

impl Plan {
    /// The plan of a graph that computes one token of one sequence.
    ///
    /// # Errors
    /// The graph does something that rows cannot.
    pub(crate) fn new(graph: &Graph) -> Result<Self, PlanError> {
        let mut planner = Planner::new(graph);
        for (i, node) in graph.nodes().iter().enumerate() {
            planner.at = i;
            planner.node(node)?;
        }
        Ok(planner.plan)
    }
}

/// What a node's value is.
#[derive(Clone, Debug)]
enum Value {
    Rows(Buffer),
    Weight(String),
    Cache(usize),
    /// Small inputs and what only says where things lie: the executor knows.
    Known,
}

struct Planner<'a> {
    graph: &'a Graph,
    plan: Plan,
    values: Vec<Value>,
    /// The last node that reads a node.
    last_use: Vec<usize>,
    /// How often a node is read.
    uses: Vec<usize>,
    /// Nodes whose rows lie in each buffer in use; others are free by width.
    owners: FxHashMap<Buffer, usize>,
    free: Vec<Buffer>,
    at: usize,
    space: Space,
    /// The rows that were prepared last, and the section that did it.
    prepared: Option<Buffer>,
}

impl<'a> Planner<'a> {
    fn new(graph: &'a Graph) -> Self {
        let n = graph.nodes().len();
        let (mut last_use, mut uses) = (vec![0; n], vec![0; n]);
        for (i, node) in graph.nodes().iter().enumerate() {
            for input in &node.inputs {
                last_use[input.index()] = i;
                uses[input.index()] += 1;
            }
        }
        Self {
            graph,
            plan: Plan::default(),
            values: Vec::with_capacity(n),
            last_use,
            uses,
            owners: FxHashMap::default(),
            free: Vec::new(),
            at: 0,
            space: Space::Tokens,
            prepared: None,
        }
    }

    fn node(&mut self, node: &Node) -> Result<(), PlanError> {
        let value = match &node.op {
            Op::Param { name, source } => self.param(name, *source),
            Op::KvSlots { .. } => Value::Known,
            Op::RopeTable { inv_freq, .. } => {
                let out = self.fresh(2 * inv_freq.len());
                let frequencies = inv_freq.clone();
                self.row(RowOp::RopeTable { frequencies, out });
                Value::Rows(out)
            }
            Op::Embed => {
                let width = self.width(node);
                let table = self.matrix(node.inputs[1], width)?;
                let out = self.fresh(width);
                self.row(RowOp::Embed { table, out });
                Value::Rows(out)
            }
            Op::RmsNorm { eps } => self.norm(node, *eps)?,
            Op::Project => self.project(node)?,
            Op::Logits => self.project(node)?,
            Op::GatedMlp => self.gated_mlp(node)?,
            Op::Rope => self.rope(node)?,
            Op::WriteKv => self.write_kv(node)?,
            Op::Attend { .. } => self.attend(node)?,
            Op::Add => self.add(node)?,
            Op::LastToken => self.last_token(node)?,
            Op::Sample => {
                let logits = self.rows(node.inputs[0])?;
                self.section(Work::Sample { logits });
                Value::Known
            }
            Op::GatherBlocks | Op::ScatterBlocks { .. } => {
                return Err(PlanError(format!(
                    "{:?} is no part of a step",
                    node.op.kind()
                )));
            }
        };
        self.values.push(value);
        self.release(node);
        Ok(())
    }

    fn param(&mut self, name: &str, source: Source) -> Value {
        match source {
            Source::Weight => Value::Weight(name.to_owned()),
            Source::Cache => {
                let caches = |v: &&Value| matches!(v, Value::Cache(_));
                Value::Cache(self.values.iter().filter(caches).count())
            }
            Source::Step | Source::Bulk => Value::Known,
        }
    }

    fn norm(&mut self, node: &Node, eps: f32) -> Result<Value, PlanError> {
        let x = self.rows(node.inputs[0])?;
        let width = self.width(node);
        let weight = self.vector(node.inputs[1], width)?;
        let out = self.fresh(width);
        self.row(RowOp::Norm {
            x,
            weight,
            eps,
            out,
        });
        Ok(Value::Rows(out))
    }

    fn project(&mut self, node: &Node) -> Result<Value, PlanError> {
        let x = self.rows(node.inputs[0])?;
        let matrix = self.matrix(node.inputs[1], self.width(self.input(node, 0)))?;
        let n_out = self.plan.matrices[matrix.0].n_out;
        let bias = self.bias(node.inputs.get(2), n_out)?;
        self.prepare(x);
        let out = self.fresh(n_out);
        let product = ProductOp {
            matrix,
            bias,
            out,
            then: Then::Set,
        };
        match self.plan.sections.last_mut() {
            Some(Section {
                work: Work::Products { x: same, list },
                ..
            }) if *same == x => list.push(product),
            _ => self.section(Work::Products {
                x,
                list: vec![product],
            }),
        }
        Ok(Value::Rows(out))
    }

    fn gated_mlp(&mut self, node: &Node) -> Result<Value, PlanError> {
        let x = self.rows(node.inputs[0])?;
        let width = self.width(node);
        let inner = self.graph.shape(node.inputs[1]).count() / width;
        let [gate, up] = [1, 2].map(|i| self.matrix(node.inputs[i], width));
        let [gate_bias, up_bias] = [4, 5].map(|i| self.bias(node.inputs.get(i), inner));
        let (gate, up, gate_bias, up_bias) = (gate?, up?, gate_bias?, up_bias?);
        let down = self.matrix(node.inputs[3], inner)?;
        let down_bias = self.bias(node.inputs.get(6), width)?;
        self.prepare(x);
        let middle = self.fresh(inner);
        let one = |matrix, bias, then| ProductOp {
            matrix,
            bias,
            out: middle,
            then,
        };
        let pair = [
            one(gate, gate_bias, Then::Set),
            one(up, up_bias, Then::Gate),
        ];
        self.section(Work::Gated { x, pair });
        self.prepare(middle);
        let out = self.fresh(width);
        let list = vec![ProductOp {
            matrix: down,
            bias: down_bias,
            out,
            then: Then::Set,
        }];
        self.section(Work::Products { x: middle, list });
        self.free.push(middle);
        Ok(Value::Rows(out))
    }

    fn rope(&mut self, node: &Node) -> Result<Value, PlanError> {
        let (x, table) = (self.rows(node.inputs[0])?, self.rows(node.inputs[1])?);
        if self.uses[node.inputs[0].index()] != 1 {
            return Err(PlanError(
                "rotated rows are read before rotation".to_owned(),
            ));
        }
        let head_dim = node.shape.size(Axis::HeadDim).unwrap_or(1);
        self.row(RowOp::Rope { x, table, head_dim });
        self.owners.insert(x, self.at);
        Ok(Value::Rows(x))
    }

    fn write_kv(&mut self, node: &Node) -> Result<Value, PlanError> {
        let layer = self.cache(node.inputs[0])?;
        let (k, v) = (self.rows(node.inputs[1])?, self.rows(node.inputs[2])?);
        self.row(RowOp::WriteKv { layer, k, v });
        Ok(Value::Cache(layer))
    }

    fn attend(&mut self, node: &Node) -> Result<Value, PlanError> {
        let (q, layer) = (self.rows(node.inputs[0])?, self.cache(node.inputs[1])?);
        let out = self.fresh(self.width(node));
        self.section(Work::Attend { layer, q, out });
        Ok(Value::Rows(out))
    }

    /// Over the first operand; as part of the product that made the second, if that came right before.
    fn add(&mut self, node: &Node) -> Result<Value, PlanError> {
        let (a, b) = (self.rows(node.inputs[0])?, self.rows(node.inputs[1])?);
        let free_after = |id: NodeId| self.last_use[id.index()] == self.at;
        if !(free_after(node.inputs[0]) && free_after(node.inputs[1]) && a != b) {
            return Err(PlanError("an operand of a sum is read again".to_owned()));
        }
        if let Some(Section {
            work: Work::Products { list, .. },
            ..
        }) = self.plan.sections.last_mut()
            && let [only] = &mut list[..]
            && only.out == b
        {
            only.out = a;
            only.then = Then::Add;
        } else {
            self.row(RowOp::Add { a, b });
        }
        self.owners.insert(a, self.at);
        Ok(Value::Rows(a))
    }

    fn last_token(&mut self, node: &Node) -> Result<Value, PlanError> {
        let x = self.rows(node.inputs[0])?;
        let out = self.fresh(self.width(node));
        self.space = Space::Last;
        self.row(RowOp::Last { x, out });
        Ok(Value::Rows(out))
    }

    /// Adds to the section before if that runs over the same rows.
    fn row(&mut self, op: RowOp) {
        if let Some(Section {
            space,
            work: Work::Rows(list),
        }) = self.plan.sections.last_mut()
            && *space == self.space
        {
            list.push(op);
            return;
        }
        self.section(Work::Rows(vec![op]));
    }

    fn section(&mut self, work: Work) {
        self.plan.sections.push(Section {
            space: self.space,
            work,
        });
    }

    /// Makes sure that rows are prepared for products.
    fn prepare(&mut self, x: Buffer) {
        if self.prepared != Some(x) {
            self.row(RowOp::Prepare { x });
            self.prepared = Some(x);
        }
    }

    /// A buffer that nobody needs any more, or a new one.
    fn fresh(&mut self, width: usize) -> Buffer {
        let same = |b: &Buffer| self.plan.widths[b.0] == width;
        let buffer = match self.free.iter().position(same) {
            Some(i) => self.free.swap_remove(i),
            None => {
                self.plan.widths.push(width);
                self.plan.strides.push(padded(width));
                Buffer(self.plan.widths.len() - 1)
            }
        };
        if self.prepared == Some(buffer) {
            self.prepared = None;
        }
        self.owners.insert(buffer, self.at);
        buffer
    }

    /// Frees the buffers of inputs that were read for the last time.
    fn release(&mut self, node: &Node) {
        for input in &node.inputs {
            let i = input.index();
            if let Value::Rows(buffer) = self.values[i]
                && self.last_use[i] == self.at
                && self.owners.get(&buffer) == Some(&i)
            {
                self.owners.remove(&buffer);
                self.free.push(buffer);
            }
        }
    }

    fn rows(&self, id: NodeId) -> Result<Buffer, PlanError> {
        match &self.values[id.index()] {
            Value::Rows(buffer) => Ok(*buffer),
            other => Err(PlanError(format!("expected rows, found {other:?}"))),
        }
    }

    fn cache(&self, id: NodeId) -> Result<usize, PlanError> {
        match &self.values[id.index()] {
            Value::Cache(layer) => Ok(*layer),
            other => Err(PlanError(format!("expected a cache, found {other:?}"))),
        }
    }

    fn weight(&self, id: NodeId) -> Result<String, PlanError> {
        match &self.values[id.index()] {
            Value::Weight(name) => Ok(name.clone()),
            other => Err(PlanError(format!("expected a weight, found {other:?}"))),
        }
    }

    fn matrix(&mut self, id: NodeId, n_in: usize) -> Result<MatrixId, PlanError> {
        let name = self.weight(id)?;
        let n_out = self.graph.shape(id).count() / n_in.max(1);
        let found = self.plan.matrices.iter().position(|m| m.name == name);
        Ok(MatrixId(found.unwrap_or_else(|| {
            self.plan.matrices.push(MatrixUse { name, n_out, n_in });
            self.plan.matrices.len() - 1
        })))
    }

    fn vector(&mut self, id: NodeId, len: usize) -> Result<VectorId, PlanError> {
        let name = self.weight(id)?;
        let found = self.plan.vectors.iter().position(|v| v.name == name);
        Ok(VectorId(found.unwrap_or_else(|| {
            self.plan.vectors.push(VectorUse { name, len });
            self.plan.vectors.len() - 1
        })))
    }

    fn bias(&mut self, id: Option<&NodeId>, len: usize) -> Result<Option<VectorId>, PlanError> {
        id.map(|&id| self.vector(id, len)).transpose()
    }

    fn input(&self, node: &Node, i: usize) -> &'a Node {
        self.graph.node(node.inputs[i])
    }

    /// Elements of one row.
    fn width(&self, node: &Node) -> usize {
        let of_row = |(axis, size): &(Axis, usize)| match axis {
            Axis::Seq | Axis::Token => 1,
            _ => *size,
        };
        node.shape.axes().iter().map(of_row).product()
    }
}
