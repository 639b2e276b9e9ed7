//! Plain lowerings of everything that touches paged KV in a step.

use super::Call;
use super::dense::positions;
use crate::hlo::{Body, Dot, Element, Gather, Order, Scatter, Type, Value};
use crate::op::Op;

pub(super) fn kv_slots(call: &Call<'_>, b: &mut Body) -> Value {
    let Op::KvSlots {
        block_size,
        n_blocks,
        n_tokens,
    } = *call.op
    else {
        unreachable!("lowered by kind")
    };
    let [start, len, tables] = call.inputs else {
        unreachable!("kv_slots has three inputs")
    };
    let seqs = start.dims()[0];
    let dims = [seqs, n_tokens];
    let ty = Type::new(Element::I32, &dims);
    let positions = positions(b, start, n_tokens);
    let size = b.int(to_i64(block_size), &ty);
    let (page, slot) = (b.div(&positions, &size), b.rem(&positions, &size));
    let row = b.iota(&ty, 0);
    let at = pair(b, &row, &page);
    let how = Gather {
        offset_dims: &[],
        collapsed: &[0, 1],
        index_map: &[0, 1],
        slice: &[1, 1],
    };
    let block = b.gather(tables, &at, how);
    let outside = b.iota(&Type::new(Element::I32, &[seqs * n_tokens]), 0);
    let outside = b.reshape(&outside, &dims);
    let end = b.int(to_i64(n_blocks), &ty);
    let outside = b.add(&outside, &end);
    let token = b.iota(&ty, 1);
    let len = b.extend(len, &dims);
    let real = b.compare(Order::Lt, &token, &len);
    let block = b.select(&real, &block, &outside);
    pair(b, &block, &slot)
}

/// `[seq, token, 2]` from two `[seq, token]`.
fn pair(b: &mut Body, first: &Value, second: &Value) -> Value {
    let dims = [first.dims(), &[1]].concat();
    let (first, second) = (b.reshape(first, &dims), b.reshape(second, &dims));
    b.concatenate(&[first, second], 2)
}

pub(super) fn write_kv(call: &Call<'_>, b: &mut Body) -> Value {
    let [cache, k, v, slots] = call.inputs else {
        unreachable!("write_kv has four inputs")
    };
    let [seqs, tokens, heads, dim] = *k.dims() else {
        unreachable!("k has four axes")
    };
    let dims = [seqs, tokens, 1, heads, dim];
    let (k, v) = (b.reshape(k, &dims), b.reshape(v, &dims));
    let kv = b.concatenate(&[k, v], 2);
    let kv = b.convert(&kv, call.element);
    let how = Scatter {
        window_dims: &[2, 3, 4],
        inserted: &[0, 3],
        index_map: &[0, 3],
    };
    b.scatter(cache, slots, &kv, how)
}

/// Values that every turn of the loop reads.
struct Turn {
    /// `[seq, kv_head, row, head_dim]`; a row is a token of one query head of the group.
    q: Value,
    /// `[seq, row]` positions of the queries.
    query_at: Value,
    /// `[seq]` tokens whose KV exists.
    context: Value,
    tables: Value,
    cache: Value,
    pages: usize,
}

/// Attention in turns of some pages each, with a running softmax, up to the longest context present.
pub(super) fn attend(call: &Call<'_>, b: &mut Body) -> Value {
    let Op::Attend { pages_per_turn } = *call.op else {
        unreachable!("lowered by kind")
    };
    let [q, cache, start, len, tables] = call.inputs else {
        unreachable!("attend has five inputs")
    };
    let [seqs, tokens, heads, dim] = *q.dims() else {
        unreachable!("q has four axes")
    };
    let (kv_heads, slots) = (cache.dims()[2], cache.dims()[3]);
    let group = heads / kv_heads;
    let rows = tokens * group;

    let context = b.add(start, len);
    let n_turns = turns(b, &context, pages_per_turn * slots);
    let q = b.convert(q, cache.ty().element);
    let q = b.reshape(&q, &[seqs, tokens, kv_heads, group, dim]);
    let q = b.transpose(&q, &[0, 2, 1, 3, 4]);
    let q = b.reshape(&q, &[seqs, kv_heads, rows, dim]);
    let query_at = positions(b, start, tokens);
    let query_at = b.extend(&query_at, &[seqs, tokens, group]);
    let query_at = b.reshape(&query_at, &[seqs, rows]);

    let stat = Type::new(Element::F32, &[seqs, kv_heads, rows]);
    let init = [
        b.int(0, n_turns.ty()),
        // Finite, so that a turn in which every key is masked subtracts no infinities.
        b.float(f32::MIN / 2.0, &stat),
        b.float(0.0, &stat),
        b.float(0.0, &Type::new(Element::F32, &[seqs, kv_heads, rows, dim])),
        n_turns,
        q,
        query_at,
        context,
        tables.clone(),
        cache.clone(),
    ];
    let out = b.while_loop(
        &init,
        |b, a| b.compare(Order::Lt, &a[0], &a[4]),
        |b, a| {
            let turn = Turn {
                q: a[5].clone(),
                query_at: a[6].clone(),
                context: a[7].clone(),
                tables: a[8].clone(),
                cache: a[9].clone(),
                pages: pages_per_turn,
            };
            [running_softmax(b, &a[..4], &turn), a[4..].to_vec()].concat()
        },
    );
    let sum = b.extend(&out[2], out[3].dims());
    let mean = b.div(&out[3], &sum);
    let mean = b.convert(&mean, call.element);
    let mean = b.reshape(&mean, &[seqs, kv_heads, tokens, group, dim]);
    let mean = b.transpose(&mean, &[0, 2, 1, 3, 4]);
    b.reshape(&mean, &[seqs, tokens, heads, dim])
}

/// Loop turns that cover the longest context.
fn turns(b: &mut Body, context: &Value, tokens_per_turn: usize) -> Value {
    let longest = b.reduce_max(context, &[0]);
    let up = b.int(to_i64(tokens_per_turn) - 1, longest.ty());
    let size = b.int(to_i64(tokens_per_turn), longest.ty());
    let longest = b.add(&longest, &up);
    b.div(&longest, &size)
}

/// One turn: `state` is turn index, running maximum, sum and weighted values.
fn running_softmax(b: &mut Body, state: &[Value], turn: &Turn) -> Vec<Value> {
    let [i, max, sum, acc] = state else {
        unreachable!("the state has four parts")
    };
    let (k, v, key_at) = read_pages(b, i, turn);
    let scores = masked_scores(b, turn, &k, &key_at);
    let peak = b.reduce_max(&scores, &[3]);
    let new_max = b.max(max, &peak);
    let shift = b.extend(&new_max, scores.dims());
    let p = b.sub(&scores, &shift);
    let p = b.exp(&p);
    let fade = b.sub(max, &new_max);
    let fade = b.exp(&fade);
    let part = b.reduce_sum(&p, &[3]);
    let sum = b.mul(sum, &fade);
    let sum = b.add(&sum, &part);
    let p = b.convert(&p, v.ty().element);
    let part = b.dot(
        &p,
        &v,
        Dot {
            batch: (&[0, 1], &[0, 1]),
            contract: (&[3], &[2]),
        },
    );
    let fade = b.extend(&fade, acc.dims());
    let acc = b.mul(acc, &fade);
    let acc = b.add(&acc, &part);
    let one = b.int(1, i.ty());
    vec![b.add(i, &one), new_max, sum, acc]
}

/// Keys and values `[seq, kv_head, token, head_dim]` of a turn, and the tokens' positions.
fn read_pages(b: &mut Body, i: &Value, turn: &Turn) -> (Value, Value, Value) {
    let [_, two, heads, slots, dim] = *turn.cache.dims() else {
        unreachable!("a cache has five axes")
    };
    let (seqs, tokens) = (turn.tables.dims()[0], turn.pages * slots);
    let zero = b.int(0, i.ty());
    let pages = b.int(to_i64(turn.pages), i.ty());
    let first = b.mul(i, &pages);
    let ids = b.dynamic_slice(&turn.tables, &[&zero, &first], &[seqs, turn.pages]);
    let ids = b.reshape(&ids, &[seqs, turn.pages, 1]);
    let slice = [1, two, heads, slots, dim];
    let how = Gather {
        offset_dims: &[1, 2, 4, 5],
        collapsed: &[0],
        index_map: &[0],
        slice: &slice,
    };
    let kv = b.gather(&turn.cache, &ids, how);
    let half = [seqs, heads, tokens, dim];
    let k = b.slice(&kv, 1, 0..1);
    let k = b.reshape(&k, &half);
    let v = b.slice(&kv, 1, 1..2);
    let v = b.reshape(&v, &half);

    let key_at = b.iota(&Type::new(Element::I32, &[seqs, tokens]), 1);
    let size = b.int(to_i64(tokens), i.ty());
    let base = b.mul(i, &size);
    let base = b.splat(&base, &key_at);
    let key_at = b.add(&key_at, &base);
    // What lies past the context may be anything, and zero times NaN is NaN.
    let context = b.extend(&turn.context, &[seqs, tokens]);
    let real = b.compare(Order::Lt, &key_at, &context);
    let real = b.broadcast(&real, &half, &[0, 2]);
    let nothing = b.float(0.0, v.ty());
    let v = b.select(&real, &v, &nothing);
    (k, v, key_at)
}

/// `[seq, kv_head, row, token]`, minus infinity where a key lies after its query.
fn masked_scores(b: &mut Body, turn: &Turn, k: &Value, key_at: &Value) -> Value {
    let scores = b.dot(
        &turn.q,
        k,
        Dot {
            batch: (&[0, 1], &[0, 1]),
            contract: (&[3], &[3]),
        },
    );
    let dims = scores.dims().to_vec();
    #[expect(
        clippy::cast_precision_loss,
        reason = "heads have a few hundred elements"
    )]
    let scale = b.float((turn.q.dims()[3] as f32).powf(-0.5), scores.ty());
    let scores = b.mul(&scores, &scale);
    let key_at = b.broadcast(key_at, &dims, &[0, 3]);
    let query_at = b.broadcast(&turn.query_at, &dims, &[0, 2]);
    let visible = b.compare(Order::Le, &key_at, &query_at);
    let never = b.float(f32::NEG_INFINITY, scores.ty());
    b.select(&visible, &scores, &never)
}

fn to_i64(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
