//! Sockets: three ports, what is served on each, and the order in which it all ends.

use crate::picker::{Epp, Manners, Shared};
use crate::settings::Config;
use baton_ext_proc::{Health, ServingStatus, serve, serve_health};
use baton_fleet::{EndpointsFile, FileError, Fleet, ListError, Probing, ProbingError, parse_file};
use baton_http::{Http2Config, Identity, ServeConfig};
use baton_scheduler::{PrefixIndex, Scheduler};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Services that health is told of by name; every other name means the same as readiness.
const SERVICES: [&str; 3] = [
    "envoy.service.ext_proc.v3.ExternalProcessor",
    "readiness",
    LIVENESS,
];
const LIVENESS: &str = "liveness";
/// How long exchanges may run on after no new ones are taken.
const GRACE: Duration = Duration::from_secs(100);

/// Why a picker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A port is taken, or not ours to take.
    #[error("cannot listen on {0}")]
    Bind(SocketAddr, #[source] std::io::Error),
    /// The certificate cannot be used.
    #[error("the certificate cannot be used")]
    Certificate(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The endpoints cannot be read.
    #[error(transparent)]
    Endpoints(#[from] FileError),
    /// They make no list.
    #[error(transparent)]
    List(#[from] ListError),
    /// They cannot be watched as the configuration wants it.
    #[error(transparent)]
    Probing(#[from] ProbingError),
    /// There is no randomness.
    #[error("the system gives no random numbers")]
    Random,
}

/// A picker whose ports are bound.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    epp: Arc<Epp>,
    file: EndpointsFile,
    probing: Probing,
    tls: Option<Identity>,
    grpc: TcpListener,
    health: TcpListener,
    metrics: TcpListener,
}

impl Bound {
    /// Where the proxy asks, where health is asked for, and where the metrics are.
    ///
    /// # Errors
    /// What the system says.
    pub fn addresses(&self) -> std::io::Result<[SocketAddr; 3]> {
        Ok([
            self.grpc.local_addr()?,
            self.health.local_addr()?,
            self.metrics.local_addr()?,
        ])
    }
}

/// Reads what has to be read, and binds the ports. Nothing is served yet.
///
/// # Errors
/// See [`ListenError`].
pub async fn bind(config: Config) -> Result<Bound, ListenError> {
    let file = EndpointsFile::new(&config.endpoints, parse_file);
    let endpoints = file.read()?;
    let probing = Probing::of(&config.picker.data)?;
    let plan = config.picker.plan.clone();
    let index = PrefixIndex::new(plan.approximate.per_server);
    let key = getrandom::u64().map_err(|_| ListenError::Random)?;
    let fleet = Arc::new(Fleet::new(Scheduler::new(plan, index), key));
    fleet.set_endpoints(&endpoints)?;
    let manners = Manners {
        heeds_subset: config.heeds_subset,
        emits_scores: config.emits_scores,
        decisions: config.decisions,
    };
    let tls = identity(&config)?;
    let on = |port| SocketAddr::new(config.host, port);
    Ok(Bound {
        epp: Arc::new(Epp::new(
            fleet,
            config.picker.clone(),
            &config.pool,
            manners,
        )),
        file,
        probing,
        tls,
        grpc: listener(on(config.grpc_port)).await?,
        health: listener(on(config.health_port)).await?,
        metrics: listener(on(config.metrics_port)).await?,
        config,
    })
}

async fn listener(at: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(at)
        .await
        .map_err(|error| ListenError::Bind(at, error))
}

fn identity(config: &Config) -> Result<Option<Identity>, ListenError> {
    let identity = match (config.secure, &config.certificate) {
        (false, _) => return Ok(None),
        (true, None) => Identity::self_signed().map_err(|e| ListenError::Certificate(e.into())),
        (true, Some(folder)) => {
            Identity::from_folder(folder).map_err(|e| ListenError::Certificate(e.into()))
        }
    };
    Ok(Some(identity?.for_http2()))
}

/// Serves until `shutdown`; then says that it is not ready, takes requests for as long as the drain lasts, and lets
/// those in progress end.
pub async fn run(bound: Bound, shutdown: CancellationToken) {
    let Bound {
        config,
        epp,
        file,
        probing,
        tls,
        grpc,
        health,
        metrics,
    } = bound;
    let mut background = JoinSet::new();
    background.spawn(file.follow(epp.fleet.clone()));
    background.spawn(baton_fleet::watch(epp.fleet.clone(), probing));
    if let (Some(tls), Some(folder)) = (&tls, &config.certificate)
        && config.reloads_certificate
    {
        background.spawn(tls.clone().follow_folder(folder.clone()));
    }
    if let Some(queue) = &epp.queue {
        background.spawn(queue.gate.clone().run());
        background.spawn(queue.gate.clone().follow(epp.fleet.clone()));
    }
    let told = health_of(&shutdown);
    let ended = CancellationToken::new();
    background.spawn(serve_health(
        health,
        told.clone(),
        Http2Config::default(),
        ended.clone(),
    ));
    background.spawn(serve_metrics(metrics, epp.clone(), ended));
    // What takes requests goes on until the drain is over.
    let stop = CancellationToken::new();
    background.spawn({
        let (stop, epp) = (stop.clone(), epp.clone());
        async move {
            shutdown.cancelled().await;
            tokio::time::sleep(config.drain).await;
            stop.cancel();
            if let Some(queue) = &epp.queue {
                queue.gate.close();
            }
        }
    });
    let http2 = Http2Config {
        tls,
        grace: GRACE,
        ..Http2Config::default()
    };
    let beside = config.health_beside.then_some(told);
    let picker = Arc::new(Shared(epp));
    serve(grpc, picker, config.limits, beside, http2, stop).await;
    // Dropping the set ends what is left.
    drop(background);
}

/// Ready until shutdown begins; alive until the end.
fn health_of(shutdown: &CancellationToken) -> Health {
    let shutdown = shutdown.clone();
    Health::new(&SERVICES, move |name| {
        if name == LIVENESS || !shutdown.is_cancelled() {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        }
    })
}

/// `/metrics`, and `/debug/decisions` if they are kept.
async fn serve_metrics(listener: TcpListener, epp: Arc<Epp>, shutdown: CancellationToken) {
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = page(&epp, &request);
        async move { Ok::<_, std::convert::Infallible>(answer) }
    });
    baton_http::serve(listener, service, ServeConfig::default(), shutdown).await;
}

fn page(epp: &Epp, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (content_type, text) = match (request.method(), request.uri().path(), &epp.decisions) {
        (&Method::GET, "/metrics", _) => (
            "text/plain; version=0.0.4; charset=utf-8",
            epp.metrics.render(epp).into(),
        ),
        (&Method::GET, "/debug/decisions", Some(decisions)) => {
            ("application/json", decisions.render().into())
        }
        _ => {
            let mut response = Response::new(Full::default());
            *response.status_mut() = StatusCode::NOT_FOUND;
            return response;
        }
    };
    let mut response = Response::new(Full::new(text));
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}
