//! Whoever follows a server knows what its prefix cache holds.

use std::time::Duration;

use baton_kv::{BlockEvent, BlockHasher, EngineHash};
use baton_kv_events::{
    Follower, Followers, HashForm, Peer, Publisher, PublisherConfig, Source, SourceEvent,
};
use baton_server::Role;
use serde_json::json;
use tokio::sync::mpsc;

use crate::support::{Server, Setup};

type News = mpsc::Receiver<((), SourceEvent)>;

async fn followed() -> (Server, Follower, News) {
    let json = r#"{"enable_kv_cache_events": true, "endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0", "topic": "kv@a@b"}"#;
    let config = PublisherConfig::from_json(json, [127, 0, 0, 1].into(), HashForm::Int);
    let mut setup = Setup::role(Role::Both);
    let block_size = setup.sim.spec.layout.block_size;
    let started = Publisher::start(config.unwrap().unwrap(), block_size).await;
    let (publisher, feed) = started.unwrap();
    let port = |address: Option<std::net::SocketAddr>| address.unwrap().port();
    let source = Source {
        live: Peer::new("127.0.0.1", port(publisher.local)),
        replay: Some(Peer::new("127.0.0.1", port(publisher.replay))),
        topic: "kv@".to_owned(),
    };
    setup.kv_events = Some((publisher, feed));
    let server = Server::start(setup).await;
    let (to, news) = mpsc::channel(16);
    let follower = Followers::default().follow((), source, to);
    (server, follower, news)
}

async fn next_events(news: &mut News) -> Vec<BlockEvent> {
    let next = tokio::time::timeout(Duration::from_secs(60), news.recv()).await;
    match next.expect("news in time").expect("news").1 {
        SourceEvent::Batch(batch) => batch.events,
        SourceEvent::Reset => panic!("a reset"),
    }
}

#[tokio::test]
async fn blocks_of_a_prompt_are_told_with_their_tokens() {
    let (server, _follower, mut news) = followed().await;
    let prompt: Vec<u32> = (0..40).map(|i| 1 + i * 3 % 200).collect();
    let body = json!({"model": "smollm2", "prompt": prompt, "max_tokens": 1});
    server.post("/v1/completions", body).await;
    let events = next_events(&mut news).await;
    let [BlockEvent::Stored(stored)] = &events[..] else {
        panic!("{events:?}");
    };
    let size = stored.block_size as usize;
    let n_blocks = prompt.len() / size;
    assert!(n_blocks > 0 && stored.parent.is_none());
    assert_eq!(stored.tokens, prompt[..n_blocks * size]);
    let hasher = BlockHasher::new("0");
    let mut before = hasher.root();
    for (name, tokens) in stored.hashes.iter().zip(prompt.chunks(size)) {
        before = hasher.block(&before, tokens, None);
        assert_eq!(*name, EngineHash::from(before));
    }
    assert_eq!(server.metric("kvx_events_total").await, 1.0);
    assert_eq!(server.metric("kvx_event_subscribers").await, 1.0);
}
