//! How much servers have room for, counted down by every request that is let go.

use super::Grant;

/// Which servers a request needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Need {
    /// One that generates.
    #[default]
    Decode = 0,
    /// Probably also one that computes its prompt.
    PrefillAndDecode = 1,
}

/// How servers' loads make one number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gauge {
    /// Their mean, where a server far above its bound counts as that much: llm-d's rule, by which one bad server stops all.
    Mean,
    /// Their mean, where no server counts more than full: there is room as long as one server has room.
    #[default]
    Slots,
}

/// How busy servers of one kind are: 1 is as busy as they should get; and what one more request, or token, adds to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Level {
    pub(super) value: f64,
    pub(super) per_request: f64,
    pub(super) per_token: f64,
}

/// Sums of small steps do not come out even.
const EPSILON: f64 = 1e-9;

impl Level {
    fn take(&mut self, requests: u32, tokens: u64) {
        let requests = self.per_request * f64::from(requests);
        self.value += requests.max(self.per_token * tokens as f64);
    }

    fn fits(&self, ceiling: f64) -> bool {
        self.value + EPSILON < ceiling
    }
}

/// How much servers have room for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Room {
    pub(super) decode: Option<Level>,
    pub(super) prefill: Option<Level>,
}

impl Room {
    /// There is no server.
    #[must_use]
    pub fn no_servers() -> Self {
        Self {
            decode: None,
            prefill: None,
        }
    }

    /// Room for so many requests, of which so many may need prefill servers: the form in which tests and simulations
    /// say it. `None` if there are no prefill servers.
    #[must_use]
    pub fn of_slots(decode: u32, prefill: Option<u32>) -> Self {
        let level = |slots: u32| Level {
            value: if slots == 0 { 1.0 } else { 0.0 },
            per_request: 1.0 / f64::from(slots.max(1)),
            per_token: 0.0,
        };
        Self {
            decode: Some(level(decode)),
            prefill: prefill.map(level),
        }
    }

    /// Whether nobody could serve anything.
    #[must_use]
    pub fn has_no_servers(&self) -> bool {
        self.decode.is_none()
    }

    /// How busy servers that generate are; 1 if there are none.
    #[must_use]
    pub fn decode(&self) -> f64 {
        self.decode.map_or(1.0, |level| level.value)
    }

    /// How busy servers are that compute prompts for others, if there are any.
    #[must_use]
    pub fn prefill(&self) -> Option<f64> {
        self.prefill.map(|level| level.value)
    }

    /// The greater of both.
    #[must_use]
    pub fn effective(&self) -> f64 {
        let decode = self.decode();
        self.prefill().map_or(decode, |prefill| prefill.max(decode))
    }

    pub(super) fn fits(&self, need: Need, ceiling: f64) -> bool {
        let fits = |level: &Level| level.fits(ceiling);
        let decode = self.decode.as_ref().is_some_and(fits);
        decode && (need == Need::Decode || self.prefill.as_ref().is_none_or(fits))
    }

    pub(super) fn take(&mut self, grant: Grant) {
        let mut one = Pending::default();
        one.add(grant);
        self.take_pending(&one);
    }

    pub(super) fn take_pending(&mut self, pending: &Pending) {
        if let Some(decode) = &mut self.decode {
            decode.take(pending.all.0, pending.all.1);
        }
        if let Some(prefill) = &mut self.prefill {
            prefill.take(pending.prefill.0, pending.prefill.1);
        }
    }
}

/// Requests and tokens that were let go and are not counted at servers yet; of all, and of those that need prefill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pending {
    all: (u32, u64),
    prefill: (u32, u64),
}

impl Pending {
    pub(super) fn add(&mut self, grant: Grant) {
        self.for_each(grant, |sum| {
            sum.0 += 1;
            sum.1 += u64::from(grant.tokens);
        });
    }

    pub(super) fn sub(&mut self, grant: Grant) {
        self.for_each(grant, |sum| {
            sum.0 = sum.0.saturating_sub(1);
            sum.1 = sum.1.saturating_sub(grant.tokens.into());
        });
    }

    fn for_each(&mut self, grant: Grant, change: impl Fn(&mut (u32, u64))) {
        change(&mut self.all);
        if grant.need == Need::PrefillAndDecode {
            change(&mut self.prefill);
        }
    }
}
