//! The decision, in the proxy's words: which headers a request gets, and where it goes.

use crate::intent;
use crate::metrics::Choice;
use crate::names;
use crate::picker::Epp;
use crate::trace::Trace;
use base64::Engine as _;
use baton_ext_proc::{Destination, RequestHead, Routed};
use baton_fleet::{Flight, Route, Server};
use baton_scheduler::{
    EndpointId, Explanation, Keys, Prompt, Request, SessionStrategy, Unschedulable,
};
use bytes::Bytes;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// A request as the decision sees it.
pub(crate) struct Ask<'a> {
    pub(crate) head: &'a RequestHead,
    pub(crate) model: Option<&'a str>,
    pub(crate) target: Option<&'a str>,
    pub(crate) prompt: &'a Prompt,
    pub(crate) keys: Option<&'a Keys>,
    pub(crate) multimodal: bool,
    pub(crate) priority: i32,
}

/// Decides where a request goes, and notes why if somebody wants to know.
pub(crate) fn decide(
    epp: &Epp,
    ask: &Ask<'_>,
    trace: Option<&mut Trace>,
) -> Result<(Route, Routed), Unschedulable> {
    let began = Instant::now();
    let headers = &ask.head.headers;
    let servers = epp.fleet.servers();
    let subset = (epp.heeds_subset && ask.head.subset.is_some())
        .then(|| ids(&servers, |at| ask.head.allows(&at)));
    let selection = headers
        .text(names::SELECTION)
        .map(|text| ids(&servers, |at| intent::selects(text, at)));
    let session = Session::of(epp, ask.head);
    let request = Request {
        model: ask.model,
        target: ask.target,
        subset: subset.as_deref(),
        selection: selection.as_deref(),
        session_endpoint: session.endpoint.as_deref(),
        session: session.id,
        keys: ask.keys,
        multimodal: ask.multimodal,
        priority: ask.priority,
        if_cached: ask.head.has_body && intent::prefers(headers, names::IF_AVAILABLE),
        ..Request::new(ask.prompt)
    };
    let explains = epp.decisions.is_some() || epp.emits_scores || trace.is_some();
    let mut why = Explanation::default();
    let mut watch = epp.metrics.plugins.watch(explains.then_some(&mut why));
    let decided = epp.fleet.route_observed(&request, &mut watch);
    let took = began.elapsed();
    epp.metrics.plugins.saw(&watch);
    epp.metrics.decided(&Choice {
        decided: &decided,
        model: ask.target.or(ask.model),
        prompt: ask.prompt,
        precise: ask.keys.is_some(),
        took,
    });
    if let Some(decisions) = &epp.decisions {
        let id = headers.text(names::REQUEST_ID).unwrap_or("");
        decisions.keep(id, &servers, &decided, &why, took);
    }
    let context = trace.map(|trace| {
        trace.decided(ask, &servers, &decided, (&why, took));
        trace.header()
    });
    let route = decided?;
    let mut routed = Routed::to(destination(&route, &servers)?);
    routed.set.extend(context);
    headers_of(&route, &mut routed);
    routed.remove.extend(names::FOR_THE_PICKER);
    if headers.get(names::REQUEST_ID).is_none() {
        routed.set.push((names::REQUEST_ID, fresh_id()));
    }
    if epp.emits_scores {
        routed.scores = scores(&why, &servers);
    }
    Ok((route, routed))
}

/// The servers whose addresses `may` be taken, by id, in order.
fn ids(servers: &[Arc<Server>], may: impl Fn(SocketAddr) -> bool) -> Vec<EndpointId> {
    let allowed = servers.iter().filter(|s| s.socket().is_some_and(&may));
    let mut ids: Vec<EndpointId> = allowed.map(|s| s.id).collect();
    ids.sort_unstable();
    ids
}

/// What the client says of its session.
#[derive(Default)]
struct Session {
    /// The endpoint that its token names.
    endpoint: Option<String>,
    /// Its own name for it, hashed.
    id: Option<u64>,
}

impl Session {
    fn of(epp: &Epp, head: &RequestHead) -> Self {
        let Some(session) = &epp.config.plan.session else {
            return Self::default();
        };
        match &session.strategy {
            SessionStrategy::Token { header } => Self {
                endpoint: head.headers.text(header).and_then(endpoint_of_token),
                id: None,
            },
            SessionStrategy::Id { headers, .. } => {
                let names: Vec<&str> = headers.iter().map(|h| &**h).collect();
                let name = intent::first(&head.headers, &names);
                Self {
                    endpoint: None,
                    id: name.map(|name| epp.fleet.hasher().session(name)),
                }
            }
        }
    }
}

fn endpoint_of_token(token: &str) -> Option<String> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(token)
        .ok()?;
    String::from_utf8(bytes).ok()
}

/// The endpoint that answers, and those to try after it.
fn destination(route: &Route, servers: &[Arc<Server>]) -> Result<Destination, Unschedulable> {
    let first = route.decode.socket().ok_or(Unschedulable::NoneHealthy)?;
    let decision = &route.decision;
    if let Some(port) = decision.primary_port {
        return Ok(SocketAddr::new(first.ip(), port).into());
    }
    if decision.others.is_empty() {
        return Ok(first.into());
    }
    let socket = |id: &EndpointId| servers.iter().find(|s| s.id == *id)?.socket();
    let others: Vec<SocketAddr> = decision.others.iter().filter_map(socket).collect();
    Ok(Destination::new(first, &others))
}

/// The headers by which the servers beside decode are told.
fn headers_of(route: &Route, routed: &mut Routed) {
    let address = |flight: &Flight| flight.address.as_str().to_owned();
    if let Some(prefill) = &route.prefill {
        routed.set.push((names::PREFILLER, address(prefill).into()));
    }
    if !route.encode.is_empty() {
        let all: Vec<String> = route.encode.iter().map(address).collect();
        routed.set.push((names::ENCODERS, all.join(",").into()));
    }
    if route.decision.primary_port.is_some() {
        let rank = address(&route.decode);
        routed.set.push((names::DATA_PARALLEL, rank.into()));
    }
}

/// What the last profile that ran made of its candidates.
fn scores(why: &Explanation, servers: &[Arc<Server>]) -> Vec<(Destination, f64)> {
    let candidates = why.stages.iter().flat_map(|stage| &stage.candidates);
    let kept = candidates.filter(|c| c.dropped_by.is_none());
    let score = |id: EndpointId, total: f64| {
        let socket = servers.iter().find(|s| s.id == id)?.socket()?;
        Some((socket.into(), total))
    };
    kept.filter_map(|c| score(c.id, c.total)).collect()
}

/// A name for a request that came without one.
fn fresh_id() -> Bytes {
    let mut bytes = [0u8; 16];
    // Without randomness an id that is not unique is better than no answer.
    let _ = getrandom::fill(&mut bytes);
    format!("{:032x}", u128::from_be_bytes(bytes)).into()
}
