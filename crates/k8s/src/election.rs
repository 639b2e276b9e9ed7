//! Who leads: the rules of a lease that several want and one holds. No clock and no server: both are asked by the shell.
//!
//! The rules are those of Kubernetes' own components, so that a picker of theirs and one of ours can stand for the same
//! lease. Clocks of different machines are never compared: a lease is over when it was seen unchanged for its duration.

use std::time::Duration;

/// How long things last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Others wait this long after the last change that they saw.
    pub lease: Duration,
    /// Who could not renew for this long no longer leads. Less than `lease`.
    pub renew_deadline: Duration,
    /// Between two looks, and two renewals.
    pub retry: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

/// What a lease says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Who holds it; empty if it was given back.
    pub holder: String,
    /// For how long, in seconds.
    pub lease_s: i32,
    /// How often it went from one to another.
    pub transitions: i32,
    /// Of the object's versions this is the one that was read; a write must name it.
    pub version: String,
    /// When it was taken, as the API server stores it. Handed on while the holder stays.
    pub acquired: String,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make the lease, or write it over the version that is named in it.
    Write(Record),
    /// It is somebody else's. Look again later.
    Wait,
}

/// One who wants to lead.
#[derive(Debug)]
pub struct Candidate {
    name: String,
    timing: Timing,
    /// The last record that differed from the one before, and when it was first seen.
    seen: Option<(Record, Duration)>,
    /// When the last write that succeeded was sent.
    renewed: Option<Duration>,
}

impl Candidate {
    /// `name` must be unique among all who want the lease.
    #[must_use]
    pub fn new(name: &str, timing: Timing) -> Self {
        Self {
            name: name.to_owned(),
            timing,
            seen: None,
            renewed: None,
        }
    }

    /// What to do about the lease as it was just read, or without a lease. `now` is a time that only moves forward.
    pub fn consider(&mut self, now: Duration, lease: Option<Record>) -> Step {
        let Some(lease) = lease else {
            self.seen = None;
            return Step::Write(self.claim(None));
        };
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != lease) {
            self.seen = Some((lease.clone(), now));
        }
        let since = self.seen.as_ref().map_or(now, |(_, since)| *since);
        let lasts = Duration::from_secs(u64::try_from(lease.lease_s).unwrap_or(0));
        let free = lease.holder.is_empty() || now.saturating_sub(since) >= lasts;
        if free || lease.holder == self.name {
            Step::Write(self.claim(Some(&lease)))
        } else {
            self.renewed = None;
            Step::Wait
        }
    }

    /// The lease was written: `sent` is when the request was sent, `lease` what it says now.
    pub fn wrote(&mut self, sent: Duration, lease: Record) {
        self.seen = Some((lease, sent));
        self.renewed = Some(sent);
    }

    /// Whether this one leads. Without renewals it says no before anybody else's patience ends.
    #[must_use]
    pub fn leads(&self, now: Duration) -> bool {
        self.left(now) > Duration::ZERO
    }

    /// For how long it will lead if it cannot renew.
    #[must_use]
    pub fn left(&self, now: Duration) -> Duration {
        let ends = self.renewed.map(|sent| sent + self.timing.renew_deadline);
        ends.map_or(Duration::ZERO, |ends| ends.saturating_sub(now))
    }

    /// What renews the lease without reading it first; `None` for who does not hold it.
    #[must_use]
    pub fn renewal(&self) -> Option<Record> {
        let (lease, _) = self.seen.as_ref()?;
        self.renewed?;
        (lease.holder == self.name).then(|| self.claim(Some(lease)))
    }

    /// What gives the lease back, so that the next one need not wait; `None` for who does not hold it.
    pub fn release(&mut self) -> Option<Record> {
        let mut lease = self.renewal()?;
        self.renewed = None;
        lease.holder.clear();
        lease.lease_s = 1;
        Some(lease)
    }

    fn claim(&self, before: Option<&Record>) -> Record {
        let stays = before.is_some_and(|lease| lease.holder == self.name);
        Record {
            holder: self.name.clone(),
            lease_s: i32::try_from(self.timing.lease.as_secs())
                .unwrap_or(i32::MAX)
                .max(1),
            transitions: before.map_or(0, |lease| {
                lease.transitions.saturating_add(i32::from(!stays))
            }),
            version: before.map_or_else(String::new, |lease| lease.version.clone()),
            acquired: before
                .filter(|_| stays)
                .map_or_else(String::new, |lease| lease.acquired.clone()),
        }
    }
}

#[cfg(test)]
#[path = "election_tests.rs"]
mod tests;
