//! The graph itself: nodes in an order in which every input comes before its use.

use crate::hlo::Element;
use crate::op::Op;
use crate::shape::Shape;

/// A node's place in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(usize);

/// Where a parameter comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The model's file; constant.
    Weight,
    /// KV of one layer, in place of which the graph returns its successor.
    Cache,
    /// Small and new at every step.
    Step,
    /// Large and new at every call: KV from another server.
    Bulk,
}

/// One operation with its inputs, and what comes out.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it computes.
    pub op: Op,
    /// From what.
    pub inputs: Vec<NodeId>,
    /// Named sizes of the result.
    pub shape: Shape,
    /// Elements of the result.
    pub element: Element,
}

/// A graph of operations. Walk [`Graph::nodes`] in order to run it.
#[derive(Clone, Debug)]
pub struct Graph {
    name: String,
    nodes: Vec<Node>,
    outputs: Vec<NodeId>,
    place: String,
}

/// An operand that does not fit its operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {what} is {found}, expected {expected}")]
pub struct ShapeError {
    /// The operation, and where in the model.
    pub place: String,
    /// The operand.
    pub what: &'static str,
    /// Its shape.
    pub found: String,
    /// What would fit.
    pub expected: String,
}

impl Graph {
    /// An empty graph.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            nodes: Vec::new(),
            outputs: Vec::new(),
            place: name.to_owned(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Says in errors where the next nodes belong, as `layer 3`.
    pub fn at(&mut self, place: impl Into<String>) {
        self.place = place.into();
    }

    /// All nodes, inputs before their uses.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// A node's shape.
    pub fn shape(&self, id: NodeId) -> &Shape {
        &self.nodes[id.0].shape
    }

    /// What the graph returns.
    pub fn outputs(&self) -> &[NodeId] {
        &self.outputs
    }

    /// Says what the graph returns.
    pub fn set_outputs(&mut self, outputs: Vec<NodeId>) {
        self.outputs = outputs;
    }

    /// The parameters from one source, in the order of their making.
    pub fn params(&self, from: Source) -> impl Iterator<Item = (NodeId, &str)> {
        self.nodes
            .iter()
            .enumerate()
            .filter_map(move |(i, node)| match &node.op {
                Op::Param { name, source } if *source == from => Some((NodeId(i), name.as_str())),
                _ => None,
            })
    }

    pub(crate) fn push(
        &mut self,
        op: Op,
        inputs: &[NodeId],
        shape: Shape,
        element: Element,
    ) -> NodeId {
        self.nodes.push(Node {
            op,
            inputs: inputs.to_vec(),
            shape,
            element,
        });
        NodeId(self.nodes.len() - 1)
    }

    pub(crate) fn mistake(
        &self,
        op: &str,
        what: &'static str,
        found: String,
        expected: String,
    ) -> ShapeError {
        ShapeError {
            place: format!("{}: {op}", self.place),
            what,
            found,
            expected,
        }
    }
}

impl NodeId {
    /// Index into [`Graph::nodes`].
    pub const fn index(self) -> usize {
        self.0
    }
}
