//! HTTP/1.1 as baton's services use it: a pooled client, a server that drains, bodies with a bound.
//!
//! With the feature `tls`, over TLS too. Nothing here knows OpenAI, models or endpoints.
//! Invariant: nothing a peer sends (headers, body, silence) is waited for or stored without a bound.
#![forbid(unsafe_code)]

mod body;
mod budget;
mod client;
mod headers;
mod line;
mod pieces;
mod request_id;
mod serve;
#[cfg(feature = "tls")]
mod tls;

pub use body::{BodyError, collect, collect_charged};
pub use budget::{Budget, Charge, ReadError};
pub use client::{Client, ClientConfig, ClientError, GetError};
pub use headers::strip_hop_by_hop;
pub use hyper_util::service::TowerToHyperService;
pub use line::{Line, LineError};
pub use pieces::Pieces;
pub use request_id::{REQUEST_ID, request_id};
pub use serve::{Peer, ServeConfig, serve};
#[cfg(feature = "tls")]
pub use tls::{ClientTls, Identity, TlsError, Trust};

#[cfg(test)]
mod tests;
