//! Whether the picker is ready, as gRPC's health protocol is told by name.

use baton_ext_proc::{Health, ServingStatus};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Services that health is told of by name.
const SERVICES: [&str; 3] = [
    "envoy.service.ext_proc.v3.ExternalProcessor",
    "readiness",
    LIVENESS,
];
const LIVENESS: &str = "liveness";

/// What being ready depends on.
#[derive(Clone, Debug)]
pub(crate) struct Readiness {
    /// Shutdown has begun.
    pub(crate) ends: CancellationToken,
    /// Whether the pool is there and its pods were listed; nothing without Kubernetes.
    pub(crate) pool: Option<watch::Receiver<bool>>,
    /// Whether this picker leads; nothing if there is no election.
    pub(crate) leads: Option<watch::Receiver<bool>>,
}

impl Readiness {
    /// Ready until shutdown begins, so far as nothing else is known.
    pub(crate) fn new(ends: CancellationToken) -> Self {
        Self {
            ends,
            pool: None,
            leads: None,
        }
    }

    /// The same as the health protocol asks for it.
    pub(crate) fn health(self) -> Health {
        Health::new(&SERVICES, move |name| self.status(name))
    }

    /// Alive until the end. Names that nobody knows mean readiness, but with an election nothing, as with llm-d's picker.
    fn status(&self, name: &str) -> ServingStatus {
        let known = name.is_empty() || SERVICES.contains(&name);
        if name == LIVENESS {
            ServingStatus::Serving
        } else if self.leads.is_some() && !known {
            ServingStatus::Unknown
        } else if self.is_ready() {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        }
    }

    fn is_ready(&self) -> bool {
        let holds =
            |told: &Option<watch::Receiver<bool>>| told.as_ref().is_none_or(|told| *told.borrow());
        !self.ends.is_cancelled() && holds(&self.pool) && holds(&self.leads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ServingStatus::{NotServing, Serving, Unknown};

    fn statuses(readiness: &Readiness) -> [ServingStatus; 4] {
        ["", "readiness", "inference-extension", "liveness"].map(|name| readiness.status(name))
    }

    #[test]
    fn without_kubernetes_it_is_ready_until_it_ends() {
        let readiness = Readiness::new(CancellationToken::new());
        assert_eq!(statuses(&readiness), [Serving; 4]);
        readiness.ends.cancel();
        assert_eq!(
            statuses(&readiness),
            [NotServing, NotServing, NotServing, Serving]
        );
    }

    #[test]
    fn with_an_election_only_the_leader_of_a_pool_that_was_seen_is_ready() {
        let (pool, seen) = watch::channel(false);
        let (lead, leads) = watch::channel(false);
        let mut readiness = Readiness::new(CancellationToken::new());
        readiness.pool = Some(seen);
        assert_eq!(
            statuses(&readiness),
            [NotServing, NotServing, NotServing, Serving]
        );
        readiness.leads = Some(leads);
        for (pool_there, leading) in [(false, false), (true, false), (false, true)] {
            pool.send_replace(pool_there);
            lead.send_replace(leading);
            assert_eq!(
                statuses(&readiness),
                [NotServing, NotServing, Unknown, Serving]
            );
        }
        pool.send_replace(true);
        assert_eq!(statuses(&readiness), [Serving, Serving, Unknown, Serving]);
    }
}
