//! Scenarios as text, and what must hold for all fleets.
//!
//! A scenario is a list of lines, done in order:
//! ```text
//! threshold 128 | never
//! d0 decode [waiting N] [active N] [kv F] [down|draining] [models a,b]
//! forget d0
//! ask TEXT*N [model M] [avoid d0] [turn N] [unanswered yet] => d0 | d0 + p0 | d0, no prefill server | unknown model | nobody
//! ```
//! `TEXT*N` is the word TEXT repeated to N tokens, four bytes each. What was asked is remembered, as
//! answered unless it says otherwise.

use super::*;
use crate::workspace::may_take;
use crate::{Health, Policy, PromptHasher, Role, Weights};
use proptest::prelude::*;
use std::fmt::Write as _;

#[derive(Default)]
struct World {
    names: Vec<String>,
    fleet: Vec<Endpoint>,
}

impl World {
    fn id(&self, name: &str) -> EndpointId {
        let at = self.names.iter().position(|n| n == name);
        EndpointId(u32::try_from(at.unwrap_or_else(|| panic!("no endpoint {name}"))).unwrap())
    }

    fn set(&mut self, name: &str, role: Role, rest: &[&str]) {
        let mut e = Endpoint {
            models: Some(["m".into()].into()),
            ..Endpoint::new(EndpointId(0), role)
        };
        let mut words = rest.iter();
        while let Some(&word) = words.next() {
            let mut value = || *words.next().unwrap();
            match word {
                "waiting" => e.load.waiting = value().parse().unwrap(),
                "active" => e.load.active = value().parse().unwrap(),
                "kv" => e.load.kv_usage = value().parse().unwrap(),
                "down" => e.health = Health::Unreachable,
                "draining" => e.health = Health::Draining,
                "models" => e.models = Some(value().split(',').map(Into::into).collect()),
                "untold" => e.models = None,
                other => panic!("what is {other}?"),
            }
        }
        e.load.active = e.load.active.max(e.load.waiting);
        if !self.names.iter().any(|n| n == name) {
            self.names.push(name.to_owned());
            self.fleet.push(e.clone());
        }
        let id = self.id(name);
        self.fleet[id.0 as usize] = Endpoint { id, ..e };
    }

    fn show(&self, decided: Result<&Decision, Unschedulable>) -> String {
        let d = match decided {
            Err(Unschedulable::UnknownModel) => return "unknown model".to_owned(),
            Err(Unschedulable::NoneHealthy) => return "nobody".to_owned(),
            Err(other) => return other.to_string(),
            Ok(d) => d,
        };
        let mut text = self.names[d.decode.0 as usize].clone();
        match d.prefill {
            Prefill::NotWorthIt => {}
            Prefill::SameServer => text.push_str(" by itself"),
            Prefill::NoneHealthy => text.push_str(", no prefill server"),
            Prefill::At(p, _) => write!(text, " + {}", self.names[p.0 as usize]).unwrap(),
        }
        text
    }
}

/// Several scorers, as the upstream guide for prefill and decode apart weighs them.
fn weighted(pd_threshold: Option<u32>) -> Policy {
    Policy {
        decode: Weights {
            prefix_cache_scorer: 2.0,
            active_request_scorer: 2.0,
            kv_cache_utilization_scorer: 1.0,
            ..Weights::default()
        },
        prefill: Weights {
            prefix_cache_scorer: 3.0,
            queue_scorer: 2.0,
            active_request_scorer: 2.0,
            ..Weights::default()
        },
        pd_threshold,
        ..Policy::default()
    }
}

fn prompt(text: &str) -> Prompt {
    let (word, tokens) = text.split_once('*').unwrap();
    let bytes: Vec<u8> = word
        .bytes()
        .cycle()
        .take(4 * tokens.parse::<usize>().unwrap())
        .collect();
    PromptHasher::new(1).prompt("m", &[&bytes], None)
}

fn ask(world: &World, scheduler: &mut Scheduler, words: &[&str]) -> String {
    let (mut model, mut avoid, mut turn, mut answered) = (Some("m"), vec![], 0, true);
    for pair in words[1..].chunks(2) {
        match pair[0] {
            "model" => model = Some(pair[1]).filter(|&m| m != "-"),
            "avoid" => avoid = pair[1].split(',').map(|n| world.id(n)).collect(),
            "unanswered" => answered = false,
            "turn" => turn = pair[1].parse().unwrap(),
            other => panic!("what is {other}?"),
        }
    }
    let prompt = prompt(words[0]);
    let request = Request {
        model,
        avoid: &avoid,
        ..Request::new(&prompt)
    };
    let decided = scheduler.decide(&world.fleet, &request, turn);
    if let Ok(d) = &decided {
        scheduler.sent(&request, d);
        if answered {
            scheduler.answered(&prompt, d.decode);
        }
    }
    world.show(decided.as_ref().map_err(|e| *e))
}

fn check(scenario: &str) {
    let mut world = World::default();
    let mut scheduler = Scheduler::new(weighted(Some(128)), PrefixIndex::new(1000));
    for line in scenario.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (words[0], words.get(1).copied()) {
            ("threshold", value) => {
                let pd_threshold = value.unwrap().parse().ok();
                scheduler.plan = weighted(pd_threshold).into();
            }
            ("forget", name) => scheduler.forget(world.id(name.unwrap())),
            ("ask", _) => {
                let (question, expected) = line[4..].split_once(" => ").unwrap();
                let words: Vec<&str> = question.split_whitespace().collect();
                assert_eq!(
                    ask(&world, &mut scheduler, &words),
                    expected,
                    "in {line:?} of {scenario}"
                );
            }
            (name, Some("decode")) => world.set(name, Role::Decode, &words[2..]),
            (name, Some("prefill")) => world.set(name, Role::Prefill, &words[2..]),
            (name, Some("both")) => world.set(name, Role::Both, &words[2..]),
            _ => panic!("what is {line:?}?"),
        }
    }
}

#[test]
fn a_long_prompt_goes_through_prefill_and_a_short_one_does_not() {
    check(
        "d0 decode
         p0 prefill
         ask story*128 => d0 + p0
         ask other*127 => d0",
    );
}

#[test]
fn a_prompt_that_decode_has_cached_needs_no_prefill() {
    check(
        "d0 decode
         p0 prefill
         ask story*1600 => d0 + p0
         ask story*1600 => d0
         ask story*1728 => d0 + p0
         ask story*1855 => d0",
    );
}

#[test]
fn a_prompt_that_is_still_under_way_draws_its_like_but_does_not_count_as_cached() {
    check(
        "d0 decode
         d1 decode
         p0 prefill
         ask story*1600 turn 1 unanswered yet => d1 + p0
         ask story*1600 turn 0 => d1 + p0
         ask story*1600 turn 0 => d1",
    );
}

#[test]
fn the_threshold_may_be_never_or_always() {
    check(
        "d0 decode
         p0 prefill
         threshold never
         ask story*5000 => d0
         threshold 0
         ask short*1 => d0 + p0
         ask none*0 => d0",
    );
}

#[test]
fn without_a_healthy_prefill_server_decode_does_it_all() {
    check(
        "d0 decode
         p0 prefill down
         p1 prefill draining
         ask story*500 => d0, no prefill server
         p0 prefill
         ask other*500 => d0 + p0",
    );
}

#[test]
fn a_prefix_draws_requests_to_its_servers() {
    check(
        "d0 decode
         d1 decode
         p0 prefill
         p1 prefill
         ask story*1600 turn 1 => d1 + p1
         ask story*1600 => d1
         ask story*3200 => d1 + p1
         ask other*1600 => d0 + p0",
    );
}

#[test]
fn load_outweighs_a_prefix_when_it_is_great() {
    check(
        "d0 decode active 0
         d1 decode active 0
         threshold never
         ask story*1600 turn 1 => d1
         d1 decode active 9
         d0 decode active 8
         ask story*1600 => d1
         d0 decode active 0
         d1 decode active 9 kv 0.3
         ask story*1600 => d0",
    );
}

#[test]
fn free_kv_and_a_short_queue_decide_between_equals() {
    check(
        "d0 decode kv 0.9
         d1 decode kv 0.2
         d2 decode kv NaN
         p0 prefill waiting 3
         p1 prefill waiting 1
         ask story*500 => d1 + p1",
    );
}

#[test]
fn equal_servers_take_turns() {
    check(
        "d0 decode
         d1 decode
         d2 decode down
         ask a*10 turn 0 => d0
         ask b*10 turn 1 => d1
         ask c*10 turn 2 => d0
         ask d*10 turn 18446744073709551615 => d1",
    );
}

#[test]
fn a_failed_server_is_avoided_and_its_prefix_forgotten() {
    check(
        "d0 decode
         d1 decode
         threshold never
         ask story*1600 => d0
         ask story*1600 avoid d0 => d1
         forget d1
         forget d0
         ask story*1600 turn 1 => d1
         ask story*1600 avoid d0,d1 => nobody",
    );
}

#[test]
fn a_model_is_unknown_only_if_everybody_told() {
    check(
        "d0 decode models a,b
         d1 decode models b down
         ask x*1 model b => d0
         ask x*1 model c => unknown model
         d0 decode models a
         ask x*1 model b => nobody
         ask x*1 model - => d0
         d2 decode untold down
         ask x*1 model c => nobody
         d2 decode untold
         ask x*1 model c => d2",
    );
}

#[test]
fn servers_of_both_roles_answer_alone_and_do_not_prefill_for_others() {
    check(
        "b0 both
         b1 both
         ask story*500 => b0, no prefill server
         p0 prefill
         ask other*500 => b0 + p0",
    );
}

#[test]
fn an_empty_fleet_has_nobody() {
    check("ask x*1 => nobody");
    check(
        "p0 prefill
         ask x*1 => nobody",
    );
}

fn any_endpoint(id: u32) -> impl Strategy<Value = Endpoint> {
    let role = prop_oneof![Just(Role::Prefill), Just(Role::Decode), Just(Role::Both)];
    let health = prop_oneof![4 => Just(Health::Healthy), 1 => Just(Health::Draining), 1 => Just(Health::Unreachable)];
    let models = prop_oneof![Just(None), Just(Some("m")), Just(Some("n"))];
    (
        role,
        health,
        models,
        any::<u32>(),
        any::<u32>(),
        any::<f32>(),
    )
        .prop_map(move |(role, health, models, w, a, kv)| {
            let mut endpoint = Endpoint {
                models: models.map(|m| [Box::from(m)].into()),
                health,
                ..Endpoint::new(EndpointId(id), role)
            };
            let load = &mut endpoint.load;
            (load.waiting, load.active, load.kv_usage) = (w, a.max(w), kv);
            endpoint
        })
}

fn any_fleet() -> impl Strategy<Value = Vec<Endpoint>> {
    (0u32..8)
        .prop_flat_map(|n| (0..n).map(any_endpoint).collect::<Vec<_>>())
        .prop_shuffle()
}

proptest! {
    #[test]
    fn whoever_is_chosen_may_be(fleet in any_fleet(), asks in prop::collection::vec((0usize..4, 0u64..9), 1..12), avoid in 0u32..8) {
        let mut scheduler = Scheduler::new(weighted(Some(128)), PrefixIndex::new(50));
        for (text, turn) in asks {
            let prompt = prompt(["a*10", "a*300", "a*700", "b*300"][text]);
            let avoid = [EndpointId(avoid)];
            let request = Request { model: Some("m"), avoid: &avoid, ..Request::new(&prompt) };
            let eligible = |role: fn(Role) -> bool| fleet.iter().filter(move |e| role(e.role)).any(|e| may_take(e, &request));
            match scheduler.decide(&fleet, &request, turn) {
                Err(_) => prop_assert!(!eligible(Role::decodes)),
                Ok(d) => {
                    let of = |id| fleet.iter().find(|e| e.id == id).unwrap();
                    prop_assert!(of(d.decode).role.decodes() && may_take(of(d.decode), &request));
                    prop_assert!(d.score.is_finite() && d.uncached_tokens <= prompt.tokens());
                    match d.prefill {
                        Prefill::At(p, _) => prop_assert!(of(p).role == Role::Prefill && may_take(of(p), &request)),
                        Prefill::NoneHealthy => prop_assert!(!eligible(Role::prefills_for_others)),
                        Prefill::NotWorthIt => prop_assert!(d.uncached_tokens < 128),
                        Prefill::SameServer => prop_assert!(false, "roles of this policy do not overlap"),
                    }
                    scheduler.sent(&request, &d);
                }
            }
        }
    }

    #[test]
    fn the_order_of_the_fleet_does_not_matter(fleet in any_fleet(), turn in any::<u64>()) {
        let decide = |fleet: &[Endpoint]| {
            let prompt = prompt("a*300");
            let request = Request { model: Some("m"), ..Request::new(&prompt) };
            Scheduler::new(weighted(Some(128)), PrefixIndex::new(50)).decide(fleet, &request, turn)
        };
        let mut reversed = fleet.clone();
        reversed.reverse();
        prop_assert_eq!(decide(&fleet), decide(&reversed));
    }
}

/// Notes what it is told.
#[derive(Default)]
struct Steps(Vec<Step>);

impl Observer for Steps {
    fn did(&mut self, step: Step) {
        self.0
            .extend(Some(step).filter(|step| *step != Step::Other));
    }
}

#[test]
fn who_watches_is_told_of_every_plugin_and_changes_nothing() {
    let mut world = World::default();
    world.set("d0", Role::Decode, &[]);
    world.set("p0", Role::Prefill, &[]);
    let mut scheduler = Scheduler::new(weighted(Some(1)), PrefixIndex::new(10));
    let prompt = PromptHasher::new(7).prompt("m", &[&[b'x'; 400]], None);
    let request = Request::new(&prompt);
    let mut steps = Steps::default();
    let observed = scheduler.decide_observed(&world.fleet, &request, 0, &mut steps);
    assert_eq!(observed, scheduler.decide(&world.fleet, &request, 0));
    // The scorer of prefixes is the first, and asks.
    let profile = |at| {
        let asked = [
            Step::Profile(at),
            Step::Filter(0),
            Step::Lookup(Source::Approximate),
        ];
        let scored = [0, 1, 2].map(Step::Scorer);
        asked.into_iter().chain(scored).chain([Step::Picker])
    };
    let all = profile(0).chain(profile(1)).chain([Step::Results]);
    assert_eq!(steps.0, all.collect::<Vec<_>>());

    world.set("d0", Role::Decode, &["down"]);
    let mut steps = Steps::default();
    let nobody = scheduler.decide_observed(&world.fleet, &request, 0, &mut steps);
    assert!(nobody.is_err());
    assert_eq!(steps.0, [Step::Profile(0), Step::Filter(0), Step::Results]);
}
