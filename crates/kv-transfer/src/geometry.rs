//! Where bytes lie: a transfer cut into chunks, and a range of blocks inside a lease.
//!
//! A transfer of `n` blocks is `[layer][kv head][block][K, V][token][dim]` of just those blocks, cut within each
//! layer into chunks of equal length but the last. All arithmetic on numbers of a peer is checked.

use std::ops::Range;

use baton_kv::KvLayout;

/// The chunks of one transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChunkMap {
    n_blocks: u32,
    n_layers: u32,
    chunks_per_layer: u32,
    chunk_bytes: usize,
    /// One kv head of one layer, all blocks.
    row_bytes: usize,
    /// One kv head of one layer of one block.
    cell_bytes: usize,
    layer_bytes: usize,
}

impl ChunkMap {
    /// `None` for no blocks, a chunk length of 0, or sizes that no memory holds.
    pub(crate) fn new(layout: &KvLayout, n_blocks: u32, chunk_bytes: usize) -> Option<Self> {
        let cell_bytes = layout.head_block_bytes();
        let row_bytes = cell_bytes.checked_mul(n_blocks as usize)?;
        let layer_bytes = row_bytes.checked_mul(layout.n_kv_heads as usize)?;
        let total = layer_bytes.checked_mul(layout.n_layers as usize)?;
        if total == 0 || chunk_bytes == 0 {
            return None;
        }
        let chunks_per_layer = u32::try_from(layer_bytes.div_ceil(chunk_bytes)).ok()?;
        chunks_per_layer.checked_mul(layout.n_layers)?;
        let n_layers = layout.n_layers;
        Some(Self {
            n_blocks,
            n_layers,
            chunks_per_layer,
            chunk_bytes,
            row_bytes,
            cell_bytes,
            layer_bytes,
        })
    }

    pub(crate) fn n_blocks(&self) -> u32 {
        self.n_blocks
    }

    pub(crate) fn n_chunks(&self) -> u32 {
        self.chunks_per_layer * self.n_layers
    }

    pub(crate) fn total_bytes(&self) -> usize {
        self.layer_bytes * self.n_layers as usize
    }

    /// The bytes of a chunk within the transfer.
    pub(crate) fn range(&self, chunk: u32) -> Option<Range<usize>> {
        if chunk >= self.n_chunks() {
            return None;
        }
        let layer = (chunk / self.chunks_per_layer) as usize;
        let begin = (chunk % self.chunks_per_layer) as usize * self.chunk_bytes;
        let end = (begin + self.chunk_bytes).min(self.layer_bytes);
        Some(layer * self.layer_bytes + begin..layer * self.layer_bytes + end)
    }

    /// Leading blocks that are whole, over all layers and heads, when `missing` chunks never came.
    pub(crate) fn whole_blocks(&self, missing: impl Iterator<Item = u32>) -> u32 {
        missing
            .filter_map(|chunk| self.range(chunk))
            .map(|gap| self.blocks_before(&gap))
            .min()
            .unwrap_or(self.n_blocks)
    }

    /// Leading blocks of which `gap` takes nothing away.
    fn blocks_before(&self, gap: &Range<usize>) -> u32 {
        let column = gap.start % self.row_bytes;
        let reaches_next_row = gap.end - gap.start > self.row_bytes - column;
        if reaches_next_row {
            0
        } else {
            u32::try_from(column / self.cell_bytes).unwrap_or(0)
        }
    }

    /// Keeps the first `n_blocks` of a buffer that holds all of them.
    pub(crate) fn compact(&self, data: &mut [u8], n_blocks: u32) -> usize {
        let keep = self.cell_bytes * n_blocks as usize;
        let n_rows = self.total_bytes() / self.row_bytes;
        for row in 0..n_rows {
            data.copy_within(
                row * self.row_bytes..row * self.row_bytes + keep,
                row * keep,
            );
        }
        n_rows * keep
    }
}

/// A range of blocks inside the bytes of a lease's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// Blocks of the part.
    lease_blocks: usize,
    first_block: usize,
    n_blocks: usize,
    cell_bytes: usize,
}

impl Window {
    /// `None` when the part has no such blocks.
    pub(crate) fn new(layout: &KvLayout, lease_blocks: u32, blocks: Range<u32>) -> Option<Self> {
        if blocks.is_empty() || blocks.end > lease_blocks {
            return None;
        }
        Some(Self {
            lease_blocks: lease_blocks as usize,
            first_block: blocks.start as usize,
            n_blocks: blocks.len(),
            cell_bytes: layout.head_block_bytes(),
        })
    }

    /// Blocks of the part.
    pub(crate) fn lease_blocks(&self) -> u32 {
        narrow(self.lease_blocks)
    }

    /// The first block, counted from the first of the part.
    pub(crate) fn first_block(&self) -> u32 {
        narrow(self.first_block)
    }

    pub(crate) fn n_blocks(&self) -> u32 {
        narrow(self.n_blocks)
    }

    /// The pieces of the lease's bytes that make up `range` of the transfer, in order.
    pub(crate) fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        // The whole lease is one piece, however long: source and transfer are then the same bytes.
        let is_whole = self.n_blocks == self.lease_blocks;
        let row = if is_whole {
            usize::MAX
        } else {
            self.n_blocks * self.cell_bytes
        };
        let stride = self.lease_blocks * self.cell_bytes;
        let skip = self.first_block * self.cell_bytes;
        let mut at = range.start;
        std::iter::from_fn(move || {
            let (r, column) = (at / row, at % row);
            let len = (row - column).min(range.end - at);
            at += len;
            let begin = r * stride + skip + column;
            (len > 0).then_some(begin..begin + len)
        })
    }
}

/// Counts of blocks come from 32 bits.
fn narrow(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The range and the chunks that a peer asks for: `blocks` out of those that lie together in `part`, both counted from the
/// first of the lease; `None` if it asks for what is not there.
pub(crate) fn opened(
    (layout, chunk_bytes): (&KvLayout, usize),
    part: &Range<u32>,
    blocks: Range<u32>,
    want: &[u8],
) -> Option<(Window, ChunkMap)> {
    let begin = blocks.start.checked_sub(part.start)?;
    let n_blocks = blocks.end.checked_sub(blocks.start)?;
    let window = Window::new(layout, part.len().try_into().ok()?, begin..begin + n_blocks)?;
    let map = ChunkMap::new(layout, n_blocks, chunk_bytes)?;
    let n_bitmap = map.n_chunks().div_ceil(8) as usize;
    (want.is_empty() || want.len() == n_bitmap).then_some((window, map))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use baton_kv::DType;
    use proptest::prelude::*;

    pub(crate) fn layout() -> KvLayout {
        KvLayout {
            n_layers: 3,
            n_kv_heads: 2,
            head_dim: 4,
            block_size: 2,
            dtype: DType::F32,
            model_fingerprint: 1,
        }
    }

    /// What a transfer of `blocks` out of a lease must hold, by definition.
    pub(crate) fn select(layout: &KvLayout, data: &[u8], blocks: Range<u32>) -> Vec<u8> {
        let cell = layout.head_block_bytes();
        let rows = (layout.n_layers * layout.n_kv_heads) as usize;
        let row = data.len() / rows;
        let cells = blocks.start as usize * cell..blocks.end as usize * cell;
        data.chunks(row)
            .flat_map(|r| r[cells.clone()].to_vec())
            .collect()
    }

    pub(crate) fn pattern(len: usize) -> Vec<u8> {
        (0..len)
            .map(|i| (i * 31 % 251) as u8 ^ (i >> 8) as u8)
            .collect()
    }

    proptest! {
        #[test]
        fn chunks_tile_the_transfer_and_stay_within_a_layer(n_blocks in 1u32..20, chunk in 1usize..3000) {
            let map = ChunkMap::new(&layout(), n_blocks, chunk).unwrap();
            let mut at = 0;
            for c in 0..map.n_chunks() {
                let range = map.range(c).unwrap();
                prop_assert_eq!(range.start, at);
                prop_assert!(!range.is_empty() && range.len() <= chunk);
                prop_assert_eq!(range.start / map.layer_bytes, (range.end - 1) / map.layer_bytes);
                at = range.end;
            }
            prop_assert_eq!(at, map.total_bytes());
            prop_assert_eq!(map.range(map.n_chunks()), None);
        }

        #[test]
        fn pieces_gather_the_blocks_asked_for(
            lease_blocks in 1u32..12, first in 0u32..12, n in 1u32..12, chunk in 1usize..999,
        ) {
            let layout = layout();
            let blocks = first..first + n;
            let window = Window::new(&layout, lease_blocks, blocks.clone());
            prop_assert_eq!(window.is_some(), blocks.end <= lease_blocks);
            if let Some(window) = window {
                let data = pattern(lease_blocks as usize * layout.block_bytes());
                let map = ChunkMap::new(&layout, n, chunk).unwrap();
                let gathered: Vec<u8> = (0..map.n_chunks())
                    .flat_map(|c| window.pieces(map.range(c).unwrap()).collect::<Vec<_>>())
                    .flat_map(|piece| data[piece].to_vec())
                    .collect();
                prop_assert_eq!(gathered, select(&layout, &data, blocks));
            }
        }

        #[test]
        fn the_prefix_is_the_longest_that_misses_nothing(
            n_blocks in 1u32..9, chunk in 1usize..400, gaps in prop::collection::vec(any::<u32>(), 0..4),
        ) {
            let layout = layout();
            let map = ChunkMap::new(&layout, n_blocks, chunk).unwrap();
            let missing: Vec<u32> = gaps.iter().map(|g| g % map.n_chunks()).collect();
            let mut present = vec![1u8; map.total_bytes()];
            missing.iter().for_each(|&c| present[map.range(c).unwrap()].fill(0));
            let prefix = map.whole_blocks(missing.into_iter());
            let full = |n: u32| select(&layout, &present, 0..n).iter().all(|&b| b == 1);
            prop_assert!(full(prefix));
            prop_assert!(prefix == n_blocks || !full(prefix + 1));
        }

        #[test]
        fn compacting_keeps_just_the_first_blocks(n_blocks in 1u32..9, keep in 0u32..9) {
            let layout = layout();
            let keep = keep.min(n_blocks);
            let map = ChunkMap::new(&layout, n_blocks, 100).unwrap();
            let data = pattern(map.total_bytes());
            let mut compacted = data.clone();
            let len = map.compact(&mut compacted, keep);
            prop_assert_eq!(&compacted[..len], select(&layout, &data, 0..keep));
        }
    }

    #[test]
    fn impossible_sizes_make_no_map() {
        let huge = KvLayout {
            n_layers: u32::MAX,
            n_kv_heads: u32::MAX,
            head_dim: u32::MAX,
            ..layout()
        };
        assert_eq!(ChunkMap::new(&huge, u32::MAX, 1), None);
        assert_eq!(ChunkMap::new(&layout(), 0, 1), None);
        assert_eq!(ChunkMap::new(&layout(), 1, 0), None);
    }
}
