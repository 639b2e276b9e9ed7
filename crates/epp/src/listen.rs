//! Sockets: three ports, what is served on each, and the order in which it all ends.

use crate::picker::{Epp, Manners, Shared};
use crate::pool::Pool;
use crate::readers;
use crate::readiness::Readiness;
use crate::reports::Reports;
use crate::settings::{self, Config};
use crate::words::Words;
use baton_checkpoint::CheckpointError;
use baton_ext_proc::{serve, serve_health};
use baton_fleet::{EndpointsFile, FileError, Fleet, ListError, Probing, ProbingError, parse_file};
use baton_http::{Http2Config, Identity, ServeConfig};
use baton_k8s::{Access, ClientError};
use baton_kv_events::EndpointError;
use baton_scheduler::{PrefixIndex, Scheduler};
use baton_telemetry::{ExportError, Exporter};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

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
    /// There is no way to Kubernetes' API server.
    #[error(transparent)]
    Kubernetes(#[from] ClientError),
    /// Nobody can connect to this address with KV events.
    #[error("zmqEndpoint {0:?}")]
    EventsEndpoint(String, #[source] EndpointError),
    /// The model has no usable tokenizer or chat template.
    #[error("the tokenizer cannot be used")]
    Tokenizer(#[from] CheckpointError),
    /// Other pickers cannot be met.
    #[error("other pickers")]
    Peers(#[from] baton_peers::BindError),
    /// Traces cannot be sent.
    #[error("traces")]
    Traces(#[from] ExportError),
    /// There is no randomness.
    #[error("the system gives no random numbers")]
    Random,
}

/// A picker whose ports are bound.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    epp: Arc<Epp>,
    source: Source,
    probing: Probing,
    reports: Option<Reports>,
    traces: Option<Exporter>,
    peers: Option<baton_peers::Bound>,
    tls: Option<Identity>,
    grpc: TcpListener,
    health: TcpListener,
    metrics: TcpListener,
}

/// Where the endpoints come from.
#[derive(Debug)]
enum Source {
    File(EndpointsFile),
    Pool(Box<Pool>),
}

impl Source {
    /// Follows it in the background. Returns what stands for leadership, and who says who may read the metrics.
    fn start(
        self,
        epp: &Arc<Epp>,
        readiness: &mut Readiness,
        background: &mut JoinSet<()>,
    ) -> (Option<JoinHandle<()>>, Option<Arc<Access>>) {
        match self {
            Self::File(file) => {
                background.spawn(file.follow(epp.fleet.clone()));
                (None, None)
            }
            Self::Pool(pool) => {
                let access = pool.access();
                (pool.start(epp, readiness, background), access)
            }
        }
    }
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

    /// Where other pickers are heard, if they are.
    ///
    /// # Errors
    /// What the system says.
    pub fn peers_address(&self) -> std::io::Result<Option<SocketAddr>> {
        self.peers.as_ref().map(|peers| peers.address()).transpose()
    }
}

/// Reads what has to be read, and binds the ports. Nothing is served yet.
///
/// # Errors
/// See [`ListenError`].
pub async fn bind(config: Config) -> Result<Bound, ListenError> {
    let probing = Probing::of(&config.picker.data)?;
    let plan = config.picker.plan.clone();
    let index = PrefixIndex::new(plan.approximate.per_server);
    let draw = getrandom::u64().map_err(|_| ListenError::Random)?;
    // Pickers that tell each other of prompts hash them alike.
    let key = (config.peers.as_ref()).map_or(draw, |(peers, _)| peers.secret.hash_key());
    let fleet = Fleet::new(Scheduler::new(plan, index), key).drawing_from(draw);
    let fleet = Arc::new(fleet);
    let source = match &config.source {
        settings::Source::File(path) => {
            let file = EndpointsFile::new(path, parse_file);
            fleet.set_endpoints(&file.read()?)?;
            Source::File(file)
        }
        settings::Source::Pool(pool) => {
            Source::Pool(Box::new(Pool::new(pool.clone(), draw).await?))
        }
    };
    let traces = config.traces.as_ref().map(Exporter::new).transpose()?;
    let (tracer, traces) = traces.unzip();
    let manners = Manners {
        tracer: tracer.map(Arc::new),
        heeds_subset: config.heeds_subset,
        emits_scores: config.emits_scores,
        decisions: config.decisions,
    };
    let (reports, words) = precise(&config).await?;
    let tls = identity(&config)?;
    let on = |port| listener(config.host, port);
    let peers = match &config.peers {
        Some((settings, port)) => {
            let listener = on(*port).await?;
            let settings = settings.clone();
            Some(baton_peers::Bound::new(settings, listener, fleet.clone())?)
        }
        None => None,
    };
    let (picker, name) = (config.picker.clone(), config.source.pool());
    let epp = Epp::new(fleet, picker, name, manners, words);
    epp.objects.store(Arc::new(config.objects.clone()));
    Ok(Bound {
        epp: Arc::new(epp),
        source,
        probing,
        reports,
        traces,
        peers,
        tls,
        grpc: on(config.grpc_port).await?,
        health: on(config.health_port).await?,
        metrics: on(config.metrics_port).await?,
        config,
    })
}

/// What takes the servers' reports and what reads prompts for them, if the configuration has a use for it.
async fn precise(config: &Config) -> Result<(Option<Reports>, Option<Arc<Words>>), ListenError> {
    let Some(precise) = &config.picker.plan.precise else {
        return Ok((None, None));
    };
    let star = config.host.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
    let reports = Reports::bind(&precise.events, star).await?;
    let path = config.tokenizer.as_deref();
    let text = path.map(baton_checkpoint::open_text).transpose()?;
    let tokens = &config.picker.tokens;
    let model = tokens.model.as_deref().unwrap_or("");
    let words = Words::new(text, model, tokens.timeout);
    Ok((Some(reports), Some(Arc::new(words))))
}

/// Without a host on every address; a machine may have IPv4 alone.
async fn listener(host: Option<IpAddr>, port: u16) -> Result<TcpListener, ListenError> {
    let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let at = host.map_or((Ipv6Addr::UNSPECIFIED, port).into(), |ip| {
        SocketAddr::new(ip, port)
    });
    let bound = match TcpListener::bind(at).await {
        Err(error) if host.is_none() && error.kind() != ErrorKind::AddrInUse => {
            TcpListener::bind(v4).await
        }
        bound => bound,
    };
    bound.map_err(|error| ListenError::Bind(at, error))
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
        source,
        probing,
        reports,
        traces,
        peers,
        tls,
        grpc,
        health,
        metrics,
    } = bound;
    let mut background = JoinSet::new();
    let mut readiness = Readiness::new(shutdown.clone());
    let (lead, access) = source.start(&epp, &mut readiness, &mut background);
    background.spawn(baton_fleet::watch(epp.fleet.clone(), probing));
    follow(&config, &epp, tls.as_ref(), reports, &mut background);
    if let Some(peers) = peers {
        background.spawn(peers.run());
    }
    // Traces are sent until the last request is over.
    let over = CancellationToken::new();
    let traces = traces.map(|traces| tokio::spawn(traces.run(over.clone())));
    let told = readiness.health();
    let ended = CancellationToken::new();
    background.spawn(serve_health(
        health,
        told.clone(),
        Http2Config::default(),
        ended.clone(),
    ));
    background.spawn(serve_metrics(metrics, epp.clone(), access, ended));
    // What takes requests goes on until the drain is over.
    let stop = CancellationToken::new();
    let stopper = drained(shutdown, config.drain, epp.clone(), stop.clone());
    background.spawn(stopper);
    let http2 = Http2Config {
        tls,
        grace: GRACE,
        ..Http2Config::default()
    };
    let beside = config.health_beside.then_some(told);
    let picker = Arc::new(Shared(epp));
    serve(grpc, picker, config.limits, beside, http2, stop).await;
    over.cancel();
    // One gives the lease back since shutdown began, one sends what is left; neither waits for anything without a bound.
    for last in [lead, traces].into_iter().flatten() {
        let _ = last.await;
    }
    // Dropping the set ends what is left.
    drop(background);
}

/// Follows what changes beside the endpoints, if it is to be followed.
fn follow(
    config: &Config,
    epp: &Arc<Epp>,
    tls: Option<&Identity>,
    reports: Option<Reports>,
    background: &mut JoinSet<()>,
) {
    if let (Some(tls), Some(folder)) = (tls, &config.certificate)
        && config.reloads_certificate
    {
        background.spawn(tls.clone().follow_folder(folder.clone()));
    }
    if let (Some(reports), Some(words)) = (reports, &epp.words) {
        background.spawn(reports.run(epp.fleet.clone(), words.clone()));
    }
    if let Some(queue) = &epp.queue {
        background.spawn(queue.gate.clone().run());
        background.spawn(queue.gate.clone().follow(epp.fleet.clone()));
    }
}

/// Takes no new requests when the drain that follows `shutdown` is over, and lets nobody wait any more.
async fn drained(
    shutdown: CancellationToken,
    drain: Duration,
    epp: Arc<Epp>,
    stop: CancellationToken,
) {
    shutdown.cancelled().await;
    tokio::time::sleep(drain).await;
    stop.cancel();
    if let Some(queue) = &epp.queue {
        queue.gate.close();
    }
}

/// `/metrics`, and `/debug/decisions` if they are kept; with `access` only for who may read them.
async fn serve_metrics(
    listener: TcpListener,
    epp: Arc<Epp>,
    access: Option<Arc<Access>>,
    shutdown: CancellationToken,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (epp, access) = (epp.clone(), access.clone());
        async move {
            let refused = match access {
                Some(access) => readers::refused(&access, &request).await,
                None => None,
            };
            let answer = match refused {
                Some(status) => empty(status),
                None => page(&epp, &request),
            };
            Ok::<_, std::convert::Infallible>(answer)
        }
    });
    baton_http::serve(listener, service, ServeConfig::default(), shutdown).await;
}

fn empty(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
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
        _ => return empty(StatusCode::NOT_FOUND),
    };
    let mut response = Response::new(Full::new(text));
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}
