//! Every method of every instruction set against scalar arithmetic.

use super::*;
use std::array::from_fn;

/// Runs the body with every instruction set that the machine has.
macro_rules! on_every_isa {
    (|$s:ident, $isa:ident| $body:block) => {{
        struct Body(Isa);
        impl Task for Body {
            type Output = ();

            #[inline(always)]
            fn run<S: Simd>(self, $s: S) {
                let $isa = self.0;
                $body
            }
        }
        Isa::all().into_iter().for_each(|isa| isa.run(Body(isa)));
    }};
}

/// A small generator with a fixed seed (SplitMix64).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn bytes(&mut self) -> [u8; 64] {
        from_fn(|_| self.bits() as u8)
    }

    /// One time in two something awkward, else any bits.
    fn float(&mut self) -> f32 {
        let bits = self.bits();
        if bits >> 63 == 1 {
            AWKWARD[bits as usize % AWKWARD.len()]
        } else {
            f32::from_bits(bits as u32)
        }
    }

    fn floats(&mut self) -> [f32; 16] {
        from_fn(|_| self.float())
    }

    /// From -1 to 1.
    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

const AWKWARD: [f32; 22] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    -0.5,
    1.5,
    2.5,
    -2.5,
    0.499_999_97,
    8_388_607.5,
    8_388_609.0,
    -4_194_304.5,
    f32::MIN_POSITIVE,
    f32::MIN_POSITIVE / 3.0,
    -1e-45,
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    -f32::NAN,
];

fn floats<S: Simd>(s: S, x: S::F) -> [f32; 16] {
    let mut out = [7.0; 16];
    s.store(x, &mut out);
    out
}

fn bytes<S: Simd>(s: S, x: S::I) -> [u8; 64] {
    let (low, high) = (floats(s, s.low_bf16(x)), floats(s, s.high_bf16(x)));
    let mut out = [0; 64];
    for (out, (low, high)) in out.as_chunks_mut().0.iter_mut().zip(low.iter().zip(high)) {
        *out = (low.to_bits() >> 16 | high.to_bits()).to_le_bytes();
    }
    out
}

fn integers(x: &[u8; 64]) -> [i32; 16] {
    from_fn(|i| i32::from_le_bytes(x.as_chunks().0[i]))
}

fn from_integers<S: Simd>(s: S, x: [i32; 16]) -> S::I {
    let lanes = x.map(i32::to_le_bytes);
    s.load_i(lanes.as_flattened().first_chunk().unwrap())
}

/// To the bit; everything that is not a number is the same.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

#[track_caller]
fn assert_same(isa: Isa, found: [f32; 16], expected: [f32; 16]) {
    let all = found.iter().zip(&expected).all(|(&a, &b)| same(a, b));
    assert!(all, "{isa:?}: {found:?} is not {expected:?}");
}

#[test]
fn the_best_instruction_set_is_the_last_of_all() {
    assert_eq!(Isa::all()[0], Isa::Portable);
    assert_eq!(Isa::all().last(), Some(&Isa::detect()));
}

#[test]
fn a_missing_instruction_set_is_replaced_by_a_portable_one() {
    struct Name;
    impl Task for Name {
        type Output = &'static str;

        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> &'static str {
            std::any::type_name::<S>().rsplit("::").next().unwrap()
        }
    }
    for isa in ISAS {
        let expected = if Isa::all().contains(&isa) {
            format!("{isa:?}")
        } else {
            "Portable".to_owned()
        };
        assert_eq!(isa.run(Name), expected);
    }
}

#[test]
fn floats_are_loaded_and_stored_as_they_are() {
    on_every_isa!(|s, isa| {
        let mut random = Random(1);
        for _ in 0..100 {
            let x = random.floats();
            assert_eq!(
                floats(s, s.load(&x)).map(f32::to_bits),
                x.map(f32::to_bits),
                "{isa:?}"
            );
            assert_same(isa, floats(s, s.splat(x[0])), [x[0]; 16]);
        }
        assert_same(isa, floats(s, s.zero()), [0.0; 16]);
    });
}

#[test]
fn integers_are_loaded_as_they_lie() {
    on_every_isa!(|s, isa| {
        let mut random = Random(2);
        for _ in 0..100 {
            let x = random.bytes();
            assert_eq!(bytes(s, s.load_i(&x)), x, "{isa:?}");
            let all = s.splat_i(integers(&x)[0]);
            assert_eq!(integers(&bytes(s, all)), [integers(&x)[0]; 16], "{isa:?}");
        }
    });
}

#[test]
fn either_half_of_a_lane_is_read_as_bf16() {
    on_every_isa!(|s, isa| {
        let mut random = Random(13);
        for _ in 0..100 {
            let x = random.bytes();
            let half = |i: usize| bf16_value(u16::from_le_bytes([x[i], x[i + 1]]));
            let lanes = s.load_i(&x);
            assert_same(isa, floats(s, s.low_bf16(lanes)), from_fn(|i| half(4 * i)));
            let high = from_fn(|i| half(4 * i + 2));
            assert_same(isa, floats(s, s.high_bf16(lanes)), high);
        }
    });
}

/// What a half-precision float stands for.
fn half_value(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let fraction = f32::from(bits & 0x3ff) / 1024.0;
    let size = match i32::from(bits >> 10 & 31) {
        0 => fraction * (-14_f32).exp2(),
        31 if fraction == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        e => (1.0 + fraction) * ((e - 15) as f32).exp2(),
    };
    sign * size
}

#[test]
fn every_half_precision_float_is_read() {
    on_every_isa!(|s, isa| {
        for first in (0..=u16::MAX).step_by(16) {
            let x: [u16; 16] = from_fn(|i| first + i as u16);
            let raw = x.map(u16::to_le_bytes);
            let found = s.load_f16(raw.as_flattened().first_chunk().unwrap());
            assert_same(isa, floats(s, found), x.map(half_value));
        }
    });
}

#[test]
fn every_byte_is_read_signed_and_unsigned() {
    on_every_isa!(|s, isa| {
        for first in (0..=u8::MAX).step_by(16) {
            let x: [u8; 16] = from_fn(|i| first + i as u8);
            assert_same(isa, floats(s, s.load_u8(&x)), x.map(f32::from));
            let signed = x.map(|x| f32::from(x.cast_signed()));
            assert_same(isa, floats(s, s.load_i8(&x)), signed);
        }
    });
}

#[test]
fn arithmetic_is_that_of_single_numbers() {
    on_every_isa!(|s, isa| {
        let mut random = Random(3);
        for _ in 0..2000 {
            let (x, y) = (random.floats(), random.floats());
            let (a, b) = (s.load(&x), s.load(&y));
            assert_same(isa, floats(s, s.add(a, b)), from_fn(|i| x[i] + y[i]));
            assert_same(isa, floats(s, s.sub(a, b)), from_fn(|i| x[i] - y[i]));
            assert_same(isa, floats(s, s.mul(a, b)), from_fn(|i| x[i] * y[i]));
            assert_same(isa, floats(s, s.div(a, b)), from_fn(|i| x[i] / y[i]));
            assert_same(isa, floats(s, s.abs(a)), x.map(f32::abs));
            assert_same(isa, floats(s, s.round(a)), x.map(f32::round_ties_even));
        }
    });
}

#[test]
fn a_product_is_added_with_one_rounding_or_two() {
    on_every_isa!(|s, isa| {
        let mut random = Random(4);
        for _ in 0..2000 {
            let [x, y, z] = [random.floats(), random.floats(), random.floats()];
            let found = floats(s, s.fma(s.load(&x), s.load(&y), s.load(&z)));
            for i in 0..16 {
                let [once, twice] = [x[i].mul_add(y[i], z[i]), x[i] * y[i] + z[i]];
                assert!(
                    same(found[i], once) || same(found[i], twice),
                    "{isa:?}: {:e} * {:e} + {:e} is not {:e}",
                    x[i],
                    y[i],
                    z[i],
                    found[i]
                );
            }
        }
    });
}

#[test]
fn the_second_wins_a_comparison_with_what_is_not_a_number() {
    on_every_isa!(|s, isa| {
        let mut random = Random(5);
        for _ in 0..2000 {
            let (x, y) = (random.floats(), random.floats());
            let (a, b) = (s.load(&x), s.load(&y));
            let greater = from_fn(|i| if x[i] > y[i] { x[i] } else { y[i] });
            let lesser = from_fn(|i| if x[i] < y[i] { x[i] } else { y[i] });
            assert_same(isa, floats(s, s.max(a, b)), greater);
            assert_same(isa, floats(s, s.min(a, b)), lesser);
        }
    });
}

#[test]
fn scaling_by_a_power_of_two_rounds_once() {
    on_every_isa!(|s, isa| {
        let mut random = Random(6);
        for n in -126..=127_i16 {
            for _ in 0..20 {
                let x = random.floats();
                let found = s.scale2(s.load(&x), s.splat(f32::from(n)));
                let power = f64::from(n).exp2();
                let expected = x.map(|x| (f64::from(x) * power) as f32);
                assert_same(isa, floats(s, found), expected);
            }
        }
    });
}

#[test]
fn each_lane_is_scaled_by_its_own_power() {
    on_every_isa!(|s, isa| {
        let n: [f32; 16] = from_fn(|i| i as f32 - 8.0);
        let found = s.scale2(s.splat(3.0), s.load(&n));
        assert_same(isa, floats(s, found), n.map(|n| 3.0 * n.exp2()));
    });
}

#[test]
fn lanes_are_summed_and_the_greatest_is_found_wherever_it_is() {
    on_every_isa!(|s, isa| {
        for i in 0..16 {
            // Powers of two: every sum of theirs is exact, and each lane shows.
            let x: [f32; 16] = from_fn(|j| ((i + j) % 16) as f32).map(f32::exp2);
            assert_eq!(s.sum(s.load(&x)), 65535.0, "{isa:?}");
            assert_eq!(s.greatest(s.load(&x)), 32768.0, "{isa:?}");
            let x = x.map(|x| -x);
            assert_eq!(s.sum(s.load(&x)), -65535.0, "{isa:?}");
            assert_eq!(s.greatest(s.load(&x)), -1.0, "{isa:?}");
            let mut x = [f32::NEG_INFINITY; 16];
            assert_eq!(s.greatest(s.load(&x)), f32::NEG_INFINITY, "{isa:?}");
            x[i] = f32::INFINITY;
            assert_eq!(s.greatest(s.load(&x)), f32::INFINITY, "{isa:?}");
            assert!(s.sum(s.load(&x)).is_nan(), "{isa:?}");
        }
    });
}

#[test]
fn integers_become_the_nearest_floats() {
    on_every_isa!(|s, isa| {
        let mut random = Random(7);
        let edges = [
            0,
            1,
            -1,
            i32::MIN,
            i32::MAX,
            1 << 24,
            16_777_217,
            16_777_219,
        ];
        for round in 0..100 {
            let mut x = integers(&random.bytes());
            if round == 0 {
                x[..8].copy_from_slice(&edges);
            }
            let found = floats(s, s.to_f(from_integers(s, x)));
            assert_same(isa, found, x.map(|x| x as f32));
        }
    });
}

#[test]
fn bytes_are_taken_apart() {
    on_every_isa!(|s, isa| {
        let mut random = Random(8);
        for _ in 0..100 {
            let x = random.bytes();
            let lanes = s.load_i(&x);
            assert_eq!(bytes(s, s.low_nibbles(lanes)), x.map(|x| x & 15), "{isa:?}");
            assert_eq!(
                bytes(s, s.high_nibbles(lanes)),
                x.map(|x| x >> 4),
                "{isa:?}"
            );
            for j in 0..4 {
                let expected = from_fn(|i| f32::from(x[4 * i + j]));
                assert_same(isa, floats(s, s.byte(lanes, j as u32)), expected);
            }
        }
    });
}

#[test]
fn a_value_is_added_to_the_bytes_that_a_mask_names() {
    on_every_isa!(|s, isa| {
        let mut random = Random(9);
        let single = (0..64).map(|i| 1 << i);
        let masks: Vec<u64> = single
            .flat_map(|bit: u64| [bit, !bit])
            .chain([0, u64::MAX])
            .chain((0..100).map(|_| random.bits()))
            .collect();
        for value in [1, 16, 32, 128, 0x5a, 255] {
            for &mask in &masks {
                let x = random.bytes().map(|x| x & !value);
                let found = s.add_where(s.load_i(&x), mask, value);
                let expected = from_fn(|i| x[i] + value * (mask >> i & 1) as u8);
                assert_eq!(bytes(s, found), expected, "{isa:?} {mask:#x} {value}");
            }
        }
    });
}

/// Checks one dot product of bytes.
#[track_caller]
fn check_dot4<S: Simd>(s: S, isa: Isa, sum: [i32; 16], u: &[u8; 64], i: &[u8; 64]) {
    let found = s.dot4(from_integers(s, sum), s.load_i(u), s.load_i(i));
    let expected: [i32; 16] = from_fn(|lane| {
        let products =
            (4 * lane..4 * lane + 4).map(|at| i32::from(u[at]) * i32::from(i[at].cast_signed()));
        sum[lane].wrapping_add(products.sum())
    });
    assert_eq!(integers(&bytes(s, found)), expected, "{isa:?} {u:?} {i:?}");
}

#[test]
fn dot_products_of_bytes_are_exact_and_wrap() {
    on_every_isa!(|s, isa| {
        let mut random = Random(10);
        for u in 0..=u8::MAX {
            for i in (0..=u8::MAX).step_by(4) {
                // Four signed bytes in a group of lanes each: so every pair of bytes meets, four times over.
                let i = from_fn(|at| i + (at / 16) as u8);
                check_dot4(s, isa, [0; 16], &[u; 64], &i);
            }
        }
        let extremes = [0, 1, 127, 128, 129, 255];
        for _ in 0..2000 {
            let sum = integers(&random.bytes());
            let (u, i) = (random.bytes(), random.bytes());
            check_dot4(s, isa, sum, &u, &i);
            let (u, i) = (
                u.map(|x| extremes[usize::from(x) % 6]),
                i.map(|x| extremes[usize::from(x) % 6]),
            );
            check_dot4(s, isa, sum, &u, &i);
        }
        check_dot4(s, isa, [i32::MAX; 16], &[255; 64], &[127; 64]);
        check_dot4(s, isa, [i32::MIN; 16], &[255; 64], &[128; 64]);
    });
}

/// What the compiler knows about codes may not change what comes out.
#[test]
fn dot_products_of_codes_are_exact() {
    on_every_isa!(|s, isa| {
        let mut random = Random(11);
        for _ in 0..2000 {
            let (x, i) = (random.bytes(), random.bytes());
            let [five, six] = [random.bits(), random.bits()];
            let low = s.low_nibbles(s.load_i(&x));
            let codes = s.add_where(s.add_where(low, five, 16), six, 32);
            let code = |at: usize| {
                i32::from(x[at] & 15) + ((five >> at & 1) << 4 | (six >> at & 1) << 5) as i32
            };
            let found = s.dot4(s.splat_i(-5), codes, s.load_i(&i));
            let expected: [i32; 16] = from_fn(|lane| {
                let products =
                    (4 * lane..4 * lane + 4).map(|at| code(at) * i32::from(i[at].cast_signed()));
                products.sum::<i32>() - 5
            });
            assert_eq!(integers(&bytes(s, found)), expected, "{isa:?}");
        }
    });
}

/// A bf16 with an exponent near zero.
fn small_bf16(random: &mut Random) -> u16 {
    let bits = random.bits() as u16;
    bits & 0x80ff | 0x3c00 | bits & 0x0380
}

/// What a bf16 stands for.
fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Two bf16 for each lane.
fn pairs<S: Simd>(s: S, x: &[[u16; 2]; 16]) -> S::I {
    from_integers(
        s,
        x.map(|[low, high]| (u32::from(high) << 16 | u32::from(low)).cast_signed()),
    )
}

#[test]
fn dot_products_of_bf16_are_those_of_exact_numbers() {
    on_every_isa!(|s, isa| {
        let mut random = Random(12);
        for _ in 0..2000 {
            let [x, y]: [[[u16; 2]; 16]; 2] =
                from_fn(|_| from_fn(|_| from_fn(|_| small_bf16(&mut random))));
            let sum: [f32; 16] = from_fn(|_| random.unit());
            let found = floats(s, s.dot2(s.load(&sum), pairs(s, &x), pairs(s, &y)));
            for i in 0..16 {
                let product =
                    |j: usize| f64::from(bf16_value(x[i][j])) * f64::from(bf16_value(y[i][j]));
                let terms = [f64::from(sum[i]), product(0), product(1)];
                let exact: f64 = terms.iter().sum();
                let size: f64 = terms.iter().map(|x| x.abs()).sum();
                let off = (f64::from(found[i]) - exact).abs();
                assert!(
                    off <= size * 2.0 * f64::from(f32::EPSILON),
                    "{isa:?} {terms:?}"
                );
            }
        }
    });
}

#[test]
fn dot_products_of_bf16_keep_infinities_and_what_is_not_a_number() {
    const ONE: u16 = 0x3f80;
    const INFINITE: u16 = 0x7f80;
    const NONE: u16 = 0x7fc0;
    on_every_isa!(|s, isa| {
        let dot = |sum, x: [u16; 2], y: [u16; 2]| {
            floats(
                s,
                s.dot2(s.splat(sum), pairs(s, &[x; 16]), pairs(s, &[y; 16])),
            )
        };
        let all = |x: f32| [x; 16];
        let infinite = all(f32::INFINITY);
        assert_same(isa, dot(1.0, [0, INFINITE], [0, ONE]), infinite);
        assert_same(isa, dot(1.0, [INFINITE, 0], [ONE, 0]), infinite);
        assert_same(isa, dot(f32::INFINITY, [0, 0], [ONE, 0]), infinite);
        let minus = ONE | 0x8000;
        assert_same(
            isa,
            dot(1.0, [INFINITE, ONE], [minus, ONE]),
            infinite.map(|x| -x),
        );
        let none = all(f32::NAN);
        assert_same(isa, dot(1.0, [INFINITE, 0], [0, ONE]), none);
        assert_same(isa, dot(1.0, [INFINITE, INFINITE], [ONE, minus]), none);
        assert_same(isa, dot(1.0, [NONE, 0], [ONE, 0]), none);
        assert_same(isa, dot(1.0, [0, 0], [0, NONE]), none);
        assert_same(isa, dot(f32::NAN, [0, 0], [0, 0]), none);
        assert_same(isa, dot(-3.0, [0, 0], [0, 0]), all(-3.0));
    });
}

#[test]
fn floats_become_the_nearest_bytes() {
    on_every_isa!(|s, isa| {
        for first in -508..=493_i16 {
            // Quarters: halves between two bytes are among them.
            let x: [f32; 16] = from_fn(|i| f32::from(first + i as i16) / 4.0);
            let mut found = [0; 16];
            s.store_i8(s.load(&x), &mut found);
            assert_eq!(found, x.map(|x| x.round_ties_even() as i8), "{isa:?}");
        }
    });
}

#[test]
fn floats_become_the_nearest_bf16() {
    on_every_isa!(|s, isa| {
        for high in 0..=u16::MAX {
            // Exact, just above, around the half on both sides, just below the next; and in no order of lanes.
            let low = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
            let x: [f32; 16] = from_fn(|i| f32::from_bits(u32::from(high) << 16 | low[i * 5 % 6]));
            let mut found = [0; 16];
            s.store_bf16(s.load(&x), &mut found);
            for (&x, found) in x.iter().zip(found) {
                let bits = x.to_bits();
                let nearest = ((u64::from(bits) + 0x7fff + u64::from(bits >> 16 & 1)) >> 16) as u16;
                let right = if x.is_nan() {
                    bf16_value(found).is_nan()
                } else if x.is_subnormal() {
                    found == nearest || found == nearest & 0x8000
                } else {
                    found == nearest
                };
                assert!(right, "{isa:?}: {bits:#x} became {found:#x}");
            }
        }
    });
}

#[test]
fn powers_of_two_are_right_to_a_ten_millionth() {
    on_every_isa!(|s, isa| {
        let mut worst = 0.0_f64;
        for first in 0..100_000 {
            let x: [f32; 16] = from_fn(|i| (first * 16 + i) as f32 * 1.575e-4 - 126.0);
            for (x, found) in x.iter().zip(floats(s, s.exp2(s.load(&x)))) {
                let exact = f64::from(*x).exp2();
                worst = worst.max(((f64::from(found) - exact) / exact).abs());
            }
        }
        assert!(worst < 1e-7, "{isa:?}: {worst:e}");
        assert!(worst > 3e-8, "{isa:?}: no f32 is that good");
        let whole: [f32; 16] = from_fn(|i| i as f32 * 16.0 - 126.0);
        assert_same(isa, floats(s, s.exp2(s.load(&whole))), whole.map(f32::exp2));
    });
}

#[test]
fn powers_of_two_end_at_what_a_float_holds() {
    on_every_isa!(|s, isa| {
        let [least, most] = [-126_f32, 126.0].map(f32::exp2);
        for (x, expected) in [
            (-126.0, least),
            (-126.3, least),
            (-1e30, least),
            (f32::NEG_INFINITY, least),
            (126.0, most),
            (126.7, most),
            (f32::INFINITY, most),
            (f32::NAN, most),
        ] {
            assert_same(isa, floats(s, s.exp2(s.splat(x))), [expected; 16]);
        }
    });
}
