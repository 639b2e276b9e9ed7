//! Prompts beside decodes whose steps are timed, in a time of the test's own.

use crate::support::{Driver, Shape, sequence, step_time};
use baton_engine::{Beside, Handover, SeqId};
use std::time::Duration;

#[test]
fn beside_decodes_prompts_are_paced_by_what_steps_take() {
    let mut driver = Driver::new(Shape {
        blocks: 64,
        len: 1024,
        beside: Beside::Stretch(1.8),
        ..Shape::LARGE_BLOCKS
    });
    driver
        .add(sequence(0, &[1; 2], 600, Handover::None))
        .unwrap();
    (0..10).for_each(|_| drop(driver.step()));
    let prompt: Vec<u32> = (0..400).map(|i| i % 251).collect();
    driver.add(sequence(1, &prompt, 1, Handover::None)).unwrap();
    let (mut gaps, mut time) = (0, Duration::ZERO);
    while !driver.ended.contains_key(&SeqId(1)) {
        driver.step();
        time += step_time(driver.engine.stats().last_iteration_tokens);
        gaps += 1;
    }
    assert!(
        time < gaps * step_time(1).mul_f64(1.8),
        "{gaps} in {time:?}"
    );
    assert!(time < step_time(400) * 4, "the prompt took {time:?}");
}
