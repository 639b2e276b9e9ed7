//! A connection whose small reads and writes become few large ones.
//!
//! HTTP/2 writes every frame of a body on its own and reads no more than the next frame needs. A proxy has the frames of
//! many requests under way at once; a system call for each of them costs more than the copy that saves it. What is
//! written during one turn of the connection's task is gathered, and goes out at its end by [`Outlet::poll_send`].

use parking_lot::Mutex;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that are gathered before they must go.
const MAX_WRITE: usize = 256 << 10;
/// Bytes read at once.
const READ: usize = 64 << 10;

/// The connection, for whoever reads and writes.
#[derive(Debug)]
pub(crate) struct Gathered<T>(Arc<Mutex<Inner<T>>>);

/// The same connection, for whoever sends what was gathered.
#[derive(Debug)]
pub(crate) struct Outlet<T>(Arc<Mutex<Inner<T>>>);

#[derive(Debug)]
struct Inner<T> {
    io: T,
    /// Read and not asked for yet: from `taken` to `filled`.
    read: Box<[u8]>,
    taken: usize,
    filled: usize,
    /// Written and not sent yet: from `sent`.
    written: Vec<u8>,
    sent: usize,
}

/// Both ends of `io`.
pub(crate) fn gathered<T>(io: T) -> (Gathered<T>, Outlet<T>) {
    let inner = Inner {
        io,
        read: vec![0; READ].into(),
        taken: 0,
        filled: 0,
        written: Vec::new(),
        sent: 0,
    };
    let inner = Arc::new(Mutex::new(inner));
    (Gathered(inner.clone()), Outlet(inner))
}

impl<T: AsyncWrite + Unpin> Outlet<T> {
    /// Sends what was gathered; pending until the peer takes all of it.
    pub(crate) fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.lock().poll_send(cx)
    }
}

impl<T: AsyncWrite + Unpin> Inner<T> {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.written.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while self.sent < self.written.len() {
            let rest = &self.written[self.sent..];
            match ready!(Pin::new(&mut self.io).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.sent += n,
            }
        }
        self.written.clear();
        self.sent = 0;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    /// Room for more, once there is some.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.written.len() >= MAX_WRITE {
            ready!(self.poll_send(cx))?;
        }
        Poll::Ready(Ok(MAX_WRITE - self.written.len()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Gathered<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let inner = &mut *self.0.lock();
        if inner.taken == inner.filled {
            if buf.remaining() >= READ {
                return Pin::new(&mut inner.io).poll_read(cx, buf);
            }
            let mut read = ReadBuf::new(&mut inner.read);
            ready!(Pin::new(&mut inner.io).poll_read(cx, &mut read))?;
            (inner.taken, inner.filled) = (0, read.filled().len());
        }
        let n = buf.remaining().min(inner.filled - inner.taken);
        buf.put_slice(&inner.read[inner.taken..inner.taken + n]);
        inner.taken += n;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Gathered<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.0.lock();
        let n = ready!(inner.poll_room(cx))?.min(data.len());
        inner.written.extend_from_slice(&data[..n]);
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.0.lock();
        let room = ready!(inner.poll_room(cx))?;
        let mut left = room;
        for slice in slices {
            let n = left.min(slice.len());
            inner.written.extend_from_slice(&slice[..n]);
            left -= n;
        }
        Poll::Ready(Ok(room - left))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing: what was written goes at the end of the turn.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let inner = &mut *self.0.lock();
        ready!(inner.poll_send(cx))?;
        Pin::new(&mut inner.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn what_is_written_goes_when_it_is_sent_and_all_of_it_before_the_end() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let (mut gathered, outlet) = gathered(near);
        gathered.write_all(b"one ").await.unwrap();
        let slices = [IoSlice::new(b"t"), IoSlice::new(b"wo")];
        assert_eq!(gathered.write_vectored(&slices).await.unwrap(), 3);
        gathered.flush().await.unwrap();
        let mut seen = [0; 7];
        let nothing = poll_fn(|cx| {
            let mut buf = ReadBuf::new(&mut seen);
            Poll::Ready(Pin::new(&mut far).poll_read(cx, &mut buf).is_pending())
        });
        assert!(nothing.await);
        poll_fn(|cx| outlet.poll_send(cx)).await.unwrap();
        far.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"one two");
        let long = vec![7; 2 * MAX_WRITE + 5];
        let writing = async {
            gathered.write_all(&long).await.unwrap();
            gathered.shutdown().await.unwrap();
        };
        let mut all = Vec::new();
        let (_, read) = tokio::join!(writing, far.read_to_end(&mut all));
        read.unwrap();
        assert!(all == long);
    }

    #[tokio::test]
    async fn what_is_read_at_once_comes_in_the_pieces_that_are_asked_for() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let (mut gathered, _outlet) = gathered(near);
        let long: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        far.write_all(&long).await.unwrap();
        drop(far);
        let mut all = vec![0; 10];
        gathered.read_exact(&mut all).await.unwrap();
        gathered.read_to_end(&mut all).await.unwrap();
        assert!(all == long);
    }
}
