//! Endpoints, priorities and rewrites from Kubernetes: a pool is followed, and if it is wanted a leader elected.

use crate::objects::{self, Objects};
use crate::picker::Epp;
use crate::readiness::Readiness;
use baton_k8s::election::Timing;
use baton_k8s::{Access, AppProtocol, Client, ClientError, LeaseName, Pace, PoolName, PoolState};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// What the command line says of a pool.
#[derive(Clone, Debug)]
pub(crate) struct PoolConfig {
    pub(crate) name: PoolName,
    /// The pool itself, if there is no such object.
    pub(crate) itself: Option<baton_k8s::Pool>,
    /// How to reach the API server; else as the environment says.
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Of all pickers of this pool one is ready.
    pub(crate) elects: bool,
    /// Who reads `/metrics` must be allowed to.
    pub(crate) checks_readers: bool,
}

/// The same with a client.
pub(crate) struct Pool {
    config: PoolConfig,
    client: Client,
    /// Who this is in an election.
    candidate: String,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// Finds the way to the API server; it is not asked yet. `draw` tells this picker from others of the same pod's name.
    pub(crate) async fn new(config: PoolConfig, draw: u64) -> Result<Self, ClientError> {
        let pod = ["POD_NAME", "HOSTNAME"].map(|name| std::env::var(name).ok());
        let pod = pod.into_iter().flatten().find(|name| !name.is_empty());
        Ok(Self {
            client: baton_k8s::client(config.kubeconfig.as_deref()).await?,
            candidate: format!("{}_{draw:016x}", pod.as_deref().unwrap_or("baton")),
            config,
        })
    }

    /// Who may read `/metrics`, if not everybody.
    pub(crate) fn access(&self) -> Option<Arc<Access>> {
        let checks = self.config.checks_readers;
        checks.then(|| Arc::new(Access::new(self.client.clone())))
    }

    /// Follows the pool for as long as `background` lives, and tells `readiness` where to look. The task that is returned
    /// stands for the lease until shutdown begins, then gives it back.
    pub(crate) fn start(
        self,
        epp: &Arc<Epp>,
        readiness: &mut Readiness,
        background: &mut JoinSet<()>,
    ) -> Option<JoinHandle<()>> {
        let (sender, states) = watch::channel(Arc::default());
        let (seen, pool) = watch::channel(false);
        readiness.pool = Some(pool);
        background.spawn(take_over(states, epp.clone(), seen));
        let (name, itself) = (self.config.name, self.config.itself);
        let lease = LeaseName::of(&name, &self.candidate);
        let client = self.client.clone();
        let following = baton_k8s::follow(client, name, itself, Pace::default(), sender);
        background.spawn(following);
        self.config
            .elects
            .then(|| stand(self.client, lease, readiness))
    }
}

fn stand(client: Client, lease: LeaseName, readiness: &mut Readiness) -> JoinHandle<()> {
    let (sender, leads) = watch::channel(false);
    readiness.leads = Some(leads);
    let ends = readiness.ends.clone();
    tokio::spawn(async move {
        let (stop, stopped) = watch::channel(false);
        let told = async move {
            ends.cancelled().await;
            drop(stop);
        };
        let lead = baton_k8s::lead(client, lease, Timing::default(), sender, stopped);
        tokio::join!(lead, told);
    })
}

/// Makes every state of the pool the picker's, and says in `seen` whether there is one.
async fn take_over(
    mut states: watch::Receiver<Arc<PoolState>>,
    epp: Arc<Epp>,
    seen: watch::Sender<bool>,
) {
    while states.changed().await.is_ok() {
        let state = states.borrow_and_update().clone();
        // Too many endpoints: those of before are better than none.
        if let Err(error) = epp.fleet.set_endpoints(&state.endpoints) {
            tracing::error!(%error, "the pool's endpoints; those of before stay");
        }
        let objects = objects_of(&state);
        if **epp.objects.load() != objects {
            epp.objects.store(Arc::new(objects));
        }
        let ready = is_ready(&state);
        if seen.send_if_modified(|seen| std::mem::replace(seen, ready) != ready) {
            let endpoints = state.endpoints.len();
            tracing::info!(ready, endpoints, "pool");
        }
    }
}

/// Whether requests can be decided: the pool is there, its pods were listed, and what they speak is known.
fn is_ready(state: &PoolState) -> bool {
    let speaks = state.pool.as_ref().map(|pool| &pool.app_protocol);
    state.synced && !matches!(speaks, Some(AppProtocol::Other(_)))
}

/// What operators say, in the picker's words. Rewrites come oldest first and stay so; each of their rules counts by itself.
fn objects_of(state: &PoolState) -> Objects {
    let objectives = state.objectives.iter();
    let rules = state
        .rewrites
        .iter()
        .flat_map(|object| object.rules.iter().map(move |rule| (&*object.name, rule)));
    let rewrite = |(object, rule): (&str, &baton_k8s::RewriteRule)| objects::Rewrite {
        object: object.into(),
        models: rule.models.iter().map(|m| m.as_str().into()).collect(),
        targets: rule
            .targets
            .iter()
            .map(|target| objects::Target {
                model: target.model.as_str().into(),
                weight: target.weight,
            })
            .collect(),
    };
    Objects {
        objectives: objectives
            .map(|(name, objective)| (name.as_str().into(), objective.priority))
            .collect(),
        rewrites: rules.map(rewrite).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_k8s::{Members, Objective, Rewrite, RewriteRule, RewriteTarget};
    use std::collections::BTreeMap;

    fn rewrite(name: &str, created: i64, rules: &[(&[&str], &str, Option<u32>)]) -> Rewrite {
        let rules = rules.iter().map(|&(models, target, weight)| RewriteRule {
            models: models.iter().map(|&m| m.into()).collect(),
            targets: vec![RewriteTarget {
                model: target.into(),
                weight,
            }],
        });
        Rewrite {
            name: name.into(),
            created,
            rules: rules.collect(),
        }
    }

    #[test]
    fn objectives_and_rewrites_mean_what_they_say() {
        let state = PoolState {
            objectives: BTreeMap::from([("low".into(), Objective { priority: -3 })]),
            rewrites: vec![
                rewrite("old", 1, &[(&["m"], "a", None), (&[], "b", Some(2))]),
                rewrite("young", 2, &[(&["m", "n"], "c", None)]),
            ],
            ..PoolState::default()
        };
        let objects = objects_of(&state);
        assert_eq!(objects.priority(Some("low")), -3);
        let target = |model| objects.rewrite(model, 0).map(|(r, t)| (&*r.object, t));
        assert_eq!(target(Some("m")), Some(("old", "a")));
        assert_eq!(target(Some("n")), Some(("young", "c")));
        assert_eq!(target(Some("x")), Some(("old", "b")));
        assert_eq!(objects.rewrites[1].targets[0].weight, Some(2));
        assert_eq!(objects_of(&PoolState::default()), Objects::default());
    }

    #[test]
    fn a_pool_counts_when_it_is_there_listed_and_understood() {
        let mut state = PoolState::default();
        assert!(!is_ready(&state));
        state.synced = true;
        assert!(is_ready(&state));
        for (app_protocol, ready) in [
            (AppProtocol::Http, true),
            (AppProtocol::H2c, true),
            (AppProtocol::Other("smoke".into()), false),
        ] {
            state.pool = Some(baton_k8s::Pool {
                members: Members::Query(String::new()),
                target_ports: vec![8000],
                app_protocol,
            });
            assert_eq!(is_ready(&state), ready);
        }
    }
}
