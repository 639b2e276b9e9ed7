//! Picks the servers of a request: a decode server first, then, if enough of the prompt is not cached there, a prefill
//! server.
//!
//! Pure: the fleet, the request and the tie-breaking number are arguments; what was decided before lives in the
//! [`PrefixIndex`]. It scrapes nothing, forwards nothing and knows no clock. Invariant: the same arguments after the
//! same history give the same decision; no decision iterates over a hash map.
#![forbid(unsafe_code)]

mod endpoint;
mod policy;
mod prefix;
mod prompt;
mod schedule;

pub use endpoint::{Endpoint, EndpointId, Health, Load, Role};
pub use policy::{Policy, Score, Weights};
pub use prefix::{Certainty, Match, PrefixIndex};
pub use prompt::{BLOCK_BYTES, BlockHash, MAX_BLOCKS, Prompt, PromptHasher};
pub use schedule::{Decision, Prefill, Request, Scheduler, Unschedulable};
