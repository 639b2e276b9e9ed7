//! What must hold for modelled fleets, scaled down; `baton simulate` does the same at full length.

use super::*;
use crate::Conversations;

fn conversations(requests: usize) -> Workload {
    let made = Conversations {
        systems: 40,
        turns: 5,
        again: false,
        system: 6000,
        question: 1200,
        answer: 100,
        requests,
        rate: 1.0,
        block_tokens: 64,
        seed: 3,
    };
    made.workload()
}

fn setup() -> Setup {
    Setup {
        both: 4,
        blocks: 4000,
        ..Setup::default()
    }
}

fn line(load: &Workload, setup: &Setup, policy: Policy) -> Line {
    run(load, setup, policy).line(load)
}

#[test]
fn the_same_arguments_give_the_same_figures() {
    let (load, setup) = (conversations(300), setup());
    for policy in Policy::ALL {
        assert_eq!(
            run(&load, &setup, policy),
            run(&load, &setup, policy),
            "{policy:?}"
        );
    }
}

#[test]
fn everything_is_answered_once() {
    let load = conversations(300);
    let apart = Setup {
        both: 0,
        prefill: 2,
        decode: 2,
        split: Split::Always,
        ..setup()
    };
    let tokens: u64 = load.asks.iter().map(|a| u64::from(a.output)).sum();
    for (setup, policy) in [(setup(), Policy::Ours), (apart, Policy::Random)] {
        let figures = run(&load, &setup, policy);
        assert_eq!((figures.tokens, figures.failed), (tokens, 0));
        assert_eq!(figures.first.len(), load.asks.len());
        assert!(figures.cached <= figures.blocks);
    }
}

#[test]
fn nobody_is_answered_before_the_question() {
    let mut load = conversations(50);
    load.asks.iter_mut().for_each(|a| a.arrival += 600_000_000);
    let figures = run(&load, &setup(), Policy::Ours);
    assert!(figures.first.iter().all(|s| (0.0..60.0).contains(s)));
}

#[test]
fn whoever_looks_for_prefixes_is_better_off_than_whoever_does_not() {
    let load = conversations(600);
    let setup = Setup {
        speed: capacity(&load, &setup()),
        ..setup()
    };
    let [random, ours, precise] =
        [Policy::Random, Policy::Ours, Policy::OursPrecise].map(|p| line(&load, &setup, p));
    assert!(ours.cached > 1.5 * random.cached, "{ours:?} {random:?}");
    assert!(ours.first[0] < random.first[0] && ours.first[2] < random.first[2]);
    assert!(precise.cached > 0.95 * ours.cached && ours.busiest < 1.3);
}

/// Requests that share nothing.
fn strangers(question: u32, answer: u32) -> Workload {
    let made = Conversations {
        systems: 400,
        turns: 1,
        again: false,
        system: 0,
        question,
        answer,
        requests: 400,
        rate: 1.0,
        block_tokens: 64,
        seed: 3,
    };
    made.workload()
}

#[test]
fn choosing_whether_to_split_is_no_worse_than_always_or_never() {
    let apart = Setup {
        both: 0,
        prefill: 2,
        decode: 2,
        ..setup()
    };
    let loads = [conversations(400), strangers(4000, 50), strangers(300, 200)];
    for (load, part) in loads.iter().flat_map(|load| [(load, 0.6), (load, 1.0)]) {
        let speed = part * capacity(load, &apart);
        let mean = |split| {
            let setup = Setup {
                split,
                speed,
                ..apart.clone()
            };
            line(load, &setup, Policy::Ours).first_mean
        };
        let [chosen, always, never] = [Split::Sooner, Split::Always, Split::Never].map(mean);
        assert!(
            chosen < 1.02 * always.min(never),
            "{:?} at {part}: {chosen}, always {always}, never {never}",
            load.asks[0]
        );
    }
}

/// Prompts of some length beside answers: their first tokens may come a little later, so that answers flow.
#[test]
fn a_prompt_elsewhere_shortens_the_whole_request() {
    let load = strangers(1500, 200);
    let apart = Setup {
        both: 0,
        prefill: 2,
        decode: 2,
        ..setup()
    };
    let speed = 0.8 * capacity(&load, &apart);
    let whole = |split| {
        let setup = Setup {
            split,
            speed,
            ..apart.clone()
        };
        line(&load, &setup, Policy::Ours).whole_mean
    };
    let [chosen, always, never] = [Split::Sooner, Split::Always, Split::Never].map(whole);
    assert!(
        chosen < 1.02 * always && chosen < 0.9 * never,
        "{chosen} {always} {never}"
    );
}

/// An hour in which a server is replaced every minute.
#[test]
fn what_is_remembered_is_bounded_while_servers_come_and_go() {
    let load = conversations(3600);
    let setup = Setup {
        speed: 1.0,
        replace_every: Some(60_000_000),
        ..setup()
    };
    for policy in [Policy::Ours, Policy::OursPrecise] {
        let line = line(&load, &setup, policy);
        assert_eq!(line.failed, 0);
        // Where servers report, what was sent to them is remembered all the same.
        let indices = 1 + usize::from(policy == Policy::OursPrecise);
        let most = indices * setup.both * setup.blocks;
        assert!(line.remembered <= most, "{line:?}");
    }
}

#[test]
fn a_table_has_a_line_for_each_way_and_load() {
    let study = Study {
        setup: setup(),
        blocks: vec![4000, 2000],
        loads: vec![0.5, 1.0],
        policies: vec![Policy::Ours, Policy::RoundRobin],
    };
    let mut lines = Vec::new();
    study.run(&conversations(50), |line| lines.push(line.to_owned()));
    let count = |what: &str| lines.iter().filter(|l| l.contains(what)).count();
    assert_eq!(
        (count("baton  "), count("round-robin"), count("capacity")),
        (4, 4, 2)
    );
    let heads: Vec<&String> = lines.iter().filter(|l| l.contains("policy")).collect();
    assert!(
        lines
            .iter()
            .filter(|l| l.contains("round-robin"))
            .all(|l| l.chars().count() == heads[0].chars().count()),
        "{lines:#?}"
    );
}
