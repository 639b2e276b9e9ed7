//! What Mooncake's bootstrap servers say their engines are, remembered for a while.

use crate::connector::mooncake::{self, Engine};
use crate::target::Target;
use baton_http::Client;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most servers remembered.
const MOST: usize = 1024;
/// How long. A server that starts anew has other engines.
const MEMORY: Duration = Duration::from_secs(30);
/// Longest wait for a bootstrap server.
const LIMIT: Duration = Duration::from_secs(5);
const MAX_ANSWER: usize = 1 << 20;

type Known = HashMap<Target, (Instant, Arc<[Engine]>)>;

/// Engines by prefill server.
#[derive(Debug)]
pub(crate) struct Engines {
    client: Client,
    port: u16,
    known: Mutex<Known>,
}

impl Engines {
    /// For bootstrap servers at `port`.
    pub(crate) fn new(port: u16) -> Self {
        Self {
            client: Client::default(),
            port,
            known: Mutex::default(),
        }
    }

    /// Where the bootstrap server of `target` is.
    pub(crate) fn bootstrap(&self, target: &Target) -> String {
        mooncake::bootstrap(target, self.port)
    }

    /// The engines of `target`; asks its bootstrap server unless they are known. Nothing if it does not answer well.
    pub(crate) async fn of(&self, target: &Target) -> Option<Arc<[Engine]>> {
        let fresh = |(since, _): &&(Instant, Arc<[Engine]>)| since.elapsed() < MEMORY;
        let known = self
            .known
            .lock()
            .get(target)
            .filter(fresh)
            .map(|(_, engines)| engines.clone());
        if known.is_some() {
            return known;
        }
        let uri = format!("{}/query", self.bootstrap(target));
        let asked = tokio::time::timeout(LIMIT, self.client.get(&uri, MAX_ANSWER)).await;
        let (status, answer) = asked.ok()?.ok()?;
        let engines: Arc<[Engine]> = mooncake::engines(&answer)
            .filter(|_| status.is_success())?
            .into();
        let mut known = self.known.lock();
        if known.len() >= MOST {
            known.retain(|_, (since, _)| since.elapsed() < MEMORY);
        }
        if known.len() < MOST {
            known.insert(target.clone(), (Instant::now(), engines.clone()));
        }
        Some(engines)
    }

    /// `target` failed: it may be another process by now.
    pub(crate) fn forget(&self, target: &Target) {
        self.known.lock().remove(target);
    }
}
