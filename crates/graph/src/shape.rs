//! Shapes with named axes.

use std::fmt;

/// What a dimension counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Sequences of a step.
    Seq,
    /// Tokens of one sequence in a step.
    Token,
    /// The residual stream's width.
    Hidden,
    /// Query heads.
    Head,
    /// Key and value heads.
    KvHead,
    /// Elements of a head.
    HeadDim,
    /// The gated MLP's width.
    Inner,
    /// Token ids.
    Vocab,
    /// Blocks of the KV pool.
    Block,
    /// Key, then value.
    KeyValue,
    /// Tokens of a block.
    Slot,
    /// Entries of a block table.
    Page,
    /// Transformer layers.
    Layer,
    /// Components of an index or of a wide number.
    Part,
}

impl Axis {
    const fn name(self) -> &'static str {
        match self {
            Self::Seq => "seq",
            Self::Token => "token",
            Self::Hidden => "hidden",
            Self::Head => "head",
            Self::KvHead => "kv_head",
            Self::HeadDim => "head_dim",
            Self::Inner => "inner",
            Self::Vocab => "vocab",
            Self::Block => "block",
            Self::KeyValue => "key_value",
            Self::Slot => "slot",
            Self::Page => "page",
            Self::Layer => "layer",
            Self::Part => "part",
        }
    }
}

/// Named sizes, the slowest first. Row-major without gaps, on every device's host side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape(Vec<(Axis, usize)>);

impl Shape {
    /// A shape.
    pub fn new(axes: &[(Axis, usize)]) -> Self {
        Self(axes.to_vec())
    }

    /// The axes with their sizes.
    pub fn axes(&self) -> &[(Axis, usize)] {
        &self.0
    }

    /// The sizes alone.
    pub fn dims(&self) -> Vec<usize> {
        self.0.iter().map(|&(_, size)| size).collect()
    }

    /// Size of an axis, if the shape has it.
    pub fn size(&self, axis: Axis) -> Option<usize> {
        self.0
            .iter()
            .find(|(a, _)| *a == axis)
            .map(|&(_, size)| size)
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.0.iter().map(|&(_, size)| size).product()
    }

    /// The trailing axes that both shapes end with.
    pub(crate) fn shared_tail(&self, other: &Self) -> usize {
        self.0
            .iter()
            .rev()
            .zip(other.0.iter().rev())
            .take_while(|(a, b)| a == b)
            .count()
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, (axis, size)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{} {size}", axis.name())?;
        }
        f.write_str("]")
    }
}
