//! KV from one engine, continued by another: the answer is that of one engine alone.

use crate::support::{Shape, alone, kv_of, sequence};
use baton_engine::{
    AdmitError, Beside, Engine, EngineError, Event, Handover, NewSequence, Progress, SeqId, Then,
};

const SHAPE: Shape = Shape::LARGE_BLOCKS;

fn prompt(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * i + 3 * i + 11) % 251).collect()
}

/// Runs until nothing can, bringing all KV that is asked for; returns the tokens and how many were cached.
fn answer(engine: &mut Engine, new: &NewSequence) -> (Vec<u32>, u32) {
    engine.add(new.clone()).unwrap();
    let (mut tokens, mut cached, mut events) = (Vec::new(), 0, Vec::new());
    while engine.step(&mut events).unwrap() == Progress::Worked {
        for event in events.drain(..) {
            match event {
                Event::FetchKv {
                    seq,
                    first_block,
                    n_blocks,
                } => {
                    let kv = kv_of(&SHAPE, &new.prompt, first_block..first_block + n_blocks);
                    engine
                        .kv_arrived(seq, first_block, &kv, Then::Compute)
                        .unwrap();
                }
                Event::Token {
                    sampled,
                    cached_tokens,
                    ..
                } => {
                    tokens.push(sampled.token);
                    cached = cached_tokens;
                }
                Event::Export { .. } => {}
            }
        }
    }
    (tokens, cached)
}

#[test]
fn two_engines_answer_as_one_for_every_prompt_length() {
    for n in 1..=70 {
        let whole = sequence(1, &prompt(n), 20, Handover::None);
        let first = sequence(1, &prompt(n), 1, Handover::Export);
        let split = sequence(1, &prompt(n), 20, Handover::Import { n_tokens: n as u32 });
        let expected = alone(&SHAPE, &whole).tokens;
        let prefill = answer(&mut SHAPE.engine(), &first);
        assert_eq!(prefill, (vec![expected[0]], 0), "prefill of {n}");
        let decode = answer(&mut SHAPE.engine(), &split);
        assert_eq!(decode, (expected, n as u32 - 1), "decode of {n}");
    }
}

#[test]
fn two_engines_answer_as_one_when_the_second_knows_a_prefix() {
    for n in 1..=70 {
        for known in [1, 15, 16, 17, 32, 33, 48, 64, 70] {
            let mut decode = SHAPE.engine();
            let earlier = prompt(known.min(n));
            answer(&mut decode, &sequence(1, &earlier, 3, Handover::None));
            let split = sequence(2, &prompt(n), 6, Handover::Import { n_tokens: n as u32 });
            let expected = alone(&SHAPE, &split).tokens;
            let got = answer(&mut decode, &split);
            assert_eq!(got, (expected, n as u32 - 1), "{n} tokens, {known} known");
            assert_eq!(decode.stats().blocks_used, 0);
        }
    }
}

/// An engine in which sequence 1, of 20 tokens, waits for its KV.
fn awaiting() -> (Engine, NewSequence) {
    let mut engine = SHAPE.engine();
    let new = sequence(1, &prompt(20), 5, Handover::Import { n_tokens: 20 });
    engine.add(new.clone()).unwrap();
    let mut events = Vec::new();
    engine.step(&mut events).unwrap();
    assert!(matches!(events[..], [Event::FetchKv { n_blocks: 2, .. }]));
    (engine, new)
}

fn assert_answers_alone(mut engine: Engine, new: &NewSequence) {
    let mut events = Vec::new();
    while engine.step(&mut events).unwrap() == Progress::Worked {}
    let tokens: Vec<u32> = events
        .iter()
        .filter_map(|event| match event {
            Event::Token { sampled, .. } => Some(sampled.token),
            _ => None,
        })
        .collect();
    assert_eq!(tokens, alone(&SHAPE, new).tokens);
}

#[test]
fn tokens_that_are_awaited_or_here_already_can_be_counted() {
    let (mut engine, new) = awaiting();
    assert_eq!(engine.awaited(SeqId(1)), 19);
    assert_eq!(engine.awaited(SeqId(2)), 0);
    let first = kv_of(&SHAPE, &new.prompt, 0..1);
    engine.kv_arrived(SeqId(1), 0, &first, Then::Fetch).unwrap();
    assert_eq!(engine.awaited(SeqId(1)), 3);
    assert_eq!(engine.found(&new.prompt), 0, "it waits for the rest");
    engine.kv_failed(SeqId(1));
    assert_eq!(engine.awaited(SeqId(1)), 0);
    assert_eq!(engine.found(&new.prompt), 16);
    let (same, another) = (prompt(16), [&[250], &prompt(40)[..]].concat());
    assert_eq!(engine.found(&same), 0, "the last token is computed");
    assert_eq!(engine.found(&another), 0);
    assert_answers_alone(engine, &new);
}

#[test]
fn bytes_that_are_not_what_was_asked_for_are_not_used() {
    let good = kv_of(&SHAPE, &prompt(20), 0..2);
    let too_much = [good.as_slice(), &good].concat();
    let one = kv_of(&SHAPE, &prompt(20), 0..1);
    let cases: [(u32, &[u8]); 7] = [
        (1, &one),
        (1, &good),
        (u32::MAX, &good),
        (0, &good[1..]),
        (0, &good[..10]),
        (0, &too_much),
        (0, &[]),
    ];
    for (first_block, data) in cases {
        let (mut engine, new) = awaiting();
        engine
            .kv_arrived(SeqId(1), first_block, data, Then::Compute)
            .unwrap();
        assert_eq!(engine.stats().external_hits, 0);
        assert_answers_alone(engine, &new);
    }
}

#[test]
fn more_blocks_than_a_lying_peer_was_asked_for_are_not_used() {
    let mut engine = SHAPE.engine();
    let new = sequence(1, &prompt(20), 5, Handover::Import { n_tokens: u32::MAX });
    engine.add(new.clone()).unwrap();
    engine.step(&mut Vec::new()).unwrap();
    let data = vec![1; 9 * engine.spec().layout.block_bytes()];
    engine
        .kv_arrived(SeqId(1), 0, &data, Then::Compute)
        .unwrap();
    assert_answers_alone(engine, &new);
}

#[test]
fn kv_arrives_once() {
    let (mut engine, new) = awaiting();
    let kv = kv_of(&SHAPE, &prompt(20), 0..2);
    engine.kv_arrived(SeqId(1), 0, &kv, Then::Compute).unwrap();
    engine
        .kv_arrived(SeqId(1), 0, &vec![1; kv.len()], Then::Compute)
        .unwrap();
    engine.kv_failed(SeqId(1));
    assert_answers_alone(engine, &new);
}

#[test]
fn a_failing_device_fails_the_step() {
    let mut sim = SHAPE.sim();
    sim.fail_at = Some(2);
    let runner = Box::new(baton_sim::SimRunner::new(sim));
    let mut engine = Engine::new(runner, SHAPE.config()).unwrap();
    engine.add(sequence(1, &[1, 2], 9, Handover::None)).unwrap();
    assert!(engine.step(&mut Vec::new()).is_ok());
    assert!(engine.step(&mut Vec::new()).is_err());
}

#[test]
fn an_unknown_token_is_refused() {
    let refused = SHAPE
        .engine()
        .add(sequence(1, &[1, 256], 9, Handover::None));
    let expected = AdmitError::UnknownToken {
        token: 256,
        vocab_size: 256,
    };
    assert_eq!(refused, Err(expected));
}

#[test]
fn an_engine_that_could_never_run_anything_is_not_built() {
    let build = |shape: Shape| {
        let runner = Box::new(baton_sim::SimRunner::new(shape.sim()));
        Engine::new(runner, shape.config()).map(|_| ())
    };
    let shapes = [
        Shape { seqs: 0, ..SHAPE },
        Shape { rows: 0, ..SHAPE },
        Shape { tokens: 0, ..SHAPE },
        Shape { chunk: 0, ..SHAPE },
        Shape {
            block_size: 0,
            ..SHAPE
        },
    ];
    for shape in shapes {
        assert_eq!(build(shape.clone()), Err(EngineError::Zero), "{shape:?}");
    }
    let beside = |beside| build(Shape { beside, ..SHAPE });
    assert_eq!(beside(Beside::Tokens(0)), Err(EngineError::Zero));
    for stretch in [0.5, 1.0, f64::NAN] {
        assert_eq!(beside(Beside::Stretch(stretch)), Err(EngineError::Stretch));
    }
    let none = Shape { blocks: 0, ..SHAPE };
    assert_eq!(build(none), Err(EngineError::NoBlocks { n_blocks: 1 }));
    assert_eq!(build(SHAPE), Ok(()));
}
