//! One authenticated control connection to a producer, and the data connections that belong to it.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use baton_shm::View;
use parking_lot::{Condvar, Mutex};

use super::Shared;
use crate::handshake::{ConsumerHandshake, Step, hello};
use crate::memory;
use crate::net::{FrameError, Socket, kind, remaining};
use crate::secret::ConnKey;
use crate::server::random;
use crate::tls;
use crate::wire::{Lent, MAX_BODY, MAX_BODY_BEFORE_AUTH, Message, Preface, Role, WireError};
use crate::{RejectCode, TransferError};

/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 4;
/// Messages that wait for a worker; it awaits at most an acceptance, a refusal and an end.
const MAX_EVENTS: usize = 8;

/// Whoever connects faster is near: with 400 KiB under way a data connection carries 2 GB/s then, about what its threads can.
const NEAR: Duration = Duration::from_micros(200);

/// The connection.
#[derive(Debug)]
pub(super) struct Session {
    addr: SocketAddr,
    /// The producer's name of it.
    name: u64,
    key: ConnKey,
    control: Socket,
    transfers: Mutex<Transfers>,
    streams: Mutex<Streams>,
    stream_freed: Condvar,
    /// The producer's memory, if it is on this machine.
    memory: Option<View>,
}

#[derive(Debug, Default)]
struct Transfers {
    running: BTreeMap<u32, Running>,
    last: u32,
    ended: Option<TransferError>,
}

#[derive(Debug)]
struct Running {
    events: SyncSender<Message>,
    /// What a worker is blocked on, other than the messages.
    socket: Option<Arc<Socket>>,
    is_accepted: bool,
}

#[derive(Debug, Default)]
struct Streams {
    idle: Vec<DataStream>,
    open: usize,
}

/// A data connection.
#[derive(Debug)]
pub(super) struct DataStream {
    pub(super) number: u16,
    pub(super) socket: Arc<Socket>,
}

fn io_error(error: &io::Error) -> TransferError {
    match tls::cause(error) {
        Some(error) if tls::is_plain(error) => encryption_differs(true),
        Some(error) => TransferError::Tls(error.to_string()),
        None => TransferError::Broken(kind(error)),
    }
}

/// One side uses TLS and the other does not.
pub(super) fn encryption_differs(we_do: bool) -> TransferError {
    let how = |is_tls| if is_tls { "TLS" } else { "none" }.to_owned();
    TransferError::Mismatch {
        what: "encryption",
        ours: how(we_do),
        theirs: how(!we_do),
    }
}

impl From<FrameError> for TransferError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Io(error) => io_error(&error),
            FrameError::Wire(error) => Self::Protocol(error),
        }
    }
}

impl Session {
    /// Connects and proves both sides to each other.
    pub(super) fn connect(shared: &Shared, host: &str, port: u16) -> Result<Self, TransferError> {
        let unreachable = |e: io::Error| TransferError::Connect(kind(&e));
        // The resolver of the system has time limits of its own.
        let addrs = (host, port).to_socket_addrs().map_err(unreachable)?;
        let mut last = TransferError::Forbidden {
            host: host.into(),
            port,
        };
        let allowed = |addr: &SocketAddr| shared.cfg.peers.allows_address(addr);
        for addr in addrs.filter(allowed).take(MAX_ADDRESSES) {
            match TcpStream::connect_timeout(&addr, shared.cfg.connect_timeout) {
                Ok(stream) => return Self::greet(shared, stream, addr),
                Err(error) => last = unreachable(error),
            }
        }
        Err(last)
    }

    fn greet(shared: &Shared, tcp: TcpStream, addr: SocketAddr) -> Result<Self, TransferError> {
        let deadline = Instant::now() + shared.cfg.idle_timeout;
        let control = prepare(tcp, shared, Role::Control, false, deadline);
        let control = control.map_err(|e| io_error(&e))?;
        let n_streams = u16::try_from(shared.cfg.n_streams).unwrap_or(u16::MAX);
        let nonce = random().map_err(|_| TransferError::Broken(io::ErrorKind::Other))?;
        let ours = hello(shared.boot_id, shared.fingerprint, nonce, n_streams);
        let say = |message: &Message| control.write_frame(0, message).map_err(|e| io_error(&e));
        say(&Message::Hello(ours))?;
        let binding = control.binding();
        let mut state = ConsumerHandshake::Greeted { ours, binding };
        let mut boot_id = 0;
        let (name, key) = loop {
            let (_, message) = control.read_frame(MAX_BODY_BEFORE_AUTH, deadline)?;
            if let Message::Hello(theirs) = &message {
                boot_id = theirs.boot_id;
            }
            state = match state.on_message(&shared.cfg.secret, message)? {
                Step::Wait(next) => next,
                Step::Reply(reply, next) => {
                    say(&reply)?;
                    next
                }
                Step::Done(name, key) => break (name, key),
            };
        };
        control.trust();
        let may_share = shared.cfg.shares_memory;
        Ok(Self {
            memory: may_share
                .then(|| memory::view(boot_id, &key.password()).ok())
                .flatten(),
            addr,
            name,
            key,
            control,
            transfers: Mutex::default(),
            streams: Mutex::default(),
            stream_freed: Condvar::new(),
        })
    }

    /// Writes a message; a connection that does not take it is ended.
    pub(super) fn say(&self, stream: u16, message: &Message) -> Result<(), TransferError> {
        self.control.write_frame(stream, message).map_err(|e| {
            self.control.hang_up();
            io_error(&e)
        })
    }

    /// Reads the next message before `deadline`; those about transfers go to their workers.
    pub(super) fn listen(&self, deadline: Instant) -> Result<Option<Message>, TransferError> {
        let (_, message) = self.control.read_frame(MAX_BODY, deadline)?;
        match &message {
            Message::Accept { xfer, .. }
            | Message::Lent(Lent { xfer, .. })
            | Message::Reject { xfer, .. }
            | Message::Cancelled { xfer } => {
                self.transfers.lock().deliver(*xfer, message);
                Ok(None)
            }
            _ => Ok(Some(message)),
        }
    }

    /// The connection is gone: every worker learns it.
    pub(super) fn end(&self, why: TransferError) {
        self.control.hang_up();
        let mut transfers = self.transfers.lock();
        transfers.ended.get_or_insert(why);
        transfers
            .running
            .values()
            .filter_map(|running| running.socket.as_ref())
            .for_each(|socket| socket.hang_up());
        transfers.running.clear();
        drop(transfers);
        self.streams.lock().idle.clear();
        self.stream_freed.notify_all();
    }

    pub(super) fn memory(&self) -> Option<&View> {
        self.memory.as_ref()
    }

    pub(super) fn ended(&self) -> Option<TransferError> {
        self.transfers.lock().ended.clone()
    }

    /// Numbers a transfer, over `stream` if it needs one; messages about it arrive at the receiver, which closes when the session ends.
    pub(super) fn register(
        &self,
        stream: Option<&DataStream>,
    ) -> Result<(u32, Receiver<Message>), TransferError> {
        let socket = stream.map(|stream| Arc::clone(&stream.socket));
        let (events, receiver) = sync_channel(MAX_EVENTS);
        let mut transfers = self.transfers.lock();
        if let Some(why) = &transfers.ended {
            return Err(why.clone());
        }
        transfers.last = transfers.last.wrapping_add(1);
        let xfer = transfers.last;
        transfers.running.insert(
            xfer,
            Running {
                events,
                socket,
                is_accepted: false,
            },
        );
        Ok((xfer, receiver))
    }

    pub(super) fn unregister(&self, xfer: u32) {
        self.transfers.lock().running.remove(&xfer);
    }

    /// A data connection of one's own: an idle one, a new one if there may be more, or else the next to be free.
    pub(super) fn stream(
        &self,
        shared: &Shared,
        deadline: Instant,
        stop: impl Fn() -> Option<TransferError>,
    ) -> Result<DataStream, TransferError> {
        let begun = Instant::now();
        let mut streams = self.streams.lock();
        loop {
            if let Some(why) = stop().or_else(|| self.ended()) {
                return Err(why);
            }
            while let Some(stream) = streams.idle.pop() {
                if !stream.socket.is_closed() {
                    return Ok(stream);
                }
                streams.open -= 1;
            }
            if streams.open < shared.cfg.n_streams {
                streams.open += 1;
                break;
            }
            if Instant::now() >= deadline {
                let after = begun.elapsed();
                return Err(TransferError::TimedOut {
                    what: "waiting for a connection",
                    after,
                });
            }
            self.stream_freed
                .wait_for(&mut streams, super::pull::CANCEL_CHECK);
        }
        drop(streams);
        self.attach(shared, deadline)
            .inspect_err(|_| self.forget_stream())
    }

    fn attach(&self, shared: &Shared, deadline: Instant) -> Result<DataStream, TransferError> {
        let deadline = deadline.min(Instant::now() + shared.cfg.idle_timeout);
        let connect = || -> io::Result<Socket> {
            let patience = remaining(deadline)?.min(shared.cfg.connect_timeout);
            let begun = Instant::now();
            let tcp = TcpStream::connect_timeout(&self.addr, patience)?;
            let is_near = begun.elapsed() < NEAR;
            let socket = prepare(tcp, shared, Role::Data, is_near, deadline)?;
            let (session, proof) = (self.name, self.key.attach_proof(&socket.binding()));
            socket.write_frame(0, &Message::Attach { session, proof })?;
            Ok(socket)
        };
        let socket = connect().map_err(|e| io_error(&e))?;
        let (_, answer) = socket.read_frame(MAX_BODY_BEFORE_AUTH, deadline)?;
        let number = match answer {
            Message::Attached { stream, proof } => {
                let is_ours = self.key.is_attached(&socket.binding(), stream, &proof);
                is_ours.then_some(stream).ok_or(TransferError::Impostor)?
            }
            Message::GoAway {
                code: RejectCode::Unauthorized,
            } => {
                // The producer has given the session up, and we did not hear of it.
                let why = TransferError::Broken(io::ErrorKind::NotConnected);
                self.end(why.clone());
                return Err(why);
            }
            Message::GoAway { code } => return Err(TransferError::Rejected(code)),
            other => {
                return Err(WireError::Unexpected {
                    message: other.name(),
                }
                .into());
            }
        };
        socket
            .set_read_timeout(shared.cfg.idle_timeout)
            .map_err(|e| io_error(&e))?;
        socket.trust();
        let socket = Arc::new(socket);
        Ok(DataStream { number, socket })
    }

    /// A data connection that can be used again.
    pub(super) fn give_back(&self, stream: DataStream) {
        if self.ended().is_none() {
            self.streams.lock().idle.push(stream);
            self.stream_freed.notify_one();
        }
    }

    /// One has broken: those that are idle may have too, without a word, and are not used again.
    pub(super) fn forget_idle(&self) {
        let mut streams = self.streams.lock();
        streams.open -= streams.idle.len();
        streams.idle.clear();
        drop(streams);
        self.stream_freed.notify_all();
    }

    /// A data connection that cannot be used again.
    pub(super) fn forget_stream(&self) {
        self.streams.lock().open -= 1;
        self.stream_freed.notify_one();
    }
}

impl Transfers {
    fn deliver(&mut self, xfer: u32, message: Message) {
        let Some(running) = self.running.get_mut(&xfer) else {
            return;
        };
        running.is_accepted |= matches!(message, Message::Accept { .. });
        // A refusal after the acceptance finds the worker waiting for bytes.
        let is_late = running.is_accepted && matches!(message, Message::Reject { .. });
        if (running.events.try_send(message).is_err() || is_late)
            && let Some(socket) = &running.socket
        {
            socket.hang_up();
        }
    }
}

/// What every connection needs first.
fn prepare(
    tcp: TcpStream,
    shared: &Shared,
    role: Role,
    is_near: bool,
    deadline: Instant,
) -> io::Result<Socket> {
    let socket = Socket::new(tcp, shared.cfg.idle_timeout)?;
    let is_tls = shared.tls.is_some();
    let preface = Preface {
        role,
        is_tls,
        is_near,
    };
    socket.write(&preface.encode())?;
    match &shared.tls {
        Some(tls) => socket.encrypted(tls::called(tls)?, deadline),
        None => Ok(socket),
    }
}
