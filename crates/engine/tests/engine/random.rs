//! Anything that may happen, in any order, on an engine with hardly any blocks. What must hold in every step is checked by
//! the device and the driver in `support`; here: that all ends, and that nothing is left behind.

use crate::support::{Driver, Shape, sequence};
use baton_engine::{Beside, Handover, NewSequence, PrefixCaching, Progress, SeqId};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Add(Draft),
    Step,
    /// The n-th live sequence, or one that is gone.
    Cancel(usize),
    Arrive(usize, u32),
    Fail(usize),
}

/// A sequence to be.
#[derive(Clone, Debug)]
struct Draft {
    /// Prompts of different families part after `shared` tokens.
    family: u32,
    shared: u32,
    len: u32,
    max_tokens: u32,
    min_tokens: u32,
    temperature: f32,
    handover: Handover,
}

impl Draft {
    fn sequence(&self, id: u64) -> NewSequence {
        let token = |i: u32| {
            i * 5 % 17
                + if i < self.shared {
                    20
                } else {
                    40 * self.family
                }
        };
        let prompt: Vec<u32> = (0..self.len).map(token).collect();
        let mut new = sequence(id, &prompt, self.max_tokens, self.handover);
        new.limits.min_tokens = self.min_tokens;
        new.limits.eos = [250].into();
        new.sampling.temperature = self.temperature;
        new.sampling.seed = u64::from(self.family);
        new
    }
}

fn any_draft() -> impl Strategy<Value = Draft> {
    let handover = prop_oneof![
        3 => Just(Handover::None),
        1 => Just(Handover::Export),
        3 => (0..50_u32).prop_map(|n_tokens| Handover::Import { n_tokens }),
    ];
    let numbers = (0..3_u32, 0..20_u32, 1..32_u32, 1..16_u32, 0..4_u32);
    (numbers, prop_oneof![Just(0.0_f32), Just(1.0)], handover).prop_map(
        |((family, shared, len, max_tokens, min_tokens), temperature, handover)| Draft {
            family,
            shared,
            len,
            max_tokens,
            min_tokens,
            temperature,
            handover,
        },
    )
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => any_draft().prop_map(Op::Add),
        8 => Just(Op::Step),
        1 => (0..8_usize).prop_map(Op::Cancel),
        2 => (0..8_usize, 0..12_u32).prop_map(|(n, blocks)| Op::Arrive(n, blocks)),
        1 => (0..8_usize).prop_map(Op::Fail),
    ]
}

fn any_shape() -> impl Strategy<Value = Shape> {
    let blocks = (1..16_u32, 1..6_u32);
    let limits = (
        1..6_usize,
        1..6_usize,
        1..24_usize,
        1..12_usize,
        20..64_usize,
    );
    (blocks, limits, any::<bool>()).prop_map(
        |((blocks, block_size), (seqs, rows, tokens, chunk, len), is_caching)| Shape {
            blocks,
            block_size,
            seqs,
            rows,
            tokens,
            // As odd as any other number.
            beside: match chunk % 2 {
                0 => Beside::Stretch(1.5),
                _ => Beside::Tokens(1 + tokens / 2),
            },
            tail: chunk / 3,
            chunk,
            len,
            waiting: 6,
            caching: if is_caching {
                PrefixCaching::On
            } else {
                PrefixCaching::Off
            },
            eos: Some((250, 9)),
        },
    )
}

fn nth(driver: &Driver, n: usize) -> SeqId {
    driver
        .live
        .keys()
        .nth(n)
        .copied()
        .unwrap_or(SeqId(u64::MAX))
}

fn obey(driver: &mut Driver, op: &Op, id: u64) {
    match op {
        // A refusal is an answer, too.
        Op::Add(draft) => drop(driver.add(draft.sequence(id))),
        Op::Step => drop(driver.step()),
        Op::Cancel(n) => driver.cancel(nth(driver, *n)),
        Op::Arrive(n, blocks) => driver.arrive(nth(driver, *n), *blocks),
        Op::Fail(n) => driver.fail(nth(driver, *n)),
    }
}

/// More steps than all sequences need one after the other, each computed anew for every one of its tokens.
fn patience(driver: &Driver) -> usize {
    let len = driver.shape.len;
    100 + driver.live.len() * len * len
}

/// Steps until all have ended, answering fetches only when nothing else can run: the worst that peers can do.
fn drain(driver: &mut Driver) {
    for _ in 0..patience(driver) {
        if driver.live.is_empty() {
            return;
        }
        if driver.step().0 == Progress::Worked {
            continue;
        }
        let mut fetching = driver.live.iter().filter(|(_, live)| live.fetch.is_some());
        let (&id, _) = fetching.next().expect("idle, and nobody waits for KV");
        if id.0.is_multiple_of(2) {
            driver.arrive(id, u32::MAX);
        } else {
            driver.fail(id);
        }
    }
    panic!("no end: {:?}", driver.engine.stats());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_answers_are_right_and_all_blocks_come_back(
        shape in any_shape(),
        ops in prop::collection::vec(any_op(), 1..80),
    ) {
        let mut driver = Driver::new(shape);
        for (id, op) in ops.iter().enumerate() {
            obey(&mut driver, op, id as u64);
        }
        drain(&mut driver);
        prop_assert_eq!(driver.engine.stats().blocks_used, 0);
        prop_assert_eq!(driver.step().0, Progress::Idle);
    }
}
