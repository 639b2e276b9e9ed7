//! Connections: one to every peer, and one from every peer.

use crate::greet::{self, GreetError, Ours};
use crate::hear::{HearError, Hearer};
use crate::secret::Secret;
use crate::tell::Teller;
use crate::wire::{Hello, MAX_FRAME, Message};
use baton_fleet::{Fleet, Note};
use baton_http::{Binding, ClientTls, Identity, TlsError, Trust};
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

/// Most peers.
pub const MAX_PEERS: usize = 64;
/// Longest wait for a connection, and for greetings.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at what names mean.
const RESOLVE: Duration = Duration::from_secs(5);
/// Before a peer is tried again: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Before an address that led to ourselves is tried again: it may be another's one day.
const MYSELF: Duration = Duration::from_secs(60);
/// How soon what is in flight is told; what is sent is told at once.
const TICK: Duration = Duration::from_millis(10);
/// A peer is told something at least so often.
const BEAT: Duration = Duration::from_secs(1);
/// Longest wait for a peer that does not read, or says nothing.
const SILENCE: Duration = Duration::from_secs(5);
/// Bytes after which what is to be told is sent.
const BATCH: usize = 256 << 10;

/// Who the peers are.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What all of them know.
    pub secret: Secret,
    /// Where they are: this picker itself may be among them.
    pub peers: Vec<Peer>,
}

/// A name, or an address, with a port. A name stands for all addresses that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    host: String,
    port: u16,
}

/// A text that is no peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not host:port")]
pub struct PeerError(String);

impl Peer {
    /// Reads `host:port`; an IPv6 address is in brackets.
    ///
    /// # Errors
    /// [`PeerError`], for everything else.
    pub fn parse(text: &str) -> Result<Self, PeerError> {
        let wrong = || PeerError(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let port = port.parse().ok().filter(|&port| port != 0);
        match port {
            Some(port) if !host.is_empty() && (bare.is_some() || !host.contains(':')) => {
                let host = bare.unwrap_or(host).to_owned();
                Ok(Self { host, port })
            }
            _ => Err(wrong()),
        }
    }
}

/// Why peers cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// There is no randomness.
    #[error("the system gives no random numbers")]
    Random,
}

/// Listens for peers; nobody is met yet.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    peers: Vec<Peer>,
    here: Arc<Here>,
}

/// This picker, as all its connections know it.
#[derive(Debug)]
struct Here {
    fleet: Arc<Fleet>,
    secret: Secret,
    instance: u64,
    identity: Identity,
    tls: ClientTls,
    /// Whom we hear, by instance.
    heard: Mutex<HashSet<u64>>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum MeetError {
    #[error(transparent)]
    Greet(#[from] GreetError),
    #[error(transparent)]
    Hear(#[from] HearError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it says nothing, or does not listen")]
    Silent,
    #[error("it is connected already")]
    Twice,
    #[error("there are no random numbers")]
    Random,
}

impl Bound {
    /// Peers connect to `listener`.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn new(
        settings: Settings,
        listener: TcpListener,
        fleet: Arc<Fleet>,
    ) -> Result<Self, BindError> {
        Ok(Self {
            listener,
            peers: settings.peers,
            here: Arc::new(Here {
                fleet,
                secret: settings.secret,
                instance: getrandom::u64().map_err(|_| BindError::Random)?,
                identity: Identity::self_signed()?,
                tls: ClientTls::new(&Trust::Anyone)?,
                heard: Mutex::default(),
            }),
        })
    }

    /// Where peers connect.
    ///
    /// # Errors
    /// What the system says.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Tells peers and hears them, for as long as it is polled. Dropped, all connections end.
    pub async fn run(self) {
        let hearing = hear_all(self.listener, self.here.clone());
        tokio::join!(hearing, tell_all(self.peers, self.here));
    }
}

/// Hears whoever connects.
async fn hear_all(listener: TcpListener, here: Arc<Here>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting peers");
                sleep(RETRY.0).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        // Twice as many: some are on their way out, or have not proved themselves.
        if connections.len() < 2 * MAX_PEERS {
            let here = here.clone();
            connections.spawn(async move {
                let Err(why) = here.hear(stream).await;
                if !matches!(why, MeetError::Greet(GreetError::Myself)) {
                    tracing::info!(%from, %why, "a peer is not heard any more");
                }
            });
        }
    }
}

/// Tells all peers, whoever they are at the time.
async fn tell_all(peers: Vec<Peer>, here: Arc<Here>) {
    let mut known: Vec<Vec<SocketAddr>> = vec![Vec::new(); peers.len()];
    let mut connections = JoinSet::new();
    let mut told: HashMap<SocketAddr, AbortHandle> = HashMap::new();
    loop {
        for (peer, known) in peers.iter().zip(&mut known) {
            let looking = tokio::net::lookup_host((&*peer.host, peer.port));
            // What a name meant counts until it is known to mean something else.
            if let Ok(Ok(found)) = timeout(PATIENCE, looking).await {
                *known = found.take(MAX_PEERS).collect();
            }
        }
        let all: BTreeSet<SocketAddr> = known.iter().flatten().copied().collect();
        told.retain(|at, task| {
            let stays = all.contains(at);
            if !stays {
                task.abort();
            }
            stays
        });
        for at in all {
            if told.len() < MAX_PEERS && !told.contains_key(&at) {
                let task = connections.spawn(here.clone().keep_telling(at));
                told.insert(at, task);
            }
        }
        while connections.try_join_next().is_some() {}
        sleep(RESOLVE).await;
    }
}

impl Here {
    fn hello(&self) -> Result<Hello, MeetError> {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(|_| MeetError::Random)?;
        let block_bytes = self.fleet.hasher().block_bytes();
        Ok(Hello {
            instance: self.instance,
            block_bytes: u32::try_from(block_bytes).unwrap_or(0),
            nonce,
        })
    }

    fn ours(&self, binding: Binding) -> Result<Ours<'_>, MeetError> {
        Ok(Ours {
            hello: self.hello()?,
            secret: &self.secret,
            binding,
        })
    }

    /// Hears one peer until the connection ends.
    async fn hear(&self, stream: TcpStream) -> Result<std::convert::Infallible, MeetError> {
        let (mut stream, binding) = self.identity.accept_bound(stream).await?;
        let ours = self.ours(binding)?;
        let greeting = greet::as_hearer(&mut stream, ours);
        let theirs = timeout(PATIENCE, greeting).await;
        let theirs = theirs.map_err(|_| MeetError::Silent)??;
        let _one = One::of(self, theirs.instance).ok_or(MeetError::Twice)?;
        tracing::info!(peer = theirs.instance, "a peer is heard");
        let takes_notes = theirs.block_bytes == ours.hello.block_bytes;
        if !takes_notes {
            tracing::warn!(
                "a peer cuts prompts into blocks of another size: its prompts do not count here"
            );
        }
        let hearer = Hearer::new(self.fleet.clone(), takes_notes);
        listen(stream, hearer).await
    }

    /// Tells the peer at `at`, and connects again whenever that ends.
    async fn keep_telling(self: Arc<Self>, at: SocketAddr) {
        let mut wait = RETRY.0;
        let mut said: Option<String> = None;
        loop {
            let began = Instant::now();
            let Err(why) = self.tell(at).await;
            if let MeetError::Greet(GreetError::Myself) = why {
                sleep(MYSELF).await;
                continue;
            }
            if began.elapsed() > PATIENCE {
                (wait, said) = (RETRY.0, None);
            }
            // Each trouble once, not at each try.
            let why = why.to_string();
            if said.as_ref() != Some(&why) {
                tracing::warn!(%at, why, "a peer is not told; trying again");
                said = Some(why);
            }
            sleep(wait).await;
            wait = (wait * 2).min(RETRY.1);
        }
    }

    /// Tells the peer at `at` until the connection ends.
    async fn tell(&self, at: SocketAddr) -> Result<std::convert::Infallible, MeetError> {
        let silent = |_| MeetError::Silent;
        let stream = timeout(PATIENCE, TcpStream::connect(at))
            .await
            .map_err(silent)??;
        stream.set_nodelay(true)?;
        let (mut stream, binding) = self.tls.connect_bound(stream).await?;
        let ours = self.ours(binding)?;
        let greeting = greet::as_teller(&mut stream, ours);
        let theirs = timeout(PATIENCE, greeting).await.map_err(silent)??;
        tracing::info!(%at, peer = theirs.instance, "a peer is told");
        speak(stream, &self.fleet).await
    }
}

/// Of the connections of one instance only one is heard, or what it tells would count twice.
struct One<'a> {
    here: &'a Here,
    instance: u64,
}

impl<'a> One<'a> {
    fn of(here: &'a Here, instance: u64) -> Option<Self> {
        let new = here.heard.lock().insert(instance);
        new.then(|| Self { here, instance })
    }
}

impl Drop for One<'_> {
    fn drop(&mut self) {
        self.here.heard.lock().remove(&self.instance);
    }
}

/// Hears what comes through `stream`.
async fn listen<S: AsyncRead + Unpin>(
    mut stream: S,
    mut hearer: Hearer,
) -> Result<std::convert::Infallible, MeetError> {
    let mut bytes = Vec::with_capacity(4096);
    loop {
        // What is not whole yet is shorter than the longest frame.
        let room = (MAX_FRAME + BATCH).saturating_sub(bytes.len());
        let mut limited = (&mut stream).take(room as u64);
        let reading = limited.read_buf(&mut bytes);
        let read = timeout(SILENCE, reading).await;
        if read.map_err(|_| MeetError::Silent)?? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let done = hearer.hear(&bytes)?;
        bytes.drain(..done);
    }
}

/// Tells `stream` what `fleet` does: what it sends at once, what ends soon.
async fn speak<S: AsyncWrite + Unpin>(
    mut stream: S,
    fleet: &Fleet,
) -> Result<std::convert::Infallible, MeetError> {
    let mut notes = fleet.notes();
    let mut teller = Teller::default();
    let (mut out, mut spoke) = (Vec::new(), Instant::now());
    loop {
        let woken = timeout(TICK, notes.recv()).await;
        // First who is where, then what they were sent.
        teller.loads(fleet, &mut out);
        if let Ok(note) = woken {
            let mut next = note.map_err(|error| match error {
                RecvError::Lagged(missed) => TryRecvError::Lagged(missed),
                RecvError::Closed => TryRecvError::Closed,
            });
            while tell_note(next, &mut teller, &mut out) && out.len() < BATCH {
                next = notes.try_recv();
            }
        }
        if out.is_empty() && spoke.elapsed() >= BEAT {
            Message::Beat.encode(&mut out);
        }
        if !out.is_empty() {
            let speaking = async {
                stream.write_all(&out).await?;
                stream.flush().await
            };
            timeout(SILENCE, speaking)
                .await
                .map_err(|_| MeetError::Silent)??;
            out.clear();
            spoke = Instant::now();
        }
    }
}

/// Says whether there may be more.
fn tell_note(
    note: Result<Arc<Note>, TryRecvError>,
    teller: &mut Teller,
    out: &mut Vec<u8>,
) -> bool {
    match note {
        Ok(note) => teller.note(&note, out),
        // What was missed is not told.
        Err(TryRecvError::Lagged(_)) => {}
        Err(TryRecvError::Empty | TryRecvError::Closed) => return false,
    }
    true
}

#[cfg(test)]
mod tests;
