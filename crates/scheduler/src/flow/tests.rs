//! Scenarios as text, and what must hold for all of them.
//!
//! A scenario is a list of lines, done in order:
//! ```text
//! at TIME
//! room none | SLOTS [prefill SLOTS]            what servers have room for
//! in FLOW[*N] [prio P] [tokens N] [bytes N] [ttl TIME] [slo TIME] [prefill] [=> OUTCOME]
//! cancel NAME
//! go => NAMES                                   what is let go, in order
//! expire => NAMES                               what has waited too long, each with its outcome
//! drain => NAMES
//! wakeup => TIME | never
//! blocked => PRIORITY | no
//! give-up => NAMES                              who that runs is ended for others, each with their priority
//! over NAME [=> TIME]                           what was let go has ended, and how long ago it was told to
//! ```
//! The first request of flow A is A1, the next A2. Requests that go are at their servers at once.

use super::*;
use std::collections::HashMap;

mod model;
mod properties;

struct World {
    queue: FlowControl<String>,
    now: Duration,
    handles: HashMap<String, Handle>,
    running: HashMap<String, Running>,
    counts: HashMap<String, usize>,
}

fn time(text: &str) -> Duration {
    if let Some(ms) = text.strip_suffix("ms") {
        Duration::from_millis(ms.parse().unwrap())
    } else {
        Duration::from_secs(text.strip_suffix('s').unwrap().parse().unwrap())
    }
}

impl World {
    fn new(config: FlowConfig) -> Self {
        Self {
            queue: FlowControl::new(config),
            now: Duration::ZERO,
            handles: HashMap::new(),
            running: HashMap::new(),
            counts: HashMap::new(),
        }
    }

    /// Does one line and returns what came of it.
    fn step(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (now, queue) = (self.now, &mut self.queue);
        match words[0] {
            "at" => self.now = time(words[1]),
            "room" => {
                let room = match words[1] {
                    "none" => Room::no_servers(),
                    n => {
                        Room::of_slots(n.parse().unwrap(), words.get(3).map(|n| n.parse().unwrap()))
                    }
                };
                queue.set_room(now, room);
            }
            "in" => return self.arrive(&words[1..]),
            "cancel" => {
                let left = queue.cancel(now, self.handles[words[1]]);
                return left.map_or("gone".to_owned(), |d| d.outcome.label().to_owned());
            }
            "go" => {
                let went = std::iter::from_fn(|| queue.dispatch(now));
                let went: Vec<_> = went.collect();
                went.iter().for_each(|d| queue.placed(d.grant));
                let running = went
                    .iter()
                    .filter_map(|d| Some((d.ticket.clone(), d.running?)));
                self.running.extend(running);
                let names = went.into_iter().map(|d| d.ticket);
                return names.collect::<Vec<_>>().join(" ");
            }
            "give-up" => {
                let name = |r: Running| self.running.iter().find(|(_, it)| **it == r).unwrap().0;
                let names: Vec<String> = (queue.give_up(now))
                    .map(|(running, priority)| format!("{}:{priority}", name(running)))
                    .collect();
                return names.join(" ");
            }
            "over" => {
                let told = queue.finished(now, &self.running[words[1]]);
                return told.map_or(String::new(), |told| format!("{}ms", told.as_millis()));
            }
            "expire" => return left(|| queue.expire(now)),
            "drain" => return left(|| queue.drain(now)),
            "wakeup" => {
                let at = queue.next_wakeup();
                return at.map_or("never".to_owned(), |t| format!("{}ms", t.as_millis()));
            }
            "blocked" => return queue.blocked().map_or("no".to_owned(), |p| p.to_string()),
            other => panic!("what is {other}?"),
        }
        String::new()
    }

    fn arrive(&mut self, words: &[&str]) -> String {
        let (flow, n) = words[0].split_once('*').unwrap_or((words[0], "1"));
        let mut arrival = Arrival {
            flow,
            ..Arrival::new()
        };
        let mut rest = words[1..].iter();
        while let Some(&word) = rest.next() {
            let mut value = || *rest.next().unwrap();
            match word {
                "prio" => arrival.priority = value().parse().unwrap(),
                "tokens" => arrival.tokens = value().parse().unwrap(),
                "bytes" => arrival.bytes = value().parse().unwrap(),
                "ttl" => arrival.ttl = Some(time(value())),
                "slo" => arrival.slo = Some(time(value())),
                "prefill" => arrival.need = Need::PrefillAndDecode,
                other => panic!("what is {other}?"),
            }
        }
        let mut outcome = String::new();
        for _ in 0..n.parse().unwrap() {
            let count = self.counts.entry(flow.to_owned()).or_default();
            *count += 1;
            let name = format!("{flow}{count}");
            match self.queue.enqueue(self.now, &arrival, name.clone()) {
                Ok(handle) => {
                    self.handles.insert(name, handle);
                }
                Err(refused) => {
                    assert_eq!(refused.ticket, name);
                    outcome = refused.outcome.label().to_owned();
                }
            }
        }
        outcome
    }
}

fn left(next: impl FnMut() -> Option<Departure<String>>) -> String {
    let left = std::iter::from_fn(next);
    let names = left.map(|d| format!("{}:{}", d.ticket, d.outcome.label()));
    names.collect::<Vec<_>>().join(" ")
}

fn play(config: FlowConfig, scenario: &str) {
    let mut world = World::new(config);
    for line in scenario.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let (line, expected) = line.split_once("=>").unwrap_or((line, ""));
        assert_eq!(world.step(line), expected.trim(), "{line}");
    }
}

fn with(fairness: Fairness, ordering: Ordering) -> FlowConfig {
    FlowConfig {
        template: BandConfig {
            fairness,
            ordering,
            ..BandConfig::default()
        },
        ..FlowConfig::default()
    }
}

#[test]
fn what_has_room_goes_and_the_rest_waits() {
    play(
        FlowConfig::default(),
        "
        in A*3
        go =>
        room 2
        go => A1 A2
        go =>
        room 1
        in A
        go => A3
        room 9
        go => A4
        go =>
        ",
    );
}

#[test]
fn higher_priorities_go_first_however_many_they_are() {
    play(
        FlowConfig::default(),
        "
        in low prio -1
        in mid
        in high*3 prio 10
        room 2
        go => high1 high2
        blocked => 10
        in high prio 10
        room 2
        go => high3 high4
        room 1
        go => mid1
        blocked => -1
        room 5
        go => low1
        blocked => no
        ",
    );
}

#[test]
fn tenants_take_turns_however_much_one_sends() {
    let scenario = |order: &str| format!("in A*4\nin B\nin C*2\nroom 7\ngo => {order}");
    let rr = with(Fairness::RoundRobin, Ordering::Arrival);
    play(rr, &scenario("A1 B1 C1 A2 C2 A3 A4"));
    let strict = with(Fairness::GlobalStrict, Ordering::Arrival);
    play(strict, &scenario("A1 A2 A3 A4 B1 C1 C2"));
}

#[test]
fn who_was_idle_has_saved_up_nothing_and_lost_nothing() {
    play(
        FlowConfig::default(),
        "
        in A*9
        room 4
        go => A1 A2 A3 A4
        in B*3
        room 4
        go => A5 B1 A6 B2
        in C
        room 9
        go => A7 B3 C1 A8 A9
        ",
    );
}

#[test]
fn new_flows_do_not_pass_those_that_wait() {
    play(
        FlowConfig::default(),
        "
        in A*2
        room 1
        go => A1
        in X1
        room 1
        go => A2
        in A
        in X2
        room 1
        go => X11
        in X3
        room 1
        go => A3
        room 9
        go => X21 X31
        ",
    );
}

#[test]
fn turns_by_tokens_let_short_prompts_through() {
    play(
        with(Fairness::Tokens, Ordering::Arrival),
        "
        in long*3 tokens 10000
        in short*3 tokens 4000
        room 6
        go => short1 short2 long1 short3 long2 long3
        ",
    );
}

#[test]
fn inside_a_flow_the_ordering_decides() {
    let edf = with(Fairness::RoundRobin, Ordering::Deadline);
    play(
        edf,
        "
        in A ttl 9s
        in A ttl 3s
        in A ttl 5s
        in A
        room 4
        go => A2 A3 A1 A4
        ",
    );
    let slo = with(Fairness::RoundRobin, Ordering::SloDeadline);
    play(
        slo,
        "
        in A
        in A slo 300ms
        in A slo 100ms
        at 250ms
        in A slo 20ms
        room 4
        go => A3 A4 A2 A1
        ",
    );
    let strict = with(Fairness::GlobalStrict, Ordering::Deadline);
    play(
        strict,
        "
        in A*2 ttl 9s
        in B ttl 3s
        in A ttl 2s
        room 4
        go => A3 B1 A1 A2
        ",
    );
}

#[test]
fn busy_prefill_servers_hold_up_only_those_that_need_them() {
    play(
        FlowConfig::default(),
        "
        in A*2 prefill
        in B
        in C prio -1
        in D prio 5 prefill
        room 9 prefill 0
        go => B1 C1
        blocked => 5
        room 9 prefill 2
        go => D1 A1
        room 0 prefill 9
        in E
        go =>
        room 1 prefill 9
        go => A2
        room 9
        go => E1
        ",
    );
}

#[test]
fn a_ring_that_was_held_up_does_not_catch_up_at_others_cost() {
    play(
        FlowConfig::default(),
        "
        in A*5 prefill
        in B*9
        room 4 prefill 0
        go => B1 B2 B3 B4
        room 6 prefill 9
        go => A1 B5 A2 B6 A3 B7
        ",
    );
}

#[test]
fn who_waits_too_long_is_told_in_time() {
    play(
        FlowConfig::default(),
        "
        room 0
        in A
        in B ttl 10ms
        in C ttl 5ms
        wakeup => 5ms
        at 4ms
        expire =>
        at 5ms
        expire => C1:EvictedTTL
        wakeup => 10ms
        at 10ms
        cancel B1 => EvictedContextCancelled
        cancel B1 => gone
        expire =>
        wakeup => 60000ms
        at 60s
        expire => A1:EvictedTTL
        wakeup => never
        ",
    );
}

#[test]
fn without_servers_requests_wait_for_the_first_one() {
    let config = FlowConfig {
        no_endpoint_ttl: Some(Duration::from_secs(20)),
        ..FlowConfig::default()
    };
    play(
        config,
        "
        in A ttl 2s
        wakeup => 20000ms
        at 15s
        in B ttl 2s
        expire =>
        room 0
        wakeup => 17000ms
        at 16s
        room none
        wakeup => 21000ms
        at 21s
        expire => A1:EvictedNoEndpoints
        at 22s
        room 1
        go => B1
        ",
    );
}

#[test]
fn what_has_no_place_is_refused() {
    let config = FlowConfig {
        max_requests: Some(4),
        max_bytes: Some(1000),
        bands: vec![(
            1,
            BandConfig {
                max_requests: 2,
                max_bytes: 100,
                ..BandConfig::default()
            },
        )],
        ..FlowConfig::default()
    };
    play(
        config,
        "
        room 0
        in A prio 1 bytes 101 => RejectedCapacity
        in A*2 prio 1
        in A prio 1 => RejectedCapacity
        in B bytes 1001 => RejectedCapacity
        in B bytes 1000
        in B bytes 1 => RejectedCapacity
        in B
        in B => RejectedCapacity
        cancel A2 => EvictedContextCancelled
        in C
        room none
        in D => RejectedNoEndpoints
        ",
    );
}

#[test]
fn a_closed_queue_gives_everything_back_and_takes_nothing() {
    play(
        FlowConfig::default(),
        "
        room 0
        in A*2
        in B prio 3 prefill
        drain => B1:EvictedOther A1:EvictedOther A2:EvictedOther
        in C => RejectedOther
        room 9
        go =>
        wakeup => never
        ",
    );
}

#[test]
fn what_was_let_go_counts_until_it_is_counted_at_its_server() {
    let mut queue = FlowControl::new(FlowConfig::default());
    for i in 0..9 {
        queue.enqueue(Duration::ZERO, &Arrival::new(), i).unwrap();
    }
    let go = |queue: &mut FlowControl<i32>| {
        let went = std::iter::from_fn(|| queue.dispatch(Duration::ZERO));
        went.collect::<Vec<_>>()
    };
    queue.set_room(Duration::ZERO, Room::of_slots(3, None));
    let went = go(&mut queue);
    assert_eq!(went.len(), 3);
    // Nobody has seen them yet: the servers look as before.
    queue.set_room(Duration::ZERO, Room::of_slots(3, None));
    assert_eq!(go(&mut queue).len(), 0);
    queue.placed(went[0].grant);
    queue.set_room(Duration::ZERO, Room::of_slots(3, None));
    assert_eq!(go(&mut queue).len(), 1);
}

fn evicting() -> FlowConfig {
    FlowConfig {
        eviction: true,
        ..FlowConfig::default()
    }
}

#[test]
fn what_runs_and_is_sheddable_makes_room_for_what_waits() {
    play(
        evicting(),
        "
        in batch*2 prio -1
        in lower prio -2
        in chat
        room 4
        go => chat1 batch1 batch2 lower1
        give-up =>
        in chat
        blocked => 0
        go =>
        give-up => lower1:0
        give-up =>
        at 400ms
        over lower1 => 400ms
        room 1
        go => chat2
        in chat
        room 0
        give-up =>
        wakeup => 500ms
        at 500ms
        give-up => batch2:0
        over batch2 => 0ms
        over chat1
        room 1
        go => chat3
        ",
    );
}

#[test]
fn nobody_is_given_up_for_an_equal_or_a_first_server_or_where_that_is_not_wanted() {
    let scenario = "
        in batch prio -1
        room 1
        go => batch1
        in chat
        room 0
        give-up =>
        ";
    play(FlowConfig::default(), scenario);
    let equal = "
        in batch*2 prio -1
        room 1
        go => batch1
        give-up =>
        room none
        in chat
        give-up =>
        room 0
        give-up => batch1:0
        ";
    play(evicting(), equal);
}

#[test]
fn busy_prefill_servers_alone_end_nothing() {
    play(
        evicting(),
        "
        in batch prio -1
        room 2 prefill 0
        go => batch1
        in chat prefill
        go =>
        blocked => 0
        give-up =>
        ",
    );
}

#[test]
fn who_does_not_end_is_waited_for_and_then_no_more() {
    play(
        evicting(),
        "
        in batch*2 prio -1 ttl 100s
        room 2
        go => batch1 batch2
        in chat ttl 100s
        room 0
        give-up => batch2:0
        wakeup => 10000ms
        at 9s
        give-up =>
        at 10s
        give-up => batch1:0
        wakeup => 100000ms
        ",
    );
}
