//! Where servers connect to, if their addresses are not known: they say by the topic who they are. There is nobody to ask
//! for what was missed, so a hole makes that all is forgotten.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::debug;

use super::{Broken, MAX_MESSAGE, RETRY, SourceEvent, live_message};
use crate::decode::{Groups, decode};
use crate::track::{Action, Numbered, Track};
use crate::zmtp::connection::open;
use crate::zmtp::frame::{Incoming, Socket};

/// Most servers at a time.
const MAX_PEERS: usize = 4096;

/// Most caches that one connection tells of.
const MAX_ORIGINS: usize = 64;

/// Most bytes of a topic.
const MAX_TOPIC: usize = 1024;

/// Whose cache a batch is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// What the server says of itself; `kv@IP:PORT@MODEL`, as a rule.
    pub topic: Arc<str>,
    /// Its data parallel rank.
    pub rank: u32,
}

/// Listens for servers; ends when dropped.
#[derive(Debug)]
pub struct Collector {
    /// Where.
    pub local: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Collector {
    /// Listens. News of topics that begin with `prefix` go to `to`; while there is no room nothing is read.
    ///
    /// # Errors
    /// When the address is not to be had.
    pub async fn bind(
        address: SocketAddr,
        prefix: String,
        to: mpsc::Sender<(Origin, SourceEvent)>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let local = listener.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(listen(listener, prefix.into(), to));
        Ok(Self {
            local,
            _tasks: tasks,
        })
    }
}

async fn listen(listener: TcpListener, prefix: Arc<str>, to: mpsc::Sender<(Origin, SourceEvent)>) {
    let mut peers = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = peers.join_next() => continue,
            () = to.closed() => return,
        };
        match accepted {
            Ok(_) if peers.len() >= MAX_PEERS => {}
            Ok((stream, peer)) => {
                let (prefix, to) = (Arc::clone(&prefix), to.clone());
                peers.spawn(async move {
                    if let Err(why) = hear(stream, &prefix, to).await {
                        debug!(%peer, %why, "a server no longer tells of its KV");
                    }
                });
            }
            Err(error) => {
                debug!(%error, "a connection for KV events cannot be accepted");
                sleep(RETRY.0).await;
            }
        }
    }
}

async fn hear(
    stream: TcpStream,
    prefix: &str,
    to: mpsc::Sender<(Origin, SourceEvent)>,
) -> Result<(), Broken> {
    let (mut reader, mut writer) = open(stream, Socket::Sub, MAX_MESSAGE).await?;
    writer.subscribe(prefix.as_bytes()).await?;
    let mut heard = Heard {
        caches: HashMap::new(),
        groups: Groups::default(),
        to,
    };
    loop {
        match reader.next().await? {
            Incoming::Message(frames) => {
                if let Some((topic, batch)) = live_message(&frames, prefix.as_bytes()) {
                    heard.take(&topic, batch).await?;
                }
            }
            Incoming::Ping(context) => writer.pong(&context).await?,
            _ => {}
        }
    }
}

/// What one connection has told of.
struct Heard {
    caches: HashMap<Origin, Track>,
    groups: Groups,
    to: mpsc::Sender<(Origin, SourceEvent)>,
}

impl Heard {
    async fn take(&mut self, topic: &Bytes, numbered: Numbered) -> Result<(), Broken> {
        let Some(topic) = std::str::from_utf8(topic)
            .ok()
            .filter(|topic| topic.len() <= MAX_TOPIC)
        else {
            return Ok(());
        };
        let Ok(batch) = decode(&numbered.payload, &mut self.groups) else {
            debug!(topic, "KV events cannot be read");
            return self.forget(topic).await;
        };
        let origin = Origin {
            topic: topic.into(),
            rank: batch.rank.unwrap_or(0),
        };
        if !self.caches.contains_key(&origin) {
            if self.caches.len() >= MAX_ORIGINS {
                return Ok(());
            }
            // What an earlier connection told may have changed since.
            self.tell(&origin, SourceEvent::Reset).await?;
            self.caches.insert(origin.clone(), Track::new(false));
        }
        let Some(track) = self.caches.get_mut(&origin) else {
            return Ok(());
        };
        track.live(Duration::ZERO, numbered);
        let actions: Vec<_> = track.actions().collect();
        let mut batch = Some(batch);
        for action in actions {
            match action {
                Action::Reset => self.tell(&origin, SourceEvent::Reset).await?,
                // Without replays what is handed on is what came, at once.
                Action::Deliver(_) => {
                    if let Some(batch) = batch.take() {
                        self.tell(&origin, SourceEvent::Batch(batch)).await?;
                    }
                }
                Action::Replay(_) => {}
            }
        }
        Ok(())
    }

    /// What was just said of this topic is unknown.
    async fn forget(&self, topic: &str) -> Result<(), Broken> {
        for origin in self.caches.keys().filter(|origin| *origin.topic == *topic) {
            self.tell(origin, SourceEvent::Reset).await?;
        }
        Ok(())
    }

    async fn tell(&self, origin: &Origin, event: SourceEvent) -> Result<(), Broken> {
        let sent = self.to.send((origin.clone(), event)).await;
        sent.map_err(|_| Broken::Unwanted)
    }
}
