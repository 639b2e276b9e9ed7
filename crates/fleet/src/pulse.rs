//! What follows from what probes of one server found: whether it is healthy, and when it is asked again.
//!
//! A server that refuses connections is out at once. One that is merely slow is not: an overloaded machine answers
//! late. Only after [`SILENCES`] probes without an answer is it taken for dead, and whoever waits for it is told.
//!
//! Busy servers and those whose numbers change are asked often, idle ones seldom: what is sent to them is counted here
//! anyway. A server whose metrics take long is asked less, so that asking does not become its work; and the more servers
//! there are, the less often each is asked.

use baton_scheduler::Health;
use std::time::Duration;

/// Between two looks at a busy server, at least.
const BUSY: Duration = Duration::from_millis(250);
/// Between two looks at an idle one, at most, if there are many.
const IDLE: Duration = Duration::from_secs(1);
/// Added to the wait of idle servers for every server there is.
const IDLE_PER_SERVER: Duration = Duration::from_millis(10);
/// Looks a second at all servers together.
const LOOKS_PER_SECOND: f64 = 1500.0;
/// Questions about health a second, all servers together, as long as each is asked once in [`IDLE`].
const HEALTH_PER_SECOND: f64 = 200.0;
/// A look may take this part of the time.
const SHARE: u32 = 10;
/// Between two looks at whatever answers.
const LONGEST: Duration = Duration::from_secs(3);
/// First wait after a refusal; doubled after each, up to [`BUSY`], and after [`PATIENT_REFUSALS`] up to [`IDLE`].
const FIRST_RETRY: Duration = Duration::from_millis(50);
const PATIENT_REFUSALS: u32 = 100;
/// Probes without an answer until a server is taken for dead: about eleven seconds.
const SILENCES: u32 = 5;

/// What one look found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Finding {
    /// It takes requests.
    Up(Look),
    /// It answers, and says that it takes no requests.
    Draining,
    /// No connection.
    Refused,
    /// No answer.
    Silent,
}

/// A look at a server that takes requests.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Look {
    /// It has requests.
    pub(crate) busy: bool,
    /// Its numbers are not those of the look before.
    pub(crate) changed: bool,
    /// How long its metrics took to come.
    pub(crate) took: Duration,
}

/// What the looks before found.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    silences: u32,
    refusals: u32,
    /// Looks since it was busy or changed.
    idle: u32,
}

/// What follows from a finding.
#[derive(Debug, PartialEq)]
pub(crate) struct Verdict {
    /// `None` leaves it as it is.
    pub(crate) health: Option<Health>,
    pub(crate) silent: bool,
    /// Until the next look, before it is varied.
    pub(crate) wait: Duration,
}

impl Pulse {
    /// Judges the look of one among `servers` servers.
    pub(crate) fn judge(&mut self, finding: &Finding, servers: usize) -> Verdict {
        let counted = |is: bool, n: u32| if is { n.saturating_add(1) } else { 0 };
        self.silences = counted(*finding == Finding::Silent, self.silences);
        self.refusals = counted(*finding == Finding::Refused, self.refusals);
        let is_idle = |look: &Look| !look.busy && !look.changed;
        self.idle = counted(matches!(finding, Finding::Up(l) if is_idle(l)), self.idle);
        let silent = self.silences >= SILENCES;
        let health = match finding {
            Finding::Up(_) => Some(Health::Healthy),
            Finding::Draining => Some(Health::Draining),
            Finding::Refused => Some(Health::Unreachable),
            Finding::Silent => silent.then_some(Health::Unreachable),
        };
        let wait = match finding {
            Finding::Up(look) => self.interval(look, servers),
            Finding::Refused => self.retry(servers),
            Finding::Draining | Finding::Silent => BUSY.max(fair_share(servers)),
        };
        Verdict {
            health,
            silent,
            wait,
        }
    }

    fn interval(&self, look: &Look, servers: usize) -> Duration {
        let busy = BUSY.max(fair_share(servers));
        let many = u32::try_from(servers).unwrap_or(u32::MAX);
        let idle = IDLE_PER_SERVER.saturating_mul(many).min(IDLE).max(busy);
        let wait = busy.saturating_mul(1 << self.idle.min(8)).min(idle);
        wait.max((look.took * SHARE).min(LONGEST))
    }

    fn retry(&self, servers: usize) -> Duration {
        let doubled = |first: Duration, n: u32| first * (1 << n.min(8));
        let wait = match self.refusals.checked_sub(PATIENT_REFUSALS) {
            None => doubled(FIRST_RETRY, self.refusals.saturating_sub(1)).min(BUSY),
            Some(more) => doubled(BUSY, more).min(IDLE),
        };
        wait.max(fair_share(servers))
    }
}

/// Between two looks, so that all servers together are not asked more than may be.
fn fair_share(servers: usize) -> Duration {
    Duration::from_secs_f64(servers as f64 / LOOKS_PER_SECOND)
}

/// How often one of `servers` servers that answers is asked whether it takes requests.
pub(crate) fn health_interval(servers: usize) -> Duration {
    Duration::from_secs_f64(servers as f64 / HEALTH_PER_SECOND).min(IDLE)
}

/// `wait`, longer or shorter by up to a tenth, so that servers are not all asked at once. `chance` is any number.
pub(crate) fn varied(wait: Duration, chance: u64) -> Duration {
    // An odd factor spreads consecutive numbers over the whole range.
    let part = (chance.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / f64::from(1u32 << 24);
    wait.mul_f64(0.9 + 0.2 * part)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: Finding = Finding::Up(Look {
        busy: true,
        changed: true,
        took: Duration::ZERO,
    });
    const IDLE_LOOK: Finding = Finding::Up(Look {
        busy: false,
        changed: false,
        took: Duration::ZERO,
    });

    fn health_after(findings: &[Finding]) -> Vec<Option<Health>> {
        let mut pulse = Pulse::default();
        findings.iter().map(|f| pulse.judge(f, 1).health).collect()
    }

    fn waits(finding: Finding, servers: usize, n: usize) -> Vec<u128> {
        let mut pulse = Pulse::default();
        (0..n)
            .map(|_| pulse.judge(&finding, servers).wait.as_millis())
            .collect()
    }

    #[test]
    fn a_refusal_counts_at_once_and_silence_only_after_a_while() {
        use Finding::{Refused, Silent};
        assert_eq!(health_after(&[Refused]), [Some(Health::Unreachable)]);
        assert_eq!(health_after(&[Silent, Silent, Silent, Silent]), [None; 4]);
        let five = health_after(&[Silent; 5]);
        assert_eq!(five[4], Some(Health::Unreachable));
        let interrupted = health_after(&[Silent, Silent, Silent, Silent, UP, Silent]);
        assert_eq!(interrupted[4..], [Some(Health::Healthy), None]);
        assert_eq!(health_after(&[Finding::Draining]), [Some(Health::Draining)]);
    }

    #[test]
    fn a_dead_server_is_asked_again_soon_and_later_seldom() {
        let found = waits(Finding::Refused, 1, 1000);
        assert_eq!(found[..4], [50, 100, 200, 250]);
        assert_eq!((found[98], found[999]), (250, 1000));
        let mut pulse = Pulse::default();
        assert!(!pulse.judge(&Finding::Refused, 1).silent);
        assert_eq!(waits(Finding::Refused, 1500, 1), [1000]);
    }

    #[test]
    fn busy_servers_are_asked_often_and_idle_ones_seldom() {
        assert_eq!(waits(UP, 1, 3), [250; 3]);
        assert_eq!(waits(IDLE_LOOK, 1, 3), [250; 3]);
        assert_eq!(waits(IDLE_LOOK, 100, 4), [500, 1000, 1000, 1000]);
        assert_eq!(waits(UP, 3000, 1), [2000]);
        assert_eq!(waits(IDLE_LOOK, 3000, 9)[8], 2000);
        let mut pulse = Pulse::default();
        pulse.judge(&IDLE_LOOK, 100);
        pulse.judge(&UP, 100);
        assert_eq!(pulse.judge(&IDLE_LOOK, 100).wait.as_millis(), 500);
    }

    #[test]
    fn a_server_whose_metrics_are_slow_is_asked_less() {
        let slow = |millis| {
            Finding::Up(Look {
                busy: true,
                changed: true,
                took: Duration::from_millis(millis),
            })
        };
        assert_eq!(waits(slow(5), 1, 1), [250]);
        assert_eq!(waits(slow(100), 1, 1), [1000]);
        assert_eq!(waits(slow(1900), 1, 1), [3000]);
    }

    #[test]
    fn health_is_asked_at_every_look_of_a_small_fleet_and_once_a_second_of_a_large_one() {
        let millis = |servers| health_interval(servers).as_millis();
        assert_eq!((millis(10), millis(100), millis(5000)), (50, 500, 1000));
    }

    #[test]
    fn waits_vary_by_a_tenth() {
        let wait = Duration::from_secs(1);
        let waits: Vec<u128> = (0..100).map(|n| varied(wait, n).as_millis()).collect();
        assert!(waits.iter().all(|w| (900..=1100).contains(w)));
        assert!(waits.iter().any(|&w| w < 930) && waits.iter().any(|&w| w > 1070));
    }
}
