//! Envoy's external processing protocol (`ext_proc`), as an endpoint picker speaks it: everything of the protocol,
//! nothing of the decision.
//!
//! One gRPC stream is one HTTP request and its answer ([`Exchange`]); [`Picker`] is the seam. The state machine
//! (`machine`) is pure: messages in, messages out. Around it lies a thin shell over hyper's HTTP/2.
//! Invariant: whatever a proxy sends, an exchange is told once why it ended, and nothing is held without a bound.
//! Not here: endpoints, models, OpenAI's API, Kubernetes.
#![forbid(unsafe_code)]

mod body;
mod cursor;
mod frames;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod headers;
mod health;
mod inbound;
mod machine;
mod metadata;
mod outbox;
#[cfg(test)]
mod peer;
mod picker;
mod proto;
mod refusal;
mod service;
mod status;
mod stream;

pub use headers::Headers;
pub use health::{Health, ServingStatus};
pub use metadata::Allowed;
pub use picker::{
    Destination, Ended, Exchange, Picker, Reply, Report, RequestHead, ResponseBody, ResponseHead,
    Routed,
};
pub use refusal::Refusal;
pub use service::{Limits, serve, serve_health};

#[cfg(test)]
mod tests;
