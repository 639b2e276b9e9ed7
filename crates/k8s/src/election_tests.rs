//! Tables for `election`.

use super::*;

const S: fn(u64) -> Duration = Duration::from_secs;

fn candidate(name: &str) -> Candidate {
    Candidate::new(name, Timing::default())
}

fn held(by: &str, version: &str) -> Record {
    Record {
        holder: by.into(),
        lease_s: 15,
        transitions: 4,
        version: version.into(),
        acquired: "then".into(),
    }
}

/// The record of a step that writes.
fn written(step: Step) -> Record {
    match step {
        Step::Write(record) => record,
        Step::Wait => panic!("waits"),
    }
}

#[test]
fn the_first_one_makes_the_lease() {
    let mut a = candidate("a");
    assert!(!a.leads(S(0)));
    let record = written(a.consider(S(0), None));
    assert_eq!(
        record,
        Record {
            holder: "a".into(),
            lease_s: 15,
            ..Record::default()
        }
    );
    assert!(!a.leads(S(0)), "it has only tried");
    a.wrote(
        S(1),
        Record {
            version: "1".into(),
            ..record
        },
    );
    assert!(a.leads(S(1)));
    assert_eq!(a.left(S(4)), S(7));
}

#[test]
fn another_waits_until_it_saw_no_change_for_the_whole_lease() {
    let mut b = candidate("b");
    assert_eq!(b.consider(S(100), Some(held("a", "1"))), Step::Wait);
    assert_eq!(b.consider(S(114), Some(held("a", "1"))), Step::Wait);
    assert_eq!(
        b.consider(S(114), Some(held("a", "2"))),
        Step::Wait,
        "renewed"
    );
    assert_eq!(b.consider(S(128), Some(held("a", "2"))), Step::Wait);
    let record = written(b.consider(S(129), Some(held("a", "2"))));
    assert_eq!(
        (
            record.holder.as_str(),
            record.transitions,
            record.version.as_str()
        ),
        ("b", 5, "2")
    );
    assert_eq!(record.acquired, "", "it is taken anew");
}

#[test]
fn a_lease_given_back_is_taken_at_once() {
    let mut b = candidate("b");
    let record = written(b.consider(S(0), Some(held("", "9"))));
    assert_eq!((record.holder.as_str(), record.transitions), ("b", 5));
}

#[test]
fn who_holds_it_renews_without_counting_a_transition() {
    let mut a = candidate("a");
    assert_eq!(a.renewal(), None);
    let record = written(a.consider(S(0), Some(held("a", "3"))));
    assert_eq!(
        (record.transitions, record.acquired.as_str()),
        (4, "then"),
        "its own of before a restart"
    );
    a.wrote(
        S(0),
        Record {
            version: "4".into(),
            ..record
        },
    );
    let renewal = a.renewal().unwrap();
    assert_eq!((renewal.version.as_str(), renewal.transitions), ("4", 4));
}

#[test]
fn who_cannot_renew_stops_before_another_may_start() {
    let mut a = candidate("a");
    let mut b = candidate("b");
    let record = Record {
        version: "1".into(),
        ..written(a.consider(S(0), None))
    };
    // The write took a second to be answered and counts from when it was sent.
    a.wrote(S(0), record.clone());
    assert_eq!(b.consider(S(0), Some(record.clone())), Step::Wait);
    for now in 0..40 {
        let other = matches!(b.consider(S(now), Some(record.clone())), Step::Write(_));
        assert!(!(a.leads(S(now)) && other), "both at {now}");
        assert_eq!(a.leads(S(now)), now < 10);
        assert_eq!(other, now >= 15);
    }
}

#[test]
fn who_sees_another_holder_no_longer_leads() {
    let mut a = candidate("a");
    let record = written(a.consider(S(0), None));
    a.wrote(
        S(0),
        Record {
            version: "1".into(),
            ..record
        },
    );
    assert_eq!(a.consider(S(1), Some(held("b", "2"))), Step::Wait);
    assert!(!a.leads(S(1)));
    assert_eq!(a.renewal(), None);
    assert_eq!(a.release(), None);
}

#[test]
fn giving_back_clears_the_holder_and_ends_leading() {
    let mut a = candidate("a");
    let record = written(a.consider(S(0), None));
    a.wrote(
        S(0),
        Record {
            version: "1".into(),
            ..record
        },
    );
    let back = a.release().unwrap();
    assert_eq!(
        (back.holder.as_str(), back.lease_s, back.version.as_str()),
        ("", 1, "1")
    );
    assert!(!a.leads(S(0)));
    assert_eq!(a.release(), None);
}

#[test]
fn a_senseless_lease_is_free() {
    let mut a = candidate("a");
    let record = Record {
        lease_s: -7,
        ..held("b", "1")
    };
    assert!(matches!(a.consider(S(0), Some(record)), Step::Write(_)));
}
