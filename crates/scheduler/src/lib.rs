//! Picks the servers of a request: a decode server first, then, if enough of the prompt is not cached there, a prefill
//! server; or whatever else a [`Plan`] says.
//!
//! Pure: the fleet, the request and the tie-breaking number are arguments; what was decided before lives in the
//! [`PrefixIndex`] and beside it. It scrapes nothing, forwards nothing and knows no clock. Invariant: the same arguments
//! after the same history give the same decision; no decision iterates over a hash map.
#![forbid(unsafe_code)]

mod account;
pub mod config;
mod endpoint;
pub mod engines;
mod filter;
pub mod flow;
mod index;
mod observe;
mod picker;
mod plan;
mod policy;
mod prompt;
mod recent;
mod request;
mod saturation;
mod schedule;
mod scorer;
mod work;
mod workspace;

pub use account::{Account, Said, Share, UnderWay};
pub use endpoint::{Adapters, Endpoint, EndpointId, Health, Identity, Load, Role, Roles};
pub use filter::{Filter, Measure, Requirement};
pub use index::{
    Certainty, Feature, Found, Keys, MAX_KEY_TOKENS, Match, PreciseConfig, PreciseIndex,
    PreciseStats, PrefixIndex, Size, TokenHasher, TokenPrompt,
};
pub use observe::{Observer, Step};
pub use picker::{Picker, Picking};
pub use plan::{
    Approximate, Decider, Events, Handler, InFlight, Named, OnUnavailable, Plan, Precise, Profile,
    ProfileIdx, Session, SessionStrategy, Shares, Shedding, Sooner, Source, StageOrder, Stages,
    Weighted,
};
pub use policy::{Policy, Weights};
pub use prompt::{BLOCK_BYTES, BlockHash, MAX_BLOCKS, Prompt, PromptHasher};
pub use request::{Candidate, Decision, Explanation, Prefill, Request, Stage, Unschedulable};
pub use saturation::{Concurrency, Counted, Detector, Saturation, Utilization};
pub use schedule::Scheduler;
pub use scorer::Scorer;
pub use work::{Backlog, Costs};
