//! Lists that change, and what is counted, remembered and forgotten meanwhile.

use super::*;
use crate::endpoint::{Address, ROLE_LABEL};
use baton_scheduler::{Policy, PrefixIndex};
use std::sync::Weak;

fn fleet() -> Fleet {
    let policy = Policy {
        pd_threshold: Some(100),
        ..Policy::default()
    };
    Fleet::new(Scheduler::new(policy, PrefixIndex::new(1000)), 7)
}

fn spec(name: &str, address: &str, role: &str) -> EndpointSpec {
    let mut spec = EndpointSpec::new(name, Address::parse(address).unwrap());
    spec.labels.insert(ROLE_LABEL.to_owned(), role.to_owned());
    spec
}

/// A fleet of healthy servers.
fn with(specs: &[EndpointSpec]) -> Fleet {
    let fleet = fleet();
    fleet.set_endpoints(specs).unwrap();
    for server in fleet.servers().iter() {
        fleet.set_health(server, Health::Healthy);
    }
    fleet
}

fn two() -> [EndpointSpec; 2] {
    [
        spec("a", "10.0.0.1:1", "decode"),
        spec("b", "10.0.0.2:1", "decode"),
    ]
}

fn prompt(fleet: &Fleet, text: &str) -> Prompt {
    fleet.prompt("m", &[text.repeat(100).as_bytes()], None)
}

fn route(fleet: &Fleet, prompt: &Prompt, avoid: &[EndpointId]) -> Route {
    let request = Request {
        avoid,
        ..Request::new(prompt)
    };
    fleet.route(&request).unwrap()
}

fn routed(fleet: &Fleet, text: &str) -> String {
    let found = route(fleet, &prompt(fleet, text), &[]);
    found.decode.name().to_owned()
}

#[test]
fn a_route_counts_at_its_servers_until_it_is_dropped() {
    let fleet = with(&[
        spec("d", "10.0.0.1:1", "decode"),
        spec("p", "10.0.0.2:1", "prefill"),
    ]);
    let prompt = prompt(&fleet, "some words");
    let first = route(&fleet, &prompt, &[]);
    let servers = fleet.servers();
    let counts = || [0, 1].map(|i| (servers[i].in_flight(), servers[i].tokens_in_flight()));
    assert_eq!(counts(), [(1, 250), (1, 250)]);
    let second = route(&fleet, &prompt, &[]);
    assert_eq!(servers[0].load(Duration::ZERO).active, 2);
    drop((first, second));
    assert_eq!(counts(), [(0, 0), (0, 0)]);
}

#[test]
fn an_endpoint_stays_itself_when_its_labels_or_port_change() {
    let [a, b] = two();
    let fleet = with(&[a, b.clone()]);
    let before = fleet.servers();
    let flight = route(&fleet, &prompt(&fleet, "x"), &[before[1].id]);
    let changed = spec("a", "10.0.0.1:2", "prefill");
    fleet.set_endpoints(&[b.clone(), changed]).unwrap();
    let after = fleet.servers();
    assert!(Arc::ptr_eq(&after[0], &before[1]));
    assert_eq!(
        (after[1].id, after[1].role),
        (before[0].id, baton_scheduler::Role::Prefill)
    );
    assert_eq!(after[1].address.as_str(), "10.0.0.1:2");
    assert_eq!(
        (after[1].health(), after[1].in_flight()),
        (Health::Healthy, 1)
    );
    drop(flight);
    assert_eq!(after[1].in_flight(), 0);
    // On another machine nothing is known of it.
    fleet
        .set_endpoints(&[b, spec("a", "10.0.0.9:2", "prefill")])
        .unwrap();
    let moved = fleet.servers();
    assert_eq!(
        (moved[1].id, moved[1].health()),
        (before[0].id, Health::Unreachable)
    );
}

#[test]
fn another_plan_decides_from_the_next_request_on() {
    let fleet = with(&[
        spec("d", "10.0.0.1:1", "decode"),
        spec("p", "10.0.0.2:1", "prefill"),
    ]);
    let words = prompt(&fleet, "some words");
    assert!(route(&fleet, &words, &[]).prefill.is_some());
    fleet.set_plan(Policy {
        pd_threshold: None,
        ..Policy::default()
    });
    assert!(
        route(&fleet, &prompt(&fleet, "other words"), &[])
            .prefill
            .is_none()
    );
}

#[test]
fn servers_are_found_by_their_address() {
    let [a, b] = two();
    let fleet = with(&[b.clone(), a, spec("named", "localhost:1", "decode")]);
    fleet
        .set_endpoints(&[spec("new", "[::1]:5", "decode"), b])
        .unwrap();
    let ids = fleet.ids_at(|address| address.port() < 9);
    assert_eq!(ids, [EndpointId(0), EndpointId(3)]);
    assert_eq!(fleet.ids_at(|address| address.is_ipv6()), [EndpointId(3)]);
}

#[test]
fn who_left_the_list_is_forgotten() {
    let [a, b] = two();
    let fleet = with(&[a.clone(), b.clone()]);
    let place = routed(&fleet, "the same words");
    fleet.answered(
        &fleet.servers()[usize::from(place == "b")],
        &prompt(&fleet, "the same words"),
    );
    for _ in 0..3 {
        assert_eq!(routed(&fleet, "the same words"), place);
    }
    let stays = if place == "a" { b.clone() } else { a.clone() };
    let ids: Vec<EndpointId> = fleet.servers().iter().map(|s| s.id).collect();
    fleet.set_endpoints(&[stays]).unwrap();
    fleet.set_endpoints(&[a, b]).unwrap();
    let servers = fleet.servers();
    let new: Vec<_> = servers.iter().filter(|s| !ids.contains(&s.id)).collect();
    assert_eq!((new.len(), new[0].name()), (1, &*place));
    fleet.set_health(new[0], Health::Healthy);
    let other = servers.iter().find(|s| s.id != new[0].id).unwrap().id;
    let words = prompt(&fleet, "the same words");
    let found = route(&fleet, &words, &[other]);
    assert_eq!(
        (found.decode.name(), found.decision.uncached_tokens),
        (&*place, words.tokens())
    );
}

#[test]
fn lists_that_make_no_sense_change_nothing() {
    let [a, b] = two();
    let fleet = with(std::slice::from_ref(&a));
    let twice = fleet.set_endpoints(&[b.clone(), b]);
    assert_eq!(twice, Err(ListError::Duplicate("b".to_owned())));
    let many: Vec<EndpointSpec> = (0..=MAX_ENDPOINTS)
        .map(|i| spec(&i.to_string(), "10.0.0.1:1", "decode"))
        .collect();
    assert_eq!(fleet.set_endpoints(&many), Err(ListError::TooMany));
    assert_eq!(fleet.servers().len(), 1);
}

#[test]
fn who_fails_in_a_row_gets_nothing_unless_most_do() {
    let specs: Vec<EndpointSpec> = (1..=3)
        .map(|i| spec(&format!("s{i}"), &format!("10.0.0.{i}:1"), "decode"))
        .collect();
    let fleet = with(&specs);
    let servers = fleet.servers();
    let used =
        |n: usize| -> BTreeSet<String> { (0..n).map(|i| routed(&fleet, &i.to_string())).collect() };
    let fail = |i: usize| (0..5).for_each(|_| fleet.failed(&servers[i]));
    assert_eq!(used(30).len(), 3);
    fail(0);
    assert_eq!(used(30), ["s2", "s3"].map(str::to_owned).into());
    fail(1);
    assert_eq!(used(30).len(), 3, "two of three: it is not the servers");
    servers[1].succeeded();
    assert_eq!(used(30), ["s2", "s3"].map(str::to_owned).into());
    servers[0].succeeded();
    assert_eq!(used(30).len(), 3);
}

#[test]
fn a_server_that_was_started_again_has_lost_its_cache() {
    let fleet = with(&two());
    let servers = fleet.servers();
    let words = prompt(&fleet, "words");
    let scraped = |started: f64| Scraped {
        started: Some(started),
        cache_tokens: Some(1 << 20),
        ..Scraped::default()
    };
    let uncached = || {
        let found = route(&fleet, &words, &[servers[1].id]);
        found.decision.uncached_tokens
    };
    fleet.scraped(&servers[0], &scraped(1.0), 0, Duration::ZERO);
    fleet.answered(&servers[0], &words);
    fleet.scraped(&servers[0], &scraped(1.0), 0, Duration::ZERO);
    assert!(uncached() < 20);
    fleet.scraped(&servers[0], &scraped(2.0), 0, Duration::ZERO);
    assert_eq!(uncached(), words.tokens());
}

#[test]
fn what_servers_report_counts_until_it_is_lost() {
    let config = serde_json::json!({
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [
            {"type": "precise-prefix-cache-scorer"},
            {"type": "max-score-in-turn-picker"},
        ],
    });
    let plan = baton_scheduler::config::load(&config).unwrap().plan;
    let fleet = Fleet::new(Scheduler::new(plan, PrefixIndex::new(1000)), 7);
    fleet.set_endpoints(&two()).unwrap();
    let servers = fleet.servers();
    for server in servers.iter() {
        fleet.set_health(server, Health::Healthy);
    }
    let tokens: Vec<u32> = (0..64).collect();
    let stored = baton_kv::Stored {
        hashes: (0..4).map(baton_kv::EngineHash).collect(),
        tokens: tokens.clone(),
        block_size: 16,
        ..baton_kv::Stored::default()
    };
    let stored = [BlockEvent::Stored(stored)];
    let uncached = || {
        let asked = TokenPrompt {
            model: "m",
            tokens: &tokens,
            ..TokenPrompt::default()
        };
        let keys = fleet.keys(&asked).unwrap();
        let prompt = fleet.prompt("m", &[&[b'x'; 300]], Some(64));
        let request = Request {
            keys: Some(&keys),
            ..Request::new(&prompt)
        };
        let found = fleet.route(&request).unwrap().decision;
        (found.decode == servers[1].id, found.uncached_tokens)
    };
    fleet.reported(servers[1].id, "m", &stored);
    assert_eq!([uncached(), uncached()], [(true, 0), (true, 0)]);
    // That it does not answer for a moment does not mean that it lost anything.
    fleet.set_health(&servers[1], Health::Unreachable);
    fleet.set_health(&servers[1], Health::Healthy);
    assert_eq!(uncached(), (true, 0));
    fleet.reports_lost(servers[1].id);
    assert_eq!(uncached().1, 64);
    fleet.reported(servers[1].id, "m", &stored);
    assert_eq!(uncached(), (true, 0));
    fleet.reports_end(servers[1].id);
    assert_eq!(uncached().1, 64);
    assert!(self::fleet().keys(&TokenPrompt::default()).is_none());
}

#[test]
fn a_thousand_endpoints_that_come_and_go_leave_nothing_behind() {
    let fleet = fleet();
    let mut gone: Vec<Weak<Server>> = Vec::new();
    for round in 0..20 {
        // Half of them are new every time.
        let specs: Vec<EndpointSpec> = (round * 500..round * 500 + 1000)
            .map(|i| {
                spec(
                    &format!("s{i}"),
                    &format!("10.0.{}.{}:1", i / 250, i % 250),
                    "decode",
                )
            })
            .collect();
        fleet.set_endpoints(&specs).unwrap();
        let servers = fleet.servers();
        assert_eq!(servers.len(), 1000);
        for server in servers.iter() {
            fleet.set_health(server, Health::Healthy);
        }
        for i in 0..20 {
            routed(&fleet, &format!("{round} {i}"));
        }
        assert_eq!(gone.iter().filter(|s| s.strong_count() > 0).count(), 0);
        gone.extend(servers[..500].iter().map(Arc::downgrade));
        assert!(fleet.deciding.lock().snapshot.capacity() < 4 * 1000);
    }
}
