//! Who watches a decision while it is made: told of every plugin that has run, and asked where to note the reasons.
//!
//! There is no clock here: whoever has one knows how long a plugin took by when it was told.

use crate::{Explanation, ProfileIdx, Source};

/// What has just been done, since the step before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The profile handler has said that this profile runs next; what follows is of it.
    Profile(ProfileIdx),
    /// An index was asked what the candidates have of the prompt.
    Lookup(Source),
    /// The filter at this place of the profile has run.
    Filter(usize),
    /// The scorer at this place of the profile has run.
    Scorer(usize),
    /// The profile's picker has run.
    Picker,
    /// The profile handler has made a decision of what was picked, or has said that there is none.
    Results,
    /// Something that is no plugin's.
    Other,
}

/// Watches a decision. One that does nothing costs nothing.
pub trait Observer {
    /// This was just done.
    fn did(&mut self, _: Step) {}

    /// Where reasons are noted, if they are wanted.
    fn explanation(&mut self) -> Option<&mut Explanation> {
        None
    }
}

/// Nobody watches.
impl Observer for () {}

impl Observer for Explanation {
    fn explanation(&mut self) -> Option<&mut Explanation> {
        Some(self)
    }
}
