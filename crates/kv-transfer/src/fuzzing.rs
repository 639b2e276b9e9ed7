//! A door for the fuzz targets, behind the feature `fuzzing`: what a peer's numbers do to our arithmetic. No API.

use std::ops::Range;

use baton_kv::KvLayout;

use crate::geometry::opened;
use crate::outgoing::{Next, Outgoing};
use crate::wire::Open;

/// The pieces of a lease's bytes that an `Open` would have sent, in order; `None` if it is refused.
pub fn pieces(
    layout: &KvLayout,
    lease_blocks: u32,
    open: &Open,
    chunk_bytes: usize,
) -> Option<Vec<Range<usize>>> {
    let end = open.first_block.checked_add(open.n_blocks)?;
    let (window, map) = opened(
        (layout, chunk_bytes),
        &(0..lease_blocks),
        open.first_block..end,
        &open.want,
    )?;
    let mut outgoing = Outgoing::new(map, open.want.clone(), open.credit);
    let chunks = std::iter::from_fn(|| match outgoing.next() {
        Next::Send(chunk) => outgoing.map().range(chunk),
        Next::Starved | Next::Sent => None,
    });
    Some(chunks.flat_map(|range| window.pieces(range)).collect())
}
