//! Which servers there are: follows the endpoints file, and keeps a probe at each server.

use crate::config::{EndpointConfig, GatewayConfig};
use crate::desk::Desk;
use crate::fleet::Server;
use crate::probe;
use baton_http::Client;
use baton_scheduler::EndpointId;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::task::{AbortHandle, JoinSet};

/// How often the file is looked at.
const INTERVAL: Duration = Duration::from_millis(200);

/// Keeps `desk`'s servers as the configuration says, beginning with `endpoints`. Dropping the future ends the probes.
pub(crate) async fn follow(desk: Arc<Desk>, config: GatewayConfig, endpoints: Vec<EndpointConfig>) {
    let mut watched = Watched {
        desk,
        client: Client::default(),
        probes: JoinSet::new(),
        servers: Vec::new(),
        next_id: 0,
    };
    watched.replace(&endpoints);
    let Some(path) = config.endpoints_file.clone() else {
        return std::future::pending().await;
    };
    let mut stamp = None;
    loop {
        let now = stamp_of(&path).await;
        if now != stamp {
            stamp = now;
            watched.reread(config.clone()).await;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// When the file was written and how long it is; `None` if it is not there.
async fn stamp_of(path: &Path) -> Option<(SystemTime, u64)> {
    let meta = tokio::fs::metadata(path).await.ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

struct Watched {
    desk: Arc<Desk>,
    client: Client,
    probes: JoinSet<()>,
    servers: Vec<(EndpointConfig, Arc<Server>, AbortHandle)>,
    next_id: u32,
}

impl Watched {
    /// A file that does not make sense changes nothing: it may be half written.
    async fn reread(&mut self, config: GatewayConfig) {
        match tokio::task::spawn_blocking(move || config.read_endpoints()).await {
            Ok(Ok(endpoints)) => self.replace(&endpoints),
            Ok(Err(error)) => {
                tracing::warn!(error = %chain(&error), "endpoints file; keeping the servers there were");
            }
            Err(error) => tracing::error!(%error, "reading the endpoints file"),
        }
    }

    /// Makes the list `endpoints`. A server that is in both lists stays the same server.
    fn replace(&mut self, endpoints: &[EndpointConfig]) {
        let mut before = std::mem::take(&mut self.servers);
        for endpoint in endpoints {
            let kept = before
                .iter()
                .position(|(old, ..)| old == endpoint)
                .map(|i| before.swap_remove(i));
            let server = kept.or_else(|| self.start(endpoint));
            self.servers.extend(server);
        }
        self.desk.set_servers(
            self.servers
                .iter()
                .map(|(_, server, _)| server.clone())
                .collect(),
        );
        for (_, server, probe) in before {
            probe.abort();
            self.desk.forget(server.id);
            tracing::info!(server = &*server.name, "server left the list");
        }
        while self.probes.try_join_next().is_some() {}
    }

    fn start(
        &mut self,
        endpoint: &EndpointConfig,
    ) -> Option<(EndpointConfig, Arc<Server>, AbortHandle)> {
        // Checked when the list was read.
        let authority = endpoint.authority().ok()?;
        let name = endpoint.name.as_deref().unwrap_or(&endpoint.address).into();
        let server = Arc::new(Server::new(
            EndpointId(self.next_id),
            authority,
            endpoint.role,
            name,
        ));
        self.next_id = self.next_id.checked_add(1)?;
        let probe = probe::watch(server.clone(), self.desk.clone(), self.client.clone());
        Some((endpoint.clone(), server, self.probes.spawn(probe)))
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
