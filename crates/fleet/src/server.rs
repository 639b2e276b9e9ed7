//! One model server as the fleet sees it, and the requests it has.

use crate::breaker::Breaker;
use crate::endpoint::{Address, EndpointSpec};
use crate::exposition::Scraped;
use baton_scheduler::{Adapters, EndpointId, Health, Identity, Load, Role};
use parking_lot::Mutex;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use tokio::sync::watch;

/// A model server: who it is, which never changes, and how it is. When its labels or its port change, another value
/// with the same state takes its place.
#[derive(Debug)]
pub struct Server {
    /// Its name in decisions.
    pub id: EndpointId,
    /// Its name, with the namespace, and its labels.
    pub identity: Arc<Identity>,
    /// Where it answers requests.
    pub address: Address,
    /// Where it answers `/metrics`.
    pub metrics: Address,
    /// What it is there for.
    pub role: Role,
    /// Its place among the data-parallel ranks of one server.
    pub rank: u32,
    pub(crate) state: Arc<State>,
}

/// How a server is. Its probe writes what is seen of it; everybody else reads.
#[derive(Debug)]
pub(crate) struct State {
    gauges: Gauges,
    breaker: Breaker,
    told: Mutex<Told>,
    /// True once probes have been without an answer for long: connections to it will not end by themselves.
    silent: watch::Sender<bool>,
}

/// What changes often, in one line of the processor's cache: a decision reads it of every server. Values that belong
/// together may be read from two scrapes, which harms nothing.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Gauges {
    in_flight: AtomicU32,
    /// Our requests there when the last scrape was asked for.
    in_flight_then: AtomicU32,
    waiting: AtomicU32,
    running: AtomicU32,
    /// Bits of an f32.
    kv_usage: AtomicU32,
    health: AtomicU8,
    /// Tokens of the requests in flight.
    tokens: AtomicU64,
    /// Prompt tokens that the requests in flight have still to wait for, as far as we know.
    queued: AtomicU64,
    /// Until when what was scraped counts as fresh, in milliseconds of the fleet's clock.
    fresh_until: AtomicU64,
}

/// What a server told of itself, and seldom changes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    pub(crate) models: Option<Arc<[Box<str>]>>,
    pub(crate) adapters: Option<Arc<Adapters>>,
    pub(crate) block_size: Option<u64>,
    pub(crate) cache_tokens: Option<u64>,
    pub(crate) started: Option<f64>,
    /// What its name was last resolved to.
    pub(crate) resolved: Option<SocketAddr>,
}

impl State {
    /// Nothing has been heard yet.
    pub(crate) fn new() -> Self {
        Self {
            gauges: Gauges {
                health: AtomicU8::new(Health::Unreachable as u8),
                ..Gauges::default()
            },
            breaker: Breaker::default(),
            told: Mutex::default(),
            silent: watch::Sender::new(false),
        }
    }
}

impl Server {
    pub(crate) fn new(id: EndpointId, spec: &EndpointSpec, state: Arc<State>) -> Self {
        Self {
            id,
            identity: Arc::new(Identity::new(
                spec.full_name(),
                spec.labels
                    .iter()
                    .map(|(k, v)| (k.as_str().into(), v.as_str().into())),
            )),
            address: spec.address.clone(),
            metrics: spec.metrics.clone().unwrap_or_else(|| spec.address.clone()),
            role: spec.role(),
            rank: spec.rank,
            state,
        }
    }

    /// Whether it takes requests, as far as is known.
    #[must_use]
    pub fn health(&self) -> Health {
        match self.state.gauges.health.load(Relaxed) {
            h if h == Health::Healthy as u8 => Health::Healthy,
            h if h == Health::Draining as u8 => Health::Draining,
            _ => Health::Unreachable,
        }
    }

    /// Whether requests are sent to it at `now`, by what became of those before.
    pub(crate) fn admits(&self, now: u64) -> bool {
        self.state.breaker.admits(now)
    }

    /// Notes that a request fared well there.
    pub fn succeeded(&self) {
        self.state.breaker.recovered();
    }

    pub(crate) fn failed(&self, now: u64) {
        self.state.breaker.failed(now);
    }

    /// Sets the health and returns the one before. Its probe sets it again.
    pub fn set_health(&self, health: Health) -> Health {
        let before = self.health();
        self.state.gauges.health.store(health as u8, Relaxed);
        before
    }

    /// Requests that are on their way to it or there.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.state.gauges.in_flight.load(Relaxed)
    }

    /// Tokens of the requests in flight.
    #[must_use]
    pub fn tokens_in_flight(&self) -> u64 {
        self.state.gauges.tokens.load(Relaxed)
    }

    /// How busy it is at `now`, in milliseconds of the fleet's clock.
    pub(crate) fn load(&self, now: u64) -> Load {
        let g = &self.state.gauges;
        let (waiting, running) = (g.waiting.load(Relaxed), g.running.load(Relaxed));
        let then = g.in_flight_then.load(Relaxed);
        let now_there = g.in_flight.load(Relaxed);
        Load {
            waiting,
            running,
            active: active(waiting, running, then, now_there),
            unseen: now_there.saturating_sub(then),
            tokens: g.tokens.load(Relaxed),
            queued_tokens: g.queued.load(Relaxed),
            kv_usage: f32::from_bits(g.kv_usage.load(Relaxed)),
            fresh: now < g.fresh_until.load(Relaxed),
        }
    }

    /// Its name, with the namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.identity.name
    }

    /// Names of the models it serves; `None` if it did not tell.
    #[must_use]
    pub fn models(&self) -> Option<Arc<[Box<str>]>> {
        self.state.told.lock().models.clone()
    }

    /// Its adapters, if it told of any.
    #[must_use]
    pub fn adapters(&self) -> Option<Arc<Adapters>> {
        self.state.told.lock().adapters.clone()
    }

    /// Tokens of one of its KV blocks, if it told.
    #[must_use]
    pub fn block_size(&self) -> Option<u64> {
        self.state.told.lock().block_size
    }

    /// Its socket's address: the one it was given, or what its name was last resolved to.
    #[must_use]
    pub fn socket(&self) -> Option<SocketAddr> {
        self.address
            .socket()
            .or_else(|| self.state.told.lock().resolved)
    }

    /// Changes what it told of itself.
    pub(crate) fn tell<R>(&self, change: impl FnOnce(&mut Told) -> R) -> R {
        change(&mut self.state.told.lock())
    }

    /// Notes what was scraped; it counts as fresh until `fresh_until`. A gauge that is missing is taken for 0.
    pub(crate) fn set_scraped(&self, scraped: &Scraped, in_flight_then: u32, fresh_until: u64) {
        let g = &self.state.gauges;
        g.waiting.store(scraped.waiting.unwrap_or(0), Relaxed);
        g.running.store(scraped.running.unwrap_or(0), Relaxed);
        g.kv_usage
            .store(scraped.kv_usage.unwrap_or(0.0).to_bits(), Relaxed);
        g.in_flight_then.store(in_flight_then, Relaxed);
        g.fresh_until.store(fresh_until, Relaxed);
    }

    /// Says whether it has stopped answering altogether.
    pub(crate) fn set_silent(&self, silent: bool) {
        self.state
            .silent
            .send_if_modified(|now| std::mem::replace(now, silent) != silent);
    }

    /// Ends when the server has stopped answering altogether. Cancel safe.
    pub fn silence(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut silent = self.state.silent.subscribe();
        async move {
            // A server that nobody watches any more is one that was taken out of the list: what it still has, it ends.
            if silent.wait_for(|silent| *silent).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// What a server said, and what was sent to it and came back since: both are needed, because what it says is some
/// hundred milliseconds old. What is under way there counts in any case: a decode server may not show yet whose prompt
/// is computed elsewhere.
fn active(waiting: u32, running: u32, in_flight_then: u32, in_flight_now: u32) -> u32 {
    let said = waiting.saturating_add(running);
    said.saturating_add(in_flight_now)
        .saturating_sub(in_flight_then)
        .max(waiting)
        .max(in_flight_now)
}

/// A request at a server; counted there until dropped.
#[derive(Debug)]
pub struct Flight {
    server: Arc<Server>,
    tokens: u64,
    /// Prompt tokens that are to be computed there; 0 once that is done.
    queued: AtomicU64,
}

impl Flight {
    /// Counts a request of about `tokens` tokens, of which `queued` are to be computed there before the answer begins.
    pub(crate) fn to(server: &Arc<Server>, tokens: u64, queued: u64) -> Self {
        let gauges = &server.state.gauges;
        gauges.in_flight.fetch_add(1, Relaxed);
        gauges.tokens.fetch_add(tokens, Relaxed);
        gauges.queued.fetch_add(queued, Relaxed);
        Self {
            server: server.clone(),
            tokens,
            queued: AtomicU64::new(queued),
        }
    }

    /// The answer has begun, so that the prompt is computed. May be said again with every piece.
    pub fn answered(&self) {
        if self.queued.load(Relaxed) == 0 {
            return;
        }
        let queued = self.queued.swap(0, Relaxed);
        self.server.state.gauges.queued.fetch_sub(queued, Relaxed);
    }

    /// Where it is.
    #[must_use]
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }

    pub(crate) fn mark_sent(&self, now: u64) {
        self.server.state.breaker.sent(now);
    }
}

impl Deref for Flight {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.answered();
        let gauges = &self.server.state.gauges;
        gauges.in_flight.fetch_sub(1, Relaxed);
        gauges.tokens.fetch_sub(self.tokens, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Arc<Server> {
        let spec = EndpointSpec::new("a", Address::parse("a:1").unwrap());
        Arc::new(Server::new(EndpointId(0), &spec, Arc::new(State::new())))
    }

    #[test]
    fn load_is_what_was_said_and_what_happened_since() {
        let active = |in_flight_then, in_flight_now| active(2, 3, in_flight_then, in_flight_now);
        assert_eq!((active(4, 4), active(4, 7), active(4, 1)), (5, 8, 2));
        let silent = |in_flight_then, now| super::active(0, 0, in_flight_then, now);
        assert_eq!((silent(0, 3), silent(9, 3)), (3, 3));
        assert_eq!(super::active(u32::MAX, u32::MAX, 0, u32::MAX), u32::MAX);
    }

    #[test]
    fn what_was_scraped_is_seen_and_grows_old() {
        let server = server();
        assert!(!server.load(0).fresh);
        let scraped = Scraped {
            waiting: Some(2),
            kv_usage: Some(0.5),
            ..Scraped::default()
        };
        let flights = [Flight::to(&server, 7, 5), Flight::to(&server, 8, 6)];
        flights[0].answered();
        server.set_scraped(&scraped, 1, 100);
        let expected = Load {
            waiting: 2,
            running: 0,
            active: 3,
            unseen: 1,
            tokens: 15,
            queued_tokens: 6,
            kv_usage: 0.5,
            fresh: true,
        };
        assert_eq!((server.load(99), server.load(100).fresh), (expected, false));
        drop(flights);
        assert_eq!((server.in_flight(), server.tokens_in_flight()), (0, 0));
        assert_eq!(server.load(100).queued_tokens, 0);
    }

    #[test]
    fn health_is_what_was_set_last() {
        let server = server();
        assert_eq!(server.health(), Health::Unreachable);
        for health in [Health::Healthy, Health::Draining, Health::Unreachable] {
            server.set_health(health);
            assert_eq!(server.health(), health);
        }
    }

    #[tokio::test]
    async fn who_waits_for_a_server_is_told_when_it_falls_silent() {
        let server = server();
        let waiting = tokio::spawn(server.silence());
        server.set_silent(true);
        waiting.await.unwrap();
        server.silence().await;
        server.set_silent(false);
        let pending = server.silence();
        drop(server);
        assert!(
            tokio::time::timeout(std::time::Duration::ZERO, pending)
                .await
                .is_err()
        );
    }
}
