//! Tables for `state`.

use super::*;
use crate::kinds::{Nothing, Object, PodStatus};
use serde_json::json;

const NAME: &str = "pool";

fn known() -> Known {
    Known::new(PoolName::new("ns", NAME))
}

fn pool(app: &str, ports: &[u16]) -> Pool {
    let ports: Vec<_> = ports.iter().map(|p| json!({"number": p})).collect();
    Pool::read(
        &serde_json::from_value(
            json!({"selector": {"matchLabels": {"app": app}}, "targetPorts": ports}),
        )
        .unwrap(),
    )
}

fn pod(app: &str, ip: &str) -> Pod {
    let object: Object<Nothing, PodStatus> = serde_json::from_value(json!({
        "metadata": {"labels": {"app": app}},
        "status": {"podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]}
    }))
    .unwrap();
    Pod::read(object).unwrap()
}

fn put<T>(name: &str, value: T) -> News<T> {
    News::Put(name.into(), Some(value))
}

fn list<T: Clone>(objects: &[(&str, T)]) -> Vec<News<T>> {
    let objects = objects.iter().map(|(name, value)| put(name, value.clone()));
    std::iter::once(News::Begin)
        .chain(objects)
        .chain([News::Complete])
        .collect()
}

/// Applies all of it; whether any of it changed the state.
fn apply<T>(known: &mut Known, event: fn(News<T>) -> Event, news: Vec<News<T>>) -> bool {
    news.into_iter()
        .fold(false, |changed, news| known.apply(event(news)) | changed)
}

fn names(known: &Known) -> Vec<String> {
    known
        .snapshot()
        .endpoints
        .into_iter()
        .map(|e| e.name)
        .collect()
}

fn synced() -> Known {
    let mut known = known();
    apply(&mut known, Event::Pool, list(&[(NAME, pool("m", &[8000]))]));
    apply(
        &mut known,
        Event::Pod,
        list(&[("a", pod("m", "10.0.0.1")), ("b", pod("m", "10.0.0.2"))]),
    );
    known
}

#[test]
fn it_is_in_step_once_the_pool_is_there_and_its_pods_are_listed() {
    let mut known = known();
    assert_eq!(known.snapshot(), PoolState::default());
    assert!(apply(&mut known, Event::Pool, list(&[])));
    assert!(!known.snapshot().synced, "there is no such pool");
    assert!(apply(
        &mut known,
        Event::Pool,
        vec![put(NAME, pool("m", &[8000]))]
    ));
    assert!(!known.snapshot().synced, "its pods are not known");
    assert!(!apply(
        &mut known,
        Event::Pod,
        vec![News::Begin, put("a", pod("m", "10.0.0.1"))]
    ));
    assert_eq!(names(&known), [""; 0], "half a list is none");
    assert!(apply(&mut known, Event::Pod, vec![News::Complete]));
    assert_eq!(names(&known), ["a-rank-0"]);
    assert!(known.snapshot().synced);
}

#[test]
fn an_empty_list_of_pods_is_a_list() {
    let mut known = known();
    apply(&mut known, Event::Pool, list(&[(NAME, pool("m", &[8000]))]));
    assert!(apply(&mut known, Event::Pod, list(&[])));
    assert!(known.snapshot().synced);
}

#[test]
fn a_new_list_replaces_the_old_one_at_its_end_and_not_before() {
    let mut known = synced();
    for news in [
        News::Begin,
        put("b", pod("m", "10.0.0.2")),
        News::Begin,
        put("c", pod("m", "10.0.0.3")),
    ] {
        assert!(!known.apply(Event::Pod(news)));
        assert_eq!(names(&known), ["a-rank-0", "b-rank-0"]);
    }
    assert!(known.apply(Event::Pod(News::Complete)));
    assert_eq!(names(&known), ["c-rank-0"]);
}

#[test]
fn a_list_that_says_the_same_changes_nothing() {
    let mut known = synced();
    assert!(!apply(
        &mut known,
        Event::Pod,
        list(&[("a", pod("m", "10.0.0.1")), ("b", pod("m", "10.0.0.2"))])
    ));
    assert!(!known.apply(Event::Pod(put("a", pod("m", "10.0.0.1")))));
    assert!(known.apply(Event::Pod(put("a", pod("m", "10.0.0.9")))));
}

#[test]
fn pods_come_and_go() {
    let mut known = synced();
    assert!(
        known.apply(Event::Pod(News::Put("a".into(), None))),
        "no longer ready"
    );
    assert!(
        !known.apply(Event::Pod(News::Remove("a".into()))),
        "was not counted any more"
    );
    assert!(known.apply(Event::Pod(put("c", pod("m", "10.0.0.3")))));
    assert!(known.apply(Event::Pod(News::Remove("b".into()))));
    assert_eq!(names(&known), ["c-rank-0"]);
}

#[test]
fn a_changed_selector_drops_pods_at_once_and_adds_with_the_next_list() {
    let mut known = synced();
    known.apply(Event::Pod(put("c", pod("m", "10.0.0.3"))));
    let other = pool("n", &[8000]);
    assert!(known.apply(Event::Pool(put(NAME, other))));
    assert_eq!(names(&known), [""; 0]);
    assert!(known.snapshot().synced, "it was and does not flap");
    apply(&mut known, Event::Pod, list(&[("x", pod("n", "10.0.0.7"))]));
    assert_eq!(names(&known), ["x-rank-0"]);
}

#[test]
fn changed_ports_keep_names() {
    let mut known = synced();
    assert!(known.apply(Event::Pool(put(NAME, pool("m", &[9000, 9001])))));
    let endpoints = known.snapshot().endpoints;
    assert_eq!(endpoints.len(), 4);
    assert_eq!(
        (endpoints[0].name.as_str(), endpoints[0].address.as_str()),
        ("a-rank-0", "10.0.0.1:9000")
    );
    assert_eq!(
        (endpoints[3].name.as_str(), endpoints[3].rank),
        ("b-rank-1", 1)
    );
}

#[test]
fn without_its_pool_nothing_is_left() {
    let mut known = synced();
    assert!(known.apply(Event::Pool(News::Remove(NAME.into()))));
    assert_eq!(known.snapshot(), PoolState::default());
    // It is made again: its pods are not known before they are listed.
    known.apply(Event::Pool(put(NAME, pool("m", &[8000]))));
    assert!(!known.snapshot().synced);
}

#[test]
fn rewrites_are_ordered_by_age_then_name() {
    let mut known = synced();
    let rewrite = |name: &str, created| {
        put(
            name,
            Rewrite {
                name: name.into(),
                created,
                rules: Vec::new(),
            },
        )
    };
    apply(
        &mut known,
        Event::Rewrite,
        vec![
            News::Begin,
            rewrite("c", 1),
            rewrite("b", 2),
            rewrite("a", 2),
            News::Complete,
        ],
    );
    let order: Vec<_> = known
        .snapshot()
        .rewrites
        .into_iter()
        .map(|r| r.name)
        .collect();
    assert_eq!(order, ["c", "a", "b"]);
}

#[test]
fn an_objective_that_moves_to_another_pool_is_gone() {
    let mut known = synced();
    assert!(known.apply(Event::Objective(put("o", Objective { priority: 5 }))));
    assert_eq!(known.snapshot().objectives["o"].priority, 5);
    assert!(known.apply(Event::Objective(News::Put("o".into(), None))));
    assert!(known.snapshot().objectives.is_empty());
}
