//! A TCP connection that speaks ZMTP: greeted, told apart in two halves, and never waited for without end.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustix::net::sockopt;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use super::frame::{
    GREETING, Incoming, Parser, ProtocolError, Socket, check_greeting, check_ready, greeting,
    put_message, put_pong, put_ready, put_subscription,
};

/// How long a peer may take to say who it is.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a peer may take nothing of what is written to it.
const WRITE: Duration = Duration::from_secs(30);

/// Bytes that are gathered before they are written.
const GATHERED: usize = 64 << 10;

/// Bytes that are asked of the system at once. Most messages are smaller, and connections are many.
const READ: usize = 8 << 10;

/// How long the system lets a silent connection be before it asks whether the peer is there.
const KEEP_ALIVE: (Duration, Duration, u32) = (Duration::from_secs(15), Duration::from_secs(5), 3);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("the peer closed the connection")]
    Closed,
    #[error("the peer took too long")]
    Slow,
}

/// Greets the peer; `max_message` bounds what is taken of it later.
pub(crate) async fn open(
    stream: TcpStream,
    socket: Socket,
    max_message: usize,
) -> Result<(Reader, Writer), ConnectionError> {
    stream.set_nodelay(true)?;
    let (idle, every, times) = KEEP_ALIVE;
    sockopt::set_socket_keepalive(&stream, true).map_err(io::Error::from)?;
    sockopt::set_tcp_keepidle(&stream, idle).map_err(io::Error::from)?;
    sockopt::set_tcp_keepintvl(&stream, every).map_err(io::Error::from)?;
    sockopt::set_tcp_keepcnt(&stream, times).map_err(io::Error::from)?;
    let (read, write) = stream.into_split();
    let mut reader = Reader {
        half: read,
        buf: BytesMut::new(),
        parser: Parser::new(max_message),
    };
    let mut writer = Writer {
        half: write,
        out: BytesMut::new(),
    };
    timeout(HANDSHAKE, shake_hands(&mut reader, &mut writer, socket))
        .await
        .map_err(|_| ConnectionError::Slow)??;
    Ok((reader, writer))
}

async fn shake_hands(
    reader: &mut Reader,
    writer: &mut Writer,
    socket: Socket,
) -> Result<(), ConnectionError> {
    writer.half.write_all(&greeting()).await?;
    let mut theirs = [0; GREETING];
    reader.half.read_exact(&mut theirs).await?;
    check_greeting(&theirs)?;
    put_ready(&mut writer.out, socket);
    writer.flush().await?;
    Ok(check_ready(socket, reader.next().await?)?)
}

/// The half from which messages come.
#[derive(Debug)]
pub(crate) struct Reader {
    half: OwnedReadHalf,
    buf: BytesMut,
    parser: Parser,
}

impl Reader {
    /// The next message or command. May be cancelled and called again.
    pub(crate) async fn next(&mut self) -> Result<Incoming, ConnectionError> {
        loop {
            if let Some(incoming) = self.parser.next(&mut self.buf)? {
                return Ok(incoming);
            }
            self.buf.reserve(READ);
            if self.half.read_buf(&mut self.buf).await? == 0 {
                return Err(ConnectionError::Closed);
            }
        }
    }
}

/// The half into which messages go. What is cancelled while it writes must not be used again.
#[derive(Debug)]
pub(crate) struct Writer {
    half: OwnedWriteHalf,
    out: BytesMut,
}

impl Writer {
    /// Writes a message, or keeps it for [`flush`](Self::flush) while there is little to write.
    pub(crate) async fn feed(&mut self, frames: &[&[u8]]) -> Result<(), ConnectionError> {
        put_message(&mut self.out, frames);
        if self.out.len() >= GATHERED {
            self.flush().await?;
        }
        Ok(())
    }

    /// Writes a message.
    pub(crate) async fn send(&mut self, frames: &[&[u8]]) -> Result<(), ConnectionError> {
        self.feed(frames).await?;
        self.flush().await
    }

    /// Answers a ping.
    pub(crate) async fn pong(&mut self, context: &Bytes) -> Result<(), ConnectionError> {
        put_pong(&mut self.out, context);
        self.flush().await
    }

    /// Asks for topics that begin with `prefix`.
    pub(crate) async fn subscribe(&mut self, prefix: &[u8]) -> Result<(), ConnectionError> {
        put_subscription(&mut self.out, prefix);
        self.flush().await
    }

    /// Writes what was kept.
    pub(crate) async fn flush(&mut self) -> Result<(), ConnectionError> {
        while !self.out.is_empty() {
            // Each write is given its time: a slow peer is one that takes nothing at all.
            let written = timeout(WRITE, self.half.write_buf(&mut self.out)).await;
            if written.map_err(|_| ConnectionError::Slow)?? == 0 {
                return Err(ConnectionError::Closed);
            }
        }
        if self.out.capacity() > 4 * GATHERED {
            self.out = BytesMut::new();
        }
        Ok(())
    }
}
