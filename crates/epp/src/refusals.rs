//! Why a request goes nowhere, as its client is told: OpenAI's errors, with llm-d's words for the reasons.

use baton_ext_proc::Refusal;
use baton_fleet::Fleet;
use baton_openai::ApiError;
use baton_openai::facts::ScanError;
use baton_scheduler::Unschedulable;
use baton_scheduler::flow::{self, Outcome};
use http::StatusCode;

/// Most models that an error names.
const MAX_NAMED: usize = 16;
const SATURATED: &str = "rejected-saturated";
const NO_ENDPOINTS: &str = "rejected-no-endpoints";

/// A field of the body is missing or wrong.
pub(crate) fn field(name: &'static str, message: &'static str) -> Refusal {
    Refusal {
        param: Some(name.into()),
        ..Refusal::new(StatusCode::BAD_REQUEST, message)
    }
}

/// The body is not JSON, or no object.
pub(crate) fn body(error: ScanError) -> Refusal {
    let error = ApiError::from(error);
    let status = StatusCode::from_u16(error.kind.status());
    Refusal {
        param: error.param.map(Into::into),
        ..Refusal::new(status.unwrap_or(StatusCode::BAD_REQUEST), error.message)
    }
}

/// The request is not let in. Upstream gives no reason here, as it has none; there is one.
pub(crate) fn not_admitted(_: Unschedulable) -> Refusal {
    let message = "servers are busy, and this request may be refused then";
    Refusal::new(StatusCode::TOO_MANY_REQUESTS, message).dropped(SATURATED)
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
    let status = StatusCode::from_u16(told.status);
    Refusal::new(
        status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE),
        told.message,
    )
    .dropped(told.dropped_reason)
}

/// The picker is at fault.
pub(crate) fn broken() -> Refusal {
    Refusal::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "the picker lost the request",
    )
}

/// No server may answer.
pub(crate) fn unschedulable(why: Unschedulable, model: Option<&str>, fleet: &Fleet) -> Refusal {
    match why {
        Unschedulable::UnknownModel => unknown_model(model.unwrap_or_default(), fleet),
        Unschedulable::NoneHealthy | Unschedulable::NoPrefill => {
            Refusal::new(StatusCode::SERVICE_UNAVAILABLE, why.to_string()).dropped(NO_ENDPOINTS)
        }
        Unschedulable::Saturated => {
            Refusal::new(StatusCode::TOO_MANY_REQUESTS, why.to_string()).dropped(SATURATED)
        }
        Unschedulable::NotCached => Refusal::new(StatusCode::PRECONDITION_FAILED, why.to_string()),
    }
}

/// As vLLM says it.
fn unknown_model(model: &str, fleet: &Fleet) -> Refusal {
    let known = fleet.models(MAX_NAMED).join(", ");
    let message = format!("The model `{model}` does not exist. Valid aliases: {known}.");
    Refusal {
        param: Some("model".into()),
        ..Refusal::new(StatusCode::NOT_FOUND, message)
    }
}

/// Upstream's word for a refusal, in metrics.
pub(crate) fn code(refusal: &Refusal) -> &'static str {
    match refusal.status.as_u16() {
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
