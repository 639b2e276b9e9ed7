//! What holds however long it runs and whatever clients send.

use super::*;
use proptest::prelude::*;

/// A small generator, so that a million operations need no test framework.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % below
    }
}

#[test]
fn a_tenant_with_a_thousand_requests_delays_another_by_one_round() {
    let mut queue = FlowControl::new(FlowConfig::default());
    let mut dice = Dice(1);
    let enqueue = |queue: &mut FlowControl<bool>, flow, ticket| {
        let arrival = Arrival {
            flow,
            ..Arrival::new()
        };
        queue.enqueue(Duration::ZERO, &arrival, ticket).unwrap();
    };
    for flow in ["big", "bigger"] {
        (0..1000).for_each(|_| enqueue(&mut queue, flow, false));
    }
    for _ in 0..100 {
        let ahead = u32::try_from(dice.roll(5)).unwrap();
        queue.set_room(Duration::ZERO, Room::of_slots(ahead, None));
        while queue
            .dispatch(Duration::ZERO)
            .map(|d| queue.placed(d.grant))
            .is_some()
        {}
        enqueue(&mut queue, "small", true);
        queue.set_room(Duration::ZERO, Room::of_slots(3, None));
        let went = std::iter::from_fn(|| queue.dispatch(Duration::ZERO));
        let went: Vec<_> = went.collect();
        assert_eq!(went.iter().filter(|d| d.ticket).count(), 1);
        went.iter().for_each(|d| queue.placed(d.grant));
    }
}

#[test]
fn who_makes_up_tenants_does_not_starve_the_others() {
    let config = FlowConfig {
        max_flows: 8,
        ..FlowConfig::default()
    };
    let mut queue = FlowControl::new(config);
    let enqueue = |queue: &mut FlowControl<bool>, flow: &str, ticket| {
        let arrival = Arrival {
            flow,
            ..Arrival::new()
        };
        queue.enqueue(Duration::ZERO, &arrival, ticket).unwrap();
    };
    (0..50).for_each(|_| enqueue(&mut queue, "honest", true));
    let mut honest = 0;
    for i in 0..500 {
        enqueue(&mut queue, &format!("sybil-{i}"), false);
        queue.set_room(Duration::ZERO, Room::of_slots(1, None));
        let went = queue.dispatch(Duration::ZERO).unwrap();
        queue.placed(went.grant);
        honest += u32::from(went.ticket);
    }
    // There are eight flows and the one that the rest shares.
    assert!(honest >= 50, "{honest}");
}

/// Clients that make up tenants, priorities, and go away.
struct Crowd {
    queue: FlowControl<()>,
    dice: Dice,
    now: Duration,
    handles: Vec<Handle>,
    came: u64,
    left: u64,
}

impl Crowd {
    fn arrive(&mut self) {
        let flow = format!("tenant-{}", self.dice.roll(10_000));
        let arrival = Arrival {
            flow: &flow,
            priority: i32::try_from(self.dice.roll(2000)).unwrap() - 1000,
            bytes: self.dice.roll(1000),
            need: [Need::Decode, Need::PrefillAndDecode][self.dice.roll(2) as usize],
            ..Arrival::new()
        };
        if let Ok(handle) = self.queue.enqueue(self.now, &arrival, ()) {
            self.came += 1;
            self.handles.push(handle);
        }
    }

    fn step(&mut self) {
        let now = self.now;
        match self.dice.roll(8) {
            0..4 => self.arrive(),
            4 => {
                let room = match self.dice.roll(50) {
                    0 => Room::no_servers(),
                    n => Room::of_slots(n as u32 % 5, Some(1)),
                };
                self.queue.set_room(now, room);
            }
            5 => {
                while let Some(went) = self.queue.dispatch(now) {
                    self.queue.placed(went.grant);
                    self.left += 1;
                }
            }
            6 => self.left += std::iter::from_fn(|| self.queue.expire(now)).count() as u64,
            _ if self.handles.is_empty() => {}
            _ => {
                let at = self.dice.roll(self.handles.len() as u64) as usize;
                let handle = self.handles.swap_remove(at);
                self.left += u64::from(self.queue.cancel(now, handle).is_some());
                self.handles.truncate(1000);
            }
        }
    }
}

#[test]
fn a_million_operations_leave_no_trace() {
    let config = FlowConfig {
        max_requests: Some(500),
        max_flows: 100,
        ..FlowConfig::default()
    };
    let mut crowd = Crowd {
        queue: FlowControl::new(config),
        dice: Dice(7),
        now: Duration::ZERO,
        handles: Vec::new(),
        came: 0,
        left: 0,
    };
    for _ in 0..1_000_000 {
        crowd.now += Duration::from_millis(crowd.dice.roll(4));
        crowd.step();
    }
    let Crowd {
        mut queue,
        now,
        came,
        left,
        ..
    } = crowd;
    assert_eq!(came - left, queue.usage().requests);
    assert!(came > 100_000 && queue.items.slots() <= 500);
    assert!(queue.flows.slots() <= 100 + 2 * MAX_BANDS && queue.bands.len() <= MAX_BANDS);
    let drained = std::iter::from_fn(|| queue.drain(now)).count() as u64;
    assert_eq!(came - left, drained);
    // Later nothing is remembered.
    assert_eq!(queue.expire(now + BAND_IDLE * 2), None);
    assert_eq!((queue.flows.len(), queue.bands.len()), (0, 1));
    assert!(queue.deadlines.is_empty() && queue.patience.is_empty() && queue.idle.is_empty());
}

#[test]
fn what_one_too_many_tenants_send_is_in_one_flow() {
    let config = FlowConfig {
        max_flows: 2,
        ..FlowConfig::default()
    };
    play(
        config,
        "
        in A*2
        in B*2
        in C
        in D
        room 9
        go => A1 B1 C1 A2 B2 D1
        in D
        in A
        room 9
        go => D2 A3
        ",
    );
    let mut queue = FlowControl::new(FlowConfig::default());
    let name = "x".repeat(MAX_FLOW_NAME + 1);
    let arrival = Arrival {
        flow: &name,
        ..Arrival::new()
    };
    queue.enqueue(Duration::ZERO, &arrival, ()).unwrap();
    assert_eq!(&*queue.flows.iter().next().unwrap().name, OTHER_FLOW);
}

#[test]
fn a_priority_too_many_waits_with_the_next_lower_one() {
    let mut queue = FlowControl::new(FlowConfig::default());
    let mut enqueue = |priority| {
        let arrival = Arrival {
            priority,
            ..Arrival::new()
        };
        queue.enqueue(Duration::ZERO, &arrival, priority).unwrap();
    };
    (1..1000).map(|i| i * 10).for_each(&mut enqueue);
    enqueue(2551);
    enqueue(-1);
    assert_eq!(queue.bands().count(), MAX_BANDS);
    queue.set_room(Duration::ZERO, Room::of_slots(5000, None));
    let went = std::iter::from_fn(|| queue.dispatch(Duration::ZERO));
    let bands: HashMap<i32, i32> = went.map(|d| (d.ticket, d.priority)).collect();
    assert_eq!(
        (bands[&2550], bands[&2551], bands[&9990]),
        (2550, 2550, 2550)
    );
    assert_eq!(bands[&-1], 0);
}

proptest! {
    /// Two tenants that always have something: neither is ever ahead by more than one request, or by tokens, by more
    /// than the longest prompt.
    #[test]
    fn turns_are_even(prompts in prop::collection::vec((1u32..1000, 1u32..1000), 1..200), by_tokens in any::<bool>()) {
        let fairness = [Fairness::RoundRobin, Fairness::Tokens][usize::from(by_tokens)];
        let mut queue = FlowControl::new(with(fairness, Ordering::Arrival));
        for &(a, b) in &prompts {
            for (flow, tokens) in [("a", a), ("b", b)] {
                let arrival = Arrival { flow, tokens, ..Arrival::new() };
                queue.enqueue(Duration::ZERO, &arrival, (flow, tokens)).unwrap();
            }
        }
        queue.set_room(Duration::ZERO, Room::of_slots(1000, None));
        let (mut served, mut left) = ([0i64; 2], [prompts.len(); 2]);
        while let Some(went) = queue.dispatch(Duration::ZERO) {
            let (flow, tokens) = went.ticket;
            let who = usize::from(flow == "b");
            served[who] += if by_tokens { i64::from(tokens) } else { 1 };
            left[who] -= 1;
            if left.contains(&0) {
                break;
            }
            let bound = if by_tokens { 1000 } else { 1 };
            prop_assert!((served[0] - served[1]).abs() <= bound, "{:?}", served);
        }
    }
}
