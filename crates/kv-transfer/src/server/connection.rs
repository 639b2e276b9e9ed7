//! One connection of a producer, from its preface to its end: control connections carry a session, data
//! connections carry the chunks of one.
//!
//! A peer that has not proved itself gets two seconds, few bytes and one of a bounded number of places.

use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use baton_shm::Room;
use parking_lot::{Condvar, Mutex};

use super::{MAX_PENDING, Shared, random, spawn};
use crate::RejectCode;
use crate::checksum::Checksum;
use crate::control::{Chunk, Content, Control, Work};
use crate::geometry::{ChunkMap, Piece};
use crate::handshake::{Answer, ProducerHandshake, hello};
use crate::lease::SessionId;
use crate::net::{FrameError, Socket, hang_up};
use crate::secret::ConnKey;
use crate::tls;
use crate::wire::{
    ChunkHeader, MAX_BODY, MAX_BODY_BEFORE_AUTH, MAX_CHUNK, Message, PREFACE_LEN, Role,
    decode_preface,
};

/// How often an idle data connection looks whether its peer is still there.
const IDLE_CHECK: Duration = Duration::from_secs(1);
/// Pieces of a chunk that are sent from where they lie.
const MAX_PIECES: usize = 16;
/// A chunk takes at most this many times the progress timeout, however steadily its bytes trickle.
const CHUNK_PATIENCE: u32 = 4;

/// What the threads of one consumer share.
#[derive(Debug)]
pub(super) struct Session {
    control: Mutex<Control<Room>>,
    /// Wakes data connections.
    changed: Condvar,
    /// Wakes the one who tells how leases grow.
    news: Condvar,
    name: u64,
    key: ConnKey,
    /// The control connection.
    socket: Socket,
}

impl Session {
    pub(super) fn wake(&self) {
        // Under the lock, so that a waiter is either before its check or in its wait.
        drop(self.control.lock());
        self.changed.notify_all();
        self.news.notify_all();
    }

    /// Whether the consumer is the one who has this password to shared memory.
    pub(super) fn opens_to(&self, password: &[u8; 16]) -> bool {
        self.key.is_password(password)
    }

    /// The consumer sees our memory from now on; `false` if it is gone already.
    pub(super) fn show_memory(&self) -> bool {
        self.control.lock().show_memory()
    }

    pub(super) fn announce_drain(&self) {
        self.say(
            0,
            &Message::GoAway {
                code: RejectCode::Draining,
            },
        );
    }

    /// Tells the consumer how the leases grow that it watches, until the session ends.
    fn tell(&self, shared: &Shared) {
        let mut control = self.control.lock();
        while !control.is_over() && !shared.is_stopping() {
            let news = control.tell(&shared.leases.lock());
            if news.is_empty() {
                self.news.wait(&mut control);
                continue;
            }
            drop(control);
            news.iter().for_each(|message| self.say(0, message));
            control = self.control.lock();
        }
    }

    /// Writes to the control connection, and ends the session if that fails.
    fn say(&self, stream: u16, message: &Message) {
        if self.socket.write_frame(stream, message).is_err() {
            self.socket.hang_up();
        }
    }
}

/// Takes a fresh connection in, on a thread of its own; or closes it when there are too many.
pub(super) fn admit(shared: &Arc<Shared>, id: u64, stream: TcpStream) -> Option<JoinHandle<()>> {
    let entered = Registered::enter(shared, id, &stream);
    let pending = Pending::enter(shared);
    let (Some(entered), Some(pending)) = (entered, pending) else {
        shared.counters.turned_away();
        return None;
    };
    let shared = Arc::clone(shared);
    let serve = move || {
        let _entered = entered;
        if let Err(error) = serve(&shared, id, stream, pending) {
            tracing::debug!(%error, "a transfer connection ended");
        }
    };
    spawn("kvx-serve", serve).ok()
}

/// A place among the connections; the server can hang up on it, and does at the end.
struct Registered {
    shared: Arc<Shared>,
    id: u64,
}

impl Registered {
    fn enter(shared: &Arc<Shared>, id: u64, stream: &TcpStream) -> Option<Self> {
        let mut sockets = shared.sockets.lock();
        if sockets.len() >= shared.cfg.max_connections {
            return None;
        }
        sockets.insert(id, stream.try_clone().ok()?);
        Some(Self {
            shared: Arc::clone(shared),
            id,
        })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(socket) = self.shared.sockets.lock().remove(&self.id) {
            hang_up(&socket);
        }
    }
}

/// A place among those that have not proved themselves.
struct Pending(Arc<Shared>);

impl Pending {
    fn enter(shared: &Arc<Shared>) -> Option<Self> {
        let waiting = shared.pending.fetch_add(1, Ordering::Relaxed);
        let place = Self(Arc::clone(shared));
        (waiting < MAX_PENDING).then_some(place)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(
    shared: &Arc<Shared>,
    id: u64,
    stream: TcpStream,
    pending: Pending,
) -> Result<(), FrameError> {
    let deadline = Instant::now() + shared.cfg.auth_timeout;
    // Entered the register before this check: either it sees the stop or the stop sees the socket.
    if shared.is_stopping() {
        return Ok(());
    }
    let socket = Socket::new(stream, shared.cfg.progress_timeout)?;
    let proved = prove(shared, id, socket, deadline);
    drop(pending);
    match proved {
        Ok(Proved::Control(session)) => serve_control(shared, &session),
        Ok(Proved::Data(number, socket, session)) => {
            serve_data(shared, &socket, number, &session);
            Ok(())
        }
        Err(error) => {
            shared.counters.turned_away();
            Err(error)
        }
    }
}

enum Proved {
    Control(Arc<Session>),
    Data(u16, Socket, Arc<Session>),
}

fn prove(
    shared: &Arc<Shared>,
    id: u64,
    socket: Socket,
    deadline: Instant,
) -> Result<Proved, FrameError> {
    let mut preface = [0; PREFACE_LEN];
    socket.read_by(&mut preface, deadline)?;
    let preface = decode_preface(&preface)?;
    if preface.is_tls != shared.cfg.tls {
        let code = RejectCode::Encryption;
        shared.counters.rejected(code);
        socket.part(&Message::GoAway { code }, deadline)?;
        return Err(io::Error::other(code.name()).into());
    }
    if preface.is_near {
        socket.keep_few_under_way()?;
    }
    let socket = match &shared.tls {
        Some(tls) => socket.encrypted(tls::accepted(tls)?, deadline)?,
        None => socket,
    };
    match preface.role {
        Role::Control => authenticate(shared, id, socket, deadline),
        Role::Data => attach(shared, socket, deadline),
    }
}

fn authenticate(
    shared: &Arc<Shared>,
    id: u64,
    socket: Socket,
    deadline: Instant,
) -> Result<Proved, FrameError> {
    let terms = &shared.terms;
    let max_streams = u16::try_from(terms.max_streams).unwrap_or(u16::MAX);
    let nonce = random().map_err(io::Error::other)?;
    let ours = hello(terms.boot_id, terms.fingerprint, nonce, max_streams);
    let challenge = random().map_err(io::Error::other)?;
    let mut handshake = ProducerHandshake::new(ours, challenge, id, socket.binding());
    loop {
        let (_, message) = socket.read_frame(MAX_BODY_BEFORE_AUTH, deadline)?;
        match handshake.on_message(&terms.secret, &message) {
            Answer::Continue(messages) => {
                messages
                    .iter()
                    .try_for_each(|message| socket.write_frame(0, message))?;
            }
            Answer::Refuse(code) => {
                shared.counters.rejected(code);
                socket.write_frame(0, &Message::GoAway { code })?;
                return Err(io::Error::other(code.name()).into());
            }
            Answer::Welcome(welcome, key) => {
                let session = Arc::new(Session {
                    control: Mutex::new(Control::new(SessionId(id), Arc::clone(terms))),
                    changed: Condvar::new(),
                    news: Condvar::new(),
                    name: id,
                    key,
                    socket,
                });
                session.socket.trust();
                // Known before the consumer learns its name, so that no data connection comes too early.
                shared.sessions.lock().insert(id, Arc::clone(&session));
                session.socket.write_frame(0, &welcome).inspect_err(|_| {
                    shared.sessions.lock().remove(&id);
                })?;
                return Ok(Proved::Control(session));
            }
        }
    }
}

fn attach(shared: &Shared, socket: Socket, deadline: Instant) -> Result<Proved, FrameError> {
    let (_, message) = socket.read_frame(MAX_BODY_BEFORE_AUTH, deadline)?;
    let Message::Attach { session, proof } = message else {
        return Err(io::Error::other("data connection without attach").into());
    };
    let binding = socket.binding();
    let session = shared.sessions.lock().get(&session).cloned();
    let session = session.filter(|session| session.key.is_attach(&binding, &proof));
    let attached = session.ok_or(RejectCode::Unauthorized).and_then(|session| {
        let number = session.control.lock().attach().ok_or(RejectCode::Busy)?;
        Ok((number, session))
    });
    let (number, session) = match attached {
        Ok(attached) => attached,
        Err(code) => {
            shared.counters.rejected(code);
            socket.write_frame(0, &Message::GoAway { code })?;
            return Err(io::Error::other(code.name()).into());
        }
    };
    let attached = Message::Attached {
        stream: number,
        proof: session.key.attached_proof(&binding, number),
    };
    match socket.write_frame(number, &attached) {
        Ok(()) => {
            socket.trust();
            Ok(Proved::Data(number, socket, session))
        }
        Err(error) => {
            session
                .control
                .lock()
                .detach(number, &mut shared.leases.lock());
            Err(error.into())
        }
    }
}

fn serve_control(shared: &Arc<Shared>, session: &Arc<Session>) -> Result<(), FrameError> {
    let (with, of) = (Arc::clone(shared), Arc::clone(session));
    let teller = spawn("kvx-tell", move || of.tell(&with))?;
    if shared.is_draining.load(Ordering::SeqCst) {
        session.announce_drain();
    }
    let ended = converse(shared, session);
    shared.sessions.lock().remove(&session.name);
    session.control.lock().end(&mut shared.leases.lock());
    session.changed.notify_all();
    session.news.notify_all();
    session.socket.hang_up();
    // It ends because the session has; one that panicked has nothing left to tell.
    let _ = teller.join();
    ended
}

/// Answers messages until the connection ends, one way or another.
fn converse(shared: &Shared, session: &Session) -> Result<(), FrameError> {
    loop {
        let deadline = Instant::now() + shared.cfg.idle_timeout;
        let (of, message) = session.socket.read_frame(MAX_BODY, deadline)?;
        count_message(shared, &message);
        let asked = bytes_asked(shared, &message);
        let may_end_lease = matches!(message, Message::Release { .. });
        // What only moves chunks tells nobody how a lease grows.
        let may_be_news = !matches!(
            message,
            Message::Open(_) | Message::Credit { .. } | Message::Nack { .. }
        );
        let answer = {
            let mut control = session.control.lock();
            let mut leases = shared.leases.lock();
            control.on_message((of, message), &mut leases, Instant::now())?
        };
        session.changed.notify_all();
        if may_be_news {
            session.news.notify_all();
        }
        if may_end_lease {
            shared.leases_changed.notify_all();
        }
        if let Some(answer) = answer {
            count_answer(shared, &answer);
            if matches!(answer, Message::Lent(_)) {
                shared.counters.lent(asked);
            }
            session.say(of, &answer);
        }
    }
}

fn bytes_asked(shared: &Shared, message: &Message) -> usize {
    let Message::Open(open) = message else {
        return 0;
    };
    let map = ChunkMap::new(&shared.cfg.layout, &open.selection, MAX_CHUNK);
    map.map_or(0, |map| map.total_bytes())
}

fn count_message(shared: &Shared, message: &Message) {
    match message {
        Message::Heartbeat { .. } => shared.counters.heartbeat(),
        Message::Nack { .. } => shared.counters.crc_error(),
        _ => {}
    }
}

fn count_answer(shared: &Shared, answer: &Message) {
    if let Message::Reject { code, .. } = answer {
        shared.counters.rejected(*code);
    }
}

/// Sends chunks until the session or the connection ends.
fn serve_data(shared: &Shared, socket: &Socket, number: u16, session: &Session) {
    let mut scratch = Vec::new();
    loop {
        match next_work(shared, socket, number, session) {
            Work::Send(chunk) => {
                let sent = send(shared, socket, &chunk, &mut scratch);
                if sent.is_err() {
                    break;
                }
            }
            Work::Say(message) => {
                count_answer(shared, &message);
                session.say(number, &message);
            }
            Work::Idle => {}
            Work::Close => break,
        }
    }
    session
        .control
        .lock()
        .detach(number, &mut shared.leases.lock());
}

/// Waits for something to do, a while at most.
fn next_work(shared: &Shared, socket: &Socket, number: u16, session: &Session) -> Work<Room> {
    let mut control = session.control.lock();
    if shared.is_stopping() {
        return Work::Close;
    }
    let work = control.work(number, &mut shared.leases.lock(), Instant::now());
    if !matches!(work, Work::Idle) {
        return work;
    }
    if socket.is_closed() {
        return Work::Close;
    }
    session.changed.wait_for(&mut control, IDLE_CHECK);
    Work::Idle
}

fn send(
    shared: &Shared,
    socket: &Socket,
    chunk: &Chunk<Room>,
    scratch: &mut Vec<u8>,
) -> io::Result<()> {
    let deadline = Instant::now() + shared.cfg.progress_timeout * CHUNK_PATIENCE;
    let pieces = gather(chunk, scratch);
    let mut sum = Checksum::new();
    pieces.iter().for_each(|piece| sum.add(piece));
    let header = ChunkHeader {
        xfer: chunk.xfer,
        chunk: chunk.chunk,
        len: u32::try_from(chunk.range.len()).unwrap_or(u32::MAX),
        offset: chunk.range.start as u64,
        crc: sum.value(),
    };
    let header = header.encode();
    let all = std::iter::once(&header[..]).chain(pieces);
    let mut all: Vec<IoSlice<'_>> = all.map(IoSlice::new).collect();
    socket.write_by(&mut all, deadline)?;
    shared.counters.sent(chunk.range.len());
    shared.counters.stalled(chunk.stalled);
    Ok(())
}

/// The chunk's bytes: where they lie if they lie in a few pieces, else copied together.
fn gather<'a>(chunk: &'a Chunk<Room>, scratch: &'a mut Vec<u8>) -> Vec<&'a [u8]> {
    let Content { parts, source } = &*chunk.content;
    let pieces = || source.pieces(chunk.range.clone());
    let lying = |piece| match piece {
        Piece::Bytes(part, range) => Some(&parts[part].bytes[range]),
        Piece::Zeros(_) => None,
    };
    let few: Option<Vec<&[u8]>> = pieces().take(MAX_PIECES + 1).map(lying).collect();
    if let Some(few) = few.filter(|few| few.len() <= MAX_PIECES) {
        return few;
    }
    scratch.clear();
    for piece in pieces() {
        match piece {
            Piece::Bytes(part, range) => scratch.extend_from_slice(&parts[part].bytes[range]),
            Piece::Zeros(n) => scratch.resize(scratch.len() + n, 0),
        }
    }
    vec![scratch]
}
