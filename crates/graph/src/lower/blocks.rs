//! Plain lowerings of KV blocks' way to and from canonical host order.

use super::Call;
use crate::hlo::{Body, Gather, Scatter, Value};
use crate::op::Op;

pub(super) fn gather_blocks(call: &Call<'_>, b: &mut Body) -> Value {
    let [ids, caches @ ..] = call.inputs else {
        unreachable!("gather_blocks has ids")
    };
    let at = b.reshape(ids, &[ids.dims()[0], 1]);
    let layers: Vec<Value> = caches
        .iter()
        .map(|cache| gather_layer(b, cache, &at))
        .collect();
    b.concatenate(&layers, 0)
}

fn gather_layer(b: &mut Body, cache: &Value, at: &Value) -> Value {
    let [_, two, heads, slots, dim] = *cache.dims() else {
        unreachable!("a cache has five axes")
    };
    let slice = [1, two, heads, slots, dim];
    let how = Gather {
        offset_dims: &[0, 1, 3, 4],
        collapsed: &[0],
        index_map: &[0],
        slice: &slice,
    };
    let blocks = b.gather(cache, at, how);
    let blocks = b.transpose(&blocks, &[1, 2, 0, 3, 4]);
    b.reshape(&blocks, &[1, heads, at.dims()[0], two, slots, dim])
}

pub(super) fn scatter_blocks(call: &Call<'_>, b: &mut Body) -> Value {
    let Op::ScatterBlocks { layer } = *call.op else {
        unreachable!("lowered by kind")
    };
    let [cache, ids, data] = call.inputs else {
        unreachable!("scatter_blocks has three inputs")
    };
    let at = b.reshape(ids, &[ids.dims()[0], 1]);
    let dims = data.dims()[1..].to_vec();
    let blocks = b.slice(data, 0, layer..layer + 1);
    let blocks = b.reshape(&blocks, &dims);
    let blocks = b.transpose(&blocks, &[1, 2, 0, 3, 4]);
    let how = Scatter {
        window_dims: &[1, 2, 3, 4],
        inserted: &[0],
        index_map: &[0],
    };
    b.scatter(cache, &at, &blocks, how)
}
