//! Blocking sockets with deadlines: no read or write here waits for ever, whatever the peer does.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

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

/// Fills `buf` before `deadline`.
pub(crate) fn read_by(mut stream: &TcpStream, buf: &mut [u8], deadline: Instant) -> io::Result<()> {
    let mut filled = 0;
    while filled < buf.len() {
        stream.set_read_timeout(Some(remaining(deadline)?))?;
        filled += retry(|| stream.read(&mut buf[filled..])).and_then(some_bytes)?;
    }
    Ok(())
}

/// Reads one frame, at most `max_body` bytes of body, before `deadline`.
pub(crate) fn read_frame(
    stream: &TcpStream,
    max_body: usize,
    deadline: Instant,
) -> Result<(u16, Message), FrameError> {
    let mut header = [0; FRAME_HEADER_LEN];
    read_by(stream, &mut header, deadline)?;
    let header = decode_frame_header(&header, max_body)?;
    let mut body = vec![0; header.len as usize];
    read_by(stream, &mut body, deadline)?;
    Ok((header.stream, decode_message(header.kind, &body)?))
}

/// Writes one frame; the stream's own write timeout bounds the wait.
pub(crate) fn write_frame(mut stream: &TcpStream, of: u16, message: &Message) -> io::Result<()> {
    stream.write_all(&encode_frame(of, message))
}

/// Reads into `buf` whatever there is, at least a byte, within the stream's own read timeout.
pub(crate) fn read_some(mut stream: &TcpStream, buf: &mut [u8]) -> io::Result<usize> {
    retry(|| stream.read(buf)).and_then(some_bytes)
}

/// Writes the slices one after the other before `deadline`.
pub(crate) fn write_slices_by(
    mut stream: &TcpStream,
    mut slices: &mut [IoSlice<'_>],
    deadline: Instant,
) -> io::Result<()> {
    while !slices.is_empty() {
        let n = retry(|| stream.write_vectored(slices)).and_then(some_bytes)?;
        IoSlice::advance_slices(&mut slices, n);
        if !slices.is_empty() {
            remaining(deadline)?;
        }
    }
    Ok(())
}

/// Whether the peer has closed a connection that has nothing to say.
pub(crate) fn is_closed(stream: &TcpStream) -> bool {
    let peek = || -> io::Result<usize> {
        stream.set_nonblocking(true)?;
        let seen = stream.peek(&mut [0]);
        stream.set_nonblocking(false)?;
        seen
    };
    // Bytes where none may come are as bad as an end.
    !peek().is_err_and(|e| e.kind() == ErrorKind::WouldBlock)
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
