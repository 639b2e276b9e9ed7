//! Pickers that meet through sockets.

use super::*;
use crate::tests::fleet;
use baton_scheduler::Request;

fn secret(byte: u8) -> Secret {
    Secret::new(&[byte; 32]).unwrap()
}

async fn bound(byte: u8, fleet: &Arc<Fleet>) -> Bound {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let settings = Settings {
        secret: secret(byte),
        peers: Vec::new(),
    };
    Bound::new(settings, listener, fleet.clone()).unwrap()
}

/// Waits until it is so; long enough only to tell "never" from "not yet".
async fn until(what: &str, is_so: impl Fn() -> bool) {
    let waiting = async {
        while !is_so() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    let done = timeout(Duration::from_secs(60), waiting).await;
    assert!(done.is_ok(), "never: {what}");
}

fn active(fleet: &Fleet) -> u32 {
    fleet.snapshot().iter().map(|e| e.load.active).sum()
}

#[tokio::test]
async fn pickers_count_what_others_have_until_they_leave() {
    let (one, two) = (fleet(7), fleet(7));
    let (mut first, mut second) = (bound(1, &one).await, bound(1, &two).await);
    let peers: Vec<Peer> = [&first, &second]
        .map(|b| Peer::parse(&b.address().unwrap().to_string()).unwrap())
        .to_vec();
    // Each list has the picker itself, too.
    (first.peers, second.peers) = (peers.clone(), peers);
    let heard = second.here.clone();
    let (first, _second) = (tokio::spawn(first.run()), tokio::spawn(second.run()));
    let prompt = one.prompt("m", &[&[5; 6400]], None);
    until("they meet", || heard.heard.lock().len() == 1).await;
    let route = one.route(&Request::new(&prompt)).unwrap();
    until("it is counted", || active(&two) == 1).await;
    one.answered(&route.decode, &prompt);
    until("where it is cached is known", || {
        let again = two.route(&Request::new(&prompt)).unwrap();
        again.decision.uncached_tokens == 0 && again.decode.id == route.decode.id
    })
    .await;
    // What the other asked about may have been told meanwhile.
    until("one has its own alone", || active(&one) == 1).await;
    drop(route);
    until("its end is told", || active(&two) == 0).await;
    let _more = one.route(&Request::new(&prompt)).unwrap();
    until("more is counted", || active(&two) == 1).await;
    first.abort();
    until("who is gone is forgotten", || active(&two) == 0).await;
}

#[tokio::test]
async fn who_has_another_secret_is_neither_told_nor_heard() {
    let (one, two) = (fleet(7), fleet(7));
    let (ours, stranger) = (bound(1, &one).await, bound(2, &two).await);
    let at = ours.address().unwrap();
    let here = ours.here.clone();
    tokio::spawn(ours.run());
    let Err(why) = stranger.here.tell(at).await;
    assert!(matches!(why, MeetError::Greet(_)), "{why}");
    let Err(why) = here.tell(at).await;
    assert!(matches!(why, MeetError::Greet(GreetError::Myself)), "{why}");
    assert!(here.heard.lock().is_empty());
}

#[tokio::test]
async fn of_two_connections_of_one_picker_one_is_heard() {
    let (one, two) = (fleet(7), fleet(7));
    let (ours, other) = (bound(1, &one).await, bound(1, &two).await);
    let at = ours.address().unwrap();
    let here = ours.here.clone();
    tokio::spawn(ours.run());
    let other = other.here;
    tokio::spawn(other.clone().keep_telling(at));
    until("it is heard", || here.heard.lock().len() == 1).await;
    let Err(why) = other.tell(at).await;
    assert!(matches!(why, MeetError::Io(_)), "{why}");
    assert_eq!(here.heard.lock().len(), 1);
}

#[test]
fn peers_are_hosts_with_ports() {
    let peer = |host: &str, port| {
        let host = host.to_owned();
        Ok(Peer { host, port })
    };
    assert_eq!(
        Peer::parse("pickers.llm.svc:9004"),
        peer("pickers.llm.svc", 9004)
    );
    assert_eq!(Peer::parse("[fd00::1]:1"), peer("fd00::1", 1));
    for bad in ["", "a", "a:", ":1", "a:0", "a:70000", "fd00::1:1"] {
        assert!(Peer::parse(bad).is_err(), "{bad}");
    }
}
