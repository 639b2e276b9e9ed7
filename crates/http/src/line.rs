//! One connection to one server, kept for questions that are asked again and again, such as how busy it is. It costs
//! less than a place in a pool: no task, no lock, and the answer is read piece by piece.

use bytes::Bytes;
use http::header::HOST;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;
use tokio::net::TcpStream;

/// Longest wait for a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of an answer that are read at a time: every line keeps such a buffer, and there may be thousands.
const BUFFER: usize = 16 << 10;

/// Why no whole answer came.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// There is no connection.
    #[error("no connection")]
    Connect(#[source] io::Error),
    /// The connection failed before the answer was whole.
    #[error("connection failed")]
    Lost(#[source] Option<hyper::Error>),
    /// The answer is longer than allowed.
    #[error("the answer is too long")]
    TooLong,
}

#[cfg(not(feature = "tls"))]
type Stream = TcpStream;
#[cfg(feature = "tls")]
type Stream = crate::tls::Stream;

/// A connection that is made when it is needed and kept as long as the server keeps it. HTTP/1.1.
#[derive(Debug)]
pub struct Line {
    authority: Authority,
    host: HeaderValue,
    #[cfg(feature = "tls")]
    tls: Option<crate::ClientTls>,
    socket: Option<SocketAddr>,
    peer: Option<SocketAddr>,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    sender: http1::SendRequest<Empty<Bytes>>,
    connection: http1::Connection<TokioIo<Stream>, Empty<Bytes>>,
}

impl Line {
    /// A line to `authority`, a host with a port. Nothing is connected yet.
    #[must_use]
    pub fn new(authority: &Authority) -> Self {
        let host = HeaderValue::from_str(authority.as_str());
        Self {
            // What is an authority is a header value.
            host: host.unwrap_or_else(|_| HeaderValue::from_static("")),
            #[cfg(feature = "tls")]
            tls: None,
            socket: authority.as_str().parse().ok(),
            peer: None,
            open: None,
            authority: authority.clone(),
        }
    }

    /// The same over TLS.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn over(self, tls: crate::ClientTls) -> Self {
        Self {
            tls: Some(tls),
            ..self
        }
    }

    #[cfg(not(feature = "tls"))]
    async fn secured(&self, tcp: TcpStream) -> io::Result<Stream> {
        Ok(tcp)
    }

    #[cfg(feature = "tls")]
    async fn secured(&self, tcp: TcpStream) -> io::Result<Stream> {
        match &self.tls {
            Some(tls) => tls.connect(self.authority.host(), tcp).await,
            None => Ok(Stream::Plain(tcp)),
        }
    }

    /// The socket that it was last connected to.
    #[must_use]
    pub fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// Gets `path` and hands the body, which may have `limit` bytes, to `read` as it comes. The caller limits the time.
    /// Dropping the future closes the connection.
    ///
    /// # Errors
    /// See [`LineError`]. A status that says "error" is none. If a kept connection turns out to be closed, another one
    /// is tried.
    pub async fn get(
        &mut self,
        path: &PathAndQuery,
        limit: usize,
        mut read: impl FnMut(&[u8]),
    ) -> Result<StatusCode, LineError> {
        if let Some(open) = self.open.take().filter(|open| !open.sender.is_closed()) {
            let mut left = limit;
            match self.exchange(open, path, &mut left, &mut read).await {
                // Nothing of an answer had come.
                Err(LineError::Lost(_)) if left == limit => {}
                done => return done,
            }
        }
        let open = self.connect().await?;
        self.exchange(open, path, &mut { limit }, &mut read).await
    }

    async fn connect(&mut self) -> Result<Open, LineError> {
        let host = self.authority.host();
        let port = self.authority.port_u16().unwrap_or(80);
        let connecting = async {
            match self.socket {
                Some(socket) => TcpStream::connect(socket).await,
                None => TcpStream::connect((host, port)).await,
            }
        };
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(LineError::Connect)?;
        // Small requests, each waited for.
        stream.set_nodelay(true).map_err(LineError::Connect)?;
        self.peer = stream.peer_addr().ok();
        let stream = self.secured(stream).await.map_err(LineError::Connect)?;
        let handshake = http1::Builder::new()
            .read_buf_exact_size(Some(BUFFER))
            .handshake(TokioIo::new(stream));
        let (sender, connection) = handshake.await.map_err(|e| LineError::Lost(Some(e)))?;
        Ok(Open { sender, connection })
    }

    async fn exchange(
        &mut self,
        mut open: Open,
        path: &PathAndQuery,
        left: &mut usize,
        read: &mut impl FnMut(&[u8]),
    ) -> Result<StatusCode, LineError> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = Uri::from(path.clone());
        request.headers_mut().insert(HOST, self.host.clone());
        let lost = |e| LineError::Lost(Some(e));
        let sender = &mut open.sender;
        let (done, is_alive) = {
            let mut talk = pin!(async {
                sender.ready().await.map_err(lost)?;
                let (parts, mut body) = sender
                    .send_request(request)
                    .await
                    .map_err(lost)?
                    .into_parts();
                while let Some(frame) = body.frame().await {
                    if let Ok(data) = frame.map_err(lost)?.into_data() {
                        *left = left.checked_sub(data.len()).ok_or(LineError::TooLong)?;
                        read(&data);
                    }
                }
                Ok(parts.status)
            });
            tokio::select! {
                biased;
                done = &mut talk => (done, true),
                // It has closed; what it had read before is still there to be taken.
                _ = &mut open.connection => (talk.await, false),
            }
        };
        if is_alive && done.is_ok() {
            self.open = Some(open);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    const PATH: PathAndQuery = PathAndQuery::from_static("/x?y");

    /// A server that gives `answer` to whatever it reads, `times` on each connection, and counts connections.
    async fn peer(answer: &'static str, times: usize) -> (Line, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let count = Arc::new(AtomicUsize::new(0));
        let accepted = count.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                accepted.fetch_add(1, Relaxed);
                let mut request = [0u8; 1000];
                for _ in 0..times {
                    let n = stream.read(&mut request).await.unwrap_or(0);
                    if n == 0 {
                        break;
                    }
                    assert!(request.starts_with(b"GET /x?y HTTP/1.1\r\nhost: 127.0.0.1:"));
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        });
        (Line::new(&address.parse().unwrap()), count)
    }

    async fn get(line: &mut Line, limit: usize) -> Result<(u16, String), LineError> {
        let mut text = Vec::new();
        let status = line
            .get(&PATH, limit, |piece| text.extend_from_slice(piece))
            .await?;
        Ok((status.as_u16(), String::from_utf8(text).unwrap()))
    }

    fn answer(status: u16, text: &str) -> (u16, String) {
        (status, text.to_owned())
    }

    #[tokio::test]
    async fn the_connection_is_kept_as_long_as_the_server_keeps_it() {
        let (mut line, count) = peer("HTTP/1.1 404 x\r\ncontent-length: 3\r\n\r\nabc", 2).await;
        assert_eq!(line.peer(), None);
        for connections in [1, 1, 2, 2, 3] {
            assert_eq!(get(&mut line, 3).await.unwrap(), answer(404, "abc"));
            assert_eq!(count.load(Relaxed), connections);
        }
        assert!(line.peer().is_some());
    }

    #[tokio::test]
    async fn a_body_may_end_with_the_connection_or_come_in_chunks() {
        let (mut line, _) = peer("HTTP/1.1 200 x\r\nconnection: close\r\n\r\nabc", 1).await;
        for _ in 0..2 {
            assert_eq!(get(&mut line, 3).await.unwrap(), answer(200, "abc"));
        }
        let chunks =
            "HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n";
        let (mut line, count) = peer(chunks, 9).await;
        for _ in 0..3 {
            assert_eq!(get(&mut line, 3).await.unwrap(), answer(200, "abc"));
        }
        assert_eq!(count.load(Relaxed), 1);
    }

    #[tokio::test]
    async fn an_answer_that_is_too_long_or_breaks_off_is_an_error() {
        let (mut line, count) = peer("HTTP/1.1 200 x\r\ncontent-length: 3\r\n\r\nabc", 9).await;
        assert!(matches!(get(&mut line, 2).await, Err(LineError::TooLong)));
        assert_eq!(get(&mut line, 3).await.unwrap(), answer(200, "abc"));
        assert_eq!(count.load(Relaxed), 2);
        let (mut line, _) = peer("HTTP/1.1 200 x\r\ncontent-length: 3\r\n\r\nab", 1).await;
        assert!(matches!(get(&mut line, 9).await, Err(LineError::Lost(_))));
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = closed.local_addr().unwrap().to_string();
        drop(closed);
        let mut line = Line::new(&address.parse().unwrap());
        assert!(matches!(
            get(&mut line, 9).await,
            Err(LineError::Connect(_))
        ));
    }
}
