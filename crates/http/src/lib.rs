//! HTTP/1.1 as baton's services use it: a pooled client, a server that drains, bodies with a bound.
//!
//! Plain HTTP only: TLS ends in front of baton. Nothing here knows OpenAI, models or endpoints.
//! Invariant: nothing a peer sends (headers, body, silence) is waited for or stored without a bound.
#![forbid(unsafe_code)]

mod body;
mod client;
mod headers;
mod serve;

pub use body::{BodyError, collect, collect_charged};
pub use client::{Client, ClientConfig, ClientError, GetError};
pub use headers::strip_hop_by_hop;
pub use hyper_util::service::TowerToHyperService;
pub use serve::{ServeConfig, serve};

#[cfg(test)]
mod tests;
