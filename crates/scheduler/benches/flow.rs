//! What a request costs at the queue, with few and with many others waiting: one comes, one goes:
//! `cargo bench -p baton-scheduler --bench flow`.

use baton_scheduler::flow::{Arrival, Fairness, FlowConfig, FlowControl, Room};
use std::time::{Duration, Instant};

const ROUNDS: u32 = 200_000;

#[expect(clippy::print_stdout, reason = "that is what it is for")]
fn main() {
    for fairness in [
        Fairness::GlobalStrict,
        Fairness::RoundRobin,
        Fairness::Tokens,
    ] {
        for waiting in [0, 1_000, 100_000] {
            let cost = measure(fairness, waiting);
            println!(
                "{fairness:?}: {waiting} waiting, {} ns a request",
                cost.as_nanos()
            );
        }
    }
}

fn measure(fairness: Fairness, waiting: u32) -> Duration {
    let mut config = FlowConfig::default();
    config.template.fairness = fairness;
    config.template.max_requests = u64::MAX;
    let mut queue = FlowControl::new(config);
    let names: Vec<String> = (0..900).map(|i| format!("tenant-{i}")).collect();
    let mut now = Duration::ZERO;
    let mut enqueue = |queue: &mut FlowControl<u32>, i: u32| {
        now += Duration::from_nanos(1);
        let arrival = Arrival {
            flow: &names[(i as usize * 7919) % names.len()],
            priority: (i % 3) as i32,
            tokens: i % 1000,
            ..Arrival::new()
        };
        let _ = queue.enqueue(now, &arrival, i);
    };
    queue.set_room(Duration::ZERO, Room::of_slots(0, None));
    (0..waiting).for_each(|i| enqueue(&mut queue, i));
    let began = Instant::now();
    for i in 0..ROUNDS {
        enqueue(&mut queue, i);
        queue.set_room(Duration::ZERO, Room::of_slots(1, None));
        let went = queue.dispatch(Duration::ZERO).map(|d| d.grant);
        went.into_iter().for_each(|grant| queue.placed(grant));
    }
    began.elapsed() / ROUNDS
}
