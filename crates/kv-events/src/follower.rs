//! Follows servers: connects to what they publish, asks for what was missed, and hands on what an index can believe.
//!
//! [`Followers::follow`] is for servers whose addresses are known, [`Collector`] for those that connect by themselves.
//! What happened is `track`'s to judge; here are the sockets.

mod collector;
mod replay;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use crate::decode::{Batch, Groups, decode};
use crate::endpoint::Peer;
use crate::track::{Action, Numbered, Track};
use crate::zmtp::connection::{ConnectionError, Reader, Writer, open};
use crate::zmtp::frame::{Incoming, Socket};

pub use collector::{Collector, Origin};
use replay::{Replay, Step};

/// Most bytes of a message of a server.
const MAX_MESSAGE: usize = 8 << 20;

/// Between two attempts to reach a server: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How long a server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// Replays that all followers of a process ask for at a time: each may be as large as a server's memory of its past.
const MAX_REPLAYS: usize = 8;

/// News of a source. Whatever was heard since the last [`SourceEvent::Reset`] is true of its cache, though there may be
/// blocks of which nothing was heard: of stored blocks the parents may be unknown, and removed blocks may be.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceEvent {
    /// Nothing that was heard is to be believed any more.
    Reset,
    /// What happened.
    Batch(Batch),
}

/// A cache that is published: one rank of one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Where batches are published.
    pub live: Peer,
    /// Where they can be asked for again, if anywhere.
    pub replay: Option<Peer>,
    /// How the topics that count begin.
    pub topic: String,
}

/// What all followers of a process share.
#[derive(Clone, Debug)]
pub struct Followers {
    replays: Arc<Semaphore>,
}

impl Default for Followers {
    fn default() -> Self {
        Self {
            replays: Arc::new(Semaphore::new(MAX_REPLAYS)),
        }
    }
}

impl Followers {
    /// Follows a source until what is returned is dropped. News go to `to` under the name `key`; while there is no room
    /// nothing is read, and what is then missed is asked for again. The first news are never a reset. Whoever stops
    /// following forgets the source by himself.
    ///
    /// Must be called from within a Tokio runtime.
    pub fn follow<K: Clone + Send + Sync + 'static>(
        &self,
        key: K,
        source: Source,
        to: mpsc::Sender<(K, SourceEvent)>,
    ) -> Follower {
        let counters = Arc::new(Counters::default());
        let following = Following {
            track: Track::new(source.replay.is_some()),
            groups: Groups::default(),
            source,
            key,
            to,
            replays: Arc::clone(&self.replays),
            counters: Arc::clone(&counters),
            since: Instant::now(),
        };
        Follower {
            task: tokio::spawn(following.run()),
            counters,
        }
    }
}

/// A source that is followed; ends when dropped.
#[derive(Debug)]
pub struct Follower {
    task: JoinHandle<()>,
    counters: Arc<Counters>,
}

impl Follower {
    /// The counters as they are.
    #[must_use]
    pub fn stats(&self) -> FollowerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FollowerStats {
            connected: self.counters.connected.load(Ordering::Relaxed),
            batches: read(&self.counters.batches),
            dropped: read(&self.counters.dropped),
            replays: read(&self.counters.replays),
            resets: read(&self.counters.resets),
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What following a source has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FollowerStats {
    /// Whether it is subscribed to now.
    pub connected: bool,
    /// Batches handed on.
    pub batches: u64,
    /// Events, and whole batches, that made no sense.
    pub dropped: u64,
    /// Replays asked for.
    pub replays: u64,
    /// Times that all was forgotten.
    pub resets: u64,
}

#[derive(Debug, Default)]
struct Counters {
    connected: AtomicBool,
    batches: AtomicU64,
    dropped: AtomicU64,
    replays: AtomicU64,
    resets: AtomicU64,
}

fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Why a source is not followed for the moment.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// Nobody wants the news any more.
    #[error("nobody listens")]
    Unwanted,
}

struct Following<K> {
    source: Source,
    key: K,
    to: mpsc::Sender<(K, SourceEvent)>,
    replays: Arc<Semaphore>,
    counters: Arc<Counters>,
    track: Track,
    groups: Groups,
    /// From when time is counted.
    since: Instant,
}

impl<K: Clone + Send + Sync + 'static> Following<K> {
    async fn run(mut self) {
        let mut wait = RETRY.0;
        loop {
            let ended = match connect(&self.source.live, Socket::Sub).await {
                Ok((reader, writer)) => {
                    wait = RETRY.0;
                    let ended = self.listen(reader, writer).await;
                    self.counters.connected.store(false, Ordering::Relaxed);
                    self.track.lost();
                    ended
                }
                Err(error) => Err(error.into()),
            };
            match ended {
                Ok(()) | Err(Broken::Unwanted) => return,
                Err(why) => debug!(source = ?self.source.live, %why, "KV events do not come"),
            }
            sleep(wait).await;
            wait = (wait * 2).min(RETRY.1);
        }
    }

    fn now(&self) -> Duration {
        self.since.elapsed()
    }

    async fn listen(&mut self, mut reader: Reader, mut writer: Writer) -> Result<(), Broken> {
        writer.subscribe(self.source.topic.as_bytes()).await?;
        self.counters.connected.store(true, Ordering::Relaxed);
        self.track.connected(self.now());
        let mut replay = None;
        loop {
            self.obey(&mut replay).await?;
            let wake = self.track.wakes_at().map(|at| self.since + at);
            tokio::select! {
                incoming = reader.next() => match incoming? {
                    Incoming::Message(frames) => self.hear(&frames),
                    Incoming::Ping(context) => writer.pong(&context).await?,
                    _ => {}
                },
                step = next_step(&mut replay) => {
                    let now = self.now();
                    match step {
                        Step::Batch(batch) => self.track.replayed(batch),
                        Step::Ended => self.track.replay_ended(now),
                        Step::Failed => self.track.replay_failed(now),
                    }
                }
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {
                    self.track.tick(self.now());
                }
            }
        }
    }

    fn hear(&mut self, frames: &[Bytes]) {
        match live_message(frames, self.source.topic.as_bytes()) {
            Some((_, batch)) => {
                let now = self.now();
                self.track.live(now, batch);
            }
            None => count(&self.counters.dropped, 1),
        }
    }

    /// Does what the track wants, as fast as the news are taken.
    async fn obey(&mut self, replay: &mut Option<Replay>) -> Result<(), Broken> {
        let actions: Vec<_> = self.track.actions().collect();
        for action in actions {
            match action {
                Action::Reset => self.reset().await?,
                Action::Deliver(payload) => self.deliver(&payload).await?,
                Action::Replay(from) => {
                    count(&self.counters.replays, 1);
                    let again = replay.take().is_some();
                    if let Some(peer) = &self.source.replay {
                        let replays = Arc::clone(&self.replays);
                        *replay = Some(Replay::ask(peer.clone(), from, again, replays));
                    }
                }
            }
        }
        Ok(())
    }

    async fn deliver(&mut self, payload: &[u8]) -> Result<(), Broken> {
        match decode(payload, &mut self.groups) {
            Ok(batch) => {
                count(&self.counters.batches, 1);
                count(&self.counters.dropped, batch.dropped.into());
                self.tell(SourceEvent::Batch(batch)).await
            }
            Err(error) => {
                warn!(source = ?self.source.live, %error, "KV events cannot be read");
                count(&self.counters.dropped, 1);
                self.reset().await
            }
        }
    }

    async fn reset(&mut self) -> Result<(), Broken> {
        count(&self.counters.resets, 1);
        self.tell(SourceEvent::Reset).await
    }

    async fn tell(&self, event: SourceEvent) -> Result<(), Broken> {
        let sent = self.to.send((self.key.clone(), event)).await;
        sent.map_err(|_| Broken::Unwanted)
    }
}

/// The next step of a replay that was asked for; never, if none was.
async fn next_step(replay: &mut Option<Replay>) -> Step {
    match replay {
        Some(asked) => asked.next().await,
        None => std::future::pending().await,
    }
}

async fn connect(peer: &Peer, socket: Socket) -> Result<(Reader, Writer), ConnectionError> {
    let connecting = TcpStream::connect((peer.host.as_str(), peer.port));
    let stream = timeout(CONNECT, connecting)
        .await
        .map_err(|_| ConnectionError::Slow)??;
    open(stream, socket, MAX_MESSAGE).await
}

/// Topic and batch of a published message: topic, number, batch.
fn live_message(frames: &[Bytes], prefix: &[u8]) -> Option<(Bytes, Numbered)> {
    let [topic, seq, payload] = frames else {
        return None;
    };
    let numbered = Numbered {
        seq: number(seq)?,
        payload: payload.clone(),
    };
    topic.starts_with(prefix).then(|| (topic.clone(), numbered))
}

fn number(frame: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(frame.try_into().ok()?))
}

#[cfg(test)]
mod tests;
