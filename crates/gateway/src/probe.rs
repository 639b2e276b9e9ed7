//! Watches one server: asks every quarter of a second whether it takes requests, how busy it is, and now and then which
//! models it serves.
//!
//! A server that refuses connections is out at once. One that is merely slow is not: an overloaded machine answers
//! late. Only after [`SILENCES`] probes without an answer is it taken for dead, and whoever waits for it is told.

use crate::desk::Desk;
use crate::exposition::{self, Scraped};
use crate::fleet::Server;
use baton_http::{Client, ClientError, GetError};
use baton_scheduler::Health;
use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(250);
/// First wait after a refusal; doubled after each, up to the interval.
const FIRST_RETRY: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(2);
/// Probes without an answer until a server is taken for dead: about eleven seconds.
const SILENCES: u32 = 5;
/// Probes between two looks at the models.
const MODELS_EVERY: u32 = 40;
const MAX_METRICS_BYTES: usize = 1 << 20;
const MAX_MODELS_BYTES: usize = 1 << 20;
/// Most models of one server that are remembered.
const MAX_MODELS: usize = 1024;

/// What one probe found.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Finding {
    Up(Option<Scraped>),
    /// It answers, and says that it takes no requests.
    Draining,
    Refused,
    Silent,
}

/// What the probes before found.
#[derive(Debug, Default)]
struct Pulse {
    silences: u32,
    refusals: u32,
}

/// What follows from a finding.
#[derive(Debug, PartialEq)]
struct Verdict {
    /// `None` leaves it as it is.
    health: Option<Health>,
    silent: bool,
    wait: Duration,
}

impl Pulse {
    fn judge(&mut self, finding: &Finding) -> Verdict {
        self.silences = if *finding == Finding::Silent {
            self.silences.saturating_add(1)
        } else {
            0
        };
        self.refusals = if *finding == Finding::Refused {
            self.refusals.saturating_add(1)
        } else {
            0
        };
        let silent = self.silences >= SILENCES;
        let health = match finding {
            Finding::Up(_) => Some(Health::Healthy),
            Finding::Draining => Some(Health::Draining),
            Finding::Refused => Some(Health::Unreachable),
            Finding::Silent => silent.then_some(Health::Unreachable),
        };
        let wait = match self.refusals {
            0 => INTERVAL,
            n => (FIRST_RETRY * (1 << (n - 1).min(8))).min(INTERVAL),
        };
        Verdict {
            health,
            silent,
            wait,
        }
    }
}

/// Watches `server` for as long as it is polled.
pub(crate) async fn watch(server: Arc<Server>, desk: Arc<Desk>, client: Client) {
    let mut pulse = Pulse::default();
    let mut until_models = 0u32;
    loop {
        let in_flight_then = server.in_flight();
        let finding = look(&server, &client).await;
        let verdict = pulse.judge(&finding);
        if let Finding::Up(scraped) = finding {
            // Before it is used for the first time, so that nothing is sent there for models it does not serve.
            if until_models == 0 || server.health() == Health::Unreachable {
                server.set_models(models(&server, &client).await);
                until_models = MODELS_EVERY;
            }
            until_models -= 1;
            if let Some(scraped) = scraped {
                server.set_scraped(scraped, in_flight_then);
                scraped
                    .cache_tokens
                    .inspect(|&tokens| desk.set_cache_size(server.id, tokens));
            }
        }
        apply(&server, &desk, &verdict);
        tokio::time::sleep(verdict.wait).await;
    }
}

fn apply(server: &Server, desk: &Desk, verdict: &Verdict) {
    server.set_silent(verdict.silent);
    let Some(health) = verdict.health else { return };
    let before = server.set_health(health);
    if before == health {
        return;
    }
    if health == Health::Unreachable {
        desk.forget(server.id);
    }
    tracing::info!(server = &*server.name, address = %server.authority, role = ?server.role, ?health, "server");
}

async fn look(server: &Server, client: &Client) -> Finding {
    let health =
        tokio::time::timeout(PATIENCE, get(server, client, "/health", MAX_METRICS_BYTES)).await;
    match health {
        Ok(Err(GetError::Client(ClientError::Connect(_)))) => Finding::Refused,
        Err(_) | Ok(Err(_)) => Finding::Silent,
        Ok(Ok((status, _))) if !status.is_success() => Finding::Draining,
        Ok(Ok(_)) => {
            let metrics =
                tokio::time::timeout(PATIENCE, get(server, client, "/metrics", MAX_METRICS_BYTES))
                    .await;
            match metrics {
                Ok(Ok((StatusCode::OK, text))) => Finding::Up(Some(exposition::read(&text))),
                // It takes requests; how busy it is, is not known anew.
                _ => Finding::Up(None),
            }
        }
    }
}

/// Names of the models served; `None` if the server does not say (it may want a key that we do not have).
async fn models(server: &Server, client: &Client) -> Option<Arc<[Box<str>]>> {
    #[derive(Deserialize)]
    struct Model {
        id: Box<str>,
    }
    #[derive(Deserialize)]
    struct Models {
        data: Vec<Model>,
    }
    let answer = tokio::time::timeout(
        PATIENCE,
        get(server, client, "/v1/models", MAX_MODELS_BYTES),
    )
    .await;
    let Ok(Ok((StatusCode::OK, body))) = answer else {
        return None;
    };
    let models: Models = serde_json::from_slice(&body).ok()?;
    Some(
        models
            .data
            .into_iter()
            .take(MAX_MODELS)
            .map(|m| m.id)
            .collect(),
    )
}

async fn get(
    server: &Server,
    client: &Client,
    path: &str,
    limit: usize,
) -> Result<(StatusCode, Bytes), GetError> {
    client
        .get(&format!("http://{}{path}", server.authority), limit)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health_after(findings: &[Finding]) -> Vec<Option<Health>> {
        let mut pulse = Pulse::default();
        findings.iter().map(|f| pulse.judge(f).health).collect()
    }

    #[test]
    fn a_refusal_counts_at_once_and_silence_only_after_a_while() {
        use Finding::{Refused, Silent, Up};
        assert_eq!(health_after(&[Refused]), [Some(Health::Unreachable)]);
        assert_eq!(health_after(&[Silent, Silent, Silent, Silent]), [None; 4]);
        let five = health_after(&[Silent; 5]);
        assert_eq!(five[4], Some(Health::Unreachable));
        let interrupted = health_after(&[Silent, Silent, Silent, Silent, Up(None), Silent]);
        assert_eq!(interrupted[4..], [Some(Health::Healthy), None]);
        assert_eq!(health_after(&[Finding::Draining]), [Some(Health::Draining)]);
    }

    #[test]
    fn a_dead_server_is_asked_again_within_the_interval() {
        let mut pulse = Pulse::default();
        let waits: Vec<u128> = (0..1000)
            .map(|_| pulse.judge(&Finding::Refused).wait.as_millis())
            .collect();
        assert_eq!(waits[..4], [50, 100, 200, 250]);
        assert_eq!(waits[999], 250);
        assert!(!pulse.judge(&Finding::Refused).silent);
    }
}
