//! A door for the fuzz targets, behind the feature `fuzzing`: what a peer's numbers do to our arithmetic. No API.

use std::ops::Range;

use baton_kv::KvLayout;

use crate::geometry::{Piece, Shard, opened};
use crate::outgoing::{Next, Outgoing};
use crate::wire::Open;

/// The pieces of a lease's parts that an `Open` would have sent, in order, each with its part's index; `None` for zeros. Nothing
/// if it is refused.
pub fn pieces(
    layout: &KvLayout,
    parts: Vec<Range<u32>>,
    open: &Open,
    chunk_bytes: usize,
) -> Option<Vec<(Option<usize>, Range<usize>)>> {
    let heads = 0..layout.n_kv_heads;
    let ours = Shard {
        layout: layout.clone(),
        heads,
    };
    let (source, map) = opened((&ours, chunk_bytes), parts, &open.selection, &open.want)?;
    let mut outgoing = Outgoing::new(map, open.want.clone(), open.credit);
    let chunks = std::iter::from_fn(|| match outgoing.next() {
        Next::Send(chunk) => outgoing.map().range(chunk),
        Next::Starved | Next::Sent => None,
    });
    let pieces = chunks.flat_map(|range| source.pieces(range));
    let shown = pieces.map(|piece| match piece {
        Piece::Bytes(part, range) => (Some(part), range),
        Piece::Zeros(n) => (None, 0..n),
    });
    Some(shown.collect())
}
