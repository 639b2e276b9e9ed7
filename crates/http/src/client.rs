//! A pooled HTTP/1.1 client that tells "nothing was sent" from "something may have been".

use crate::body::{BodyError, collect};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::Body;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use std::time::Duration;

/// How a [`Client`] connects and what it keeps.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Longest wait for a TCP connection.
    pub connect_timeout: Duration,
    /// How long an unused connection is kept. Must be shorter than the server's, or a request may meet a closing one.
    pub idle_timeout: Duration,
    /// Most unused connections kept for one address.
    pub max_idle_per_host: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(1),
            // uvicorn, under vLLM, closes after 5 s.
            idle_timeout: Duration::from_secs(4),
            max_idle_per_host: 64,
        }
    }
}

/// Why no response head came.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection: nothing was sent, so that the request may be sent elsewhere whatever it does.
    #[error("no connection")]
    Connect(#[source] legacy::Error),
    /// The connection failed before the head of a response came. The server may have seen the request.
    #[error("connection failed before a response")]
    Sent(#[source] legacy::Error),
}

#[cfg(not(feature = "tls"))]
type Connector = HttpConnector;
#[cfg(feature = "tls")]
type Connector = crate::tls::Connector;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Sends requests over pooled connections. Cheap to clone; clones share the pool.
#[derive(Debug)]
pub struct Client<B = Full<Bytes>> {
    inner: legacy::Client<Connector, B>,
}

impl<B> Clone for Client<B> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

impl<B> Client<B>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    /// A client with an empty pool, for plain HTTP. No request is made yet.
    #[must_use]
    pub fn new(config: &ClientConfig) -> Self {
        let connector = http_connector(config);
        #[cfg(feature = "tls")]
        let connector = Connector::new(connector, None);
        Self::over(connector, config)
    }

    /// A client that speaks TLS as `tls` says wherever a URI begins with `https`.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn with_tls(config: &ClientConfig, tls: crate::ClientTls) -> Self {
        let mut connector = http_connector(config);
        connector.enforce_http(false);
        Self::over(Connector::new(connector, Some(tls)), config)
    }

    fn over(connector: Connector, config: &ClientConfig) -> Self {
        let inner = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(config.idle_timeout)
            .pool_max_idle_per_host(config.max_idle_per_host)
            .build(connector);
        Self { inner }
    }

    /// Sends `req`, whose URI is absolute (`http://host:port/path`), and returns as soon as the response's head is there.
    ///
    /// There is no limit on how long the server may think: the caller sets one. Dropping the future, or later the
    /// body, closes the connection at once, which tells the server that nobody waits.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn send(&self, req: Request<B>) -> Result<Response<Incoming>, ClientError> {
        self.inner
            .request(req)
            .await
            .map_err(|e| match e.is_connect() {
                true => ClientError::Connect(e),
                false => ClientError::Sent(e),
            })
    }
}

fn http_connector(config: &ClientConfig) -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(config.connect_timeout));
    connector.set_nodelay(true);
    connector.set_keepalive(Some(Duration::from_secs(15)));
    connector
}

/// Why a whole answer did not come.
#[derive(Debug, thiserror::Error)]
pub enum GetError {
    /// The address is none.
    #[error("not an address")]
    Uri(#[source] http::Error),
    /// No head came.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The body did not come whole.
    #[error(transparent)]
    Body(#[from] BodyError),
}

impl Client {
    /// Gets `uri` (absolute), and a body of at most `limit` bytes. As with [`Client::send`], the caller limits the time.
    ///
    /// # Errors
    /// See [`GetError`]. A status that says "error" is none.
    pub async fn get(&self, uri: &str, limit: usize) -> Result<(StatusCode, Bytes), GetError> {
        let req = Request::get(uri)
            .body(Full::default())
            .map_err(GetError::Uri)?;
        let response = self.send(req).await?;
        let status = response.status();
        Ok((status, collect(response.into_body(), limit).await?))
    }
}

impl Default for Client {
    fn default() -> Self {
        Self::new(&ClientConfig::default())
    }
}
