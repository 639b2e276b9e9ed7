//! One request over a connection of HTTP/2 that is made for it: for what is said seldom.

use crate::tls::{ClientTls, Stream};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::io;
use tokio::net::TcpStream;

/// Why no response's head came.
#[derive(Debug, thiserror::Error)]
pub enum OnceError {
    /// The URI has no host.
    #[error("not an address")]
    Uri,
    /// There is no connection.
    #[error("no connection")]
    Connect(#[source] io::Error),
    /// It failed.
    #[error("connection failed")]
    Lost(#[source] hyper::Error),
}

/// Sends `request`, whose URI is absolute, over TLS if there is any. The caller limits the time; whoever drops the body
/// closes the connection.
///
/// # Errors
/// See [`OnceError`].
pub async fn once_h2(
    request: Request<Full<Bytes>>,
    tls: Option<&ClientTls>,
) -> Result<Response<Incoming>, OnceError> {
    let uri = request.uri();
    let host = uri.host().ok_or(OnceError::Uri)?;
    let usual = if tls.is_some() { 443 } else { 80 };
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let port = uri.port_u16().unwrap_or(usual);
    let tcp = TcpStream::connect((bare.unwrap_or(host), port)).await;
    let tcp = tcp.map_err(OnceError::Connect)?;
    let stream = match tls {
        None => Stream::Plain(tcp),
        Some(tls) => {
            let connecting = tls.clone().for_http2();
            let connected = connecting.connect(host, tcp).await;
            connected.map_err(OnceError::Connect)?
        }
    };
    let io = TokioIo::new(stream);
    let shaking = http2::handshake(TokioExecutor::new(), io);
    let (mut sender, connection) = shaking.await.map_err(OnceError::Lost)?;
    // It ends with the response's body.
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(OnceError::Lost)
}
