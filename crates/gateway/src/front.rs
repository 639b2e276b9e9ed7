//! Which path is whose: what the gateway answers itself, and what goes to servers.

use crate::config::{ConfigError, GatewayConfig, Limits};
use crate::events::Events;
use crate::flow::Flow;
use crate::forward::{Asked, Guard, Journey, forward};
use crate::keys::{Keys, Who};
use crate::metrics::{Metrics, Timer};
use crate::models;
use crate::outgoing::{Outgoing, forwardable, without_foreign_kv};
use crate::refusal::{Refusal, json};
use baton_fleet::{Fleet, Permit};
use baton_http::{BodyError, Budget, Client, REQUEST_ID, ReadError, request_id};
use baton_openai::facts::Facts;
use baton_openai::{ApiError, ErrorKind};
use baton_scheduler::{Health, PrefixIndex, Scheduler};
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use std::borrow::Cow;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tracing::Instrument as _;

/// A whole answer, or one that streams.
pub(crate) type ResponseBody = Either<Full<Bytes>, Events<Incoming, Guard>>;

/// Everything that answers requests.
#[derive(Debug)]
pub(crate) struct Gateway {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) client: Client,
    pub(crate) metrics: Metrics,
    pub(crate) limits: Limits,
    /// The queue, if requests wait here.
    pub(crate) flow: Option<Flow>,
    keys: Keys,
    places: Arc<Semaphore>,
    body_budget: Budget,
}

const VERSION: &str = concat!("{\"version\":\"", env!("CARGO_PKG_VERSION"), "\"}");

/// What a path is.
enum Target {
    Health,
    Metrics,
    Version,
    Models,
    /// A server's.
    Server,
}

impl Gateway {
    pub(crate) fn new(config: &GatewayConfig) -> Result<Self, ConfigError> {
        let limits = config.limits.clone();
        let index = PrefixIndex::new(limits.prefix_blocks_per_server);
        let scheduler = Scheduler::new(config.policy(), index);
        let key = getrandom::u64().map_err(|_| ConfigError::Random)?;
        let fleet = Arc::new(Fleet::new(scheduler, key));
        let metrics = Metrics::new(config.flow_control.is_some());
        let flow = match (&config.flow_control, &metrics.flow) {
            (Some(section), Some(seen)) => {
                let prefill_from = config.pd_threshold;
                Some(Flow::new(section, prefill_from, &fleet, seen.clone())?)
            }
            _ => None,
        };
        Ok(Self {
            fleet,
            client: Client::default(),
            metrics,
            flow,
            keys: config.keys()?,
            places: Arc::new(Semaphore::new(
                limits.max_in_flight.min(Semaphore::MAX_PERMITS),
            )),
            body_budget: Budget::new(limits.max_buffered_bytes),
            limits,
        })
    }

    /// Answers a request; whatever goes wrong is an answer too.
    pub(crate) async fn answer(&self, req: Request<Incoming>) -> Response<ResponseBody> {
        let id = request_id(req.headers());
        let path = req.uri().path().to_owned();
        let timer = self.metrics.begin(&path);
        let started = timer.started();
        let mut response = match target(req.method(), &path) {
            Ok(target) => {
                let span =
                    tracing::info_span!("request", id = %String::from_utf8_lossy(id.as_bytes()));
                let dispatched = self
                    .dispatch(target, req, &id, timer)
                    .instrument(span)
                    .await;
                dispatched.unwrap_or_else(Refusal::into_response)
            }
            Err(refusal) => refusal.into_response(),
        };
        response.headers_mut().entry(REQUEST_ID).or_insert(id);
        self.metrics.answered(&path, response.status(), started);
        response
    }

    async fn dispatch(
        &self,
        target: Target,
        req: Request<Incoming>,
        id: &HeaderValue,
        timer: Timer,
    ) -> Result<Response<ResponseBody>, Refusal> {
        match target {
            Target::Health => self.health(),
            Target::Version => Ok(json(StatusCode::OK, Bytes::from_static(VERSION.as_bytes()))),
            Target::Metrics => Ok(self.render_metrics()),
            Target::Models => {
                self.tenant(&req)?;
                models::answer(self, &self.split(req, id).0).await
            }
            Target::Server => self.serve(req, id, timer).await,
        }
    }

    /// Ready as soon as somebody can generate.
    fn health(&self) -> Result<Response<ResponseBody>, Refusal> {
        let ready = self
            .fleet
            .servers()
            .iter()
            .any(|s| s.role.decodes() && s.health() == Health::Healthy);
        if ready {
            Ok(Response::new(Either::Left(Full::default())))
        } else {
            Err(Refusal::NoServer)
        }
    }

    fn render_metrics(&self) -> Response<ResponseBody> {
        let gate = self.flow.as_ref().map(|flow| &*flow.gate);
        let mut response = json(
            StatusCode::OK,
            self.metrics.render(&self.fleet, gate).into(),
        );
        let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, text);
        response
    }

    async fn serve(
        &self,
        req: Request<Incoming>,
        id: &HeaderValue,
        timer: Timer,
    ) -> Result<Response<ResponseBody>, Refusal> {
        let tenant = self.tenant(&req)?;
        let claim = match &self.flow {
            Some(flow) if generates(&req) => Some((flow, flow.claim(req.headers(), tenant))),
            _ => None,
        };
        let (mut outgoing, body) = self.split(req, id);
        let (body, _charge) = match outgoing.method {
            Method::POST => {
                let limit = self.limits.max_request_bytes;
                let (body, charge) = self.body_budget.read(body, limit).await?;
                (body, Some(charge))
            }
            _ => (Bytes::new(), None),
        };
        let facts = match body.is_empty() {
            true => Facts::default(),
            false => Facts::read(&[&body]).map_err(Refusal::Api)?,
        };
        outgoing.body = without_foreign_kv(body.clone(), &facts);
        let asked = self.asked(&body, &facts);
        let mut permit = match &claim {
            Some((flow, claim)) => Some(flow.admit(claim, &asked, body.len()).await?),
            None => None,
        };
        // Only now: a client that is slow to send, or waits, takes nobody's place.
        let place = self
            .places
            .clone()
            .try_acquire_owned()
            .map_err(|_| Refusal::Full)?;
        let journey = Journey {
            outgoing,
            place,
            timer,
            eviction: permit.as_mut().map(Permit::eviction).unwrap_or_default(),
            permit,
        };
        forward(self, journey, &asked).await
    }

    /// What a decision needs of `body`, which says `facts`.
    fn asked(&self, body: &Bytes, facts: &Facts) -> Asked {
        let pieces = [body];
        let model = facts.model_name(&pieces);
        let text: Vec<&[u8]> = facts.prompt_slices(&pieces).collect();
        let name = model.as_deref().unwrap_or("");
        Asked {
            prompt: self.fleet.prompt(name, &text, facts.tokens()),
            model: model.map(Cow::into_owned),
        }
    }

    /// Who sends `req`, if tenants have keys.
    fn tenant(&self, req: &Request<Incoming>) -> Result<Option<Arc<str>>, Refusal> {
        match self.keys.who(req.method(), req.headers()) {
            Who::Anybody => Ok(None),
            Who::Tenant(tenant) => Ok(Some(tenant)),
            Who::Stranger => Err(Refusal::Unauthorized),
        }
    }

    /// The request as it will go out, without its body, and the body. A key that is ours stops here.
    fn split(&self, req: Request<Incoming>, id: &HeaderValue) -> (Outgoing, Incoming) {
        let (mut outgoing, body) = split(req, id);
        if self.keys.are_needed() {
            outgoing.headers.remove(AUTHORIZATION);
        }
        (outgoing, body)
    }
}

/// Whether `req` makes work for servers that is worth waiting for.
fn generates(req: &Request<Incoming>) -> bool {
    req.method() == Method::POST && req.uri().path().starts_with("/v1/")
}

fn target(method: &Method, path: &str) -> Result<Target, Refusal> {
    let (target, allowed): (Target, &[Method]) = match path {
        "/health" => (Target::Health, &[Method::GET]),
        "/ping" => (Target::Health, &[Method::GET, Method::POST]),
        "/metrics" => (Target::Metrics, &[Method::GET]),
        "/version" => (Target::Version, &[Method::GET]),
        "/v1/models" => (Target::Models, &[Method::GET]),
        "/tokenize" | "/detokenize" => (Target::Server, &[Method::POST]),
        path if path.starts_with("/v1/") => (
            Target::Server,
            &[Method::GET, Method::POST, Method::OPTIONS],
        ),
        _ => return Err(Refusal::NoSuchPath),
    };
    match (allowed.contains(method), allowed) {
        (true, _) => Ok(target),
        (false, [Method::POST]) => Err(Refusal::NoSuchMethod("POST")),
        (false, [Method::GET]) => Err(Refusal::NoSuchMethod("GET")),
        (false, _) => Err(Refusal::NoSuchMethod("GET, POST")),
    }
}

/// The request as it will go out, without its body, and the body.
fn split(req: Request<Incoming>, id: &HeaderValue) -> (Outgoing, Incoming) {
    let (parts, body) = req.into_parts();
    let path = parts
        .uri
        .path_and_query()
        .cloned()
        .unwrap_or_else(|| PathAndQuery::from_static("/"));
    let headers = forwardable(parts.headers, id);
    (
        Outgoing {
            method: parts.method,
            path,
            headers,
            body: Bytes::new(),
        },
        body,
    )
}

impl From<ReadError> for Refusal {
    fn from(error: ReadError) -> Self {
        let kind = match error {
            ReadError::Full => return Self::Full,
            ReadError::Body(BodyError::TooLarge { .. }) => ErrorKind::PayloadTooLarge,
            ReadError::Body(BodyError::Stalled | BodyError::Broken(_)) => ErrorKind::BadRequest,
        };
        Self::Api(ApiError::new(kind, error.to_string()))
    }
}
