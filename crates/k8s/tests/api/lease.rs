//! Two want a lease: one leads, and the other only when the first cannot any more.

use crate::fake::{Fake, LEASES};
use baton_k8s::election::Timing;
use baton_k8s::{LeaseName, PoolName, lead};
use std::time::Duration;
use tokio::sync::watch;

/// For tests of what happens when a lease is over.
const BRIEF: Timing = Timing {
    lease: Duration::from_secs(1),
    renew_deadline: Duration::from_millis(600),
    retry: Duration::from_millis(50),
};
/// For tests in which none may be over, however busy the machine.
const LONG: Timing = Timing {
    lease: Duration::from_secs(120),
    renew_deadline: Duration::from_secs(100),
    retry: Duration::from_millis(50),
};
const LEASE: &str = "epp-ns-pool.llm-d.ai";

struct Candidate {
    leads: watch::Receiver<bool>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Candidate {
    fn start(fake: &Fake, name: &str, timing: Timing) -> Self {
        let (sender, leads) = watch::channel(false);
        let (stop, stopped) = watch::channel(false);
        let name = LeaseName::of(&PoolName::new("ns", "pool"), name);
        let task = tokio::spawn(lead(fake.client(), name, timing, sender, stopped));
        Self { leads, stop, task }
    }

    async fn until(&mut self, leads: bool) {
        let told = self.leads.wait_for(|now| *now == leads);
        tokio::time::timeout(Duration::from_secs(60), told)
            .await
            .unwrap()
            .unwrap();
    }

    fn leads(&self) -> bool {
        *self.leads.borrow()
    }
}

fn holder(fake: &Fake) -> String {
    fake.get(LEASES, LEASE).unwrap()["spec"]["holderIdentity"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[tokio::test]
async fn one_leads_and_hands_over_when_it_stops() {
    let fake = Fake::start(&[LEASES]).await;
    let mut a = Candidate::start(&fake, "a", LONG);
    a.until(true).await;
    let mut b = Candidate::start(&fake, "b", LONG);
    while fake.count("get", LEASES) < 4 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(a.leads() && !b.leads());
    a.stop.send_replace(true);
    a.task.await.unwrap();
    assert!(!*a.leads.borrow());
    b.until(true).await;
    assert_eq!(holder(&fake), "b");
    let spec = &fake.get(LEASES, LEASE).unwrap()["spec"];
    assert_eq!(
        spec["leaseTransitions"], 1,
        "from a to nobody does not count, to b does"
    );
    b.task.abort();
}

#[tokio::test]
async fn a_killed_leader_is_followed_when_its_lease_is_over() {
    let fake = Fake::start(&[LEASES]).await;
    let mut a = Candidate::start(&fake, "a", BRIEF);
    a.until(true).await;
    let mut b = Candidate::start(&fake, "b", BRIEF);
    a.task.abort();
    b.until(true).await;
    assert_eq!(holder(&fake), "b");
    b.task.abort();
}

#[tokio::test]
async fn who_cannot_renew_no_longer_leads_and_leads_again_when_it_can() {
    let fake = Fake::start(&[LEASES]).await;
    let mut a = Candidate::start(&fake, "a", BRIEF);
    a.until(true).await;
    fake.refuse("update", LEASES, Some(500));
    a.until(false).await;
    fake.refuse("update", LEASES, None);
    a.until(true).await;
    a.task.abort();
}

#[tokio::test]
async fn a_lease_that_was_deleted_is_made_again() {
    let fake = Fake::start(&[LEASES]).await;
    let mut a = Candidate::start(&fake, "a", LONG);
    a.until(true).await;
    fake.delete(LEASES, LEASE);
    while fake.get(LEASES, LEASE).is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(holder(&fake), "a");
    a.task.abort();
}

#[tokio::test]
async fn never_do_two_lead() {
    let fake = Fake::start(&[LEASES]).await;
    let mut candidates: Vec<_> = ["a", "b", "c"]
        .into_iter()
        .map(|name| Candidate::start(&fake, name, LONG))
        .collect();
    for round in 0..6 {
        let leader = loop {
            let leaders: Vec<_> = (0..3).filter(|n| candidates[*n].leads()).collect();
            assert!(leaders.len() <= 1, "{leaders:?}");
            if let Some(leader) = leaders.first() {
                break *leader;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        // It goes, and another stands in its place.
        let old = std::mem::replace(
            &mut candidates[leader],
            Candidate::start(&fake, &format!("another-{round}"), LONG),
        );
        old.stop.send_replace(true);
        old.task.await.unwrap();
    }
    for candidate in candidates {
        candidate.task.abort();
    }
}
