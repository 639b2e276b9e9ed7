//! Prints what a server's prefix cache is said to hold, a line of JSON for each piece of news:
//! `follow HOST:PORT [HOST:PORT [TOPIC]]`, where batches are published and where they can be asked for again.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "printing is what it is for")]

use baton_kv::{BlockEvent, EngineHash};
use baton_kv_events::{Followers, Peer, Source, SourceEvent};
use serde_json::{Value, json};
use std::io::Write as _;
use tokio::sync::mpsc;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut args = std::env::args().skip(1);
    let live = args.next().as_deref().and_then(peer);
    let replay = args.next().filter(|text| !text.is_empty());
    let topic = args.next().unwrap_or_default();
    let Some(live) = live else {
        println!("follow HOST:PORT [HOST:PORT [TOPIC]]");
        return;
    };
    let source = Source {
        live,
        replay: replay.as_deref().and_then(peer),
        topic,
    };
    let (to, mut news) = mpsc::channel(64);
    let _follower = Followers::default().follow((), source, to);
    while let Some((_, event)) = news.recv().await {
        println!("{}", said(&event));
        // Whoever has the other end of the pipe wants it now.
        let _ = std::io::stdout().flush();
    }
}

fn peer(text: &str) -> Option<Peer> {
    let (host, port) = text.rsplit_once(':')?;
    Some(Peer::new(host, port.parse().ok()?))
}

fn said(event: &SourceEvent) -> Value {
    match event {
        SourceEvent::Reset => json!({"reset": true}),
        SourceEvent::Batch(batch) => json!({
            "ts": batch.ts,
            "rank": batch.rank,
            "dropped": batch.dropped,
            "events": batch.events.iter().map(of_block).collect::<Vec<_>>(),
        }),
    }
}

fn of_block(event: &BlockEvent) -> Value {
    let names = |hashes: &[EngineHash]| hashes.iter().map(|hash| hash.0).collect::<Vec<_>>();
    match event {
        BlockEvent::Stored(stored) => json!({
            "stored": names(&stored.hashes),
            "parent": stored.parent.map(|hash| hash.0),
            "tokens": stored.tokens,
            "block_size": stored.block_size,
            "medium": format!("{:?}", stored.medium),
            "adapter": stored.adapter,
        }),
        BlockEvent::Removed(removed) => json!({
            "removed": names(&removed.hashes),
            "medium": format!("{:?}", removed.medium),
        }),
        BlockEvent::Cleared => json!({"cleared": true}),
    }
}
