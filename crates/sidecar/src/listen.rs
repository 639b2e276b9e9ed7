//! Listeners: one for each rank, one for metrics; bound before anything is served, drained together.

use crate::config::{Certificate, Config};
use crate::front::{Sidecar, StartError};
use baton_http::{FolderError, Identity, ServeConfig};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// As llm-d's: a gateway keeps connections for long.
const IDLE: Duration = Duration::from_secs(300);
/// As llm-d's.
const MAX_HEAD: usize = 1 << 20;

/// Why a sidecar does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A port cannot be had.
    #[error("cannot listen on port {port}")]
    Bind {
        /// Which.
        port: u16,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Certificate or key cannot be used.
    #[error("certificate{}: {reason}", .folder.as_ref().map(|f| format!(" in {}", f.display())).unwrap_or_default())]
    Certificate {
        /// Where they should be.
        folder: Option<PathBuf>,
        /// What is wrong with them.
        reason: String,
    },
    /// Something else is missing.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// A sidecar that listens and does not serve yet.
#[derive(Debug)]
pub struct Bound {
    sidecar: Arc<Sidecar>,
    ranks: Vec<TcpListener>,
    metrics: Option<TcpListener>,
    identity: Option<Identity>,
}

impl Bound {
    /// Where rank 0 is served.
    ///
    /// # Errors
    /// The socket's.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        match self.ranks.first() {
            Some(rank) => rank.local_addr(),
            None => Err(std::io::ErrorKind::NotConnected.into()),
        }
    }

    /// Whether it serves TLS.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.identity.is_some()
    }
}

/// Binds every port and reads every file that `config` names.
///
/// # Errors
/// See [`ListenError`].
pub async fn bind(mut config: Config) -> Result<Bound, ListenError> {
    let identity = config.serve_tls.as_ref().map(identity).transpose()?;
    let mut ranks = Vec::new();
    for rank in 0..config.ranks {
        // A port of 0 is whatever the system gives; only tests ask for it, and with one rank.
        ranks.push(listener(config.host, config.port.saturating_add(rank)).await?);
    }
    let bound = ranks.first().and_then(|l| l.local_addr().ok());
    config.port = bound.map_or(config.port, |address| address.port());
    let metrics = match config.metrics_port {
        Some(port) => Some(listener(config.host, port).await?),
        None => None,
    };
    Ok(Bound {
        sidecar: Arc::new(Sidecar::new(config)?),
        ranks,
        metrics,
        identity,
    })
}

/// On `host`, or on every address, IPv6 and IPv4, if the system has both.
async fn listener(host: Option<IpAddr>, port: u16) -> Result<TcpListener, ListenError> {
    let bound = match host {
        Some(host) => TcpListener::bind((host, port)).await,
        None => match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
            }
            bound => bound,
        },
    };
    bound.map_err(|source| ListenError::Bind { port, source })
}

/// Serves until `shutdown`, then lets requests in progress finish within the configured grace.
pub async fn run(bound: Bound, shutdown: CancellationToken) {
    let Bound {
        sidecar,
        ranks,
        metrics,
        identity,
    } = bound;
    let mut background = JoinSet::new();
    let allow = sidecar.allow.clone();
    background.spawn(async move { allow.follow().await });
    if let (Some(identity), Some(Certificate::Folder(folder))) =
        (identity.clone(), sidecar.config.serve_tls.clone())
    {
        background.spawn(identity.follow_folder(folder));
    }
    let config = serve_config(&sidecar.config, identity);
    let mut serving = JoinSet::new();
    if let Some(listener) = metrics {
        let sidecar = sidecar.clone();
        let service = service_fn(move |req| {
            let sidecar = sidecar.clone();
            async move { Ok::<_, Infallible>(metrics_answer(&sidecar, &req)) }
        });
        // Scraped until the last request is done.
        background.spawn(baton_http::serve(
            listener,
            service,
            ServeConfig::default(),
            CancellationToken::new(),
        ));
    }
    for (rank, listener) in (0u16..).zip(ranks) {
        let sidecar = sidecar.clone();
        let service = service_fn(move |req| {
            let sidecar = sidecar.clone();
            async move { Ok::<_, Infallible>(sidecar.answer(rank, req).await) }
        });
        serving.spawn(baton_http::serve(
            listener,
            service,
            config.clone(),
            shutdown.clone(),
        ));
    }
    while serving.join_next().await.is_some() {}
    drop(background);
}

fn serve_config(config: &Config, identity: Option<Identity>) -> ServeConfig {
    ServeConfig {
        head_timeout: IDLE,
        max_head_bytes: MAX_HEAD,
        grace: config.grace,
        tls: identity,
        ..ServeConfig::default()
    }
}

fn metrics_answer(sidecar: &Sidecar, req: &Request<Incoming>) -> Response<Full<Bytes>> {
    if req.uri().path() != "/metrics" {
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    }
    let mut response = Response::new(Full::new(sidecar.metrics.render().into()));
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, text);
    response
}

fn identity(certificate: &Certificate) -> Result<Identity, ListenError> {
    let (folder, made) = match certificate {
        Certificate::SelfSigned => (None, Identity::self_signed().map_err(FolderError::from)),
        Certificate::Folder(folder) => (Some(folder.clone()), Identity::from_folder(folder)),
    };
    made.map_err(|e| ListenError::Certificate {
        folder,
        reason: e.to_string(),
    })
}
