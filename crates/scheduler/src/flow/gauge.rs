//! From what is known of servers to how much they have room for.
//!
//! What a server said is some time old. Requests that were sent to it since then count as waiting: an idle server so takes
//! at most as many at once as it may have waiting, until it has been looked at again.

use super::room::{Gauge, Level, Room};
use crate::saturation::{Concurrency, Counted, Detector, Utilization};
use crate::{Endpoint, Health, Load, Roles};

impl Room {
    /// How much the healthy servers of `fleet` have room for.
    #[must_use]
    pub fn of(fleet: &[Endpoint], detector: &Detector, gauge: Gauge) -> Self {
        let of = |roles: Roles| {
            let servers = fleet
                .iter()
                .filter(|e| e.health == Health::Healthy && roles.contains(e.role));
            Level::of(servers.map(|e| &e.load), detector, gauge)
        };
        Self {
            decode: of(Roles::DECODE),
            prefill: of(Roles::PREFILL_ONLY),
        }
    }
}

impl Level {
    /// `None` without servers.
    fn of<'a>(
        loads: impl Iterator<Item = &'a Load>,
        detector: &Detector,
        gauge: Gauge,
    ) -> Option<Self> {
        let (mut sum, mut n) = (0.0, 0u32);
        for load in loads {
            let busy = match detector {
                Detector::Utilization(u) => u.of(&with_unseen(load)),
                Detector::Concurrency(c) => c.of(load),
            };
            sum += match gauge {
                Gauge::Mean => busy,
                Gauge::Slots => busy.min(1.0),
            };
            n += 1;
        }
        let n = (n > 0).then(|| f64::from(n))?;
        let (per_request, per_token) = steps(detector);
        Some(Self {
            value: sum / n,
            per_request: per_request / n,
            per_token: per_token / n,
        })
    }
}

/// What one request, and one token, adds to a server.
fn steps(detector: &Detector) -> (f64, f64) {
    match detector {
        Detector::Utilization(Utilization { queue_depth, .. }) => (1.0 / queue_depth, 0.0),
        Detector::Concurrency(Concurrency {
            mode,
            requests,
            tokens,
            ..
        }) => {
            let (request, token) = (1.0 / requests, 1.0 / tokens);
            match mode {
                Counted::Requests => (request, 0.0),
                Counted::Tokens => (0.0, token),
                Counted::Both => (request, token),
            }
        }
    }
}

fn with_unseen(load: &Load) -> Load {
    Load {
        waiting: load.waiting.saturating_add(load.unseen),
        ..*load
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Arrival, FlowConfig, FlowControl, Need};
    use crate::{EndpointId, Role};
    use std::time::Duration;

    fn server(role: Role, load: Load) -> Endpoint {
        Endpoint {
            load,
            ..Endpoint::new(EndpointId(0), role)
        }
    }

    fn decode(waiting: u32, running: u32, active: u32) -> Endpoint {
        let load = Load {
            waiting,
            running,
            active,
            unseen: active.saturating_sub(waiting + running),
            ..Load::default()
        };
        server(Role::Decode, load)
    }

    /// How many requests go.
    fn fit(room: Room, need: Need) -> usize {
        let mut queue = FlowControl::new(FlowConfig::default());
        queue.set_room(Duration::ZERO, room);
        let arrival = Arrival {
            need,
            tokens: 100,
            ..Arrival::new()
        };
        for _ in 0..1000 {
            queue.enqueue(Duration::ZERO, &arrival, ()).unwrap();
        }
        std::iter::from_fn(|| queue.dispatch(Duration::ZERO)).count()
    }

    fn slots(fleet: &[Endpoint], detector: Detector) -> usize {
        fit(Room::of(fleet, &detector, Gauge::Slots), Need::Decode)
    }

    #[test]
    fn a_burst_between_two_looks_does_not_overshoot() {
        let detector = Detector::default();
        assert_eq!(slots(&[decode(0, 0, 0)], detector), 5);
        assert_eq!(slots(&[decode(0, 8, 8)], detector), 5);
        assert_eq!(slots(&[decode(2, 8, 10)], detector), 3);
        // Three were sent since it was looked at.
        assert_eq!(slots(&[decode(0, 8, 11)], detector), 2);
        assert_eq!(slots(&[decode(2, 8, 15)], detector), 0);
        // Four have ended since; that says nothing of those that wait.
        assert_eq!(slots(&[decode(2, 8, 6)], detector), 3);
        assert_eq!(slots(&[decode(0, 0, 0), decode(0, 0, 0)], detector), 10);
    }

    #[test]
    fn one_bad_server_stops_all_only_by_the_mean() {
        let fleet = [decode(50, 9, 59), decode(0, 3, 3), decode(0, 3, 3)];
        let detector = Detector::default();
        assert_eq!(slots(&fleet, detector), 10);
        let mean = Room::of(&fleet, &detector, Gauge::Mean);
        assert_eq!(fit(mean, Need::Decode), 0);
        assert!((mean.decode() - 10.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn servers_that_are_down_or_silent_have_no_room() {
        let mut stale = decode(0, 0, 0);
        stale.load.fresh = false;
        assert_eq!(slots(&[stale.clone()], Detector::default()), 0);
        let mut down = decode(0, 0, 0);
        down.health = Health::Unreachable;
        let room = Room::of(&[down.clone()], &Detector::default(), Gauge::Slots);
        assert!(room.has_no_servers());
        let room = Room::of(&[down, stale], &Detector::default(), Gauge::Slots);
        assert!(!room.has_no_servers() && room.decode() >= 1.0);
        let mut full = decode(0, 0, 0);
        full.load.kv_usage = f32::NAN;
        assert_eq!(slots(&[full], Detector::default()), 0);
    }

    #[test]
    fn what_was_sent_is_counted_in_requests_or_tokens_or_both() {
        let of = |mode, requests, tokens| {
            Detector::Concurrency(Concurrency {
                mode,
                requests,
                tokens,
                headroom: 0.0,
            })
        };
        let mut used = decode(0, 4, 4);
        used.load.tokens = 400;
        let fleet = [used];
        assert_eq!(slots(&fleet, of(Counted::Requests, 10.0, 1.0)), 6);
        assert_eq!(slots(&fleet, of(Counted::Tokens, 1.0, 1000.0)), 6);
        assert_eq!(slots(&fleet, of(Counted::Both, 7.0, 1000.0)), 3);
        assert_eq!(slots(&fleet, of(Counted::Both, 100.0, 1000.0)), 6);
    }

    #[test]
    fn prefill_servers_are_counted_apart() {
        let busy = Load {
            waiting: 5,
            active: 5,
            ..Load::default()
        };
        let fleet = [decode(0, 0, 0), server(Role::Prefill, busy)];
        let room = Room::of(&fleet, &Detector::default(), Gauge::Slots);
        assert_eq!(
            (fit(room, Need::Decode), fit(room, Need::PrefillAndDecode)),
            (5, 0)
        );
        assert!((room.effective() - 1.0).abs() < 1e-9);
        let only = Room::of(&fleet[..1], &Detector::default(), Gauge::Slots);
        assert_eq!(fit(only, Need::PrefillAndDecode), 5);
        assert!(Room::of(&fleet[1..], &Detector::default(), Gauge::Slots).has_no_servers());
    }
}
