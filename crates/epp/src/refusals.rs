//! Why a request goes nowhere, as its client is told: OpenAI's errors, with llm-d's words for the reasons.

use baton_ext_proc::Refusal;
use baton_fleet::Fleet;
use baton_openai::facts::ScanError;
use baton_openai::{ApiError, ErrorKind};
use baton_scheduler::Unschedulable;
use baton_scheduler::flow::{self, Outcome};

/// Most models that an error names.
const MAX_NAMED: usize = 16;
const SATURATED: &str = "rejected-saturated";
const NO_ENDPOINTS: &str = "rejected-no-endpoints";

/// A field of the body is missing or wrong.
pub(crate) fn field(name: &'static str, message: &'static str) -> Refusal {
    about(name, ErrorKind::BadRequest, message)
}

/// The body is not JSON, or no object.
pub(crate) fn body(error: ScanError) -> Refusal {
    ApiError::from(error).into()
}

/// The request is not let in. Upstream gives no reason here, as it has none; there is one.
pub(crate) fn not_admitted(_: Unschedulable) -> Refusal {
    let message = "servers are busy, and this request may be refused then";
    Refusal::new(ErrorKind::TooManyRequests, message).dropped(SATURATED)
}

/// The queue turned the request away.
pub(crate) fn turned_away(outcome: Outcome) -> Refusal {
    outcome.refusal().map_or_else(broken, of_the_queue)
}

/// A request that runs has to make room for others.
pub(crate) fn evicted() -> Refusal {
    of_the_queue(flow::Refusal::EVICTED)
}

fn of_the_queue(told: flow::Refusal) -> Refusal {
    Refusal::new(ErrorKind::of_status(told.status), told.message).dropped(told.dropped_reason)
}

/// The picker is at fault.
pub(crate) fn broken() -> Refusal {
    Refusal::new(ErrorKind::Internal, "the picker lost the request")
}

/// No server may answer.
pub(crate) fn unschedulable(why: Unschedulable, model: Option<&str>, fleet: &Fleet) -> Refusal {
    let of = |kind| Refusal::new(kind, why.to_string());
    match why {
        Unschedulable::UnknownModel => unknown_model(model.unwrap_or_default(), fleet),
        Unschedulable::NoneHealthy | Unschedulable::NoPrefill => {
            of(ErrorKind::Unavailable).dropped(NO_ENDPOINTS)
        }
        Unschedulable::Saturated => of(ErrorKind::TooManyRequests).dropped(SATURATED),
        Unschedulable::NotCached => of(ErrorKind::PreconditionFailed),
    }
}

/// As vLLM says it.
fn unknown_model(model: &str, fleet: &Fleet) -> Refusal {
    let known = fleet.models(MAX_NAMED).join(", ");
    let message = format!("The model `{model}` does not exist. Valid aliases: {known}.");
    about("model", ErrorKind::NotFound, message)
}

/// With the field at fault.
fn about(field: &str, kind: ErrorKind, message: impl Into<String>) -> Refusal {
    let error = ApiError::new(kind, message);
    let param = Some(field.to_owned());
    ApiError { param, ..error }.into()
}

/// Upstream's word for a refusal, in metrics.
pub(crate) fn code(refusal: &Refusal) -> &'static str {
    match refusal.status() {
        400 | 413 => "BadRequest",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        412 => "PreconditionFailed",
        429 => "ResourceExhausted",
        503 => "ServiceUnavailable",
        500 => "Internal",
        _ => "Unknown",
    }
}
