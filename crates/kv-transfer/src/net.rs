//! Blocking connections with deadlines, plain or encrypted: no read or write here waits for ever, whatever the peer does.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustls::Connection;

use crate::secret::{Binding, UNBOUND};
use crate::sockets::{keep_few_under_way, watch_over};
use crate::tls::{MAX_BEFORE_AUTH, Tls};
use crate::wire::{
    FRAME_HEADER_LEN, Message, WireError, decode_frame_header, decode_message, encode_frame,
};

/// Why reading a frame failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// A connection. One thread may read from it while others write.
#[derive(Debug)]
pub(crate) struct Socket {
    tcp: TcpStream,
    tls: Option<Box<Tls>>,
    /// What is being written, if that is not what the caller has; locked meanwhile, so that it goes out in one piece.
    outgoing: Mutex<Vec<u8>>,
}

impl Socket {
    /// A write that makes no progress for as long as `write_timeout` fails.
    pub(crate) fn new(tcp: TcpStream, write_timeout: Duration) -> io::Result<Self> {
        watch_over(&tcp, write_timeout)?;
        Ok(Self {
            tcp,
            tls: None,
            outgoing: Mutex::default(),
        })
    }

    /// The peer is near: what waits to be sent should be little.
    pub(crate) fn keep_few_under_way(&self) -> io::Result<()> {
        keep_few_under_way(&self.tcp)
    }

    /// The same connection, encrypted from here on.
    pub(crate) fn encrypted(self, conn: Connection, deadline: Instant) -> io::Result<Self> {
        let tls = Tls::agree(&self.tcp, conn, deadline)?;
        Ok(Self {
            tls: Some(Box::new(tls)),
            ..self
        })
    }

    /// What its two ends, and nobody else's, see of the connection.
    pub(crate) fn binding(&self) -> Binding {
        self.tls.as_deref().map_or(UNBOUND, Tls::binding)
    }

    /// The peer belongs to the pool. Before that, under TLS, few bytes are read from it.
    pub(crate) fn trust(&self) {
        self.tls.as_deref().into_iter().for_each(Tls::trust);
    }

    /// How long [`read`](Self::read) waits for something to come.
    pub(crate) fn set_read_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.tcp.set_read_timeout(Some(timeout))
    }

    /// Reads into `buf` whatever there is: straight from the system, or as it is decrypted. Nothing, if what has come is
    /// not enough to decrypt yet.
    ///
    /// # Errors
    /// The end of the connection is one, and so is a wait that is too long.
    pub(crate) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match &self.tls {
            None => read_once(&self.tcp, buf),
            Some(tls) => tls.read(&self.tcp, buf),
        }
    }

    /// Fills `buf` before `deadline`.
    pub(crate) fn read_by(&self, buf: &mut [u8], deadline: Instant) -> io::Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            self.set_read_timeout(remaining(deadline)?)?;
            filled += self.read(&mut buf[filled..])?;
        }
        Ok(())
    }

    /// Reads one frame, at most `max_body` bytes of body, before `deadline`.
    pub(crate) fn read_frame(
        &self,
        max_body: usize,
        deadline: Instant,
    ) -> Result<(u16, Message), FrameError> {
        let mut header = [0; FRAME_HEADER_LEN];
        self.read_by(&mut header, deadline)?;
        let header = decode_frame_header(&header, max_body)?;
        let mut body = vec![0; header.len as usize];
        self.read_by(&mut body, deadline)?;
        Ok((header.stream, decode_message(header.kind, &body)?))
    }

    /// Writes one frame; the write timeout bounds the wait.
    pub(crate) fn write_frame(&self, of: u16, message: &Message) -> io::Result<()> {
        self.write(&encode_frame(of, message))
    }

    /// Writes all of `bytes`; the write timeout bounds the wait.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        self.write_slices(&mut [IoSlice::new(bytes)], None)
    }

    /// Writes the slices one after the other before `deadline`, from where they lie unless they are encrypted.
    pub(crate) fn write_by(&self, slices: &mut [IoSlice<'_>], deadline: Instant) -> io::Result<()> {
        self.write_slices(slices, Some(deadline))
    }

    fn write_slices(
        &self,
        mut slices: &mut [IoSlice<'_>],
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        let mut sealed = self.outgoing.lock();
        let Some(tls) = &self.tls else {
            return write_all(&self.tcp, slices, deadline);
        };
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            sealed.clear();
            let n = tls.seal(slices, &mut sealed).and_then(some_bytes)?;
            write_all(&self.tcp, &mut [IoSlice::new(&sealed)], deadline)?;
            IoSlice::advance_slices(&mut slices, n);
        }
        Ok(())
    }

    /// Says a last word and waits until the peer has gone, before `deadline`. Hanging up at once would make the system
    /// throw the word away if the peer has said something that nobody has read.
    pub(crate) fn part(&self, word: &Message, deadline: Instant) -> io::Result<()> {
        self.write_frame(0, word)?;
        self.tcp.shutdown(Shutdown::Write)?;
        let (mut scrap, mut left) = ([0; 512], MAX_BEFORE_AUTH);
        while left > 0 {
            self.set_read_timeout(remaining(deadline)?)?;
            let Ok(n) = read_once(&self.tcp, &mut scrap) else {
                break;
            };
            left = left.saturating_sub(n);
        }
        Ok(())
    }

    /// Whether the peer has closed a connection that has nothing to say.
    pub(crate) fn is_closed(&self) -> bool {
        let peek = || -> io::Result<usize> {
            self.tcp.set_nonblocking(true)?;
            let seen = self.tcp.peek(&mut [0]);
            self.tcp.set_nonblocking(false)?;
            seen
        };
        // Bytes where none may come are as bad as an end.
        let is_silent = peek().is_err_and(|e| e.kind() == ErrorKind::WouldBlock);
        !is_silent || self.tls.as_deref().is_some_and(Tls::has_unread)
    }

    /// Ends the connection for both sides; a thread that is blocked on it returns.
    pub(crate) fn hang_up(&self) {
        hang_up(&self.tcp);
    }
}

fn write_all(
    mut tcp: &TcpStream,
    mut slices: &mut [IoSlice<'_>],
    deadline: Option<Instant>,
) -> io::Result<()> {
    while !slices.is_empty() {
        let n = retry(|| tcp.write_vectored(slices)).and_then(some_bytes)?;
        IoSlice::advance_slices(&mut slices, n);
        if !slices.is_empty() {
            deadline.map_or(Ok(Duration::MAX), remaining)?;
        }
    }
    Ok(())
}

/// Reads what there is, at least a byte.
pub(crate) fn read_once(mut tcp: &TcpStream, buf: &mut [u8]) -> io::Result<usize> {
    retry(|| tcp.read(buf)).and_then(some_bytes)
}

/// Ends a connection for both sides; a thread that is blocked on it returns.
pub(crate) fn hang_up(stream: &TcpStream) {
    // It may be closed already, which is as good.
    let _ = stream.shutdown(Shutdown::Both);
}

/// The time left, or the error that there is none.
pub(crate) fn remaining(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(ErrorKind::TimedOut.into())
    } else {
        Ok(left)
    }
}

/// A read or write timeout is `WouldBlock` on Unix; everywhere else here it is `TimedOut`.
pub(crate) fn kind(error: &io::Error) -> ErrorKind {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut,
        kind => kind,
    }
}

fn some_bytes(n: usize) -> io::Result<usize> {
    if n == 0 {
        Err(ErrorKind::UnexpectedEof.into())
    } else {
        Ok(n)
    }
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
