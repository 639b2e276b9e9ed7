//! Plain lowering of sampling: no sort, and a draw that depends on seed, position and logits alone.
//!
//! As vLLM does it: temperature, min-p, top-k, top-p, then one draw; tokens as likely as the last one kept are kept
//! too. Thresholds are found bit by bit on an integer form of the logits that keeps their order; the draw is the
//! maximum of logits plus Gumbel noise, which Threefry-2x32 makes from (seed; position, token id).

use super::Call;
use crate::hlo::{Body, Element, Order, Type, Value};

pub(super) fn sample(call: &Call<'_>, b: &mut Body) -> Value {
    let [logits, temperature, top_k, top_p, min_p, seed, start, len] = call.inputs else {
        unreachable!("sample has eight inputs")
    };
    let zero = b.float(0.0, temperature.ty());
    let random = b.compare(Order::Gt, temperature, &zero);
    let any = any(b, &random);
    let greedy = arg_max(b, logits);
    let ty = greedy.ty().clone();
    let fallback = greedy.clone();
    b.if_else(
        &any,
        &ty,
        |b| {
            let one = b.float(1.0, temperature.ty());
            let divisor = b.select(&random, temperature, &one);
            let scores = tempered(b, logits, &divisor);
            let least = threshold(b, &scores, &random, [top_k, top_p, min_p]);
            let position = b.add(start, len);
            let noise = gumbel(b, seed, &position, scores.ty());
            let noisy = b.add(&scores, &noise);
            let keys = ordered_bits(b, &scores);
            let least = b.extend(&least, keys.dims());
            let kept = b.compare(Order::Ge, &keys, &least);
            let never = b.float(f32::NEG_INFINITY, noisy.ty());
            let noisy = b.select(&kept, &noisy, &never);
            let drawn = arg_max(b, &noisy);
            b.select(&random, &drawn, &greedy)
        },
        |_| fallback,
    )
}

/// Logits less their maximum, divided by the temperature: at most 0, and no infinity divided by another.
fn tempered(b: &mut Body, logits: &Value, divisor: &Value) -> Value {
    let peak = b.reduce_max(logits, &[1]);
    let peak = b.extend(&peak, logits.dims());
    let below = b.sub(logits, &peak);
    let divisor = b.extend(divisor, logits.dims());
    b.div(&below, &divisor)
}

/// Index of each row's greatest value, the first among equals; the row's length if a value is not a number.
fn arg_max(b: &mut Body, x: &Value) -> Value {
    let peak = b.reduce_max(x, &[1]);
    let peak = b.extend(&peak, x.dims());
    let equal = b.compare(Order::Eq, x, &peak);
    let index = b.iota(&x.ty().with(Element::I32), 1);
    let none = b.int(i64::try_from(x.dims()[1]).unwrap_or(i64::MAX), index.ty());
    let index = b.select(&equal, &index, &none);
    b.reduce_min(&index, &[1])
}

/// Whether any element holds.
fn any(b: &mut Body, pred: &Value) -> Value {
    let ones = b.convert(pred, Element::I32);
    let most = b.reduce_max(&ones, &[0]);
    let zero = b.int(0, most.ty());
    b.compare(Order::Gt, &most, &zero)
}

/// Integers in the order of the floats.
fn ordered_bits(b: &mut Body, x: &Value) -> Value {
    let bits = b.bitcast(x, Element::U32);
    let shift = b.int(31, bits.ty());
    let sign = b.shr(&bits, &shift);
    let zero = b.int(0, bits.ty());
    let ones_if_negative = b.sub(&zero, &sign);
    let top = b.int(1 << 31, bits.ty());
    let flip = b.or(&ones_if_negative, &top);
    b.xor(&bits, &flip)
}

/// The least key that top-k, top-p and min-p all keep, never above the greatest key present. Rows that are not drawn
/// from cost nothing.
fn threshold(
    b: &mut Body,
    scores: &Value,
    random: &Value,
    [top_k, top_p, min_p]: [&Value; 3],
) -> Value {
    let keys = ordered_bits(b, scores);
    let ones = b.float(1.0, scores.ty());
    let zero = b.int(0, top_k.ty());
    let limited = b.compare(Order::Gt, top_k, &zero);
    let limited = b.and(&limited, random);
    let k = b.convert(top_k, Element::F32);
    let by_k = mass_threshold(b, &keys, &ones, [&k, &limited]);
    let floor = b.log(min_p);
    let by_min_p = ordered_bits(b, &floor);
    let least = b.max(&by_k, &by_min_p);

    let wide = b.extend(&least, keys.dims());
    let kept = b.compare(Order::Ge, &keys, &wide);
    let weight = b.exp(scores);
    let nothing = b.float(0.0, weight.ty());
    let weight = b.select(&kept, &weight, &nothing);
    let total = b.reduce_sum(&weight, &[1]);
    let target = b.mul(top_p, &total);
    let one = b.float(1.0, top_p.ty());
    let limited = b.compare(Order::Lt, top_p, &one);
    let limited = b.and(&limited, random);
    let by_p = mass_threshold(b, &keys, &weight, [&target, &limited]);
    let least = b.max(&least, &by_p);

    let likeliest = b.reduce_max(&keys, &[1]);
    b.min(&least, &likeliest)
}

/// In each limited row the greatest key such that the keys from it upwards weigh at least the target; elsewhere 0.
/// Costs nothing if no row is limited.
fn mass_threshold(
    b: &mut Body,
    keys: &Value,
    weight: &Value,
    [target, limited]: [&Value; 2],
) -> Value {
    let scalar = Type::new(Element::U32, &[]);
    let any = any(b, limited);
    let top = b.int(1 << 31, &scalar);
    let none = b.int(0, &scalar);
    let bit = b.select(&any, &top, &none);
    let found = b.int(0, &Type::new(Element::U32, target.dims()));
    let init = [bit, found, keys.clone(), weight.clone(), target.clone()];
    let out = b.while_loop(
        &init,
        |b, a| {
            let zero = b.int(0, a[0].ty());
            b.compare(Order::Gt, &a[0], &zero)
        },
        |b, a| {
            let [bit, found, keys, weight, target] = a else {
                unreachable!("five values are carried")
            };
            let wide = b.splat(bit, found);
            let candidate = b.or(found, &wide);
            let least = b.extend(&candidate, keys.dims());
            let above = b.compare(Order::Ge, keys, &least);
            let nothing = b.float(0.0, weight.ty());
            let counted = b.select(&above, weight, &nothing);
            let mass = b.reduce_sum(&counted, &[1]);
            let enough = b.compare(Order::Ge, &mass, target);
            let found = b.select(&enough, &candidate, found);
            let one = b.int(1, bit.ty());
            vec![
                b.shr(bit, &one),
                found,
                keys.clone(),
                weight.clone(),
                target.clone(),
            ]
        },
    );
    let zero = b.int(0, out[1].ty());
    b.select(limited, &out[1], &zero)
}

/// `-ln(-ln(1 - u))` with u in (0, 1) from 32 random bits, exact where the noise is great.
fn gumbel(b: &mut Body, seed: &Value, position: &Value, ty: &Type) -> Value {
    let wide = ty.with(Element::U32);
    let rows = [ty.dims[0], 1];
    let key = [0, 1].map(|part| {
        let word = b.slice(seed, 1, part..part + 1);
        b.broadcast(&word, &wide.dims, &[0, 1])
    });
    let position = b.convert(position, Element::U32);
    let position = b.reshape(&position, &rows);
    let position = b.broadcast(&position, &wide.dims, &[0, 1]);
    let token = b.iota(&wide, 1);
    let bits = threefry(b, &key, [&position, &token]);
    let x = b.convert(&bits, Element::F32);
    let half = b.float(0.5, ty);
    let x = b.add(&x, &half);
    let scale = b.float(2f32.powi(-32), ty);
    let u = b.mul(&x, &scale);
    let below_one = b.float(1.0 - f32::EPSILON / 2.0, ty);
    let u = b.min(&u, &below_one);
    let u = b.neg(&u);
    let log = b.log_plus_one(&u);
    let exponential = b.neg(&log);
    let log = b.log(&exponential);
    b.neg(&log)
}

/// First word of Threefry-2x32 with 20 rounds.
fn threefry(b: &mut Body, key: &[Value; 2], counter: [&Value; 2]) -> Value {
    const ROTATIONS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];
    let ty = counter[0].ty().clone();
    let parity = b.int(0x1BD1_1BDA, &ty);
    let mixed = b.xor(&key[0], &key[1]);
    let keys = [key[0].clone(), key[1].clone(), b.xor(&mixed, &parity)];
    let mut x = b.add(counter[0], &keys[0]);
    let mut y = b.add(counter[1], &keys[1]);
    for group in 0..5 {
        for bits in ROTATIONS[group % 2] {
            x = b.add(&x, &y);
            y = rotate(b, &y, bits);
            y = b.xor(&y, &x);
        }
        x = b.add(&x, &keys[(group + 1) % 3]);
        y = b.add(&y, &keys[(group + 2) % 3]);
        let turn = b.int(i64::try_from(group).unwrap_or(0) + 1, &ty);
        y = b.add(&y, &turn);
    }
    x
}

fn rotate(b: &mut Body, x: &Value, bits: u32) -> Value {
    let left = b.int(i64::from(bits), x.ty());
    let right = b.int(i64::from(32 - bits), x.ty());
    let (high, low) = (b.shl(x, &left), b.shr(x, &right));
    b.or(&high, &low)
}
