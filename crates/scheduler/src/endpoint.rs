//! What the scheduler knows of a server at one moment.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Names a server. Given out by whoever keeps the fleet, never reused while the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct EndpointId(pub u32);

/// What a server is there for: the value of the label `llm-d.ai/role`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Computes prompts for others.
    Prefill,
    /// Generates; may be told to fetch a prompt's KV from a prefill server.
    Decode,
    /// Generates without being told where to fetch KV, unless prefill servers are there too.
    #[serde(alias = "prefill-decode")]
    Both,
    /// Encodes pictures and sound for others.
    Encode,
    /// Encodes, and computes prompts for others.
    EncodePrefill,
    /// Does everything.
    EncodePrefillDecode,
    /// Nobody said: generates, and does nothing for others.
    #[serde(skip)]
    Unlabelled,
    /// Something that is not known here: takes no part.
    #[serde(skip)]
    Other,
}

/// Names of roles as labels have them, and the two of `Both`.
const ROLES: [(&str, Role); 7] = [
    ("prefill", Role::Prefill),
    ("decode", Role::Decode),
    ("both", Role::Both),
    ("prefill-decode", Role::Both),
    ("encode", Role::Encode),
    ("encode-prefill", Role::EncodePrefill),
    ("encode-prefill-decode", Role::EncodePrefillDecode),
];

impl Role {
    /// The role that a label's value means.
    #[must_use]
    pub fn of_label(value: Option<&str>) -> Self {
        let Some(value) = value else {
            return Self::Unlabelled;
        };
        let known = ROLES.iter().find(|(name, _)| *name == value);
        known.map_or(Self::Other, |(_, role)| *role)
    }

    /// Its name, as a label has it; `none` and `other` for the two that no label gives.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unlabelled => "none",
            known => {
                let found = ROLES.iter().find(|(_, role)| *role == known);
                found.map_or("other", |(name, _)| name)
            }
        }
    }

    /// Whether clients' requests may be sent to it.
    #[must_use]
    pub fn decodes(self) -> bool {
        Roles::DECODE.contains(self)
    }

    /// Whether decode servers may be sent to it. A server of both roles keeps its prompts to itself: two of them would
    /// only exchange their work.
    #[must_use]
    pub fn prefills_for_others(self) -> bool {
        Roles::PREFILL_ONLY.contains(self)
    }
}

/// A set of roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    /// What `decode-filter` keeps: whoever generates, and whoever has no label.
    pub const DECODE: Self = Self::of(&[
        Role::Decode,
        Role::Both,
        Role::EncodePrefillDecode,
        Role::Unlabelled,
    ]);
    /// What `prefill-filter` keeps.
    pub const PREFILL: Self = Self::of(&[
        Role::Prefill,
        Role::EncodePrefill,
        Role::Both,
        Role::EncodePrefillDecode,
    ]);
    /// What `encode-filter` keeps.
    pub const ENCODE: Self =
        Self::of(&[Role::Encode, Role::EncodePrefill, Role::EncodePrefillDecode]);
    /// Servers that are there to compute others' prompts, and do not generate.
    pub const PREFILL_ONLY: Self = Self::of(&[Role::Prefill, Role::EncodePrefill]);

    /// The set of `roles`.
    #[must_use]
    pub const fn of(roles: &[Role]) -> Self {
        let (mut set, mut i) = (0, 0);
        while i < roles.len() {
            set |= 1 << roles[i] as u8;
            i += 1;
        }
        Self(set)
    }

    /// Whether `role` is in it.
    #[must_use]
    pub const fn contains(self, role: Role) -> bool {
        self.0 & (1 << role as u8) != 0
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
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Requests that wait for a place in the batch, as the server said.
    pub waiting: u32,
    /// Requests in the batch, as the server said.
    pub running: u32,
    /// Requests that wait, run, or are on their way: at least `waiting`.
    pub active: u32,
    /// How many more requests are under way there than when it said what it said: what it has not shown yet.
    pub unseen: u32,
    /// Tokens of the requests that were sent there and are not over, by our own account.
    pub tokens: u64,
    /// What is probably left to compute of the prompts that were sent there and are not answered yet, by our own account,
    /// as [`Costs::work`](crate::Costs::work) counts it.
    pub queued_work: f64,
    /// Such work a second, as it was seen to do it; `None` before its first answer.
    pub pace: Option<f64>,
    /// Part of the KV pool in use, 0 to 1; other values are clamped, not-a-number counts as full.
    pub kv_usage: f32,
    /// Whether `waiting`, `running` and `kv_usage` are recent enough to be believed. If not, scorers take the worst.
    pub fresh: bool,
}

/// Idle, and known to be.
impl Default for Load {
    fn default() -> Self {
        Self {
            waiting: 0,
            running: 0,
            active: 0,
            unseen: 0,
            tokens: 0,
            queued_work: 0.0,
            pace: None,
            kv_usage: 0.0,
            fresh: true,
        }
    }
}

/// LoRA adapters of a server, as it said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Adapters {
    /// Those that requests in the batch use.
    pub running: Vec<Box<str>>,
    /// Those that waiting requests need.
    pub waiting: Vec<Box<str>>,
    /// How many fit at a time.
    pub most: u32,
}

/// What does not change while a server is what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// `namespace/pod-rank-N`.
    pub name: Box<str>,
    /// The pod's labels, in the order of their keys: see [`Identity::new`].
    labels: Box<[(Box<str>, Box<str>)]>,
}

impl Identity {
    /// An identity; of labels with the same key the last one counts.
    #[must_use]
    pub fn new(
        name: impl Into<Box<str>>,
        labels: impl IntoIterator<Item = (Box<str>, Box<str>)>,
    ) -> Self {
        let labels: std::collections::BTreeMap<_, _> = labels.into_iter().collect();
        Self {
            name: name.into(),
            labels: labels.into_iter().collect(),
        }
    }

    /// The value of a label.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        let found = self.labels.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        Some(&self.labels[found].1)
    }

    /// All labels, in the order of their keys.
    #[must_use]
    pub fn labels(&self) -> &[(Box<str>, Box<str>)] {
        &self.labels
    }
}

/// A server, as it was when the snapshot was taken.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its name.
    pub id: EndpointId,
    /// What it is there for.
    pub role: Role,
    /// Whether it takes requests.
    pub health: Health,
    /// How busy it is.
    pub load: Load,
    /// Names of the models it serves; `None` if it did not tell, which makes it a candidate for every model.
    pub models: Option<Arc<[Box<str>]>>,
    /// Its adapters, if it told.
    pub adapters: Option<Arc<Adapters>>,
    /// Its name in the cluster, and its labels.
    pub identity: Arc<Identity>,
}

impl Endpoint {
    /// An idle, healthy server without labels that did not tell what it serves.
    #[must_use]
    pub fn new(id: EndpointId, role: Role) -> Self {
        Self {
            id,
            role,
            health: Health::Healthy,
            load: Load::default(),
            models: None,
            adapters: None,
            identity: Arc::default(),
        }
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_say_what_a_server_is_there_for() {
        let cases = [
            (Some("prefill"), Role::Prefill, "prefill", false),
            (Some("decode"), Role::Decode, "decode", true),
            (Some("both"), Role::Both, "both", true),
            (Some("prefill-decode"), Role::Both, "both", true),
            (Some("encode"), Role::Encode, "encode", false),
            (
                Some("encode-prefill-decode"),
                Role::EncodePrefillDecode,
                "encode-prefill-decode",
                true,
            ),
            (Some("cook"), Role::Other, "other", false),
            (None, Role::Unlabelled, "none", true),
        ];
        for (label, role, name, decodes) in cases {
            let found = Role::of_label(label);
            assert_eq!(
                (found, found.name(), found.decodes()),
                (role, name, decodes)
            );
        }
        assert!(Roles::PREFILL.contains(Role::Both) && !Role::Both.prefills_for_others());
        assert!(!Roles::PREFILL.contains(Role::Unlabelled));
    }

    #[test]
    fn a_label_is_found_by_its_key() {
        let pairs = [("b", "2"), ("a", "1"), ("b", "3")];
        let identity = Identity::new("ns/pod-rank-0", pairs.map(|(k, v)| (k.into(), v.into())));
        assert_eq!(
            (
                identity.label("a"),
                identity.label("b"),
                identity.label("c")
            ),
            (Some("1"), Some("3"), None)
        );
    }
}
