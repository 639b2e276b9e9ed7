//! Stands for a lease: asks and tells the API server what [`election`](crate::election) says.

use crate::PoolName;
use crate::backoff::{chance, shortened};
use crate::election::{Candidate, Record, Step, Timing};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Which lease, and who wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseName {
    /// Where the lease lies.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Who this is: unique among all who want it, a pod's name with something drawn.
    pub candidate: String,
}

impl LeaseName {
    /// The lease for which llm-d's pickers of this pool stand, so that one of theirs and one of ours never lead together.
    #[must_use]
    pub fn of(pool: &PoolName, candidate: &str) -> Self {
        Self {
            namespace: pool.namespace.clone(),
            name: format!("epp-{}-{}.llm-d.ai", pool.namespace, pool.name),
            candidate: candidate.to_owned(),
        }
    }
}

/// Stands for the lease until `stop` is true or its sender is gone, keeps `leads` as things are, and gives the lease back
/// at the end.
///
/// Whoever leads and cannot renew reads `false` in `leads` before anybody else may lead.
pub async fn lead(
    client: Client,
    name: LeaseName,
    timing: Timing,
    leads: watch::Sender<bool>,
    mut stop: watch::Receiver<bool>,
) {
    let mut stand = Stand {
        api: Api::namespaced(client, &name.namespace),
        candidate: Candidate::new(&name.candidate, timing),
        name,
        started: Instant::now(),
    };
    // An error means that nobody can stop us any more, which is a stop.
    let stopped = async { stop.wait_for(|stop| *stop).await.map_or((), drop) };
    tokio::select! {
        () = stand.run(timing, &leads) => {}
        () = stopped => {}
    }
    if let Some(back) = stand.candidate.release() {
        let written = tokio::time::timeout(timing.retry, stand.give_back(back)).await;
        if !matches!(written, Ok(Ok(()))) {
            tracing::warn!(lease = stand.name.name, "not given back; it ends by itself");
        }
    }
    tell(&leads, false, &stand.name);
}

struct Stand {
    api: Api<Lease>,
    candidate: Candidate,
    name: LeaseName,
    started: Instant,
}

impl Stand {
    async fn run(&mut self, timing: Timing, leads: &watch::Sender<bool>) {
        loop {
            let led = self.candidate.left(self.now());
            // A leader's request may take as long as it leads; nobody waits longer than the deadline.
            let patience = if led.is_zero() {
                timing.renew_deadline
            } else {
                led
            };
            match tokio::time::timeout(patience, self.attempt()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(lease = self.name.name, %error, "lease"),
                Err(_) => tracing::warn!(lease = self.name.name, "lease: no answer in time"),
            }
            let left = self.candidate.left(self.now());
            tell(leads, !left.is_zero(), &self.name);
            let wait = if left.is_zero() {
                shortened(timing.retry, chance())
            } else {
                timing.retry.min(left)
            };
            tokio::time::sleep(wait).await;
            tell(leads, self.candidate.leads(self.now()), &self.name);
        }
    }

    /// One look or renewal.
    async fn attempt(&mut self) -> Result<(), kube::Error> {
        if let Some(renewal) = self.candidate.renewal() {
            let sent = self.now();
            match self.write(renewal).await {
                Ok(record) => {
                    self.candidate.wrote(sent, record);
                    return Ok(());
                }
                // Somebody wrote it meanwhile: look who.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => return Err(error),
            }
        }
        let lease = self.api.get_opt(&self.name.name).await?;
        let step = self.candidate.consider(self.now(), lease.map(read));
        let Step::Write(record) = step else {
            return Ok(());
        };
        let sent = self.now();
        match self.write(record).await {
            Ok(record) => self.candidate.wrote(sent, record),
            // Another was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn give_back(&self, back: Record) -> Result<(), kube::Error> {
        match self.write(back.clone()).await {
            // The last renewal was under way when we were stopped, and arrived.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            other => return other.map(drop),
        }
        let now = self.api.get_opt(&self.name.name).await?.map(read);
        match now.filter(|lease| lease.holder == self.name.candidate) {
            Some(Record { version, .. }) => self.write(Record { version, ..back }).await.map(drop),
            None => Ok(()),
        }
    }

    async fn write(&self, record: Record) -> Result<Record, kube::Error> {
        let new = record.version.is_empty();
        let lease = lease(&self.name.name, record, Timestamp::now());
        let params = PostParams::default();
        let written = if new {
            self.api.create(&params, &lease).await?
        } else {
            self.api.replace(&self.name.name, &params, &lease).await?
        };
        Ok(read(written))
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

fn tell(leads: &watch::Sender<bool>, now: bool, name: &LeaseName) {
    let changed = leads.send_if_modified(|leads| std::mem::replace(leads, now) != now);
    if changed {
        tracing::info!(
            lease = name.name,
            candidate = name.candidate,
            leads = now,
            "leader election"
        );
    }
}

fn read(lease: Lease) -> Record {
    let spec = lease.spec.unwrap_or_default();
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        lease_s: spec.lease_duration_seconds.unwrap_or(0),
        transitions: spec.lease_transitions.unwrap_or(0),
        version: lease.metadata.resource_version.unwrap_or_default(),
        acquired: spec
            .acquire_time
            .map_or_else(String::new, |time| time.0.to_string()),
    }
}

fn lease(name: &str, record: Record, now: Timestamp) -> Lease {
    // What cannot be read as a time was not written by anyone who keeps to the rules.
    let acquired = record.acquired.parse().unwrap_or(now);
    Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            resource_version: (!record.version.is_empty()).then_some(record.version),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(record.holder),
            lease_duration_seconds: Some(record.lease_s),
            lease_transitions: Some(record.transitions),
            acquire_time: Some(MicroTime(acquired)),
            renew_time: Some(MicroTime(now)),
            ..LeaseSpec::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_goes_through_a_lease_unharmed() {
        let record = Record {
            holder: "a".into(),
            lease_s: 15,
            transitions: 3,
            version: "7".into(),
            acquired: "2026-01-02T03:04:05.000006Z".into(),
        };
        assert_eq!(
            read(lease("l", record.clone(), Timestamp::UNIX_EPOCH)),
            record
        );
        let fresh = Record {
            acquired: String::new(),
            ..record
        };
        let read = read(lease("l", fresh, Timestamp::UNIX_EPOCH));
        assert_eq!(read.acquired, "1970-01-01T00:00:00Z");
    }

    #[test]
    fn the_lease_is_that_of_upstream() {
        let name = LeaseName::of(&PoolName::new("ns", "pool"), "me");
        assert_eq!(
            (name.namespace.as_str(), name.name.as_str()),
            ("ns", "epp-ns-pool.llm-d.ai")
        );
        assert_eq!(Timing::default().lease, Duration::from_secs(15));
    }
}
