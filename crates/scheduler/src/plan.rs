//! How to choose, as data: which profiles there are, who runs them, and what they are made of.

use crate::filter::Filter;
use crate::picker::Picker;
use crate::saturation::Detector;
use crate::scorer::Scorer;
use crate::{Costs, Decision, PreciseConfig, PreciseIndex, Share, TokenHasher};
use std::time::Duration;

/// Everything that decides.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The profiles. Those that the handler does not name never run.
    pub profiles: Vec<Profile>,
    /// Which profiles run, and in which order.
    pub handler: Named<Handler>,
    /// How prompts are cut for the approximate index, and how much of them it remembers.
    pub approximate: Approximate,
    /// How KV events are read, if they are.
    pub precise: Option<Precise>,
    /// When servers count as busy.
    pub saturation: Detector,
    /// How sessions stay where they were, if a profile wants that.
    pub session: Option<Session>,
    /// Most servers whose last use is remembered for `no-hit-lru-scorer`.
    pub recently_used: usize,
    /// How requests of priority below 0 are refused when servers are busy.
    pub shedding: Shedding,
    /// What a request counts while it is under way.
    pub in_flight: InFlight,
    /// What work is, and what [`Scorer::LeastWork`] weighs.
    pub costs: Costs,
}

/// Filters, in order; scorers with their weights; a picker.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Its name.
    pub name: Box<str>,
    /// Filters, in the order in which they run.
    pub filters: Vec<Named<Filter>>,
    /// Scorers.
    pub scorers: Vec<Weighted>,
    /// Takes the best.
    pub picker: Named<Picker>,
}

/// A plugin with the name that the configuration gave it.
#[derive(Clone, Debug, PartialEq)]
pub struct Named<T> {
    /// The name.
    pub name: Box<str>,
    /// Its type, as configurations write it.
    pub kind: &'static str,
    /// What it is.
    pub is: T,
}

impl<T> Named<T> {
    /// A plugin that is called as its type is.
    #[must_use]
    pub fn usual(kind: &'static str, is: T) -> Self {
        let name = kind.into();
        Self { name, kind, is }
    }
}

/// A scorer and how much it counts.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighted {
    /// The name that the configuration gave it.
    pub name: Box<str>,
    /// Its type, as configurations write it.
    pub kind: &'static str,
    /// What it is.
    pub scorer: Scorer,
    /// Its factor.
    pub weight: f64,
}

/// Position of a profile in [`Plan::profiles`].
pub type ProfileIdx = usize;

/// Which profiles run.
#[derive(Clone, Debug, PartialEq)]
pub enum Handler {
    /// One.
    Single(ProfileIdx),
    /// One; the proxy connects to `primary_port`, and the chosen endpoint's own port travels in a header.
    DataParallel {
        /// The profile.
        profile: ProfileIdx,
        /// The port of the process that forwards to the others.
        primary_port: u16,
    },
    /// Decode, and perhaps encode and prefill.
    Disaggregated(Stages),
}

/// The stages of a request whose prompt may be computed elsewhere.
#[derive(Clone, Debug, PartialEq)]
pub struct Stages {
    /// Picks the server that answers.
    pub decode: ProfileIdx,
    /// Picks the server that computes the prompt.
    pub prefill: Option<ProfileIdx>,
    /// Picks the servers that encode pictures and sound.
    pub encode: Option<ProfileIdx>,
    /// Whether prefill runs.
    pub prefill_if: Decider,
    /// Whether encode runs.
    pub encode_if: Decider,
    /// What happens if prefill should run and nobody can.
    pub on_unavailable: OnUnavailable,
    /// Which comes first.
    pub order: StageOrder,
    /// As in [`Handler::DataParallel`], for the decode server.
    pub primary_port: Option<u16>,
    /// A label that prefill and decode must agree in, so that servers of two versions do not exchange KV.
    pub same_label: Option<Box<str>>,
}

/// Whether a stage runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decider {
    /// It does not.
    Never,
    /// It does.
    Always,
    /// If there are pictures, films or sound in the prompt.
    Multimodal,
    /// If enough of the prompt is not cached on the decode server, and anything at all.
    Uncached {
        /// Least uncached tokens.
        at_least: u32,
        /// Least tokens of the whole prompt.
        prompt_at_least: u32,
        /// Who knows what is cached.
        source: Source,
    },
    /// If the first token is expected sooner by way of the best prefill server.
    Sooner(Sooner),
}

/// What is known of the way of KV from a prefill to a decode server, for [`Decider::Sooner`].
///
/// Expected is, on either server, that what waits there is computed first, at the pace that it was seen to have; that KV
/// is sent while the prompt is computed; and that a prompt beside running answers delays each of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sooner {
    /// Prompts with fewer uncached tokens than this stay on the decode server.
    pub at_least: u32,
    /// Seconds from the end of the prompt's computation to the first token, whatever its length.
    pub hand_over: f64,
    /// Seconds that the KV of a token is on its way.
    pub per_token: f64,
    /// What a second counts by which an answer that runs already is delayed, beside 1 for a second before the first token.
    pub delay: f64,
    /// Who knows what is cached.
    pub source: Source,
}

/// As `baton simulate` models it: prompts up to some 440 tokens fit into a step beside answers without making it longer; the
/// step that is under way on the decode server and one for the last prompt token; the
/// KV of Llama-3.3-70B (327,680 bytes a token) over 100 Gb/s.
impl Default for Sooner {
    fn default() -> Self {
        Self {
            at_least: 512,
            hand_over: 0.03,
            per_token: 26e-6,
            delay: 0.1,
            source: Source::Approximate,
        }
    }
}

/// What happens if a prompt should be computed elsewhere and nobody can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnUnavailable {
    /// The decode server computes it.
    #[default]
    Fallback,
    /// The request is refused.
    Fail,
}

/// Which server is picked first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StageOrder {
    /// The one that answers; prefill only if the decider says so.
    #[default]
    DecodeFirst,
    /// The one that computes the prompt, whatever the decider says.
    PrefillFirst,
}

/// Who says what a server has cached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// The index of what was sent where.
    #[default]
    Approximate,
    /// The index of what servers said in KV events.
    Precise,
}

/// Settings of the approximate index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Approximate {
    /// Tokens of a block; a token is taken for four bytes.
    pub block_tokens: u32,
    /// Most blocks of a prompt that are looked at.
    pub most_blocks: usize,
    /// Most blocks remembered of a server.
    pub per_server: usize,
    /// Whether a server that told how large its cache is, is believed.
    pub auto_tune: bool,
}

/// Settings of the precise index and of the events that feed it.
#[derive(Clone, Debug, PartialEq)]
pub struct Precise {
    /// Tokens of a block: the servers' own block size.
    pub block_tokens: u32,
    /// Most blocks in the index.
    pub most_blocks: usize,
    /// What a block in device memory counts.
    pub device_weight: f32,
    /// What a block in host memory counts.
    pub host_weight: f32,
    /// How long a routed request's blocks are expected to appear, if that is guessed.
    pub speculative: Option<Duration>,
    /// Whether metrics tell what is asked of it, and what is reported.
    pub metrics: bool,
    /// Where events come from.
    pub events: Events,
}

/// Where KV events come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Events {
    /// Address to bind, to which servers connect; without it every server is connected to.
    pub bind: Option<Box<str>>,
    /// What topics begin with.
    pub topic: Box<str>,
    /// The servers' port, rank 0.
    pub port: u16,
    /// The servers' port for replay, rank 0; `None` asks for none.
    pub replay_port: Option<u16>,
    /// Whether servers speak SGLang's form of events.
    pub sglang: bool,
}

/// How a session stays on its server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// How a session is known.
    pub strategy: SessionStrategy,
    /// The profile whose server is remembered; the one that answers if there is none.
    pub profile: Option<ProfileIdx>,
}

/// How a session is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionStrategy {
    /// The answer tells the client a token that names the server.
    Token {
        /// The header in which it travels both ways.
        header: Box<str>,
    },
    /// The client names its session, and we remember the server.
    Id {
        /// Headers that are looked at, in order.
        headers: Vec<Box<str>>,
        /// How long after its last request a session is remembered.
        idle: Duration,
    },
}

/// How requests of priority below 0 are refused.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Shedding {
    /// All of them, when saturation reaches 1.
    #[default]
    AtSaturation,
    /// With a probability of `factor · s^power`, s being the servers' mean load.
    Probabilistic {
        /// Waiting requests that make a server busy.
        queue_depth: f64,
        /// Part of the KV pool in use that makes a server busy.
        kv_usage: f64,
        /// The power.
        power: f64,
        /// The factor.
        factor: f64,
    },
}

/// What a request counts in [`Load::tokens`](crate::Load::tokens) while it is under way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InFlight {
    /// Whether tokens of the answer are guessed too.
    pub add_output: bool,
    /// Tokens of an answer for each of the prompt.
    pub output_ratio: f64,
    /// Most guessed tokens of an answer; 0 for no bound.
    pub most_output: u32,
}

/// What a request counts at each of its servers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shares {
    /// At the one that answers.
    pub decode: Share,
    /// At the one that computes the prompt for it, if there is one.
    pub prefill: Share,
}

impl Default for Approximate {
    fn default() -> Self {
        Self {
            block_tokens: 16,
            most_blocks: 2048,
            per_server: 31_250,
            auto_tune: true,
        }
    }
}

impl Default for InFlight {
    fn default() -> Self {
        Self {
            add_output: false,
            output_ratio: 1.5,
            most_output: 0,
        }
    }
}

impl InFlight {
    /// Tokens that a request counts, of which `uncached` have to be computed; `most` is the client's bound of the answer.
    #[must_use]
    pub fn tokens(&self, uncached: u32, most: Option<u32>) -> u64 {
        if !self.add_output {
            return uncached.into();
        }
        let bound = match self.most_output {
            0 => u32::MAX,
            bound => bound,
        };
        let guess = f64::from(uncached) * self.output_ratio;
        let output = (guess as u64).min(bound.min(most.unwrap_or(u32::MAX)).into());
        u64::from(uncached) + output
    }
}

impl Plan {
    /// An empty index of what servers report, if the plan has one; `hasher` makes its keys, and those of prompts.
    #[must_use]
    pub fn precise_index(&self, hasher: TokenHasher) -> Option<PreciseIndex> {
        let precise = self.precise.as_ref()?;
        let usual = PreciseConfig::default();
        let config = PreciseConfig {
            most_per_source: usual.most_per_source.min(precise.most_blocks),
            weight_off_device: precise.host_weight,
            ..usual
        };
        Some(PreciseIndex::new(hasher, config))
    }

    /// What a request that is sent as `decision` says counts at the servers that are busy with it.
    #[must_use]
    pub fn shares(&self, decision: &Decision) -> Shares {
        let uncached = decision.uncached_tokens;
        let elsewhere = decision.prefill.server().is_some();
        Shares {
            decode: Share {
                tokens: self.in_flight.tokens(uncached, None),
                // What another server computes does not keep this one busy.
                work: if elsewhere { 0.0 } else { decision.work },
            },
            prefill: Share {
                tokens: uncached.into(),
                work: decision.work,
            },
        }
    }

    /// How long blocks of a routed request are expected to be reported, if that is guessed.
    pub(crate) fn speculative(&self) -> Option<Duration> {
        self.precise.as_ref()?.speculative
    }

    /// A plan with one profile and defaults for everything else.
    #[must_use]
    pub fn single(profile: Profile) -> Self {
        let handler = Named::usual("single-profile-handler", Handler::Single(0));
        Self::with(vec![profile], handler)
    }

    /// A plan with these profiles and defaults for everything else.
    pub(crate) fn with(profiles: Vec<Profile>, handler: Named<Handler>) -> Self {
        Self {
            profiles,
            handler,
            approximate: Approximate::default(),
            precise: None,
            saturation: Detector::default(),
            session: None,
            recently_used: 1024,
            shedding: Shedding::default(),
            in_flight: InFlight::default(),
            costs: Costs::default(),
        }
    }
}
