//! Serving connections until told to stop, then draining them.

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What a client may take of a server, and how long it may run on after the end.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// Most open connections; more wait in the kernel's backlog.
    pub max_connections: usize,
    /// Longest wait for a request's whole head, counted from the end of the one before: also the idle limit.
    pub head_timeout: Duration,
    /// Most bytes of a request's head.
    pub max_head_bytes: usize,
    /// How long requests may run on after shutdown began.
    pub grace: Duration,
    /// Who this server is, if it speaks TLS and nothing else.
    #[cfg(feature = "tls")]
    pub tls: Option<crate::Identity>,
}

/// Where a request came from; an extension of every request that [`serve`] hands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            head_timeout: Duration::from_secs(60),
            max_head_bytes: 64 << 10,
            grace: Duration::from_secs(30),
            #[cfg(feature = "tls")]
            tls: None,
        }
    }
}

/// Serves `service` on `listener` until `shutdown`, then stops accepting, lets requests in progress finish within
/// the grace, and ends what is left. An axum router is a service through [`TowerToHyperService`].
///
/// When a client hangs up, the future or body that answers it is dropped at once.
///
/// [`TowerToHyperService`]: crate::TowerToHyperService
pub async fn serve<S, B>(
    listener: TcpListener,
    service: S,
    config: ServeConfig,
    shutdown: CancellationToken,
) where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let (accepting, builder, stop) = (Accepting::of(&config), builder(&config), shutdown.clone());
    let serve = move |stream, peer: Peer| {
        let service = service.clone();
        let service = service_fn(move |mut req: Request<Incoming>| {
            req.extensions_mut().insert(peer);
            service.call(req)
        });
        connection(stream, service, builder.clone(), stop.clone())
    };
    connections(listener, accepting, shutdown, serve).await;
}

/// A connection, in TLS or not.
#[cfg(feature = "tls")]
pub(crate) type Wire = tokio_util::either::Either<TcpStream, crate::tls::Secured>;
/// A connection.
#[cfg(not(feature = "tls"))]
pub(crate) type Wire = TcpStream;

/// How connections are taken, whatever is spoken on them.
#[derive(Clone)]
pub(crate) struct Accepting {
    pub(crate) most: usize,
    pub(crate) grace: Duration,
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<crate::Identity>,
}

impl Accepting {
    fn of(config: &ServeConfig) -> Self {
        Self {
            most: config.max_connections,
            grace: config.grace,
            #[cfg(feature = "tls")]
            tls: config.tls.clone(),
        }
    }

    /// The connection, once both sides know how they speak; nothing if they do not agree.
    #[cfg(feature = "tls")]
    async fn agreed(&self, stream: TcpStream) -> Option<Wire> {
        let Some(identity) = &self.tls else {
            return Some(Wire::Left(stream));
        };
        let secured = identity.accept(stream).await;
        let secured = secured.inspect_err(|error| tracing::debug!(%error, "no TLS"));
        Some(Wire::Right(secured.ok()?))
    }

    #[cfg(not(feature = "tls"))]
    async fn agreed(&self, stream: TcpStream) -> Option<Wire> {
        Some(stream)
    }
}

/// Runs `serve` for every client until `shutdown`, for as many at a time as there are places; the grace begins then.
pub(crate) async fn connections<F>(
    listener: TcpListener,
    accepting: Accepting,
    shutdown: CancellationToken,
    serve: impl Fn(Wire, Peer) -> F + Clone + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(accepting.most));
    let mut connections = JoinSet::new();
    loop {
        let (stream, peer, place) = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (accepting, serve) = (accepting.clone(), serve.clone());
        connections.spawn(async move {
            if let Some(wire) = accepting.agreed(stream).await {
                serve(wire, peer).await;
            }
            drop(place);
        });
    }
    // Closing the listener now sends new clients elsewhere while the old ones are served.
    drop(listener);
    drain(connections, accepting.grace).await;
}

/// The next connection, once there is a place for it. Cancel safe.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, Peer, OwnedSemaphorePermit) {
    loop {
        let place = places
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, peer)) => {
                without_delay(&stream);
                return (stream, Peer(peer), place);
            }
            // Out of file descriptors, or the client is gone already: neither ends the server.
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// An answer of a few bytes must not wait for the acknowledgement of the one before.
fn without_delay(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "nodelay refused");
    }
}

fn builder(config: &ServeConfig) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(config.head_timeout)
        // hyper insists on 8 KiB.
        .max_buf_size(config.max_head_bytes.max(8 << 10));
    builder
}

async fn connection<T, S, B>(
    stream: T,
    service: S,
    builder: http1::Builder,
    shutdown: CancellationToken,
) where
    T: AsyncRead + AsyncWrite + Unpin,
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    B: Body + 'static,
    B::Error: Into<BoxError>,
{
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

async fn drain(mut connections: JoinSet<()>, grace: Duration) {
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(grace, all_ended).await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "still busy after the grace; closing"
        );
        connections.shutdown().await;
    }
}
