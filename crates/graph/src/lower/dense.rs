//! Plain lowerings of embedding, norm, rope, projections and the gated MLP. Sums run in f32.

use super::Call;
use crate::hlo::{Body, Dot, Element, Gather, Type, Value};
use crate::op::Op;

pub(super) fn embed(call: &Call<'_>, b: &mut Body) -> Value {
    let [ids, table] = call.inputs else {
        unreachable!("embed has two inputs")
    };
    let at = b.reshape(ids, &[ids.dims(), &[1]].concat());
    let slice = [1, table.dims()[1]];
    b.gather(
        table,
        &at,
        Gather {
            offset_dims: &[ids.dims().len()],
            collapsed: &[0],
            index_map: &[0],
            slice: &slice,
        },
    )
}

pub(super) fn rms_norm(call: &Call<'_>, b: &mut Body) -> Value {
    let Op::RmsNorm { eps } = *call.op else {
        unreachable!("lowered by kind")
    };
    let (x, weight) = (b.convert(&call.inputs[0], Element::F32), &call.inputs[1]);
    let dims = x.dims().to_vec();
    let last = dims.len() - 1;
    let square = b.mul(&x, &x);
    let sum = b.reduce_sum(&square, &[last]);
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
    let width = b.float(dims[last] as f32, sum.ty());
    let mean = b.div(&sum, &width);
    let eps = b.float(eps, mean.ty());
    let shifted = b.add(&mean, &eps);
    let scale = b.rsqrt(&shifted);
    let scale = b.extend(&scale, &dims);
    let unit = b.mul(&x, &scale);
    let unit = b.convert(&unit, call.element);
    let weight = b.broadcast(weight, &dims, &[last]);
    b.mul(&unit, &weight)
}

pub(super) fn project(call: &Call<'_>, b: &mut Body) -> Value {
    let [x, weight, bias @ ..] = call.inputs else {
        unreachable!("project has a weight")
    };
    // Of `x` and `weight` together, the result lacks the contracted axes twice.
    let shared = (x.dims().len() + weight.dims().len() - call.shape.axes().len()) / 2;
    let out = product(b, x, weight, shared);
    let out = biased(b, out, bias.first());
    b.convert(&out, call.element)
}

pub(super) fn logits(call: &Call<'_>, b: &mut Body) -> Value {
    product(b, &call.inputs[0], &call.inputs[1], 1)
}

pub(super) fn gated_mlp(call: &Call<'_>, b: &mut Body) -> Value {
    let [x, gate, up, down, biases @ ..] = call.inputs else {
        unreachable!("a gated mlp has three weights")
    };
    let gate = product(b, x, gate, 1);
    let gate = biased(b, gate, biases.first());
    let up = product(b, x, up, 1);
    let up = biased(b, up, biases.get(1));
    let sigmoid = b.logistic(&gate);
    let silu = b.mul(&gate, &sigmoid);
    let inner = b.mul(&silu, &up);
    let inner = b.convert(&inner, call.element);
    let out = product(b, &inner, down, 1);
    let out = biased(b, out, biases.get(2));
    b.convert(&out, call.element)
}

pub(super) fn add(call: &Call<'_>, b: &mut Body) -> Value {
    b.add(&call.inputs[0], &call.inputs[1])
}

/// `x` times `weight` over the last `shared` axes of both, in f32. Written as a product of two plain matrices:
/// given more dimensions, XLA's CPU backend transposes the whole weight at every step.
fn product(b: &mut Body, x: &Value, weight: &Value, shared: usize) -> Value {
    let (rows, width) = x.dims().split_at(x.dims().len() - shared);
    let (out, _) = weight.dims().split_at(weight.dims().len() - shared);
    let (dims, width) = ([rows, out].concat(), width.iter().product());
    let x = b.reshape(x, &[rows.iter().product(), width]);
    let weight = b.reshape(weight, &[out.iter().product(), width]);
    let product = b.dot(
        &x,
        &weight,
        Dot {
            batch: (&[], &[]),
            contract: (&[1], &[1]),
        },
    );
    b.reshape(&product, &dims)
}

fn biased(b: &mut Body, x: Value, bias: Option<&Value>) -> Value {
    let Some(bias) = bias else { return x };
    let bias = b.convert(bias, Element::F32);
    let dims = x.dims().to_vec();
    let trailing: Vec<usize> = (dims.len() - bias.dims().len()..dims.len()).collect();
    let bias = b.broadcast(&bias, &dims, &trailing);
    b.add(&x, &bias)
}

pub(super) fn rope_table(call: &Call<'_>, b: &mut Body) -> Value {
    let Op::RopeTable { inv_freq, n_tokens } = call.op else {
        unreachable!("lowered by kind")
    };
    let start = &call.inputs[0];
    let dims = [start.dims()[0], *n_tokens, inv_freq.len()];
    let positions = positions(b, start, *n_tokens);
    let positions = b.convert(&positions, Element::F32);
    let positions = b.extend(&positions, &dims);
    let frequencies = b.floats(inv_freq);
    let frequencies = b.broadcast(&frequencies, &dims, &[2]);
    let angles = b.mul(&positions, &frequencies);
    let (cos, sin) = (b.cos(&angles), b.sin(&angles));
    b.concatenate(&[cos, sin], 2)
}

pub(super) fn rope(call: &Call<'_>, b: &mut Body) -> Value {
    let [x, table] = call.inputs else {
        unreachable!("rope has two inputs")
    };
    let x = b.convert(x, Element::F32);
    let mut half = x.dims().to_vec();
    let width = half[3] / 2;
    half[3] = width;
    let (first, second) = (b.slice(&x, 3, 0..width), b.slice(&x, 3, width..2 * width));
    let cos = b.slice(table, 2, 0..width);
    let cos = b.broadcast(&cos, &half, &[0, 1, 3]);
    let sin = b.slice(table, 2, width..2 * width);
    let sin = b.broadcast(&sin, &half, &[0, 1, 3]);
    let (fc, ss) = (b.mul(&first, &cos), b.mul(&second, &sin));
    let (sc, fs) = (b.mul(&second, &cos), b.mul(&first, &sin));
    let (left, right) = (b.sub(&fc, &ss), b.add(&sc, &fs));
    let out = b.concatenate(&[left, right], 3);
    b.convert(&out, call.element)
}

pub(super) fn last_token(call: &Call<'_>, b: &mut Body) -> Value {
    let [x, len] = call.inputs else {
        unreachable!("last_token has two inputs")
    };
    let [seqs, tokens, hidden] = *x.dims() else {
        unreachable!("x has three axes")
    };
    if tokens == 1 {
        return b.reshape(x, &[seqs, hidden]);
    }
    let one = b.int(1, len.ty());
    let last = b.sub(len, &one);
    let zero = b.int(0, len.ty());
    let last = b.max(&last, &zero);
    let row = b.iota(&Type::new(Element::I32, &[seqs, 1]), 0);
    let last = b.reshape(&last, &[seqs, 1]);
    let at = b.concatenate(&[row, last], 1);
    let slice = [1, 1, hidden];
    b.gather(
        x,
        &at,
        Gather {
            offset_dims: &[1],
            collapsed: &[0, 1],
            index_map: &[0, 1],
            slice: &slice,
        },
    )
}

/// `[seq, token]` positions that count up from each sequence's start.
pub(super) fn positions(b: &mut Body, start: &Value, n_tokens: usize) -> Value {
    let dims = [start.dims()[0], n_tokens];
    let offset = b.iota(&Type::new(Element::I32, &dims), 1);
    let start = b.extend(start, &dims);
    b.add(&start, &offset)
}
