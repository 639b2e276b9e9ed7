//! Serving HTTP/2, with prior knowledge or over TLS: what a gRPC service stands on.

use crate::any_authority::AnyAuthority;
use crate::gathered::{Outlet, gathered};
use crate::serve::{Accepting, connections};
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Bytes of bodies that a connection may have sent without anybody having read them.
const CONNECTION_WINDOW: u32 = 4 << 20;
/// The same, of one request.
const STREAM_WINDOW: u32 = 1 << 20;
/// Longest frame that is taken; longer ones are fewer.
const FRAME: u32 = 64 << 10;
/// Most bytes of an answer that wait for the client.
const SEND_BUFFER: usize = 256 << 10;
/// Requests that a client may have given up before they were looked at. A proxy whose clients all leave at once gives
/// up many, an attacker no end of them.
const GIVEN_UP: usize = 1024;

/// A connection on which no request came by then is closed: it may have been opened to take up a place.
const FIRST_REQUEST: Duration = Duration::from_secs(300);

/// What a client may take of a server, and how long it may run on after the end.
#[derive(Clone, Debug)]
pub struct Http2Config {
    /// Most open connections; more wait in the kernel's backlog.
    pub max_connections: usize,
    /// Most requests in progress on one connection.
    pub max_streams: u32,
    /// Most bytes of a request's headers.
    pub max_head_bytes: u32,
    /// A connection on which nothing came for so long is asked for a sign of life.
    pub ping_after: Duration,
    /// How long the sign may take.
    pub ping_timeout: Duration,
    /// How long requests may run on after shutdown began.
    pub grace: Duration,
    /// Who this server is, if it speaks TLS and nothing else; see [`Identity::for_http2`](crate::Identity::for_http2).
    #[cfg(feature = "tls")]
    pub tls: Option<crate::Identity>,
}

impl Default for Http2Config {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_streams: 4096,
            max_head_bytes: 16 << 10,
            ping_after: Duration::from_secs(30),
            ping_timeout: Duration::from_secs(20),
            grace: Duration::from_secs(30),
            #[cfg(feature = "tls")]
            tls: None,
        }
    }
}

/// As [`serve`](crate::serve), in HTTP/2. When a client resets a request, its future or body is dropped at once.
pub async fn serve_h2<S, B>(
    listener: TcpListener,
    service: S,
    config: Http2Config,
    shutdown: CancellationToken,
) where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let accepting = Accepting {
        most: config.max_connections,
        grace: config.grace,
        #[cfg(feature = "tls")]
        tls: config.tls.clone(),
    };
    let (builder, stop) = (builder(&config), shutdown.clone());
    let serve = move |stream, _| connection(stream, service.clone(), builder.clone(), stop.clone());
    connections(listener, accepting, shutdown, serve).await;
}

fn builder(config: &Http2Config) -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(config.max_streams)
        .max_header_list_size(config.max_head_bytes)
        .max_pending_accept_reset_streams(GIVEN_UP)
        .keep_alive_interval(config.ping_after)
        .keep_alive_timeout(config.ping_timeout);
    builder
}

async fn connection<T, S, B>(
    stream: T,
    service: S,
    builder: http2::Builder<TokioExecutor>,
    shutdown: CancellationToken,
) where
    T: AsyncRead + AsyncWrite + Unpin,
    S: Service<Request<Incoming>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let used = Arc::new(AtomicBool::new(false));
    let mark = used.clone();
    let service = service_fn(move |request| {
        mark.store(true, Ordering::Relaxed);
        service.call(request)
    });
    let (gathered, outlet) = gathered(AnyAuthority::new(stream));
    let mut connection = pin!(builder.serve_connection(TokioIo::new(gathered), service));
    let unused = async {
        tokio::time::sleep(FIRST_REQUEST).await;
        if used.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    let ended = tokio::select! {
        ended = turns(connection.as_mut(), &outlet) => Some(ended),
        () = shutdown.cancelled() => None,
        () = unused => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            turns(connection, &outlet).await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

/// Runs `connection`, and sends after each of its turns what it wrote.
async fn turns<C, T>(mut connection: Pin<&mut C>, outlet: &Outlet<T>) -> Result<(), BoxError>
where
    C: Future<Output = hyper::Result<()>>,
    T: AsyncWrite + Unpin,
{
    poll_fn(|cx| {
        let turn = connection.as_mut().poll(cx);
        // What the peer does not take now goes in a later turn, for which its taking wakes this task.
        if let Poll::Ready(Err(error)) = outlet.poll_send(cx) {
            return Poll::Ready(Err(error.into()));
        }
        turn.map_err(Into::into)
    })
    .await
}
