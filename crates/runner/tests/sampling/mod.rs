//! The sampling node on XLA's CPU plugin, against the same rules written out plainly.

use crate::plugin;
use baton_graph::hlo::Element;
use baton_graph::{Axis, Graph, KvRows, Lowerings, SampleRows, Source};
use baton_pjrt::{Arg, Client, CompileOptions, Plugin};

const ROWS: usize = 6;
const VOCAB: usize = 257;

#[derive(Clone, Copy, Debug)]
struct How {
    temperature: f32,
    top_k: i32,
    top_p: f32,
    min_p: f32,
    seed: u64,
    position: i32,
}

const PLAIN: How = How {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    seed: 3,
    position: 9,
};

/// Threefry-2x32-20, first word, as its authors give it.
fn threefry(key: [u32; 2], counter: [u32; 2]) -> u32 {
    let keys = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD1_1BDA];
    let [mut x, mut y] = [
        counter[0].wrapping_add(keys[0]),
        counter[1].wrapping_add(keys[1]),
    ];
    for round in 0..20 {
        x = x.wrapping_add(y);
        y = y.rotate_left([13, 15, 26, 6, 17, 29, 16, 24][round % 8]) ^ x;
        if round % 4 == 3 {
            let group = round / 4 + 1;
            x = x.wrapping_add(keys[group % 3]);
            y = y
                .wrapping_add(keys[(group + 1) % 3])
                .wrapping_add(group as u32);
        }
    }
    x
}

/// Which tokens may be drawn: temperature, min-p, top-k, top-p, by sorting.
fn kept(logits: &[f32], how: How) -> Vec<bool> {
    let peak = logits.iter().copied().fold(f32::MIN, f32::max);
    let z: Vec<f32> = logits
        .iter()
        .map(|x| (x - peak) / how.temperature)
        .collect();
    let mut order: Vec<usize> = (0..z.len()).collect();
    order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
    let mut least = how.min_p.ln();
    if how.top_k > 0 && (how.top_k as usize) < z.len() {
        least = least.max(z[order[how.top_k as usize - 1]]);
    }
    let total: f64 = z
        .iter()
        .filter(|&&x| x >= least)
        .map(|&x| f64::from(x).exp())
        .sum();
    if how.top_p < 1.0 {
        let mut mass = 0.0;
        for &i in &order {
            mass += f64::from(z[i]).exp();
            if mass >= f64::from(how.top_p) * total {
                least = least.max(z[i]);
                break;
            }
        }
    }
    z.iter().map(|&x| x >= least).collect()
}

fn reference(logits: &[f32], how: How) -> usize {
    let peak = logits.iter().copied().fold(f32::MIN, f32::max);
    if how.temperature == 0.0 {
        return logits.iter().position(|&x| x == peak).unwrap();
    }
    let kept = kept(logits, how);
    let key = [how.seed as u32, (how.seed >> 32) as u32];
    let score = |i: usize| {
        let u = (threefry(key, [how.position as u32, i as u32]) as f32 + 0.5) * 2f32.powi(-32);
        let noise = -(-(-u.min(1.0 - f32::EPSILON / 2.0)).ln_1p()).ln();
        (logits[i] - peak) / how.temperature + noise
    };
    (0..logits.len())
        .filter(|&i| kept[i])
        .max_by(|&a, &b| score(a).total_cmp(&score(b)))
        .unwrap()
}

struct Sampler {
    program: baton_pjrt::LoadedExecutable,
    client: Client,
}

impl Sampler {
    fn new() -> Self {
        let mut g = Graph::new("sample");
        let seq = (Axis::Seq, ROWS);
        let mut small = |name: &str, element, axes: &[(Axis, usize)]| {
            g.param(name, Source::Step, element, axes)
        };
        let start = small("start", Element::I32, &[seq]);
        let len = small("len", Element::I32, &[seq]);
        let how = SampleRows {
            temperature: small("temperature", Element::F32, &[seq]),
            top_k: small("top_k", Element::I32, &[seq]),
            top_p: small("top_p", Element::F32, &[seq]),
            min_p: small("min_p", Element::F32, &[seq]),
            seed: small("seed", Element::U32, &[seq, (Axis::Part, 2)]),
        };
        let logits = g.param(
            "logits",
            Source::Bulk,
            Element::F32,
            &[seq, (Axis::Vocab, VOCAB)],
        );
        let token = g
            .sample(
                logits,
                how,
                KvRows {
                    start,
                    len,
                    tables: start,
                },
            )
            .unwrap();
        g.set_outputs(vec![token]);
        let text = Lowerings::plain().lower(&g).unwrap().text;
        let client = Client::create(
            &Plugin::load(plugin()).unwrap(),
            &[("cpu_device_count", 1.into())],
        )
        .unwrap();
        Self {
            program: client.compile(text, &CompileOptions::default()).unwrap(),
            client,
        }
    }

    fn sample(&self, logits: &[[f32; VOCAB]; ROWS], how: &[How; ROWS]) -> Vec<i32> {
        let mut words: Vec<i32> = how.iter().map(|h| h.position - 1).collect();
        words.extend([1; ROWS]);
        words.extend(how.iter().map(|h| h.temperature.to_bits() as i32));
        words.extend(how.iter().map(|h| h.top_k));
        words.extend(how.iter().map(|h| h.top_p.to_bits() as i32));
        words.extend(how.iter().map(|h| h.min_p.to_bits() as i32));
        words.extend(
            how.iter()
                .flat_map(|h| [h.seed as u32 as i32, (h.seed >> 32) as i32]),
        );
        let device = &self.client.addressable_devices().unwrap()[0];
        let step = self
            .client
            .buffer_from_slice(&words, &[words.len() as i64], device)
            .unwrap();
        let flat = logits.as_flattened();
        let logits = self
            .client
            .buffer_from_slice(flat, &[ROWS as i64, VOCAB as i64], device)
            .unwrap();
        let out = self
            .program
            .execute([Arg::Borrow(&step), Arg::Borrow(&logits)])
            .unwrap();
        out[0].to_vec::<i32>().unwrap()
    }
}

/// Logits from a hash, between -4 and 4, with some ties.
fn logits(round: u32) -> [[f32; VOCAB]; ROWS] {
    std::array::from_fn(|row| {
        std::array::from_fn(|i| {
            let bits = threefry([round, row as u32], [i as u32, 77]);
            (bits >> 22) as f32 / 128.0 - 4.0
        })
    })
}

#[test]
fn threefry_gives_its_authors_known_answers() {
    assert_eq!(threefry([0, 0], [0, 0]), 0x6b20_0159);
    assert_eq!(threefry([u32::MAX; 2], [u32::MAX; 2]), 0x1cb9_96fc);
    assert_eq!(
        threefry([0x1319_8a2e, 0x0370_7344], [0x243f_6a88, 0x85a3_08d3]),
        0xc492_3a9c
    );
}

#[test]
fn rows_are_sampled_by_the_plain_rules_each_by_its_own() {
    let sampler = Sampler::new();
    let mut differ = 0;
    for round in 0..200_u32 {
        let logits = logits(round);
        let seed = 0x1234_5678_9abc_0000 + u64::from(round);
        let how = [
            How {
                temperature: 0.0,
                ..PLAIN
            },
            How { seed, ..PLAIN },
            How {
                seed,
                temperature: 0.7,
                top_k: 1 + (round % 40) as i32,
                ..PLAIN
            },
            How {
                seed,
                temperature: 1.5,
                top_p: 0.05 + 0.004 * round as f32,
                position: 100 + round as i32,
                ..PLAIN
            },
            How {
                seed,
                temperature: 0.9,
                min_p: 0.01 * (round % 90) as f32,
                ..PLAIN
            },
            How {
                seed,
                temperature: 1.1,
                top_k: 30,
                top_p: 0.8,
                min_p: 0.05,
                ..PLAIN
            },
        ];
        for (row, &found) in sampler.sample(&logits, &how).iter().enumerate() {
            let found = usize::try_from(found).unwrap();
            let allowed = how[row].temperature == 0.0 || kept(&logits[row], how[row])[found];
            // Where rounding differs, two nearly equal scores may change places; nothing else may.
            differ += usize::from(found != reference(&logits[row], how[row]));
            assert!(
                allowed,
                "round {round}, row {row}: {found} by {:?}",
                how[row]
            );
        }
    }
    assert!(differ <= 2, "{differ} of 1200 draws differ");
}

#[test]
fn draws_follow_the_distribution() {
    let sampler = Sampler::new();
    let mut row = [f32::NEG_INFINITY; VOCAB];
    for (i, p) in [(3, 0.5_f32), (100, 0.3), (256, 0.2)] {
        row[i] = p.ln();
    }
    let mut counts = [0_usize; VOCAB];
    let n = 3000;
    for round in 0..n / ROWS as u64 {
        let how = std::array::from_fn(|i| How {
            seed: round * 6 + i as u64,
            ..PLAIN
        });
        for token in sampler.sample(&[row; ROWS], &how) {
            counts[token as usize] += 1;
        }
    }
    assert_eq!(counts[3] + counts[100] + counts[256], n as usize);
    // Five standard deviations.
    assert!(
        counts[3].abs_diff(1500) < 137 && counts[256].abs_diff(600) < 110,
        "{counts:?}"
    );
}

#[test]
fn the_best_token_survives_every_setting_and_rows_of_no_numbers_are_told_apart() {
    let sampler = Sampler::new();
    let mut rows = logits(5);
    rows[0] = [f32::NAN; VOCAB];
    rows[1] = [f32::NAN; VOCAB];
    let best = |row: &[f32; VOCAB]| {
        reference(
            row,
            How {
                temperature: 0.0,
                ..PLAIN
            },
        ) as i32
    };
    let how = [
        How {
            temperature: 0.0,
            ..PLAIN
        },
        PLAIN,
        How { top_k: 1, ..PLAIN },
        How {
            top_p: 0.0,
            ..PLAIN
        },
        How {
            min_p: 1.0,
            ..PLAIN
        },
        How {
            temperature: 1e-30,
            ..PLAIN
        },
    ];
    let found = sampler.sample(&rows, &how);
    assert_eq!(found[..2], [VOCAB as i32; 2]);
    for row in [2, 3, 4, 5] {
        let peak = rows[row][best(&rows[row]) as usize];
        assert_eq!(rows[row][found[row] as usize], peak, "row {row}");
    }
}
