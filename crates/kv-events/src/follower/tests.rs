//! Followers and publishers of ours over loopback.

use super::*;
use crate::{Endpoint, Feed, Form, Publisher, PublisherConfig, ReplayForm};
use baton_kv::{BlockEvent, BlockHash, CacheChange, EngineHash};
use std::net::SocketAddr;

const LOOPBACK: &str = "127.0.0.1:0";

fn config(endpoint: Endpoint, buffer_steps: usize) -> PublisherConfig {
    PublisherConfig {
        endpoint,
        replay: Some(LOOPBACK.parse().unwrap()),
        buffer_steps,
        hwm: 100,
        max_queue_size: 100,
        topic: "kv@here@model".to_owned(),
        form: Form::default(),
        replay_form: ReplayForm::Topic,
    }
}

async fn publisher(buffer_steps: usize) -> (Publisher, Feed) {
    let endpoint = Endpoint::Bind(LOOPBACK.parse().unwrap());
    Publisher::start(config(endpoint, buffer_steps), 16)
        .await
        .unwrap()
}

fn source(publisher: &Publisher) -> Source {
    let peer = |address: SocketAddr| Peer::new(address.ip().to_string(), address.port());
    Source {
        live: peer(publisher.local.unwrap()),
        replay: publisher.replay.map(peer),
        topic: "kv@".to_owned(),
    }
}

/// Says that block `n` is gone.
fn say(feed: &mut Feed, n: u8) {
    feed.offer(&mut vec![CacheChange::Removed(vec![BlockHash([n; 32])])]);
}

type News<K> = mpsc::Receiver<(K, SourceEvent)>;

/// The block of the next batch; `None`: a reset.
async fn heard<K>(news: &mut News<K>) -> Option<u8> {
    let next = timeout(Duration::from_secs(60), news.recv()).await;
    match next.expect("news in time").expect("news").1 {
        SourceEvent::Reset => None,
        SourceEvent::Batch(batch) => match &batch.events[..] {
            [BlockEvent::Removed(removed)] => match removed.hashes[..] {
                [EngineHash(hash)] => Some(hash as u8),
                _ => panic!("{removed:?}"),
            },
            other => panic!("{other:?}"),
        },
    }
}

async fn published(publisher: &Publisher, n: u64) {
    while publisher.stats().batches < n {
        sleep(Duration::from_millis(1)).await;
    }
}

async fn subscribed(publisher: &Publisher, n: u64) {
    while publisher.stats().subscribers != n {
        sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn the_past_and_the_present_are_heard_in_order() {
    let (publisher, mut feed) = publisher(100).await;
    (0..5).for_each(|n| say(&mut feed, n));
    published(&publisher, 5).await;
    let (to, mut news) = mpsc::channel(4);
    let follower = Followers::default().follow((), source(&publisher), to);
    for n in 0..5 {
        assert_eq!(heard(&mut news).await, Some(n));
    }
    for n in 5..50 {
        say(&mut feed, n);
    }
    for n in 5..50 {
        assert_eq!(heard(&mut news).await, Some(n));
    }
    let stats = follower.stats();
    assert_eq!(
        (stats.connected, stats.batches, stats.resets),
        (true, 50, 0)
    );
    drop(follower);
    subscribed(&publisher, 0).await;
}

#[tokio::test]
async fn a_forgotten_beginning_is_no_reason_to_know_nothing() {
    let (publisher, mut feed) = publisher(3).await;
    (0..10).for_each(|n| say(&mut feed, n));
    published(&publisher, 10).await;
    let (to, mut news) = mpsc::channel(4);
    let _follower = Followers::default().follow((), source(&publisher), to);
    for n in 7..10 {
        assert_eq!(heard(&mut news).await, Some(n));
    }
}

#[tokio::test]
async fn a_server_that_starts_anew_is_heard_anew() {
    let (first, mut feed) = publisher(100).await;
    let address = (first.local.unwrap(), first.replay.unwrap());
    (0..3).for_each(|n| say(&mut feed, n));
    let (to, mut news) = mpsc::channel(4);
    let _follower = Followers::default().follow((), source(&first), to);
    for n in 0..3 {
        assert_eq!(heard(&mut news).await, Some(n));
    }
    drop((first, feed));
    let mut again = config(Endpoint::Bind(address.0), 100);
    again.replay = Some(address.1);
    // Its sockets close when its tasks have ended.
    let (_second, mut feed) = loop {
        match Publisher::start(again.clone(), 16).await {
            Ok(started) => break started,
            Err(_) => sleep(Duration::from_millis(5)).await,
        }
    };
    (10..15).for_each(|n| say(&mut feed, n));
    assert_eq!(heard(&mut news).await, None);
    for n in 10..15 {
        assert_eq!(heard(&mut news).await, Some(n));
    }
}

#[tokio::test]
async fn without_replay_what_comes_is_believed() {
    let (publisher, mut feed) = publisher(100).await;
    (0..3).for_each(|n| say(&mut feed, n));
    published(&publisher, 3).await;
    let (to, mut news) = mpsc::channel(4);
    let mut source = source(&publisher);
    source.replay = None;
    let _follower = Followers::default().follow((), source, to);
    subscribed(&publisher, 1).await;
    say(&mut feed, 3);
    assert_eq!(heard(&mut news).await, Some(3));
}

#[tokio::test]
async fn whoever_does_not_take_news_misses_some_and_gets_them_again() {
    let (publisher, mut feed) = publisher(10_000).await;
    let (to, mut news) = mpsc::channel(1);
    let _follower = Followers::default().follow((), source(&publisher), to);
    subscribed(&publisher, 1).await;
    // More than the sockets hold, and far more than the high-water mark of 100 batches.
    const N: u64 = 1000;
    for n in 1..=N {
        let fat = vec![BlockHash([7; 32]); 4000];
        feed.offer(&mut vec![CacheChange::Removed(fat)]);
        published(&publisher, n).await;
    }
    for _ in 0..N {
        let next = timeout(Duration::from_secs(60), news.recv()).await;
        let (_, event) = next.expect("news in time").unwrap();
        assert!(matches!(event, SourceEvent::Batch(_)), "{event:?}");
    }
    assert!(publisher.stats().skipped > 0);
}

#[tokio::test]
async fn servers_may_connect_by_themselves() {
    let (to, mut news) = mpsc::channel(4);
    let collector = Collector::bind(LOOPBACK.parse().unwrap(), "kv@".to_owned(), to)
        .await
        .unwrap();
    let peer = Peer::new("127.0.0.1", collector.local.port());
    let (publisher, mut feed) = Publisher::start(config(Endpoint::Connect(peer), 10), 16)
        .await
        .unwrap();
    subscribed(&publisher, 1).await;
    say(&mut feed, 1);
    say(&mut feed, 2);
    let first = news.recv().await.unwrap();
    let origin = Origin {
        topic: "kv@here@model".into(),
        rank: 0,
    };
    assert_eq!(first, (origin, SourceEvent::Reset));
    assert_eq!(heard(&mut news).await, Some(1));
    assert_eq!(heard(&mut news).await, Some(2));
}

#[tokio::test]
async fn peers_that_make_no_sense_harm_nobody() {
    use tokio::io::AsyncWriteExt as _;
    let (publisher, mut feed) = publisher(100).await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 200], &[]] {
        let mut stream = TcpStream::connect(publisher.local.unwrap()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut stream = TcpStream::connect(publisher.replay.unwrap()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
    }
    say(&mut feed, 9);
    let (to, mut news) = mpsc::channel(4);
    let _follower = Followers::default().follow((), source(&publisher), to);
    assert_eq!(heard(&mut news).await, Some(9));
}
