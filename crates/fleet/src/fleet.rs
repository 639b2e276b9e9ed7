//! Where decisions are made: the servers, the scheduler, and whose turn it is.

use crate::endpoint::EndpointSpec;
use crate::exposition::Scraped;
use crate::server::{Flight, Server, State};
use arc_swap::ArcSwap;
use baton_kv::BlockEvent;
use baton_scheduler::flow::{Gauge, Room};
use baton_scheduler::{
    BlockHash, Certainty, Decision, Detector, Endpoint, EndpointId, Health, Keys, Load, Observer,
    Plan, PreciseStats, Prompt, PromptHasher, Request, Saturation, Scheduler, Share, TokenHasher,
    TokenPrompt, Unschedulable,
};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Release};
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, watch};

/// Most endpoints of a fleet.
pub const MAX_ENDPOINTS: usize = 4096;

/// Notes that wait for who listens to them: of some ten kilobytes, where prompts are long.
const MAX_NOTES: usize = 1024;

/// The servers there are, in the order in which they were listed.
pub type Servers = Vec<Arc<Server>>;

/// The servers, how they are, and what is on its way to them. Decides; the lock is held for a decision, never longer.
#[derive(Debug)]
pub struct Fleet {
    servers: ArcSwap<Servers>,
    /// Held by who changes the list: the next id.
    listing: Mutex<u32>,
    /// Told when the list has changed.
    listed: watch::Sender<()>,
    /// Told when servers may have more room or less, for whatever reason but our own requests.
    news: watch::Sender<()>,
    /// How often the list, or what a server told of itself, has changed.
    version: AtomicU64,
    hasher: ArcSwap<PromptHasher>,
    token_hasher: TokenHasher,
    deciding: Mutex<Deciding>,
    /// Told what was sent where, if somebody listens.
    notes: broadcast::Sender<Arc<Note>>,
    /// Looks at servers' metrics that failed.
    failed_looks: AtomicU64,
    began: Instant,
}

#[derive(Debug)]
struct Deciding {
    scheduler: Scheduler,
    /// What the scheduler sees. What seldom changes is copied when `version` has changed.
    snapshot: Vec<Endpoint>,
    servers: Arc<Servers>,
    version: u64,
    turn: u64,
}

/// A decision, with the servers that it names counted as busy.
#[derive(Debug)]
pub struct Route {
    /// The server that answers.
    pub decode: Flight,
    /// The server that computes the prompt for it.
    pub prefill: Option<Flight>,
    /// Servers that encode pictures and sound for it.
    pub encode: Vec<Flight>,
    /// Why these.
    pub decision: Decision,
}

/// A prompt that was sent to servers, or answered by one: what other pickers should know of their caches.
#[derive(Debug)]
pub struct Note {
    /// The servers, at most two.
    pub servers: [Option<EndpointId>; 2],
    /// What was sent.
    pub prompt: Prompt,
    /// Whether they have computed it.
    pub certainty: Certainty,
}

/// Why a list of endpoints is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// Two endpoints of one name.
    #[error("endpoint {0:?} is listed twice")]
    Duplicate(String),
    /// More than are watched.
    #[error("more than {MAX_ENDPOINTS} endpoints")]
    TooMany,
}

impl Fleet {
    /// A fleet without servers, which decides with `scheduler`. `key`, a random number, keeps clients from aiming at hashes.
    #[must_use]
    pub fn new(scheduler: Scheduler, key: u64) -> Self {
        let hasher = PromptHasher::new(key).with_blocks(&scheduler.plan().approximate);
        let token_hasher = TokenHasher::new(key);
        let scheduler = match scheduler.plan().precise_index(token_hasher) {
            Some(index) => scheduler.with_precise(index),
            None => scheduler,
        };
        Self {
            servers: ArcSwap::default(),
            listing: Mutex::new(0),
            listed: watch::Sender::new(()),
            news: watch::Sender::new(()),
            version: AtomicU64::new(0),
            hasher: ArcSwap::from_pointee(hasher),
            token_hasher,
            deciding: Mutex::new(Deciding {
                scheduler,
                snapshot: Vec::new(),
                servers: Arc::default(),
                version: 0,
                // Some pickers draw by it.
                turn: key,
            }),
            notes: broadcast::Sender::new(MAX_NOTES),
            failed_looks: AtomicU64::new(0),
            began: Instant::now(),
        }
    }

    /// The same fleet, whose draws among equals begin with `seed`: pickers that share a key need not draw alike.
    #[must_use]
    pub fn drawing_from(self, seed: u64) -> Self {
        self.deciding.lock().turn = seed;
        self
    }

    /// What is sent where from now on, for pickers that share the key. Who is slow misses some.
    #[must_use]
    pub fn notes(&self) -> broadcast::Receiver<Arc<Note>> {
        self.notes.subscribe()
    }

    fn note(&self, servers: [Option<EndpointId>; 2], prompt: &Prompt, certainty: Certainty) {
        if self.notes.receiver_count() > 0 {
            let prompt = prompt.clone();
            // Who listened may just have left.
            let _ = self.notes.send(Arc::new(Note {
                servers,
                prompt,
                certainty,
            }));
        }
    }

    /// Another picker sent `server` a prompt of `blocks`, or had it answered.
    pub fn heard(&self, server: EndpointId, blocks: &[BlockHash], certainty: Certainty) {
        let scheduler = &mut self.deciding.lock().scheduler;
        scheduler.heard(server, blocks, certainty);
    }

    /// What others have in flight has changed.
    pub fn others_changed(&self) {
        self.news.send_replace(());
    }

    /// The servers there are now.
    #[must_use]
    pub fn servers(&self) -> Arc<Servers> {
        self.servers.load_full()
    }

    /// How many servers there are.
    pub(crate) fn size(&self) -> usize {
        self.servers.load().len()
    }

    /// Ids of the servers whose socket's address is `allowed`, in ascending order, as [`Request`] wants them.
    #[must_use]
    pub fn ids_at(&self, allowed: impl Fn(SocketAddr) -> bool) -> Vec<EndpointId> {
        let servers = self.servers.load();
        let at = |s: &&Arc<Server>| s.socket().is_some_and(&allowed);
        let mut ids: Vec<EndpointId> = servers.iter().filter(at).map(|s| s.id).collect();
        ids.sort_unstable();
        ids
    }

    /// Makes the list `specs`. An endpoint that was there before, by namespace and name, stays the same server, with
    /// what is known of it and what is in flight; all is forgotten of those that are gone.
    ///
    /// # Errors
    /// [`ListError`]; the list is then what it was.
    pub fn set_endpoints(&self, specs: &[EndpointSpec]) -> Result<(), ListError> {
        check_list(specs)?;
        let mut next_id = self.listing.lock();
        let before = self.servers();
        let mut known: BTreeMap<&str, &Arc<Server>> =
            before.iter().map(|s| (s.name(), s)).collect();
        let mut after = Vec::with_capacity(specs.len());
        let mut moved = Vec::new();
        for spec in specs {
            let name = spec.full_name();
            match known.remove(&*name) {
                Some(old) if old.is_as_told(spec) => after.push(old.clone()),
                Some(old) => {
                    if old.moves_to(spec) {
                        old.set_health(Health::Unreachable);
                        moved.push(old.id);
                    }
                    let new = Server::new(old.id, spec, old.state.clone());
                    after.push(Arc::new(new));
                }
                None => {
                    let id = EndpointId(*next_id);
                    *next_id = next_id.wrapping_add(1);
                    after.push(Arc::new(Server::new(
                        id,
                        spec,
                        Arc::new(State::new(self.began)),
                    )));
                }
            }
        }
        self.servers.store(Arc::new(after));
        self.changed();
        self.listed.send_replace(());
        let gone: Vec<EndpointId> = known.values().map(|s| s.id).collect();
        for server in known.values() {
            tracing::info!(server = server.name(), "server left the list");
        }
        let mut deciding = self.deciding.lock();
        // The next decision makes them anew; until then they would keep what is gone.
        deciding.snapshot.clear();
        deciding.servers = Arc::default();
        for id in moved.into_iter().chain(gone) {
            deciding.scheduler.forget(id);
        }
        drop(deciding);
        self.news.send_replace(());
        Ok(())
    }

    /// Something of a server that a decision copies has changed.
    pub(crate) fn changed(&self) {
        self.version.fetch_add(1, Release);
    }

    /// Changes whenever the list does.
    #[must_use]
    pub fn listings(&self) -> watch::Receiver<()> {
        self.listed.subscribe()
    }

    /// Milliseconds since the fleet began.
    pub(crate) fn now(&self) -> u64 {
        millis(self.began.elapsed())
    }

    /// `server` has begun to answer a request with `prompt`.
    pub fn answered(&self, server: &Server, prompt: &Prompt) {
        server.succeeded();
        self.deciding.lock().scheduler.answered(prompt, server.id);
        self.note([Some(server.id), None], prompt, Certainty::Computed);
    }

    /// A request failed at `server`, and might not have elsewhere. Several in a row, and it gets none for a while.
    pub fn failed(&self, server: &Server) {
        server.failed(self.now());
    }

    /// There is no connection to `server`: it gets nothing more until its probe finds it again.
    pub fn unreachable(&self, server: &Server) {
        self.set_health(server, Health::Unreachable);
    }

    /// Notes what a probe found, which counts as fresh for some time.
    pub(crate) fn scraped(
        &self,
        server: &Server,
        scraped: &Scraped,
        in_flight_then: u32,
        fresh_for: Duration,
    ) {
        server.set_scraped(
            scraped,
            in_flight_then,
            self.began.elapsed().saturating_add(fresh_for),
        );
        let (resized, restarted) = server.tell(|told| {
            let restarted = scraped.started.is_some()
                && told.started.is_some_and(|s| Some(s) != scraped.started);
            let resized = scraped
                .cache_tokens
                .filter(|_| scraped.cache_tokens != told.cache_tokens);
            told.started = scraped.started.or(told.started);
            told.cache_tokens = scraped.cache_tokens.or(told.cache_tokens);
            told.block_size = scraped.block_size.or(told.block_size);
            (resized, restarted)
        });
        if restarted {
            tracing::info!(server = server.name(), "server was started again");
            server.succeeded();
            self.forget(server.id);
        }
        if let Some(tokens) = resized {
            let scheduler = &mut self.deciding.lock().scheduler;
            let block = u64::from(scheduler.plan().approximate.block_tokens.max(1));
            let blocks = usize::try_from(tokens / block).unwrap_or(usize::MAX);
            scheduler.set_cache_size(server.id, blocks);
        }
        self.news.send_replace(());
    }

    /// A look at a server's metrics failed.
    pub(crate) fn look_failed(&self) {
        self.failed_looks.fetch_add(1, Release);
    }

    /// Looks at servers' metrics that failed, of all there were.
    #[must_use]
    pub fn failed_looks(&self) -> u64 {
        self.failed_looks.load(Acquire)
    }

    /// Blocks of prompts that servers are taken to have by what was sent to them, over all of them.
    #[must_use]
    pub fn cached_blocks(&self) -> usize {
        self.deciding.lock().scheduler.cached_blocks()
    }

    /// Notes how `server` is.
    pub(crate) fn set_health(&self, server: &Server, health: Health) {
        let before = server.set_health(health);
        if before == health {
            return;
        }
        if health == Health::Unreachable {
            // What it reported is its reports' to take back.
            self.deciding.lock().scheduler.forget_sent(server.id);
        } else if before == Health::Unreachable {
            server.succeeded();
        }
        tracing::info!(server = server.name(), address = %server.address, role = ?server.role, ?health, "server");
        self.news.send_replace(());
    }

    /// `server` lost its cache.
    fn forget(&self, server: EndpointId) {
        self.deciding.lock().scheduler.forget(server);
    }

    /// Names of the models that can be asked for, at most `n` of them, each once, in order.
    #[must_use]
    pub fn models(&self, n: usize) -> Vec<Box<str>> {
        let servers = self.servers();
        let lists: Vec<_> = servers
            .iter()
            .filter(|s| s.role.decodes())
            .filter_map(|s| s.models())
            .collect();
        let names: BTreeSet<&str> = lists
            .iter()
            .flat_map(|list| list.iter().map(|name| &**name))
            .collect();
        names.into_iter().take(n).map(Into::into).collect()
    }

    /// What hashes prompts and the names of sessions.
    #[must_use]
    pub fn hasher(&self) -> PromptHasher {
        **self.hasher.load()
    }

    /// Decides by another plan from now on. What is known of the servers stays.
    pub fn set_plan(&self, plan: impl Into<Plan>) {
        let scheduler = &mut self.deciding.lock().scheduler;
        scheduler.set_plan(plan);
        let hasher = self.hasher().with_blocks(&scheduler.plan().approximate);
        self.hasher.store(Arc::new(hasher));
    }

    /// The prompt that `pieces`, one after another, make for `model`; `tokens` is its length, if it is known.
    #[must_use]
    pub fn prompt(&self, model: &str, pieces: &[&[u8]], tokens: Option<u32>) -> Prompt {
        self.hasher.load().prompt(model, pieces, tokens)
    }

    /// Decides where `request` goes; its time is set here.
    ///
    /// # Errors
    /// [`Unschedulable`], if no server may answer.
    pub fn route(&self, request: &Request<'_>) -> Result<Route, Unschedulable> {
        self.route_observed(request, &mut ())
    }

    /// Decides as [`Fleet::route`] does, and tells `observer` how. Nothing else is decided meanwhile.
    ///
    /// # Errors
    /// Likewise; the observer knows how far it came.
    pub fn route_observed<O: Observer>(
        &self,
        request: &Request<'_>,
        observer: &mut O,
    ) -> Result<Route, Unschedulable> {
        let now = self.began.elapsed();
        let request = Request { now, ..*request };
        let mut locked = self.deciding.lock();
        let deciding = &mut *locked;
        deciding.refresh(self, now);
        let turn = deciding.next_turn();
        let (scheduler, snapshot) = (&mut deciding.scheduler, &deciding.snapshot);
        let decision = scheduler.decide_observed(snapshot, &request, turn, observer)?;
        scheduler.sent(&request, &decision);
        // Counted before the lock is released, so that the next decision sees it.
        let shares = scheduler.plan().shares(&decision);
        let flight = |id, share| deciding.flight(id, share, now);
        let route = Route {
            decode: flight(decision.decode, shares.decode).ok_or(Unschedulable::NoneHealthy)?,
            prefill: (decision.prefill.server()).and_then(|id| flight(id, shares.prefill)),
            encode: decision
                .encode
                .iter()
                .filter_map(|&id| flight(id, Share::default()))
                .collect(),
            decision,
        };
        drop(locked);
        let prefill = route.prefill.as_ref().map(|flight| flight.id);
        let servers = [Some(route.decode.id), prefill];
        self.note(servers, request.prompt, Certainty::Expected);
        Ok(route)
    }

    /// Keys of a prompt's blocks for the index of what servers report; `None` if the plan has no such index.
    #[must_use]
    pub fn keys(&self, prompt: &TokenPrompt<'_>) -> Option<Keys> {
        let sizes: Vec<u32> = {
            let mut deciding = self.deciding.lock();
            deciding.scheduler.precise()?.block_sizes().collect()
        };
        Some(self.token_hasher.keys(prompt, sizes))
    }

    /// `server` reports what changed in its cache of `model`.
    pub fn reported(&self, server: EndpointId, model: &str, events: &[BlockEvent]) {
        if let Some(index) = self.deciding.lock().scheduler.precise() {
            for event in events {
                index.apply(server, model, event);
            }
        }
    }

    /// What `server` reported no longer holds: some of it was missed, or it began anew.
    pub fn reports_lost(&self, server: EndpointId) {
        if let Some(index) = self.deciding.lock().scheduler.precise() {
            index.reset(server);
        }
    }

    /// `server` reports no more, and nothing that it reported counts.
    pub fn reports_end(&self, server: EndpointId) {
        if let Some(index) = self.deciding.lock().scheduler.precise() {
            index.remove(server);
        }
    }

    /// What became of reports and lookups, if the plan has an index of reports.
    #[must_use]
    pub fn report_stats(&self) -> Option<PreciseStats> {
        let mut deciding = self.deciding.lock();
        deciding.scheduler.precise().map(|index| index.stats())
    }

    /// Whether a request of this priority is let in where nobody queues.
    ///
    /// # Errors
    /// [`Unschedulable::Saturated`], if it is not.
    pub fn admit(&self, priority: i32) -> Result<(), Unschedulable> {
        let mut deciding = self.deciding.lock();
        deciding.refresh(self, self.began.elapsed());
        let turn = deciding.next_turn();
        deciding.scheduler.admit(&deciding.snapshot, priority, turn)
    }

    /// How busy the fleet is.
    #[must_use]
    pub fn saturation(&self) -> Saturation {
        let mut deciding = self.deciding.lock();
        deciding.refresh(self, self.began.elapsed());
        deciding.scheduler.saturation(&deciding.snapshot)
    }

    /// How much room servers have, for a queue before them.
    #[must_use]
    pub fn room(&self, detector: &Detector, gauge: Gauge) -> Room {
        let mut deciding = self.deciding.lock();
        deciding.refresh(self, self.began.elapsed());
        Room::of(&deciding.snapshot, detector, gauge)
    }

    /// Changes whenever servers were looked at, or came, or went.
    #[must_use]
    pub fn news(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }

    /// Healthy servers whose metrics are too old to count on: each is taken for full.
    #[must_use]
    pub fn stale(&self) -> usize {
        let mut deciding = self.deciding.lock();
        deciding.refresh(self, self.began.elapsed());
        let is_stale = |e: &&Endpoint| e.health == Health::Healthy && !e.load.fresh;
        deciding.snapshot.iter().filter(is_stale).count()
    }

    /// All servers, as a decision would see them now.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Endpoint> {
        let mut deciding = self.deciding.lock();
        deciding.refresh(self, self.began.elapsed());
        deciding.snapshot.clone()
    }
}

impl Deciding {
    fn next_turn(&mut self) -> u64 {
        self.turn = self.turn.wrapping_add(1);
        self.turn
    }

    /// Brings the snapshot up to date: all of it if the list or what servers told of themselves has changed, otherwise
    /// only what changes all the time.
    fn refresh(&mut self, fleet: &Fleet, now: Duration) {
        let version = fleet.version.load(Acquire);
        if version != self.version || self.snapshot.is_empty() {
            self.version = version;
            self.servers = fleet.servers();
            self.snapshot.clear();
            self.snapshot
                .extend(self.servers.iter().map(|s| describe(s)));
        }
        let (mut healthy, mut shut, at) = (0usize, 0usize, millis(now));
        for (endpoint, server) in self.snapshot.iter_mut().zip(self.servers.iter()) {
            endpoint.load = server.load(now);
            endpoint.health = server.health();
            if endpoint.health == Health::Healthy {
                healthy += 1;
                shut += usize::from(!server.admits(at));
            }
        }
        // If most servers fail, the requests are to blame, or something that all of them share.
        if shut > 0 && shut * 2 <= healthy {
            for (endpoint, server) in self.snapshot.iter_mut().zip(self.servers.iter()) {
                if !server.admits(at) {
                    endpoint.health = Health::Unreachable;
                }
            }
        }
    }

    fn flight(&self, id: EndpointId, share: Share, now: Duration) -> Option<Flight> {
        let at = self.snapshot.iter().position(|e| e.id == id)?;
        let flight = Flight::to(self.servers.get(at)?, share, now);
        flight.mark_sent(millis(now));
        Some(flight)
    }
}

/// What a decision needs to know of a server and seldom changes.
fn describe(server: &Server) -> Endpoint {
    Endpoint {
        id: server.id,
        role: server.role,
        models: server.models(),
        adapters: server.adapters(),
        identity: server.identity.clone(),
        health: Health::Unreachable,
        load: Load::default(),
    }
}

impl Server {
    /// Whether it was made of just this.
    fn is_as_told(&self, spec: &EndpointSpec) -> bool {
        self.address == spec.address
            && self.metrics == *spec.metrics.as_ref().unwrap_or(&spec.address)
            && self.rank == spec.rank
            && (self.identity.labels().iter().map(|(k, v)| (&**k, &**v)))
                .eq(spec.labels.iter().map(|(k, v)| (k.as_str(), v.as_str())))
    }

    /// Whether `spec` puts it on another machine: what it had cached is not there. Another port of the same machine is
    /// taken for the same server.
    fn moves_to(&self, spec: &EndpointSpec) -> bool {
        self.address.authority().host() != spec.address.authority().host()
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn check_list(specs: &[EndpointSpec]) -> Result<(), ListError> {
    if specs.len() > MAX_ENDPOINTS {
        return Err(ListError::TooMany);
    }
    let mut names: Vec<String> = specs.iter().map(EndpointSpec::full_name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(ListError::Duplicate(pair[0].clone())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
