//! One model server as the fleet sees it, and the requests it has.

use crate::breaker::Breaker;
use crate::endpoint::{Address, EndpointSpec};
use crate::exposition::Scraped;
use baton_scheduler::{
    Account, Adapters, EndpointId, Health, Identity, Load, Role, Said, Share, UnderWay,
};
use parking_lot::Mutex;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::time::{Duration, Instant};
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
    /// The fleet's clock: when it began.
    began: Instant,
    /// Held for a few additions, never longer: a decision reads it of every server.
    account: Mutex<Account>,
    health: AtomicU8,
    breaker: Breaker,
    told: Mutex<Told>,
    /// True once probes have been without an answer for long: connections to it will not end by themselves.
    silent: watch::Sender<bool>,
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
    /// Nothing has been heard yet; the fleet's clock began at `began`.
    pub(crate) fn new(began: Instant) -> Self {
        Self {
            began,
            account: Mutex::default(),
            health: AtomicU8::new(Health::Unreachable as u8),
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
        match self.state.health.load(Relaxed) {
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
        self.state.health.store(health as u8, Relaxed);
        before
    }

    /// Requests that are on their way to it or there.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.state.account.lock().requests()
    }

    /// The same, with what other pickers say they have there.
    pub(crate) fn in_flight_of_all(&self) -> u32 {
        self.state.account.lock().requests_of_all()
    }

    /// What is in flight, for other pickers.
    #[must_use]
    pub fn under_way(&self) -> UnderWay {
        let now = self.state.began.elapsed();
        self.state.account.lock().under_way(now)
    }

    /// Tokens of the requests in flight.
    #[must_use]
    pub fn tokens_in_flight(&self) -> u64 {
        self.state.account.lock().tokens()
    }

    /// How busy it is at `now` of the fleet's clock.
    pub(crate) fn load(&self, now: Duration) -> Load {
        self.state.account.lock().load(now)
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

    /// Notes what was scraped, when `sent` requests were there, ours and others'; it counts as fresh until `until`. A gauge that is
    /// missing is taken for 0.
    pub(crate) fn set_scraped(&self, scraped: &Scraped, sent: u32, until: Duration) {
        self.state.account.lock().said(Said {
            waiting: scraped.waiting.unwrap_or(0),
            running: scraped.running.unwrap_or(0),
            kv_usage: scraped.kv_usage.unwrap_or(0.0),
            sent,
            until,
        });
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

/// A request at a server; counted there until dropped.
#[derive(Debug)]
pub struct Flight {
    server: Arc<Server>,
    share: Share,
    /// Whether its work is done: it was answered.
    answered: AtomicBool,
}

impl Flight {
    /// Counts a request that was sent at `now` of the fleet's clock.
    pub(crate) fn to(server: &Arc<Server>, share: Share, now: Duration) -> Self {
        server.state.account.lock().sent(share, now);
        Self {
            server: server.clone(),
            share,
            answered: AtomicBool::new(false),
        }
    }

    /// The answer has begun, so that the prompt is computed. May be said again with every piece.
    pub fn answered(&self) {
        if self.answered.load(Relaxed) || self.answered.swap(true, Relaxed) {
            return;
        }
        let state = &self.server.state;
        let now = state.began.elapsed();
        state.account.lock().answered(self.share, now);
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
        let mut account = self.server.state.account.lock();
        if !*self.answered.get_mut() {
            account.given_up(self.share);
        }
        account.over(self.share);
    }
}

/// What another picker has at a server; counted there until dropped.
#[derive(Debug)]
pub struct Elsewhere {
    server: Arc<Server>,
    counted: UnderWay,
}

impl Elsewhere {
    /// Counts nothing yet.
    #[must_use]
    pub fn at(server: &Arc<Server>) -> Self {
        Self {
            server: server.clone(),
            counted: UnderWay::default(),
        }
    }

    /// Counts `told` from now on. More than anybody has is taken for that.
    pub fn set(&mut self, told: UnderWay) {
        let told = told.bounded();
        let before = std::mem::replace(&mut self.counted, told);
        self.server.state.account.lock().others(before, told);
    }

    /// Whether it is counted where `server` is.
    #[must_use]
    pub fn is_at(&self, server: &Arc<Server>) -> bool {
        Arc::ptr_eq(&self.server.state, &server.state)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.set(UnderWay::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Arc<Server> {
        let spec = EndpointSpec::new("a", Address::parse("a:1").unwrap());
        Arc::new(Server::new(
            EndpointId(0),
            &spec,
            Arc::new(State::new(Instant::now())),
        ))
    }

    #[test]
    fn what_was_scraped_is_seen_and_grows_old() {
        let server = server();
        let ms = Duration::from_millis;
        assert!(!server.load(ms(0)).fresh);
        let scraped = Scraped {
            waiting: Some(2),
            kv_usage: Some(0.5),
            ..Scraped::default()
        };
        let shares = [(7, 5.0), (8, 6.0)].map(|(tokens, work)| Share { tokens, work });
        let flights = shares.map(|share| Flight::to(&server, share, ms(0)));
        flights[0].answered();
        flights[0].answered();
        server.set_scraped(&scraped, 1, ms(100));
        let load = server.load(ms(0));
        assert_eq!(
            (load.waiting, load.active, load.unseen, load.kv_usage),
            (2, 3, 1, 0.5)
        );
        assert_eq!((load.tokens, load.queued_work, load.fresh), (15, 6.0, true));
        assert!(server.load(ms(99)).fresh && !server.load(ms(100)).fresh);
        drop(flights);
        assert_eq!((server.in_flight(), server.tokens_in_flight()), (0, 0));
        assert!(server.load(ms(100)).queued_work.abs() < 1e-9);
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
        assert!(tokio::time::timeout(Duration::ZERO, pending).await.is_err());
    }
}
