//! What the scheduler knows of a server at one moment.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Names a server. Given out by whoever keeps the fleet, never reused while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(pub u32);

/// What a server is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Computes prompts for others.
    Prefill,
    /// Generates; may be told to fetch a prompt's KV from a prefill server.
    Decode,
    /// Generates without being told where to fetch KV, unless prefill servers are there too.
    Both,
}

impl Role {
    /// Whether clients' requests may be sent to it.
    #[must_use]
    pub fn decodes(self) -> bool {
        matches!(self, Self::Decode | Self::Both)
    }

    /// Whether decode servers may be sent to it. A server of both roles keeps its prompts to itself: two of them would
    /// only exchange their work.
    #[must_use]
    pub fn prefills_for_others(self) -> bool {
        self == Self::Prefill
    }
}

/// Whether a server takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It does.
    Healthy,
    /// It finishes what it has.
    Draining,
    /// It does not answer, or is not up yet.
    Unreachable,
}

/// How busy a server is, its own account and what was sent to it since taken together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests that wait for a place in the batch.
    pub waiting: u32,
    /// Requests that wait, run, or are on their way: at least `waiting`.
    pub active: u32,
    /// Part of the KV pool in use, 0 to 1; other values are clamped, not-a-number counts as full.
    pub kv_usage: f32,
}

/// A server, as it was when the snapshot was taken.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its name.
    pub id: EndpointId,
    /// What it is there for.
    pub role: Role,
    /// Names of the models it serves; `None` if it did not tell, which makes it a candidate for every model.
    pub models: Option<Arc<[Box<str>]>>,
    /// Whether it takes requests.
    pub health: Health,
    /// How busy it is.
    pub load: Load,
}

impl Endpoint {
    pub(crate) fn is_healthy(&self) -> bool {
        self.health == Health::Healthy
    }

    /// A request without a model name means the server's first.
    pub(crate) fn serves(&self, model: Option<&str>) -> bool {
        match (&self.models, model) {
            (Some(models), Some(model)) => models.iter().any(|m| **m == *model),
            _ => true,
        }
    }
}
