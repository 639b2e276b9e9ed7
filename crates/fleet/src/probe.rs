//! Watches the servers: asks each, again and again, whether it takes requests, how busy it is, and now and then which
//! models it serves.

use crate::endpoint::Address;
use crate::exposition::{Reader, Scraped, Wanted, adapters};
use crate::fleet::Fleet;
use crate::pulse::{Finding, Look, Pulse, health_interval, varied};
use crate::server::Server;
use baton_http::{ClientTls, Line, LineError, TlsError, Trust};
use baton_scheduler::config::{DataLayer, Engines, MetricsSource};
use baton_scheduler::engines::EngineMetrics;
use baton_scheduler::{Adapters, EndpointId, Health};
use http::StatusCode;
use http::uri::PathAndQuery;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::{AbortHandle, JoinSet};

const METRICS_PATH: PathAndQuery = PathAndQuery::from_static("/metrics");
const TRTLLM_METRICS_PATH: PathAndQuery = PathAndQuery::from_static("/prometheus/metrics");
/// The label that named a server's engine before the one that [`Engines`] has.
const LEGACY_ENGINE_LABEL: &str = "inference.networking.k8s.io/engine-type";
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks at the models.
const MODELS_EVERY: Duration = Duration::from_secs(10);
/// What was scraped counts as fresh for two intervals, and at least this.
const GRACE: Duration = Duration::from_secs(1);
const MAX_HEALTH_BYTES: usize = 1 << 16;
const MAX_METRICS_BYTES: usize = 4 << 20;
const MAX_MODELS_BYTES: usize = 1 << 20;
/// Most models of one server that are remembered; most adapters too.
const MAX_MODELS: usize = 1024;

/// How servers are watched.
#[derive(Clone, Debug)]
pub struct Probing {
    /// The engines there are, and the label that tells which one a server is.
    pub engines: Engines,
    /// Where servers have their metrics; engines that are known to have them elsewhere are asked there.
    pub metrics_path: PathAndQuery,
    /// The port of the metrics, if it is another one.
    pub metrics_port: Option<u16>,
    /// How metrics are asked for, if not in plain text; and all else that is on their port.
    pub metrics_tls: Option<ClientTls>,
    /// Where servers say whether they take requests; `None` if somebody else looks after that.
    pub health_path: Option<PathAndQuery>,
    /// Where servers list their models; `None` takes every server for one that serves all.
    pub models_path: Option<PathAndQuery>,
    /// What was scraped counts as fresh for at least this long.
    pub stale_after: Duration,
}

/// What of a configuration cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum ProbingError {
    /// TLS with the servers cannot be set up.
    #[error("metrics over https")]
    Tls(#[from] TlsError),
    /// A file with certificates, or a key, cannot be read.
    #[error("metrics over https: {0}")]
    File(Box<str>, #[source] std::io::Error),
    /// A path that is none.
    #[error("{0:?} is no path of metrics")]
    Path(Box<str>),
}

impl Default for Probing {
    fn default() -> Self {
        Self {
            engines: Engines::default(),
            metrics_path: METRICS_PATH,
            metrics_port: None,
            metrics_tls: None,
            health_path: Some(PathAndQuery::from_static("/health")),
            models_path: Some(PathAndQuery::from_static("/v1/models")),
            stale_after: GRACE,
        }
    }
}

impl Probing {
    /// What a picker's configuration says. How often servers are asked follows from how busy they are; an interval that
    /// is configured is not used.
    ///
    /// # Errors
    /// [`ProbingError`], for what cannot be done.
    pub fn of(data: &DataLayer) -> Result<Self, ProbingError> {
        let path = &data.metrics.path;
        let metrics_path = PathAndQuery::try_from(&**path)
            .ok()
            .filter(|p| p.as_str().starts_with('/'));
        let standard = Self::default();
        Ok(Self {
            engines: data.engines.clone(),
            metrics_path: metrics_path.ok_or_else(|| ProbingError::Path(path.clone()))?,
            metrics_port: data.metrics.port,
            metrics_tls: tls(&data.metrics)?,
            models_path: standard.models_path.clone().filter(|_| data.asks_models),
            stale_after: data.stale_after.unwrap_or_default().max(GRACE),
            ..standard
        })
    }
}

/// Whose certificates count, if metrics are asked for over TLS: as in llm-d, anybody's unless it is said otherwise.
fn tls(metrics: &MetricsSource) -> Result<Option<ClientTls>, ProbingError> {
    if !metrics.https {
        return Ok(None);
    }
    let read = |path: &str| {
        let bytes = std::fs::read(path);
        bytes.map_err(|error| ProbingError::File(path.into(), error))
    };
    let trust = match &metrics.ca_cert {
        _ if metrics.insecure_skip_verify => Trust::Anyone,
        None => Trust::System,
        Some(path) => Trust::Roots(read(path)?),
    };
    Ok(Some(match &metrics.client_cert {
        None => ClientTls::new(&trust)?,
        Some((chain, key)) => ClientTls::showing(&trust, &read(chain)?, &read(key)?)?,
    }))
}

/// What all probes share.
#[derive(Debug)]
struct Shared {
    fleet: Arc<Fleet>,
    probing: Probing,
    wanted: BTreeMap<Box<str>, Arc<Wanted>>,
}

impl Shared {
    fn new(fleet: Arc<Fleet>, probing: Probing) -> Self {
        let wanted = |e: &EngineMetrics| (e.name.clone(), Arc::new(Wanted::new(e)));
        Self {
            wanted: probing.engines.known.iter().map(wanted).collect(),
            fleet,
            probing,
        }
    }

    /// What to look for in the metrics of `server`, and where they are.
    fn engine(&self, server: &Server) -> (Arc<Wanted>, PathAndQuery) {
        let engines = &self.probing.engines;
        let labels = [&engines.label, LEGACY_ENGINE_LABEL];
        let named = labels.iter().find_map(|l| server.identity.label(l));
        let name = named
            .filter(|name| self.wanted.contains_key(*name))
            .unwrap_or(&engines.default);
        let path = &self.probing.metrics_path;
        let path = match name {
            "trtllm-serve" if *path == METRICS_PATH => TRTLLM_METRICS_PATH,
            _ => path.clone(),
        };
        (self.wanted.get(name).cloned().unwrap_or_default(), path)
    }

    /// Where the metrics of `server` are, if that is not where it answers requests.
    fn metrics_address(&self, server: &Server) -> Option<Address> {
        if server.metrics != server.address {
            return Some(server.metrics.clone());
        }
        let port = self.probing.metrics_port?;
        let address = Address::new(server.address.authority().host(), port);
        address.ok().filter(|address| *address != server.address)
    }
}

/// Watches the servers of `fleet`, whatever its list is, for as long as it is polled. Dropping the future ends all
/// probes.
pub async fn watch(fleet: Arc<Fleet>, probing: Probing) {
    let mut listings = fleet.listings();
    let shared = Arc::new(Shared::new(fleet.clone(), probing));
    let mut tasks = JoinSet::new();
    let mut probes: HashMap<EndpointId, (Arc<Server>, AbortHandle)> = HashMap::new();
    loop {
        listings.mark_unchanged();
        let servers = fleet.servers();
        let mut before = std::mem::take(&mut probes);
        for server in servers.iter() {
            let kept = before.remove(&server.id).filter(|(old, handle)| {
                let same = Arc::ptr_eq(old, server);
                if !same {
                    handle.abort();
                }
                same
            });
            let probe = kept.unwrap_or_else(|| {
                let probe = Probe::new(server.clone(), shared.clone());
                (server.clone(), tasks.spawn(probe.run()))
            });
            probes.insert(server.id, probe);
        }
        for (_, handle) in before.into_values() {
            handle.abort();
        }
        while tasks.try_join_next().is_some() {}
        // The fleet holds the sender: it does not end before us.
        if listings.changed().await.is_err() {
            return;
        }
    }
}

/// What watches one server.
struct Probe {
    server: Arc<Server>,
    shared: Arc<Shared>,
    wanted: Arc<Wanted>,
    metrics_path: PathAndQuery,
    line: Line,
    /// Where the metrics are, if that is another address.
    metrics_line: Option<Line>,
    reader: Reader,
    pulse: Pulse,
    last: Scraped,
    lora: Vec<u8>,
    asked_health: Option<Instant>,
    asked_models: Option<Instant>,
    looks: u64,
}

impl Probe {
    fn new(server: Arc<Server>, shared: Arc<Shared>) -> Self {
        let (wanted, metrics_path) = shared.engine(&server);
        let apart = shared.metrics_address(&server);
        let tls = shared.probing.metrics_tls.as_ref();
        let line = |address: &Address, tls: Option<&ClientTls>| {
            let plain = Line::new(address.authority());
            match tls {
                Some(tls) => plain.over(tls.clone()),
                None => plain,
            }
        };
        Self {
            wanted,
            metrics_path,
            line: line(&server.address, tls.filter(|_| apart.is_none())),
            metrics_line: apart.map(|address| line(&address, tls)),
            server,
            shared,
            reader: Reader::default(),
            pulse: Pulse::default(),
            last: Scraped::default(),
            lora: Vec::new(),
            asked_health: None,
            asked_models: None,
            looks: 0,
        }
    }

    async fn run(mut self) {
        loop {
            let servers = self.shared.fleet.size();
            let in_flight_then = self.server.in_flight_of_all();
            let finding = self.look(servers).await;
            let verdict = self.pulse.judge(&finding, servers);
            if !matches!(&finding, Finding::Up(look) if look.took > Duration::ZERO) {
                self.shared.fleet.look_failed();
            }
            if let Finding::Up(look) = finding {
                self.learn_models().await;
                if look.took > Duration::ZERO {
                    let fresh = verdict.wait * 2 + self.shared.probing.stale_after;
                    let fleet = &self.shared.fleet;
                    fleet.scraped(&self.server, &self.last, in_flight_then, fresh);
                    self.learn_adapters();
                }
            }
            self.server.set_silent(verdict.silent);
            if let Some(health) = verdict.health {
                self.shared.fleet.set_health(&self.server, health);
            }
            self.looks = self.looks.wrapping_add(1);
            let chance = self.looks ^ (u64::from(self.server.id.0) << 32);
            tokio::time::sleep(varied(verdict.wait, chance)).await;
        }
    }

    async fn look(&mut self, servers: usize) -> Finding {
        if let Some(path) = self.shared.probing.health_path.clone()
            && self.is_health_due(servers)
        {
            match get(&mut self.line, &path, MAX_HEALTH_BYTES, |_| ()).await {
                Ok(status) if status.is_success() => self.asked_health = Some(Instant::now()),
                // An engine that does not know the question; that it answers is enough.
                Ok(StatusCode::NOT_FOUND) => self.asked_health = Some(Instant::now()),
                Ok(_) => return Finding::Draining,
                Err(LineError::Connect(_)) => return Finding::Refused,
                Err(_) => return Finding::Silent,
            }
        }
        self.scrape().await
    }

    /// A server that is not known to be healthy is asked that first.
    fn is_health_due(&self, servers: usize) -> bool {
        let waited = |at: Instant| at.elapsed() >= health_interval(servers);
        self.server.health() != Health::Healthy || self.asked_health.is_none_or(waited)
    }

    async fn scrape(&mut self) -> Finding {
        let asked = Instant::now();
        let (reader, wanted) = (&mut self.reader, &self.wanted);
        reader.clear();
        let line = self.metrics_line.as_mut().unwrap_or(&mut self.line);
        let push = |piece: &[u8]| reader.push(wanted, piece);
        let answer = get(line, &self.metrics_path, MAX_METRICS_BYTES, push).await;
        let mut look = Look {
            busy: self.server.in_flight() > 0,
            ..Look::default()
        };
        match answer {
            Ok(StatusCode::OK) => {
                let scraped = self.reader.finish(&self.wanted);
                look.took = asked.elapsed().max(Duration::from_nanos(1));
                look.busy |= scraped.waiting.is_some_and(|n| n > 0)
                    || scraped.running.is_some_and(|n| n > 0);
                look.changed = scraped != self.last;
                self.last = scraped;
                Finding::Up(look)
            }
            // Who is asked for metrics alone is judged by them.
            Err(LineError::Connect(_)) if self.metrics_line.is_none() => Finding::Refused,
            Err(_) if self.shared.probing.health_path.is_none() => Finding::Silent,
            // It takes requests; how busy it is, is not known anew.
            _ => Finding::Up(look),
        }
    }

    /// Before it is used for the first time, so that nothing is sent there for models it does not serve; then now and
    /// then.
    async fn learn_models(&mut self) {
        let Some(path) = self.shared.probing.models_path.clone() else {
            return;
        };
        let is_old = self
            .asked_models
            .is_none_or(|at| at.elapsed() >= MODELS_EVERY);
        if is_old || self.server.health() == Health::Unreachable {
            let models = models(&mut self.line, &path).await;
            self.asked_models = Some(Instant::now());
            if self
                .server
                .tell(|told| std::mem::replace(&mut told.models, models.clone()) != models)
            {
                self.shared.fleet.changed();
            }
        }
        let peer = self.line.peer();
        if self.server.address.socket().is_none() {
            self.server
                .tell(|told| told.resolved = peer.or(told.resolved));
        }
    }

    fn learn_adapters(&mut self) {
        let labels = self.reader.lora_labels().unwrap_or_default();
        if labels != self.lora {
            self.lora.clear();
            self.lora.extend_from_slice(labels);
            let told: Option<Arc<Adapters>> =
                (!labels.is_empty()).then(|| Arc::new(adapters(labels, MAX_MODELS)));
            self.server.tell(|t| t.adapters = told);
            self.shared.fleet.changed();
        }
    }
}

/// Names of the models served; `None` if the server does not say (it may want a key that we do not have).
async fn models(line: &mut Line, path: &PathAndQuery) -> Option<Arc<[Box<str>]>> {
    #[derive(Deserialize)]
    struct Model {
        id: Box<str>,
    }
    #[derive(Deserialize)]
    struct Models {
        data: Vec<Model>,
    }
    let mut body = Vec::new();
    let read = |piece: &[u8]| body.extend_from_slice(piece);
    let answer = get(line, path, MAX_MODELS_BYTES, read).await;
    let Ok(StatusCode::OK) = answer else {
        return None;
    };
    let models: Models = serde_json::from_slice(&body).ok()?;
    let names = models.data.into_iter().take(MAX_MODELS).map(|m| m.id);
    Some(names.collect())
}

async fn get(
    line: &mut Line,
    path: &PathAndQuery,
    limit: usize,
    read: impl FnMut(&[u8]),
) -> Result<StatusCode, LineError> {
    tokio::time::timeout(PATIENCE, line.get(path, limit, read))
        .await
        .unwrap_or(Err(LineError::Lost(None)))
}

#[cfg(test)]
mod tests;
