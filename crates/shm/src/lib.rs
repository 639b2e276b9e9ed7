//! Host memory that the processes of one machine share: an [`Arena`], which one process writes, and [`View`]s of it, which
//! others read.
//!
//! An arena is one sealed memory file: it never shrinks nor grows, and nobody but its owner can write to it. Ranges of it
//! are handed out as [`Room`]s. A range that is given up loses its mark before it is used again, so that a reader who copies
//! first and looks at the mark then never keeps bytes of somebody else. The file goes from process to process through a
//! [`Door`]; where a room lies is told by other means, as a [`Place`].
//!
//! Where there are no memory files an arena is private memory, and nobody gets a view of it.
#![allow(
    unsafe_code,
    reason = "memory of other processes is reached through pointers"
)]

mod arena;
#[cfg_attr(not(target_os = "linux"), path = "no_door.rs")]
mod door;
mod holes;
mod past_caches;
mod view;

pub use arena::{Arena, Place, Room};
pub use door::{Door, knock};
pub use view::View;

/// Rooms at the same time.
pub const MAX_ROOMS: usize = 4096;
/// The marks lie before the rooms.
const HEAD_BYTES: usize = MAX_ROOMS * size_of::<u64>();
