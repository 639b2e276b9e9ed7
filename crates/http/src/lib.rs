//! HTTP/1.1 as baton's services use it: a pooled client, a server that drains, bodies with a bound.
//!
//! With the feature `tls`, over TLS too; with `http2`, a server of HTTP/2. Nothing here knows OpenAI, models or endpoints.
//! Invariant: nothing a peer sends (headers, body, silence) is waited for or stored without a bound.
#![forbid(unsafe_code)]

#[cfg(feature = "http2")]
mod any_authority;
#[cfg(feature = "tls")]
mod any_name;
mod body;
#[cfg(feature = "tls")]
mod bound;
mod budget;
mod causes;
#[cfg(feature = "tls")]
mod certificate;
mod client;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "http2")]
mod gathered;
mod headers;
mod line;
#[cfg(all(feature = "http2", feature = "tls"))]
mod once_h2;
mod pieces;
mod request_id;
mod secret;
mod serve;
#[cfg(feature = "http2")]
mod serve_h2;
#[cfg(feature = "tls")]
mod tls;

pub use body::{BodyError, collect, collect_charged};
#[cfg(feature = "tls")]
pub use bound::Binding;
pub use budget::{Account, Budget, Charge, ReadError};
pub use causes::with_causes;
#[cfg(feature = "tls")]
pub use certificate::FolderError;
pub use client::{Client, ClientConfig, ClientError, GetError};
pub use headers::strip_hop_by_hop;
pub use hyper_util::service::TowerToHyperService;
pub use line::{Line, LineError};
#[cfg(all(feature = "http2", feature = "tls"))]
pub use once_h2::{OnceError, once_h2};
pub use pieces::Pieces;
pub use request_id::{REQUEST_ID, request_id};
pub use secret::{bearer, same_bytes};
pub use serve::{Peer, ServeConfig, serve};
#[cfg(feature = "http2")]
pub use serve_h2::{Http2Config, serve_h2};
#[cfg(feature = "tls")]
pub use tls::{ClientTls, Identity, TlsError, Trust};

#[cfg(test)]
mod tests;
