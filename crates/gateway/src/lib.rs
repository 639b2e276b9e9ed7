//! The OpenAI front door: reads a request, has the scheduler pick its servers, forwards the same bytes, and stands in
//! for servers that fail.
//!
//! One file a station: `front` (which path is whose), `outgoing` (what goes to a server), `forward` (tries and answers),
//! `events` (a stream that never ends in silence). Which servers there are, how they are and which is picked is `fleet`'s.
//! It computes nothing of a model and parses no answer.
//! Invariants: what a client may not say to servers does not reach them; a request is retried only while nothing of an
//! answer has reached the client.
#![forbid(unsafe_code)]

mod config;
mod events;
mod flow;
mod forward;
mod front;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod keys;
mod metrics;
mod models;
mod outgoing;
mod refusal;

pub use baton_scheduler::{Role, Weights};
pub use config::{Certificate, ConfigError, EndpointConfig, GatewayConfig, Limits};
pub use flow::{BandSection, DetectorSection, FlowControlConfig, FlowError, Mode, PriorityBand};
pub use keys::{ApiKey, KeyError};

use crate::front::Gateway;
use baton_fleet::{Probing, watch};
use hyper::service::service_fn;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Serves on `listener` until `shutdown`, then lets requests in progress finish within the configured grace.
///
/// # Errors
/// [`ConfigError`], before anything is served, if the configuration or the endpoints file does not make sense.
pub async fn run(
    listener: TcpListener,
    config: GatewayConfig,
    shutdown: CancellationToken,
) -> Result<(), ConfigError> {
    let endpoints = config.resolve()?;
    let identity = config.identity()?;
    let gateway = Arc::new(Gateway::new(&config)?);
    let mut background = JoinSet::new();
    gateway.fleet.set_endpoints(&endpoints)?;
    background.spawn(watch(gateway.fleet.clone(), Probing::default()));
    if let Some(file) = config.file() {
        background.spawn(file.follow(gateway.fleet.clone()));
    }
    if let Some(flow) = &gateway.flow {
        background.spawn(flow.gate.clone().run());
        background.spawn(flow.gate.clone().follow(gateway.fleet.clone()));
        let (gate, shutdown) = (flow.gate.clone(), shutdown.clone());
        background.spawn(async move {
            shutdown.cancelled().await;
            gate.close();
        });
    }
    if let (Some(identity), Some(Certificate::Folder(folder))) =
        (identity.clone(), config.tls.clone())
    {
        background.spawn(identity.follow_folder(folder));
    }
    let serve_config = baton_http::ServeConfig {
        grace: config.limits.grace(),
        tls: identity,
        ..baton_http::ServeConfig::default()
    };
    let service = service_fn(move |req| {
        let gateway = gateway.clone();
        async move { Ok::<_, std::convert::Infallible>(gateway.answer(req).await) }
    });
    baton_http::serve(listener, service, serve_config, shutdown).await;
    // Dropping the set ends the probes and the look at the file.
    drop(background);
    Ok(())
}

#[cfg(test)]
mod tests;
