//! One model server as the gateway sees it, and the requests it has there.

use crate::exposition::Scraped;
use baton_scheduler::{Endpoint, EndpointId, Health, Identity, Load, Role};
use http::uri::Authority;
use parking_lot::Mutex;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use tokio::sync::watch;

/// A model server. Its probe writes what is seen of it; everybody else reads.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) id: EndpointId,
    pub(crate) authority: Authority,
    pub(crate) role: Role,
    pub(crate) name: Arc<str>,
    identity: Arc<Identity>,
    in_flight: AtomicU32,
    seen: Mutex<Seen>,
    /// True once probes have been without an answer for long: connections to it will not end by themselves.
    silent: watch::Sender<bool>,
}

#[derive(Debug)]
struct Seen {
    health: Health,
    models: Option<Arc<[Box<str>]>>,
    scraped: Scraped,
    /// Our requests there when `scraped` was asked for.
    in_flight_then: u32,
}

impl Server {
    /// A server that has not been heard of yet.
    pub(crate) fn new(id: EndpointId, authority: Authority, role: Role, name: Arc<str>) -> Self {
        let seen = Seen {
            health: Health::Unreachable,
            models: None,
            scraped: Scraped::default(),
            in_flight_then: 0,
        };
        Self {
            id,
            authority,
            role,
            identity: Arc::new(Identity::new(&*name, [])),
            name,
            in_flight: AtomicU32::new(0),
            seen: Mutex::new(seen),
            silent: watch::Sender::new(false),
        }
    }

    /// What the scheduler needs to know of it now.
    pub(crate) fn endpoint(&self) -> Endpoint {
        let seen = self.seen.lock();
        Endpoint {
            id: self.id,
            role: self.role,
            health: seen.health,
            models: seen.models.clone(),
            adapters: None,
            identity: self.identity.clone(),
            load: load(
                seen.scraped,
                seen.in_flight_then,
                self.in_flight.load(Relaxed),
            ),
        }
    }

    pub(crate) fn health(&self) -> Health {
        self.seen.lock().health
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Sets the health and returns the one before.
    pub(crate) fn set_health(&self, health: Health) -> Health {
        std::mem::replace(&mut self.seen.lock().health, health)
    }

    pub(crate) fn set_models(&self, models: Option<Arc<[Box<str>]>>) {
        self.seen.lock().models = models;
    }

    pub(crate) fn set_scraped(&self, scraped: Scraped, in_flight_then: u32) {
        let mut seen = self.seen.lock();
        (seen.scraped, seen.in_flight_then) = (scraped, in_flight_then);
    }

    /// Says whether it has stopped answering altogether.
    pub(crate) fn set_silent(&self, silent: bool) {
        self.silent
            .send_if_modified(|now| std::mem::replace(now, silent) != silent);
    }

    /// Ends when the server has stopped answering altogether. Cancel safe.
    pub(crate) fn silence(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut silent = self.silent.subscribe();
        async move {
            // A server that nobody watches any more is one that was taken out of the list: what it still has, it ends.
            if silent.wait_for(|silent| *silent).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// What a server said, and what was sent to it and came back since: both are needed, because what it says is some
/// hundred milliseconds old.
fn load(scraped: Scraped, in_flight_then: u32, in_flight_now: u32) -> Load {
    let waiting = scraped.waiting.unwrap_or(0);
    let said = waiting.saturating_add(scraped.running.unwrap_or(0));
    let active = said
        .saturating_add(in_flight_now)
        .saturating_sub(in_flight_then)
        .max(waiting);
    Load {
        waiting,
        running: scraped.running.unwrap_or(0),
        active,
        kv_usage: scraped.kv_usage.unwrap_or(0.0),
        ..Load::default()
    }
}

/// A request at a server; counted there until dropped.
#[derive(Debug)]
pub(crate) struct Flight(Arc<Server>);

impl Flight {
    pub(crate) fn to(server: &Arc<Server>) -> Self {
        server.in_flight.fetch_add(1, Relaxed);
        Self(server.clone())
    }
}

impl Deref for Flight {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.0
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_what_was_said_and_what_happened_since() {
        let said = Scraped {
            waiting: Some(2),
            running: Some(3),
            kv_usage: None,
            cache_tokens: None,
        };
        assert_eq!(load(said, 4, 4).active, 5);
        assert_eq!(load(said, 4, 7).active, 8);
        assert_eq!(load(said, 4, 1).active, 2);
        assert_eq!(
            load(Scraped::default(), 0, 3),
            Load {
                active: 3,
                ..Load::default()
            }
        );
        assert_eq!(load(Scraped::default(), 9, 3).active, 0);
        let huge = Scraped {
            waiting: Some(u32::MAX),
            running: Some(u32::MAX),
            kv_usage: Some(1.0),
            cache_tokens: None,
        };
        assert_eq!(load(huge, 0, u32::MAX).active, u32::MAX);
    }

    fn server() -> Arc<Server> {
        let authority = Authority::from_static("a:1");
        Arc::new(Server::new(
            EndpointId(0),
            authority,
            Role::Decode,
            "a".into(),
        ))
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

    #[test]
    fn a_flight_counts_until_it_is_dropped() {
        let server = server();
        let flights = [Flight::to(&server), Flight::to(&server)];
        assert_eq!(server.in_flight(), 2);
        drop(flights);
        assert_eq!(server.in_flight(), 0);
    }
}
