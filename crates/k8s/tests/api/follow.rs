//! A pool is followed through what may happen to pods, pools, definitions, watches and the API server.

use crate::fake::{Fake, OBJECTIVES, OLD_OBJECTIVES, PODS, POOLS};
use baton_k8s::{AppProtocol, Members, Pace, Pool, PoolName, PoolState, follow};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const PACE: Pace = Pace {
    retry_first: Duration::from_millis(5),
    retry_most: Duration::from_millis(20),
    recheck: Duration::from_millis(20),
};

/// The snapshots of a pool that is followed in the background.
struct Followed(watch::Receiver<Arc<PoolState>>, tokio::task::JoinHandle<()>);

impl Followed {
    fn start(fake: &Fake) -> Self {
        let (sender, receiver) = watch::channel(Arc::default());
        let task = tokio::spawn(follow(
            fake.client(),
            PoolName::new("ns", "pool"),
            None,
            PACE,
            sender,
        ));
        Self(receiver, task)
    }

    /// Waits until a snapshot is as wanted. A minute without it is a failure.
    async fn until(&mut self, what: &str, wanted: impl Fn(&PoolState) -> bool) -> Arc<PoolState> {
        let found = self.0.wait_for(|state| wanted(state));
        let found = tokio::time::timeout(Duration::from_secs(60), found).await;
        found
            .unwrap_or_else(|_| panic!("never: {what}"))
            .unwrap()
            .clone()
    }

    async fn until_names(&mut self, wanted: &[&str]) {
        self.until(&format!("{wanted:?}"), |state| names(state) == wanted)
            .await;
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.1.abort();
    }
}

fn names(state: &PoolState) -> Vec<&str> {
    state.endpoints.iter().map(|e| e.name.as_str()).collect()
}

fn pool(app: &str, ports: &[u16]) -> Value {
    let ports: Vec<_> = ports.iter().map(|p| json!({"number": p})).collect();
    json!({"spec": {"selector": {"matchLabels": {"app": app}}, "targetPorts": ports}})
}

fn pod(app: &str, ready: bool) -> Value {
    let ready = if ready { "True" } else { "False" };
    json!({"metadata": {"labels": {"app": app}},
           "status": {"podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": ready}]}})
}

fn objective(pool: &str, priority: i32) -> Value {
    json!({"spec": {"priority": priority, "poolRef": {"name": pool}}})
}

async fn started(collections: &[&str]) -> (Fake, Followed) {
    let fake = Fake::start(&[&[POOLS, PODS], collections].concat()).await;
    fake.put(POOLS, "pool", pool("m", &[8000]));
    fake.put(PODS, "a", pod("m", true));
    fake.put(PODS, "z", pod("other", true));
    let mut followed = Followed::start(&fake);
    followed.until("in step", |s| s.synced).await;
    (fake, followed)
}

#[tokio::test]
async fn pods_come_change_and_go() {
    let (fake, mut followed) = started(&[]).await;
    followed.until_names(&["a-rank-0"]).await;
    fake.put(PODS, "b", pod("m", false));
    fake.put(PODS, "c", pod("m", true));
    followed.until_names(&["a-rank-0", "c-rank-0"]).await;
    fake.put(PODS, "b", pod("m", true));
    fake.put(PODS, "a", pod("m", false));
    followed.until_names(&["b-rank-0", "c-rank-0"]).await;
    fake.put(PODS, "b", pod("other", true));
    fake.delete(PODS, "c");
    followed.until_names(&[]).await;
}

#[tokio::test]
async fn a_pool_changes_its_ports_and_its_selector() {
    let (fake, mut followed) = started(&[]).await;
    fake.put(POOLS, "pool", pool("m", &[8000, 8001]));
    followed.until_names(&["a-rank-0", "a-rank-1"]).await;
    fake.put(POOLS, "pool", pool("other", &[8000]));
    followed.until_names(&["z-rank-0"]).await;
    fake.put(PODS, "a", pod("m", false));
    fake.put(PODS, "y", pod("other", true));
    followed.until_names(&["y-rank-0", "z-rank-0"]).await;
}

#[tokio::test]
async fn a_pool_that_is_deleted_is_out_of_step_and_comes_back() {
    let (fake, mut followed) = started(&[]).await;
    fake.put(POOLS, "another", pool("other", &[1]));
    fake.delete(POOLS, "pool");
    let state = followed.until("gone", |s| s.pool.is_none()).await;
    assert_eq!((state.synced, state.endpoints.len()), (false, 0));
    fake.put(POOLS, "pool", pool("m", &[9000]));
    let state = followed.until("back", |s| s.synced).await;
    assert_eq!(state.endpoints[0].address.as_str(), "127.0.0.1:9000");
}

#[tokio::test]
async fn a_pool_may_come_after_its_picker() {
    let fake = Fake::start(&[PODS]).await;
    fake.put(PODS, "a", pod("m", true));
    let mut followed = Followed::start(&fake);
    while fake.count("list", POOLS) < 3 {
        tokio::task::yield_now().await;
    }
    fake.serve(POOLS);
    fake.put(POOLS, "pool", pool("m", &[8000]));
    followed.until_names(&["a-rank-0"]).await;
}

/// Watches in the background and fails when an endpoint that should stay is gone for a moment.
fn stays(followed: &Followed, name: &'static str) -> tokio::task::JoinHandle<()> {
    let mut states = followed.0.clone();
    tokio::spawn(async move {
        while states.changed().await.is_ok() {
            let state = states.borrow_and_update().clone();
            assert!(state.synced && names(&state).contains(&name), "{state:?}");
        }
    })
}

#[tokio::test]
async fn a_cut_watch_goes_on_where_it_was() {
    let (fake, mut followed) = started(&[]).await;
    let guard = stays(&followed, "a-rank-0");
    let lists = fake.count("list", PODS);
    for round in 0..5 {
        fake.cut_watches();
        let name = format!("b{round}");
        fake.put(PODS, &name, pod("m", true));
        followed
            .until(&name, |s| s.endpoints.len() == round + 2)
            .await;
    }
    assert_eq!(fake.count("list", PODS), lists, "nothing was listed again");
    drop(followed);
    guard.await.unwrap();
}

#[tokio::test]
async fn a_restarted_server_is_found_again_without_a_flap() {
    let (mut fake, mut followed) = started(&[]).await;
    let guard = stays(&followed, "a-rank-0");
    fake.stop().await;
    fake.put(PODS, "b", pod("m", true));
    tokio::time::sleep(Duration::from_millis(100)).await;
    fake.listen().await;
    followed.until_names(&["a-rank-0", "b-rank-0"]).await;
    drop(followed);
    guard.await.unwrap();
}

#[tokio::test]
async fn who_was_away_too_long_lists_again_without_a_flap() {
    for in_stream in [true, false] {
        let (mut fake, mut followed) = started(&[]).await;
        fake.put(PODS, "b", pod("m", true));
        followed.until_names(&["a-rank-0", "b-rank-0"]).await;
        let guard = stays(&followed, "a-rank-0");
        fake.stop().await;
        fake.delete(PODS, "b");
        fake.put(PODS, "c", pod("m", true));
        fake.forget(in_stream);
        fake.listen().await;
        followed.until_names(&["a-rank-0", "c-rank-0"]).await;
        assert!(
            fake.count("watch", PODS) < 50,
            "it does not ask without a pause"
        );
        drop(followed);
        guard.await.unwrap();
    }
}

#[tokio::test]
async fn objectives_are_optional_and_may_come_later_in_either_group() {
    let (fake, mut followed) = started(&[]).await;
    fake.serve(OLD_OBJECTIVES);
    fake.put(OLD_OBJECTIVES, "o", objective("pool", 1));
    fake.put(OLD_OBJECTIVES, "foreign", objective("other", 9));
    let state = followed
        .until("the old group's", |s| !s.objectives.is_empty())
        .await;
    assert_eq!(
        state
            .objectives
            .iter()
            .map(|(n, o)| (n.as_str(), o.priority))
            .collect::<Vec<_>>(),
        [("o", 1)]
    );
    fake.serve(OBJECTIVES);
    fake.put(OBJECTIVES, "o", objective("pool", 2));
    followed
        .until("the new group's", |s| {
            s.objectives.get("o").is_some_and(|o| o.priority == 2)
        })
        .await;
    fake.put(OBJECTIVES, "o", objective("other", 2));
    followed
        .until("moved away", |s| s.objectives.is_empty())
        .await;
}

#[tokio::test]
async fn who_may_not_read_objectives_does_without() {
    let fake = Fake::start(&[POOLS, PODS, OBJECTIVES]).await;
    fake.refuse("list", OBJECTIVES, Some(403));
    fake.put(POOLS, "pool", pool("m", &[8000]));
    fake.put(OBJECTIVES, "o", objective("pool", 1));
    let mut followed = Followed::start(&fake);
    let state = followed.until("in step", |s| s.synced).await;
    assert!(state.objectives.is_empty());
    fake.refuse("list", OBJECTIVES, None);
    followed
        .until("allowed at last", |s| s.objectives.contains_key("o"))
        .await;
}

#[tokio::test]
async fn who_may_list_pods_but_not_watch_them_learns_of_changes_all_the_same() {
    let fake = Fake::start(&[POOLS, PODS]).await;
    fake.refuse("watch", PODS, Some(403));
    fake.put(POOLS, "pool", pool("m", &[8000]));
    let mut followed = Followed::start(&fake);
    followed.until("in step", |s| s.synced).await;
    fake.put(PODS, "a", pod("m", true));
    followed.until_names(&["a-rank-0"]).await;
}

#[tokio::test]
async fn a_burst_of_pods_ends_in_the_right_state() {
    let (fake, mut followed) = started(&[]).await;
    for n in 0..500 {
        fake.put(PODS, &format!("p{n}"), pod("m", true));
    }
    for n in 0..500 {
        if n % 3 != 0 {
            fake.delete(PODS, &format!("p{n}"));
        }
    }
    followed
        .until("167 and one", |s| s.endpoints.len() == 168)
        .await;
}

#[tokio::test]
async fn pods_can_be_followed_without_a_pool() {
    let fake = Fake::start(&[PODS, OBJECTIVES]).await;
    fake.put(PODS, "a", pod("m", true));
    fake.put(PODS, "z", pod("other", true));
    fake.put(OBJECTIVES, "low", objective("pool", -1));
    let (sender, receiver) = watch::channel(Arc::default());
    let itself = Pool {
        members: Members::Query("app=m".to_owned()),
        target_ports: vec![8000, 8001],
        app_protocol: AppProtocol::Http,
    };
    let name = PoolName::new("ns", "pool");
    let task = tokio::spawn(follow(fake.client(), name, Some(itself), PACE, sender));
    let mut followed = Followed(receiver, task);
    let state = followed.until("in step", |s| s.synced).await;
    assert_eq!(names(&state), ["a-rank-0", "a-rank-1"]);
    followed
        .until("the objective", |s| s.objectives.contains_key("low"))
        .await;
    fake.put(PODS, "b", pod("m", true));
    fake.delete(PODS, "a");
    followed.until_names(&["b-rank-0", "b-rank-1"]).await;
}

#[tokio::test]
async fn it_ends_with_its_last_receiver() {
    let fake = Fake::start(&[POOLS, PODS]).await;
    let (sender, receiver) = watch::channel(Arc::default());
    let task = tokio::spawn(follow(
        fake.client(),
        PoolName::new("ns", "pool"),
        None,
        PACE,
        sender,
    ));
    drop(receiver);
    tokio::time::timeout(Duration::from_secs(60), task)
        .await
        .unwrap()
        .unwrap();
}
