//! When servers count as busy.

use crate::{Endpoint, Load, Roles};

/// Measures how busy a set of servers is: 1 is as busy as it should get.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Detector {
    /// By what servers say of themselves.
    Utilization(Utilization),
    /// By what was sent to them.
    Concurrency(Concurrency),
}

/// Bounds of what servers say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Utilization {
    /// Waiting requests that make a server busy.
    pub queue_depth: f64,
    /// Part of the KV pool in use that makes a server busy.
    pub kv_usage: f64,
    /// By how much more a filter lets a server be busy, 0 for not at all.
    pub headroom: f64,
}

/// Bounds of what is sent to a server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Concurrency {
    /// What counts.
    pub mode: Counted,
    /// Most requests at a server.
    pub requests: f64,
    /// Most tokens at a server.
    pub tokens: f64,
    /// By how much more a filter lets a server have, 0 for not at all.
    pub headroom: f64,
}

/// What a [`Concurrency`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// Requests.
    Requests,
    /// Tokens.
    Tokens,
    /// Whichever is nearer to its bound.
    Both,
}

impl Default for Detector {
    fn default() -> Self {
        Self::Utilization(Utilization::default())
    }
}

impl Default for Utilization {
    fn default() -> Self {
        Self {
            queue_depth: 5.0,
            kv_usage: 0.8,
            headroom: 0.0,
        }
    }
}

impl Default for Concurrency {
    fn default() -> Self {
        Self {
            mode: Counted::Requests,
            requests: 100.0,
            tokens: 1e6,
            headroom: 0.0,
        }
    }
}

impl Utilization {
    /// How busy a server is; one that nothing recent is known of counts as busy.
    #[must_use]
    pub fn of(&self, load: &Load) -> f64 {
        let kv = usage(load);
        if load.fresh {
            (f64::from(load.waiting) / self.queue_depth).max(kv / self.kv_usage)
        } else {
            1.0
        }
    }

    /// Whether a filter lets it have more.
    pub(crate) fn has_room(&self, load: &Load) -> bool {
        let more = 1.0 + self.headroom;
        load.fresh
            && f64::from(load.waiting) < self.queue_depth * more
            && usage(load) < self.kv_usage * more
    }
}

impl Concurrency {
    /// How much of what it may have a server has.
    #[must_use]
    pub fn of(&self, load: &Load) -> f64 {
        let requests = f64::from(load.active) / self.requests;
        let tokens = load.tokens as f64 / self.tokens;
        match self.mode {
            Counted::Requests => requests,
            Counted::Tokens => tokens,
            Counted::Both => requests.max(tokens),
        }
    }

    /// Whether a filter lets it have more.
    pub(crate) fn has_room(&self, load: &Load) -> bool {
        self.of(load) < 1.0 + self.headroom
    }
}

impl Detector {
    /// The mean over `servers`; without servers, 1.
    #[must_use]
    pub fn of<'a>(&self, servers: impl Iterator<Item = &'a Endpoint>) -> f64 {
        let (sum, n) = servers.fold((0.0, 0u32), |(sum, n), server| {
            let busy = match self {
                Self::Utilization(u) => u.of(&server.load),
                Self::Concurrency(c) => c.of(&server.load),
            };
            (sum + busy, n + 1)
        });
        if n == 0 { 1.0 } else { sum / f64::from(n) }
    }

    /// How busy a fleet is: its decode servers or its prefill servers, whoever is busier. Only healthy servers count.
    #[must_use]
    pub fn of_fleet(&self, fleet: &[Endpoint]) -> Saturation {
        let of = |roles: Roles| {
            let mut servers = (fleet.iter())
                .filter(|e| e.is_healthy() && roles.contains(e.role))
                .peekable();
            servers.peek().is_some().then(|| self.of(servers))
        };
        Saturation {
            prefill: of(Roles::PREFILL_ONLY),
            decode: of(Roles::DECODE).unwrap_or(1.0),
        }
    }
}

/// How busy a fleet is, by what servers are there for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Saturation {
    /// Servers that only compute prompts for others; `None` if there are none.
    pub prefill: Option<f64>,
    /// Servers that generate; 1 if there are none.
    pub decode: f64,
}

impl Saturation {
    /// The greater of both.
    #[must_use]
    pub fn effective(&self) -> f64 {
        self.prefill.map_or(self.decode, |p| p.max(self.decode))
    }
}

/// Part of the KV pool in use; not-a-number counts as full.
pub(crate) fn usage(load: &Load) -> f64 {
    let usage = f64::from(load.kv_usage);
    if usage.is_nan() { 1.0 } else { usage.max(0.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EndpointId, Role};

    fn server(role: Role, load: Load) -> Endpoint {
        Endpoint {
            load,
            ..Endpoint::new(EndpointId(0), role)
        }
    }

    #[test]
    fn a_server_is_as_busy_as_the_busier_of_queue_and_memory() {
        let u = Utilization::default();
        let load = |waiting, kv_usage, fresh| Load {
            waiting,
            kv_usage,
            fresh,
            ..Load::default()
        };
        for (load, busy, room) in [
            (load(0, 0.0, true), 0.0, true),
            (load(4, 0.2, true), 0.8, true),
            (load(1, 0.4, true), 0.5, true),
            (load(10, 0.0, true), 2.0, false),
            (load(0, f32::NAN, true), 1.25, false),
            (load(0, 0.0, false), 1.0, false),
        ] {
            assert!((u.of(&load) - busy).abs() < 1e-6, "{load:?}");
            assert_eq!(u.has_room(&load), room, "{load:?}");
        }
        let more = Utilization { headroom: 1.0, ..u };
        assert!(more.has_room(&load(9, 0.0, true)) && !more.has_room(&load(10, 0.0, true)));
    }

    #[test]
    fn concurrency_counts_requests_or_tokens_or_whichever_is_nearer_to_its_bound() {
        let load = Load {
            active: 50,
            tokens: 750_000,
            ..Load::default()
        };
        let of = |mode| {
            Concurrency {
                mode,
                ..Concurrency::default()
            }
            .of(&load)
        };
        assert_eq!(
            [Counted::Requests, Counted::Tokens, Counted::Both].map(of),
            [0.5, 0.75, 0.75]
        );
    }

    #[test]
    fn a_fleet_is_as_busy_as_the_busier_half_of_it() {
        let waiting = |waiting| Load {
            waiting,
            ..Load::default()
        };
        let d = Detector::default();
        let fleet = [
            server(Role::Decode, waiting(5)),
            server(Role::Unlabelled, waiting(0)),
            server(Role::Prefill, waiting(10)),
        ];
        let of_all = d.of_fleet(&fleet);
        assert_eq!((of_all.decode, of_all.prefill), (0.5, Some(2.0)));
        assert_eq!(of_all.effective(), 2.0);
        assert_eq!(d.of_fleet(&fleet[..2]).effective(), 0.5);
        assert_eq!(d.of_fleet(&[]).effective(), 1.0);
    }
}
