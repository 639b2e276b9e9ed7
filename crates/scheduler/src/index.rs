//! What is cached where: by what was sent there, or by what the servers say themselves.

mod approximate;
mod holders;
mod precise;
mod token_keys;

pub use approximate::{Certainty, Match, PrefixIndex, Size};
pub use precise::{Found, PreciseConfig, PreciseIndex, PreciseStats};
pub use token_keys::{Feature, Keys, MAX_KEY_TOKENS, TokenHasher, TokenPrompt};
