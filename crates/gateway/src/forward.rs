//! Sends a request to the servers chosen for it, and to others if they fail.
//!
//! As long as nothing of an answer has reached the client, a failed server is a reason to try the next. Answers that
//! are not streamed are read whole before they are passed on, so that this includes a server that dies in the middle.
//! A request that has to make room for others is tried no more; its server learns of it by the connection's end.

use crate::events::{Cut, Ending, Events, Hears};
use crate::front::{Gateway, ResponseBody};
use crate::metrics::{Retry, Timer};
use crate::outgoing::Outgoing;
use crate::refusal::Refusal;
use baton_fleet::{Eviction, Flight, Permit, Route};
use baton_http::{BodyError, ClientError, collect, strip_hop_by_hop};
use baton_openai::{ApiError, ErrorKind};
use baton_scheduler::{EndpointId, Prompt, Request, Unschedulable, flow};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use tokio::sync::OwnedSemaphorePermit;

/// What a streamed answer holds until its end: its place here, its count at the server, its time, and last, since it
/// wakes others who look at that count, its leave to go there.
pub(crate) type Guard = (OwnedSemaphorePermit, Flight, Timer, Option<Permit>);

impl Hears for Guard {
    fn first_bytes(&self) {
        self.1.answered();
    }
}

/// Most models that an error names.
const MAX_NAMED: usize = 16;

/// What became of one try.
enum Outcome {
    /// A streamed answer has begun.
    Stream(Response<Incoming>, Flight),
    /// A whole answer for the client.
    Whole(Response<ResponseBody>),
    /// The server has no room; this is what it said.
    Busy(Response<ResponseBody>),
    /// No connection.
    Unreachable,
    /// The connection failed before the answer was complete.
    Lost,
    /// The request has to make room for others.
    Evicted,
}

/// A request on its way, with what it holds meanwhile.
pub(crate) struct Journey {
    pub(crate) outgoing: Outgoing,
    pub(crate) place: OwnedSemaphorePermit,
    pub(crate) timer: Timer,
    /// When it is to make room for others.
    pub(crate) eviction: Eviction,
    /// Leave to go to a server, where that is needed.
    pub(crate) permit: Option<Permit>,
}

/// What a decision needs of a request.
pub(crate) struct Asked {
    /// The model, if it is named.
    pub(crate) model: Option<String>,
    pub(crate) prompt: Prompt,
}

/// Answers `journey`.
pub(crate) async fn forward(
    gateway: &Gateway,
    mut journey: Journey,
    asked: &Asked,
) -> Result<Response<ResponseBody>, Refusal> {
    let (model, prompt) = (asked.model.as_deref(), &asked.prompt);
    let mut tried: Vec<EndpointId> = Vec::new();
    let mut failure = Err(Refusal::NoServer);
    while tried.len() < gateway.limits.max_tries {
        let request = Request {
            model,
            avoid: &tried,
            ..Request::new(prompt)
        };
        let route = match gateway.fleet.route(&request) {
            Ok(route) => route,
            Err(Unschedulable::UnknownModel) => return Err(unknown_model(model, gateway)),
            Err(_) => break,
        };
        journey.permit.iter_mut().for_each(Permit::placed);
        gateway.metrics.decided(&route.decision.prefill);
        tracing::debug!(server = route.decode.name(), decision = ?route.decision, "routed");
        let server = route.decode.server().clone();
        tried.push(server.id);
        let reason = match attempt(gateway, &mut journey, route).await {
            Outcome::Stream(response, flight) => {
                gateway.fleet.answered(&server, prompt);
                return Ok(stream(response, flight, journey));
            }
            Outcome::Whole(response) => {
                match response.status() {
                    status if status.is_success() => gateway.fleet.answered(&server, prompt),
                    StatusCode::INTERNAL_SERVER_ERROR => gateway.fleet.failed(&server),
                    _ => {}
                }
                return Ok(response);
            }
            Outcome::Busy(response) => {
                failure = Ok(response);
                Retry::Busy
            }
            Outcome::Evicted => return Err(Refusal::Queue(flow::Refusal::EVICTED)),
            Outcome::Unreachable => Retry::Unreachable,
            Outcome::Lost => {
                gateway.fleet.failed(&server);
                failure = Err(Refusal::ServersFailed);
                Retry::Lost
            }
        };
        gateway.metrics.retry(reason);
        tracing::warn!(server = server.name(), ?reason, "a try failed");
    }
    failure
}

async fn attempt(gateway: &Gateway, journey: &mut Journey, route: Route) -> Outcome {
    let Route {
        decode, prefill, ..
    } = route;
    let prefiller = prefill.as_ref().map(|p| p.address.authority());
    let Some(request) = journey
        .outgoing
        .request(decode.address.authority(), prefiller)
    else {
        return Outcome::Lost;
    };
    let sent = tokio::select! {
        sent = gateway.client.send(request) => sent,
        () = decode.silence() => return Outcome::Lost,
        () = &mut journey.eviction => return Outcome::Evicted,
    };
    if let Some(prefill) = prefill {
        prompt_done(prefill, journey, sent.as_ref().is_ok_and(is_success));
    }
    let response = match sent {
        Ok(response) => response,
        Err(error) => {
            tracing::debug!(server = decode.name(), %error, "no answer");
            return failed(gateway, &decode, &error);
        }
    };
    if is_event_stream(&response) {
        return Outcome::Stream(response, decode);
    }
    if is_success(&response) {
        decode.answered();
    }
    tokio::select! {
        outcome = whole(response, gateway.limits.max_response_bytes) => outcome,
        () = decode.silence() => Outcome::Lost,
        () = &mut journey.eviction => Outcome::Evicted,
    }
}

/// The prefill server has no more work with this request; if all went well, the prompt is computed.
fn prompt_done(prefill: Flight, journey: &Journey, well: bool) {
    if well {
        prefill.answered();
    }
    drop(prefill);
    journey.permit.iter().for_each(Permit::part_done);
}

fn is_success(response: &Response<Incoming>) -> bool {
    response.status().is_success()
}

/// A server that cannot be connected to gets nothing more until its probe finds it again.
fn failed(gateway: &Gateway, server: &Flight, error: &ClientError) -> Outcome {
    match error {
        ClientError::Connect(_) => {
            gateway.fleet.unreachable(server);
            Outcome::Unreachable
        }
        ClientError::Sent(_) => Outcome::Lost,
    }
}

/// Reads an answer that is not streamed to its end.
async fn whole(response: Response<Incoming>, limit: usize) -> Outcome {
    let (mut parts, body) = response.into_parts();
    strip_hop_by_hop(&mut parts.headers);
    parts.headers.remove(CONTENT_LENGTH);
    match collect(body, limit).await {
        Ok(body) => {
            let busy = is_busy(parts.status);
            let response = Response::from_parts(parts, Either::Left(Full::new(body)));
            if busy {
                Outcome::Busy(response)
            } else {
                Outcome::Whole(response)
            }
        }
        // Another server would give the same answer.
        Err(BodyError::TooLarge { .. }) => Outcome::Whole(Refusal::ServersFailed.into_response()),
        Err(BodyError::Stalled | BodyError::Broken(_)) => Outcome::Lost,
    }
}

/// Statuses with which a server, or a proxy before it, says that another one might do better.
fn is_busy(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    )
}

fn is_event_stream(response: &Response<Incoming>) -> bool {
    let content_type = response
        .headers()
        .get(CONTENT_TYPE)
        .map(HeaderValue::as_bytes)
        .unwrap_or_default();
    content_type
        .to_ascii_lowercase()
        .starts_with(b"text/event-stream")
}

/// Passes a stream on; what `journey` and `flight` hold is held until it ends.
fn stream(
    response: Response<Incoming>,
    flight: Flight,
    journey: Journey,
) -> Response<ResponseBody> {
    let (mut parts, body) = response.into_parts();
    strip_hop_by_hop(&mut parts.headers);
    parts.headers.remove(CONTENT_LENGTH);
    let ending = match journey.outgoing.path.path() {
        "/v1/completions" | "/v1/chat/completions" => Ending::Done,
        _ => Ending::Own,
    };
    let (silence, eviction) = (flight.silence(), journey.eviction);
    let cut = Box::pin(async move {
        tokio::select! {
            () = silence => Cut::Silent,
            () = eviction => Cut::Evicted,
        }
    });
    let guard = (journey.place, flight, journey.timer, journey.permit);
    Response::from_parts(parts, Either::Right(Events::new(body, cut, ending, guard)))
}

/// As vLLM says it.
fn unknown_model(model: Option<&str>, gateway: &Gateway) -> Refusal {
    let model = model.unwrap_or_default();
    let known = gateway.fleet.models(MAX_NAMED).join(", ");
    let message = format!("The model `{model}` does not exist. Valid aliases: {known}.");
    Refusal::Api(ApiError {
        kind: ErrorKind::NotFound,
        message,
        param: Some("model".to_owned()),
    })
}
