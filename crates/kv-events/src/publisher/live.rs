//! Subscribers: each is told of batches as they come, from when it asked for them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::debug;

use super::Shared;
use crate::endpoint::Peer;
use crate::zmtp::connection::{ConnectionError, Reader, Writer, open};
use crate::zmtp::frame::{Incoming, Socket, as_subscription};

/// Most peers at a time.
const MAX_PEERS: usize = 256;

/// Most prefixes that a peer asks for.
const MAX_TOPICS: usize = 64;

/// Most bytes of a message of a subscriber.
const MAX_MESSAGE: usize = 4096;

/// Between two attempts to reach a peer: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Serves who connects, for as long as it is not dropped.
pub(super) async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    accept(listener, MAX_PEERS, |stream| {
        let shared = Arc::clone(&shared);
        async move { serve(&shared, stream).await }
    })
    .await;
}

/// Runs `serve` for everybody who connects, for at most `most` at a time.
pub(super) async fn accept<F>(listener: TcpListener, most: usize, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = Result<(), ConnectionError>> + Send + 'static,
{
    let mut peers = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = peers.join_next() => continue,
        };
        match accepted {
            // Closed at once: a peer more than this is no fleet's.
            Ok(_) if peers.len() >= most => {}
            Ok((stream, peer)) => {
                let served = serve(stream);
                peers.spawn(async move {
                    if let Err(why) = served.await {
                        debug!(%peer, %why, "who wanted KV events is gone");
                    }
                });
            }
            // Out of descriptors, say: what frees some is not here.
            Err(error) => {
                debug!(%error, "a connection for KV events cannot be accepted");
                tokio::time::sleep(RETRY.0).await;
            }
        }
    }
}

/// Serves a peer that listens, and looks for it again whenever it is gone.
pub(super) async fn connect(shared: Arc<Shared>, peer: Peer) {
    let mut wait = RETRY.0;
    loop {
        let served = match TcpStream::connect((peer.host.as_str(), peer.port)).await {
            Ok(stream) => {
                wait = RETRY.0;
                serve(&shared, stream).await
            }
            Err(error) => Err(error.into()),
        };
        if let Err(why) = served {
            debug!(?peer, %why, "the subscriber of KV events is not there");
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RETRY.1);
    }
}

/// What the peer has said, for the half that writes.
#[derive(Default)]
struct Wants {
    topics: Mutex<Vec<Bytes>>,
    ping: Mutex<Option<Bytes>>,
    changed: Notify,
}

impl Wants {
    fn matches(&self, topic: &str) -> bool {
        let topics = self.topics.lock();
        topics
            .iter()
            .any(|prefix| topic.as_bytes().starts_with(prefix))
    }
}

async fn serve(shared: &Shared, stream: TcpStream) -> Result<(), ConnectionError> {
    let (reader, writer) = open(stream, Socket::Pub, MAX_MESSAGE).await?;
    let wants = Wants::default();
    // Both run until one fails; neither waits for the other.
    tokio::select! {
        ended = hear(reader, &wants) => ended,
        ended = tell(shared, writer, &wants) => ended,
    }
}

async fn hear(mut reader: Reader, wants: &Wants) -> Result<(), ConnectionError> {
    loop {
        match as_subscription(reader.next().await?) {
            Incoming::Subscribe(prefix) => {
                let mut topics = wants.topics.lock();
                if topics.len() < MAX_TOPICS {
                    topics.push(prefix);
                }
            }
            Incoming::Cancel(prefix) => {
                let mut topics = wants.topics.lock();
                if let Some(i) = topics.iter().position(|known| *known == prefix) {
                    topics.swap_remove(i);
                }
            }
            Incoming::Ping(context) => *wants.ping.lock() = Some(context),
            _ => continue,
        }
        wants.changed.notify_one();
    }
}

async fn tell(shared: &Shared, mut writer: Writer, wants: &Wants) -> Result<(), ConnectionError> {
    let mut next = shared.next.subscribe();
    let mut subscribed: Option<Subscribed<'_>> = None;
    loop {
        let pinged = wants.ping.lock().take();
        if let Some(context) = pinged {
            writer.pong(&context).await?;
        }
        let does = wants.matches(&shared.config.topic);
        if does != subscribed.is_some() {
            subscribed = does.then(|| Subscribed::new(shared));
        }
        let newest = *next.borrow_and_update();
        if let Some(subscribed) = &mut subscribed {
            subscribed.write(&mut writer, newest).await?;
        }
        tokio::select! {
            changed = next.changed() => if changed.is_err() { return Ok(()) },
            () = wants.changed.notified() => {}
        }
    }
}

/// A peer that is told; counted while it is.
struct Subscribed<'a> {
    shared: &'a Shared,
    /// The number of the batch that it is told next.
    at: u64,
}

impl<'a> Subscribed<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.counters.subscribers.fetch_add(1, Ordering::Relaxed);
        Self {
            shared,
            at: shared.log.lock().next(),
        }
    }

    /// Writes all batches before `newest`.
    async fn write(&mut self, writer: &mut Writer, newest: u64) -> Result<(), ConnectionError> {
        let config = &self.shared.config;
        while self.at < newest {
            let found = self.shared.log.lock().at(self.at, config.hwm);
            let Some((number, batch)) = found else {
                break;
            };
            let skipped = &self.shared.counters.skipped;
            skipped.fetch_add(number - self.at, Ordering::Relaxed);
            self.at = number + 1;
            writer
                .feed(&[config.topic.as_bytes(), &number.to_be_bytes(), &batch])
                .await?;
        }
        writer.flush().await
    }
}

impl Drop for Subscribed<'_> {
    fn drop(&mut self) {
        let subscribers = &self.shared.counters.subscribers;
        subscribers.fetch_sub(1, Ordering::Relaxed);
    }
}
