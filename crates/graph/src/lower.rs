//! From a graph to one StableHLO function.
//!
//! Small inputs travel as one packed `i32` array, so that a step costs one upload. Arguments come in the order: step,
//! bulk, caches, weights. A cache is donated to the result that succeeds it.

mod attention;
mod blocks;
mod dense;
mod sampling;

use crate::graph::{Graph, NodeId, Source};
use crate::hlo::{Body, Element, HloError, Module, Type, Value};
use crate::op::{Kind, Op};
use crate::shape::Shape;
use std::collections::BTreeMap;

/// One node about to be lowered.
#[derive(Debug)]
pub struct Call<'a> {
    /// The operation.
    pub op: &'a Op,
    /// Its inputs, as [`Op`] orders them.
    pub inputs: &'a [Value],
    /// Shape of the result.
    pub shape: &'a Shape,
    /// Elements of the result.
    pub element: Element,
}

/// Writes one node's operations and returns its value.
pub type LowerFn = fn(&Call<'_>, &mut Body) -> Value;

/// Which function lowers each kind of node.
#[derive(Clone, Debug)]
pub struct Lowerings(BTreeMap<Kind, LowerFn>);

impl Lowerings {
    /// Plain StableHLO for every kind: right on every platform, and the oracle for kernels.
    pub fn plain() -> Self {
        let table: [(Kind, LowerFn); 15] = [
            (Kind::Embed, dense::embed),
            (Kind::RmsNorm, dense::rms_norm),
            (Kind::Project, dense::project),
            (Kind::RopeTable, dense::rope_table),
            (Kind::Rope, dense::rope),
            (Kind::KvSlots, attention::kv_slots),
            (Kind::WriteKv, attention::write_kv),
            (Kind::Attend, attention::attend),
            (Kind::GatedMlp, dense::gated_mlp),
            (Kind::Add, dense::add),
            (Kind::LastToken, dense::last_token),
            (Kind::Logits, dense::logits),
            (Kind::Sample, sampling::sample),
            (Kind::GatherBlocks, blocks::gather_blocks),
            (Kind::ScatterBlocks, blocks::scatter_blocks),
        ];
        Self(table.into())
    }

    /// Puts a platform's own lowering in a kind's place.
    #[must_use]
    pub fn with(mut self, kind: Kind, lower: LowerFn) -> Self {
        self.0.insert(kind, lower);
        self
    }

    /// Lowers a graph.
    ///
    /// # Errors
    /// An operation that does not type-check: a mistake in a lowering, since the graph's shapes were checked before.
    pub fn lower(&self, graph: &Graph) -> Result<Lowered, HloError> {
        let mut module = Module::new(graph.name());
        let mut values: Vec<Option<Value>> = vec![None; graph.nodes().len()];
        let args = declare(graph, &mut module, &mut values);
        for (i, node) in graph.nodes().iter().enumerate() {
            let Some(lower) = self.0.get(&node.op.kind()) else {
                continue;
            };
            let inputs: Vec<Value> = node
                .inputs
                .iter()
                .filter_map(|id| values[id.index()].clone())
                .collect();
            let call = Call {
                op: &node.op,
                inputs: &inputs,
                shape: &node.shape,
                element: node.element,
            };
            let value = lower(&call, module.body());
            let ty = Type::new(node.element, &node.shape.dims());
            if *value.ty() != ty {
                module.body().refuse(
                    "lowering",
                    format!("{:?} is {}, not {ty}", node.op.kind(), value.ty()),
                );
            }
            values[i] = Some(value);
        }
        let results: Vec<Value> = graph
            .outputs()
            .iter()
            .filter_map(|id| values[id.index()].clone())
            .collect();
        let types = results.iter().map(|v| v.ty().clone()).collect();
        Ok(Lowered {
            text: module.finish(&results)?,
            args,
            results: types,
        })
    }
}

/// A lowered graph: the program's text and what its arguments are.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// The module.
    pub text: String,
    /// The function's arguments in order.
    pub args: Vec<Arg>,
    /// Types of the results in order.
    pub results: Vec<Type>,
}

/// One argument of a lowered program.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// All small inputs in one `i32` array.
    Step(Packing),
    /// A large input.
    Bulk(Type),
    /// KV of a layer, counted from 0.
    Cache {
        /// Which.
        layer: usize,
        /// The result that takes its buffer over.
        donated_to: Option<usize>,
        /// Its type.
        ty: Type,
    },
    /// A weight.
    Weight {
        /// Hugging Face's name.
        name: String,
        /// Its type; row-major, so heads and head elements may be split or joined at will.
        ty: Type,
    },
}

/// Where each small input lies in the packed array; 32-bit elements of any type, bit for bit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packing {
    /// The inputs in order.
    pub fields: Vec<Field>,
    /// Elements of the whole array.
    pub len: usize,
}

/// One input in a [`Packing`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// The parameter's name.
    pub name: String,
    /// Its first element.
    pub offset: usize,
    /// Its number of elements.
    pub len: usize,
}

impl Packing {
    fn of(graph: &Graph) -> Self {
        let mut packing = Self::default();
        for (id, name) in graph.params(Source::Step) {
            let len = graph.shape(id).count();
            packing.fields.push(Field {
                name: name.to_owned(),
                offset: packing.len,
                len,
            });
            packing.len += len;
        }
        packing
    }

    /// Where a parameter lies.
    pub fn range(&self, name: &str) -> Option<std::ops::Range<usize>> {
        self.fields
            .iter()
            .find(|f| f.name == name)
            .map(|f| f.offset..f.offset + f.len)
    }
}

/// Adds the function's arguments and the values of all parameters.
fn declare(graph: &Graph, module: &mut Module, values: &mut [Option<Value>]) -> Vec<Arg> {
    let mut args = Vec::new();
    let ty = |id: NodeId| Type::new(graph.node(id).element, &graph.shape(id).dims());
    let packing = Packing::of(graph);
    if packing.len > 0 {
        let packed = module.arg(Type::new(Element::I32, &[packing.len]), None);
        for ((id, _), field) in graph.params(Source::Step).zip(&packing.fields) {
            let body = module.body();
            let part = body.slice(&packed, 0, field.offset..field.offset + field.len);
            let part = body.bitcast(&part, ty(id).element);
            values[id.index()] = Some(body.reshape(&part, &ty(id).dims));
        }
        args.push(Arg::Step(packing));
    }
    for (id, _) in graph.params(Source::Bulk) {
        values[id.index()] = Some(module.arg(ty(id), None));
        args.push(Arg::Bulk(ty(id)));
    }
    for (layer, (id, _)) in graph.params(Source::Cache).enumerate() {
        let donated_to = graph
            .outputs()
            .iter()
            .position(|&out| succeeds(graph, out, id));
        values[id.index()] = Some(module.arg(ty(id), donated_to));
        args.push(Arg::Cache {
            layer,
            donated_to,
            ty: ty(id),
        });
    }
    for (id, name) in graph.params(Source::Weight) {
        values[id.index()] = Some(module.arg(ty(id), None));
        args.push(Arg::Weight {
            name: name.to_owned(),
            ty: ty(id),
        });
    }
    args
}

/// Whether `node` is `cache` after writes.
fn succeeds(graph: &Graph, mut node: NodeId, cache: NodeId) -> bool {
    while let Op::WriteKv | Op::ScatterBlocks { .. } = graph.node(node).op {
        node = graph.node(node).inputs[0];
    }
    node == cache
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Axis, KvRows};

    fn copied(call: &Call<'_>, body: &mut Body) -> Value {
        body.raw(
            call.inputs[0].ty().clone(),
            format_args!("stablehlo.custom_call @kernel()"),
        )
    }

    fn sum() -> Graph {
        let mut g = Graph::new("sum");
        let axes = [(Axis::Seq, 2), (Axis::Hidden, 4)];
        let a = g.param("a", Source::Step, Element::F32, &axes);
        let b = g.param("b", Source::Weight, Element::F32, &axes);
        let c = g.add(a, b).unwrap();
        g.set_outputs(vec![c]);
        g
    }

    #[test]
    fn small_inputs_are_unpacked_from_one_array() {
        let lowered = Lowerings::plain().lower(&sum()).unwrap();
        assert_eq!(
            lowered.text,
            "module @sum {\n  func.func public @main(%arg0: tensor<8xi32>, %arg1: tensor<2x4xf32>) -> \
             (tensor<2x4xf32>) {\n    %1 = stablehlo.slice %arg0 [0:8] : (tensor<8xi32>) -> tensor<8xi32>\n    \
             %2 = stablehlo.bitcast_convert %1 : (tensor<8xi32>) -> tensor<8xf32>\n    \
             %3 = stablehlo.reshape %2 : (tensor<8xf32>) -> tensor<2x4xf32>\n    \
             %4 = stablehlo.add %3, %arg1 : tensor<2x4xf32>\n    return %4 : tensor<2x4xf32>\n  }\n}\n"
        );
        assert!(matches!(&lowered.args[0], Arg::Step(p) if p.range("a") == Some(0..8)));
    }

    #[test]
    fn a_platform_puts_its_kernel_in_a_nodes_place() {
        let text = Lowerings::plain()
            .with(Kind::Add, copied)
            .lower(&sum())
            .unwrap()
            .text;
        assert!(text.contains("custom_call @kernel") && !text.contains("stablehlo.add"));
    }

    #[test]
    fn a_cache_is_donated_to_its_successor() {
        let mut g = Graph::new("write");
        let cache_axes = [
            (Axis::Block, 4),
            (Axis::KeyValue, 2),
            (Axis::KvHead, 1),
            (Axis::Slot, 4),
            (Axis::HeadDim, 8),
        ];
        let cache = g.param("kv", Source::Cache, Element::F32, &cache_axes);
        let start = g.param("start", Source::Step, Element::I32, &[(Axis::Seq, 1)]);
        let len = g.param("len", Source::Step, Element::I32, &[(Axis::Seq, 1)]);
        let tables = g.param(
            "tables",
            Source::Step,
            Element::I32,
            &[(Axis::Seq, 1), (Axis::Page, 4)],
        );
        let k_axes = [
            (Axis::Seq, 1),
            (Axis::Token, 3),
            (Axis::KvHead, 1),
            (Axis::HeadDim, 8),
        ];
        let k = g.param("k", Source::Bulk, Element::F32, &k_axes);
        let slots = g
            .kv_slots(KvRows { start, len, tables }, 3, &Shape::new(&cache_axes))
            .unwrap();
        let written = g.write_kv(cache, k, k, slots).unwrap();
        g.set_outputs(vec![slots, written]);
        let lowered = Lowerings::plain().lower(&g).unwrap();
        assert!(matches!(
            lowered.args[2],
            Arg::Cache {
                layer: 0,
                donated_to: Some(1),
                ..
            }
        ));
        assert!(lowered.text.contains("{tf.aliasing_output = 1 : i32}"));
    }
}
