//! `baton gateway`: the front door, from a configuration file.

use crate::cli::Gateway;
use crate::lifetime::{ParentWatch, shutdown_token};
use crate::{Failure, say_ready};
use anyhow::Context as _;
use baton_gateway::GatewayConfig;
use std::net::SocketAddr;
use tokio::net::TcpListener;

/// Runs until it is told to stop.
pub(crate) fn command(args: &Gateway) -> Result<(), Failure> {
    let path = args.config.display();
    let text = std::fs::read(&args.config)
        .with_context(|| format!("cannot read {path}"))
        .map_err(Failure::Usage)?;
    let config: GatewayConfig = serde_json::from_slice(&text)
        .with_context(|| format!("{path} is no gateway configuration"))
        .map_err(Failure::Usage)?;
    config.check().map_err(|e| Failure::Usage(e.into()))?;
    let runtime = tokio::runtime::Runtime::new().map_err(|e| Failure::Unavailable(e.into()))?;
    let done = runtime.block_on(serve(config, ParentWatch::from(args.exit_with_parent)));
    runtime.shutdown_background();
    done
}

async fn serve(config: GatewayConfig, watch: ParentWatch) -> Result<(), Failure> {
    let shutdown = shutdown_token(watch).map_err(|e| Failure::Unavailable(e.into()))?;
    let address = SocketAddr::new(config.host, config.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"));
    let listener = listener.map_err(Failure::Unavailable)?;
    let bound = listener
        .local_addr()
        .map_err(|e| Failure::Unavailable(e.into()))?;
    say_ready("gateway", bound);
    baton_gateway::run(listener, config, shutdown)
        .await
        .map_err(|e| Failure::Usage(e.into()))
}
