//! From a request's head to what is done with it: answered here, passed on unread, or prefilled and decoded.

use crate::allow::{AllowError, AllowList};
use crate::answer_body::Answer;
use crate::config::Config;
use crate::connector::{self, Connector, nixl};
use crate::dispatch::{Choosing, Plan, Prefill, Steering};
use crate::early::Early;
use crate::edit::Object;
use crate::engines::Engines;
use crate::foreign;
use crate::legs::{Head, Payload, Stage};
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::release::Releases;
use crate::route::{self, Route};
use crate::target::Target;
use crate::usage::{Cached, Patch, Patched, StreamPatch, WholePatch};
use baton_http::{
    Budget, Charge, ClientError, Peer, Pieces, REQUEST_ID, TlsError, request_id, strip_hop_by_hop,
};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use hyper::body::Incoming;
use std::sync::{Arc, Once};
use std::time::Duration;
use tracing::Instrument as _;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Bodies of this many requests of the longest kind are held at a time.
const HELD_BODIES: usize = 8;
/// Longest wait for a decode server that is asked how it is.
const PROBE: Duration = Duration::from_secs(2);

/// Everything that answers requests.
#[derive(Debug)]
pub(crate) struct Sidecar {
    pub(crate) config: Config,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) allow: Arc<AllowList>,
    pub(crate) prefill: Stage,
    pub(crate) engines: Engines,
    pub(crate) releases: Releases,
    pub(crate) early: Early,
    decode: Stage,
    /// The decode server's ranks.
    ranks: Vec<Authority>,
    budget: Budget,
    /// Done once a request has named encode servers, which is worth one line and not one a request.
    encoders_named: Once,
}

/// Why a sidecar cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The allow-list.
    #[error(transparent)]
    Allow(#[from] AllowError),
    /// TLS towards servers.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Not an address.
    #[error("no address for the decode server")]
    Address,
}

/// A request whose prompt is computed somewhere, with what it holds meanwhile.
#[derive(Debug)]
pub(crate) struct Journey {
    pub(crate) head: Head,
    pub(crate) route: Route,
    pub(crate) body: Object,
    pub(crate) rank: u16,
    _charge: Charge,
}

impl Sidecar {
    pub(crate) fn new(config: Config) -> Result<Self, StartError> {
        let metrics = Arc::new(Metrics::new());
        let prefill = Stage::new(config.prefill_tls, &config)?;
        let rank = |rank| format!("localhost:{}", config.decode_port.saturating_add(rank)).parse();
        let ranks = (0..config.ranks).map(rank).collect::<Result<_, _>>();
        Ok(Self {
            allow: Arc::new(AllowList::new(&config.allow)?),
            engines: Engines::new(config.mooncake_port),
            releases: Releases::new(prefill.clone(), metrics.clone()),
            early: Early::default(),
            decode: Stage::new(config.decode_tls, &config)?,
            ranks: ranks.map_err(|_| StartError::Address)?,
            budget: Budget::new(config.max_body.saturating_mul(HELD_BODIES)),
            encoders_named: Once::new(),
            prefill,
            metrics,
            config,
        })
    }

    /// Answers a request that came to the port of `rank`; whatever goes wrong is an answer too.
    pub(crate) async fn answer(
        self: &Arc<Self>,
        rank: u16,
        req: Request<Incoming>,
    ) -> Response<Answer> {
        let path = req.uri().path();
        if req.method() == Method::GET || req.method() == Method::HEAD {
            match path {
                "/health" => return well(),
                "/ready" => return self.ready(rank).await,
                _ => {}
            }
        }
        let route = Route::of(req.method(), path);
        let timer = self.metrics.begin(route);
        let id = request_id(req.headers());
        let span = tracing::info_span!("request", id = %String::from_utf8_lossy(id.as_bytes()));
        let dispatched = self.dispatch(rank, route, req, &id).instrument(span).await;
        let mut response = dispatched.unwrap_or_else(|refusal| {
            tracing::debug!(?refusal, "refused");
            refusal.into_response()
        });
        response.headers_mut().entry(REQUEST_ID).or_insert(id);
        self.metrics.answered(route, response.status());
        response.map(|body| body.timed(timer))
    }

    async fn dispatch(
        self: &Arc<Self>,
        rank: u16,
        route: Option<Route>,
        req: Request<Incoming>,
        id: &HeaderValue,
    ) -> Result<Response<Answer>, Refusal> {
        let (mut head, body) = split(req, id);
        let steering = Steering::take(&mut head.headers);
        let Some(route) = route else {
            return self
                .ask_decode(rank, &head, Payload::Passed(body))
                .await
                .map(passed);
        };
        let rank = match rank {
            0 => steering.rank(
                self.config.pod_ip.as_deref(),
                self.config.port,
                self.config.ranks,
            )?,
            rank => rank,
        };
        let plan = self.plan(&steering).await?;
        if steering.encoders {
            self.encoders_named.call_once(|| {
                tracing::warn!("encode servers are named, and there is no encode stage here");
            });
        }
        let (body, charge) = self.budget.read(body, self.config.max_body).await?;
        let mut body = Object::parse(body)?;
        if !self.config.trust_client_kv {
            body = foreign::strip(body)?;
        }
        let journey = Journey {
            head,
            route,
            body,
            rank,
            _charge: charge,
        };
        self.run(journey, plan).await
    }

    /// Decides; a second time with a fresh list if nobody named is on it.
    async fn plan(&self, steering: &Steering) -> Result<Plan, Refusal> {
        let choosing = Choosing {
            allow: &self.allow,
            most: self.config.policy.candidates(),
            pick: self.config.sampling.then(random),
        };
        match steering.plan(choosing) {
            Err(Refusal::NotAllowed) if self.allow.look_again().await => steering.plan(choosing),
            planned => planned,
        }
    }

    async fn run(
        self: &Arc<Self>,
        journey: Journey,
        plan: Plan,
    ) -> Result<Response<Answer>, Refusal> {
        let targets = match plan.prefill {
            Prefill::Unwanted => return self.without_prefill(&journey, plan.source).await,
            Prefill::Malformed => Vec::new(),
            Prefill::At(targets) => targets,
        };
        let connector = self.config.connector;
        let whole = route::whole(&journey.body).filter(|_| connector.decodes_alone());
        if let Some(whole) = whole {
            self.metrics.fallback(whole.name());
            return self.decode_alone(&journey).await;
        }
        match connector {
            Connector::Nixlv2 | Connector::SharedStorage => {
                self.one_after_the_other(&journey, &targets, plan.source)
                    .await
            }
            Connector::Sglang | Connector::Mooncake | Connector::Offloading => {
                self.both_at_once(&journey, &targets, plan.source).await
            }
        }
    }

    /// The request as it came, or with the KV that another server has cached.
    async fn without_prefill(
        &self,
        journey: &Journey,
        source: Option<Target>,
    ) -> Result<Response<Answer>, Refusal> {
        let source = source.filter(|source| !self.is_here(source, journey.rank));
        let body = match source.and_then(|source| self.source(&source, None)) {
            Some(source) => nixl::pull(&journey.body, &source),
            None => journey.body.text().clone().into(),
        };
        self.decode(journey, body).await.map(passed)
    }

    /// Decode computes the prompt too.
    pub(crate) async fn decode_alone(
        &self,
        journey: &Journey,
    ) -> Result<Response<Answer>, Refusal> {
        let body = match self.config.connector {
            Connector::SharedStorage => connector::shared_storage::decode(&journey.body),
            _ => journey.body.text().clone().into(),
        };
        self.decode(journey, body).await.map(passed)
    }

    /// Asks the decode server of the request's rank.
    pub(crate) async fn decode(
        &self,
        journey: &Journey,
        body: Pieces,
    ) -> Result<Response<Incoming>, Refusal> {
        self.ask_decode(journey.rank, &journey.head, Payload::Edited(body))
            .await
    }

    async fn ask_decode(
        &self,
        rank: u16,
        head: &Head,
        body: Payload,
    ) -> Result<Response<Incoming>, Refusal> {
        let to = self
            .ranks
            .get(usize::from(rank))
            .ok_or(Refusal::UnknownRank)?;
        let mut response = self.decode.send(to, head, body).await.map_err(|error| {
            tracing::warn!(%error, "decode gave no answer");
            match error {
                ClientError::Connect(_) => Refusal::DecodeDown,
                ClientError::Sent(_) => Refusal::DecodeFailed,
            }
        })?;
        strip_hop_by_hop(response.headers_mut());
        Ok(response)
    }

    /// Whether the decode server of `rank` is well, by its own word.
    async fn ready(&self, rank: u16) -> Response<Answer> {
        let head = Head {
            method: Method::GET,
            path: PathAndQuery::from_static("/health"),
            headers: HeaderMap::new(),
        };
        let asked = self.ask_decode(rank, &head, Payload::Edited(Pieces::default()));
        match tokio::time::timeout(PROBE, asked).await {
            Ok(Ok(response)) if response.status().is_success() => well(),
            _ => Refusal::DecodeDown.into_response(),
        }
    }

    /// Whether `target` is this pod's own rank, which need not pull from itself.
    fn is_here(&self, target: &Target, rank: u16) -> bool {
        let here = self.config.pod_ip.as_deref() == Some(target.host());
        here && target.port() == self.config.port.saturating_add(rank)
    }

    /// The server that holds part of the prompt, unless pulls are off or it is `but` itself.
    pub(crate) fn source(&self, source: &Target, but: Option<&Target>) -> Option<nixl::KvSource> {
        let pulls = self.config.p2p_pull || self.config.connector == Connector::Offloading;
        (pulls && Some(source) != but).then(|| self.at(source, connector::uuid4(random_bytes())))
    }

    /// `target` as one to be pulled from under `id`.
    pub(crate) fn at(&self, target: &Target, id: String) -> nixl::KvSource {
        let ports = (self.config.p2p_port, self.config.port);
        nixl::KvSource::at(target, id, ports, self.config.ranks)
    }
}

fn well() -> Response<Answer> {
    Response::new(Answer::whole(Pieces::default()))
}

/// An answer as it comes.
pub(crate) fn passed(response: Response<Incoming>) -> Response<Answer> {
    response.map(Answer::passed)
}

/// Decode's answer with `cached` as its count of cached tokens, if it is one that counts.
pub(crate) fn counted(
    response: Response<Incoming>,
    route: Route,
    cached: Cached,
) -> Response<Answer> {
    let (mut parts, body) = response.into_parts();
    let readable = parts.status.is_success() && !parts.headers.contains_key(CONTENT_ENCODING);
    let kind = parts.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let kind = kind.unwrap_or_default().to_ascii_lowercase();
    let patch = if kind.starts_with(b"text/event-stream") {
        Some(Patch::Stream(StreamPatch::new(cached)))
    } else if kind.starts_with(b"application/json") {
        Some(Patch::Whole(WholePatch::new(cached)))
    } else {
        None
    };
    match patch.filter(|_| readable && route.details_prompt_tokens()) {
        None => Response::from_parts(parts, Answer::passed(body)),
        Some(patch) => {
            parts.headers.remove(CONTENT_LENGTH);
            Response::from_parts(parts, Answer::patched(Patched::new(body, patch)))
        }
    }
}

/// The request as it goes to servers, without its body, and the body.
fn split(req: Request<Incoming>, id: &HeaderValue) -> (Head, Incoming) {
    let (parts, body) = req.into_parts();
    let path = parts.uri.path_and_query().cloned();
    let mut headers = parts.headers;
    strip_hop_by_hop(&mut headers);
    // The length may change, and nobody waits for a 100.
    for name in [CONTENT_LENGTH, EXPECT] {
        headers.remove(name);
    }
    headers.insert(REQUEST_ID, id.clone());
    if let Some(Peer(peer)) = parts.extensions.get() {
        forwarded_for(&mut headers, &peer.ip().to_canonical().to_string());
    }
    let head = Head {
        method: parts.method,
        path: path.unwrap_or_else(|| PathAndQuery::from_static("/")),
        headers,
    };
    (head, body)
}

fn forwarded_for(headers: &mut HeaderMap, peer: &str) {
    let before: Vec<&str> = headers
        .get_all(&FORWARDED_FOR)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .chain([peer])
        .collect();
    if let Ok(value) = HeaderValue::from_str(&before.join(", ")) {
        headers.insert(FORWARDED_FOR, value);
    }
}

/// Zeros if the system has no randomness: what is asked for here need not be secret.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let _ = getrandom::fill(&mut bytes);
    bytes
}

pub(crate) fn random() -> u64 {
    u64::from_be_bytes(random_bytes())
}
