//! Giving back KV that one of our own prefill servers holds for a request that ended before decode had it.
//!
//! Best effort: the lease ends by itself after seconds. Servers that are not ours give no token and are not called.

use crate::answer::Lease;
use crate::legs::{Head, Payload, Stage};
use crate::metrics::Metrics;
use crate::target::Target;
use baton_http::Pieces;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// Carries the lease's token.
const TOKEN: HeaderName = HeaderName::from_static("x-kvx-token");
/// Longest wait for a server to take note.
const LIMIT: Duration = Duration::from_secs(2);
/// Most calls at a time; more leases are left to end by themselves.
const MOST: usize = 64;

/// Makes the calls. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Releases {
    stage: Stage,
    metrics: Arc<Metrics>,
    places: Arc<Semaphore>,
}

impl Releases {
    pub(crate) fn new(stage: Stage, metrics: Arc<Metrics>) -> Self {
        Self {
            stage,
            metrics,
            places: Arc::new(Semaphore::new(MOST)),
        }
    }

    /// What `target` holds under `lease` is given back unless it is [taken](Held::taken).
    pub(crate) fn hold(&self, target: &Target, lease: Option<Lease>) -> Held {
        Held(lease.map(|lease| (self.clone(), target.clone(), lease)))
    }

    fn release(self, target: Target, lease: &Lease) {
        let Some((path, token)) = call(lease) else {
            return;
        };
        let (Ok(place), Ok(runtime)) = (
            self.places.clone().try_acquire_owned(),
            tokio::runtime::Handle::try_current(),
        ) else {
            return self.metrics.released("skipped");
        };
        runtime.spawn(async move {
            let head = Head {
                method: Method::DELETE,
                path,
                headers: HeaderMap::from_iter([(TOKEN, token)]),
            };
            let body = Payload::Edited(Pieces::default());
            let sent = self.stage.send(target.authority(), &head, body);
            let taken_note = match tokio::time::timeout(LIMIT, sent).await {
                Ok(Ok(response)) => response.status().is_success(),
                _ => false,
            };
            self.metrics
                .released(if taken_note { "done" } else { "failed" });
            drop(place);
        });
    }
}

fn call(lease: &Lease) -> Option<(PathAndQuery, HeaderValue)> {
    let path = format!("/kv/v1/leases/{}", lease.uuid).parse().ok()?;
    let mut token = HeaderValue::from_str(&lease.token).ok()?;
    token.set_sensitive(true);
    Some((path, token))
}

/// KV held for a request; given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Held(Option<(Releases, Target, Lease)>);

impl Held {
    /// Decode has taken the request, and the care for its KV with it.
    pub(crate) fn taken(mut self) {
        self.0 = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some((releases, target, lease)) = self.0.take() {
            releases.release(target, &lease);
        }
    }
}
