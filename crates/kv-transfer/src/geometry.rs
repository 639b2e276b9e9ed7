//! Where bytes lie: a transfer cut into chunks, and the same bytes in the parts of a lease. Pure.
//!
//! The two sides may keep blocks of different sizes and different heads of the model. A transfer has the consumer's order,
//! `[layer][kv head][block][K, V][token][dim]` of just what it asks for, cut within each layer into chunks of equal length
//! but the last; the producer finds each piece where it has it. All arithmetic on numbers of a peer is checked.

use std::ops::Range;

use baton_kv::KvLayout;

use crate::wire::Selection;

/// Tokens in the longest block that a consumer may have. It keeps the arithmetic below from overflowing.
const MAX_BLOCK_SIZE: u32 = 1 << 16;

/// What one server has of a model's KV: all layers, and some heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    /// Of the whole model, in blocks of this server's size.
    pub(crate) layout: KvLayout,
    /// The heads that are here, counted over all of the model's.
    pub(crate) heads: Range<u32>,
}

impl Shard {
    /// Bytes of one block over all layers and the heads that are here.
    pub(crate) fn block_bytes(&self) -> usize {
        self.row_bytes(1) * self.layout.n_layers as usize
    }

    /// Bytes of `n_blocks` blocks; `None` if no memory holds so many.
    pub(crate) fn bytes(&self, n_blocks: u32) -> Option<usize> {
        self.block_bytes().checked_mul(n_blocks as usize)
    }

    /// The blocks of this server in which a selection lies, out of `n_blocks`. The selection's last block may reach beyond.
    pub(crate) fn blocks_of(&self, selection: &Selection, n_blocks: u32) -> Option<Range<u32>> {
        let size = u64::from(self.layout.block_size);
        let token = |block: u32| u64::from(block) * u64::from(selection.block_size);
        let begin = u32::try_from(token(selection.blocks.start) / size).ok()?;
        let last = token(selection.blocks.end.checked_sub(1)?) / size;
        let is_there = last < u64::from(n_blocks);
        let end = token(selection.blocks.end)
            .div_ceil(size)
            .min(n_blocks.into());
        is_there.then_some(begin..u32::try_from(end).ok()?)
    }

    /// One layer of some blocks.
    fn row_bytes(&self, n_blocks: usize) -> usize {
        self.layout.head_block_bytes() * self.heads.len() * n_blocks
    }
}

/// Bytes of one token's key, or value, of one head.
fn vector_bytes(layout: &KvLayout) -> usize {
    layout.head_dim as usize * layout.dtype.bytes()
}

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
    /// `None` for no bytes, a chunk length of 0, or sizes that no memory holds.
    pub(crate) fn new(
        layout: &KvLayout,
        selection: &Selection,
        chunk_bytes: usize,
    ) -> Option<Self> {
        let [blocks, heads, layers] =
            [&selection.blocks, &selection.heads, &selection.layers].map(ExactSizeIterator::len);
        let cell_bytes = vector_bytes(layout)
            .checked_mul(2)?
            .checked_mul(selection.block_size as usize)?;
        let row_bytes = cell_bytes.checked_mul(blocks)?;
        let layer_bytes = row_bytes.checked_mul(heads)?;
        let total = layer_bytes.checked_mul(layers)?;
        if total == 0 || chunk_bytes == 0 {
            return None;
        }
        let n_layers = u32::try_from(layers).ok()?;
        let chunks_per_layer = u32::try_from(layer_bytes.div_ceil(chunk_bytes)).ok()?;
        chunks_per_layer.checked_mul(n_layers)?;
        Some(Self {
            n_blocks: u32::try_from(blocks).ok()?,
            n_layers,
            chunks_per_layer,
            chunk_bytes,
            row_bytes,
            cell_bytes,
            layer_bytes,
        })
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
        if n_blocks >= self.n_blocks {
            return self.total_bytes();
        }
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

/// Bytes of a transfer, as the producer has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// In the part of this index.
    Bytes(usize, Range<usize>),
    /// So many that the producer does not have: they follow the last token in the consumer's last block.
    Zeros(usize),
}

impl Piece {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Bytes(_, range) => range.len(),
            Self::Zeros(n) => *n,
        }
    }

    /// Both in one, if `next` follows this one where it lies.
    fn joined(&self, next: &Self) -> Option<Self> {
        match (self, next) {
            (Self::Bytes(part, a), Self::Bytes(same, b)) if part == same && a.end == b.start => {
                Some(Self::Bytes(*part, a.start..b.end))
            }
            (Self::Zeros(a), Self::Zeros(b)) => Some(Self::Zeros(a + b)),
            _ => None,
        }
    }
}

/// Where the bytes of a selection lie in the parts of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    selection: Selection,
    /// The heads that the producer has.
    heads: Range<u32>,
    /// Blocks of each part, counted by the producer from the first of the lease. They follow each other.
    parts: Vec<Range<u32>>,
    /// Keys, or values, of one block of one head of the consumer, and of the producer.
    half: usize,
    their_half: usize,
}

impl Source {
    /// `None` when the producer has no such layers, heads or blocks. The last block may reach beyond the last part.
    pub(crate) fn new(
        theirs: &Shard,
        parts: Vec<Range<u32>>,
        selection: &Selection,
    ) -> Option<Self> {
        let Selection {
            layers,
            heads,
            blocks,
            block_size,
        } = selection;
        let is_within = |inner: &Range<u32>, outer: &Range<u32>| {
            !inner.is_empty() && outer.start <= inner.start && inner.end <= outer.end
        };
        let layout = &theirs.layout;
        let token = |block: u32, size: u32| u64::from(block) * u64::from(size);
        let there = token(parts.first()?.start, layout.block_size)
            ..token(parts.last()?.end, layout.block_size);
        let is_there = is_within(layers, &(0..layout.n_layers))
            && is_within(heads, &theirs.heads)
            && !blocks.is_empty()
            && (1..=MAX_BLOCK_SIZE).contains(block_size)
            && there.contains(&token(blocks.start, *block_size))
            && there.contains(&token(blocks.end - 1, *block_size))
            && parts.windows(2).all(|two| two[0].end == two[1].start)
            && parts.iter().all(|part| !part.is_empty());
        let vector = vector_bytes(layout);
        is_there.then(|| Self {
            selection: selection.clone(),
            heads: theirs.heads.clone(),
            parts,
            half: *block_size as usize * vector,
            their_half: layout.block_size as usize * vector,
        })
    }

    /// The pieces that make up `range` of the transfer, in order, each as long as can be.
    pub(crate) fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = Piece> {
        let mut at = range.start;
        let mut runs = std::iter::from_fn(move || {
            let run = (at < range.end).then(|| self.run(at, range.end))?;
            at += run.len();
            Some(run)
        });
        let mut held = runs.next();
        std::iter::from_fn(move || {
            let mut piece = held.take()?;
            for run in runs.by_ref() {
                match piece.joined(&run) {
                    Some(joined) => piece = joined,
                    None => {
                        held = Some(run);
                        break;
                    }
                }
            }
            Some(piece)
        })
    }

    /// What lies together from byte `at` of the transfer on, up to `end` at most.
    fn run(&self, at: usize, end: usize) -> Piece {
        let Selection {
            layers,
            heads,
            blocks,
            ..
        } = &self.selection;
        let row = 2 * self.half * blocks.len();
        let (head, column) = (at / row, at % row);
        let (layer, head) = (head / heads.len(), head % heads.len());
        let (block, within) = (column / (2 * self.half), column % (2 * self.half));
        let (is_value, offset) = (within / self.half, within % self.half);
        // How far along the tokens, in bytes of keys alone or values alone.
        let along = (blocks.start as usize + block) * self.half + offset;
        let left = (self.half - offset).min(end - at);
        let i = self
            .parts
            .partition_point(|part| part.end as usize * self.their_half <= along);
        let Some(part) = self.parts.get(i) else {
            return Piece::Zeros(left);
        };
        let along = along - part.start as usize * self.their_half;
        let (block, offset) = (along / self.their_half, along % self.their_half);
        let layer = layers.start as usize + layer;
        let head = (heads.start - self.heads.start) as usize + head;
        let cells = (layer * self.heads.len() + head) * part.len();
        let within = is_value * self.their_half + offset;
        let begin = (cells + block) * 2 * self.their_half + within;
        let len = if self.half == self.their_half {
            let rest = (part.len() - block) * 2 * self.their_half - within;
            rest.min(row - column).min(end - at)
        } else {
            left.min(self.their_half - offset)
        };
        Piece::Bytes(i, begin..begin + len)
    }
}

/// Where what a peer asks for lies, and its chunks; `None` if it asks for what is not there.
pub(crate) fn opened(
    (ours, chunk_bytes): (&Shard, usize),
    parts: Vec<Range<u32>>,
    selection: &Selection,
    want: &[u8],
) -> Option<(Source, ChunkMap)> {
    let source = Source::new(ours, parts, selection)?;
    let map = ChunkMap::new(&ours.layout, selection, chunk_bytes)?;
    let n_bitmap = map.n_chunks().div_ceil(8) as usize;
    (want.is_empty() || want.len() == n_bitmap).then_some((source, map))
}

/// Cuts a selection by layers into at most `n` of about the same size; their bytes follow each other.
pub(crate) fn stripes(selection: &Selection, n: usize) -> Vec<Selection> {
    let layers = &selection.layers;
    let n_layers = layers.end.saturating_sub(layers.start);
    let n = u32::try_from(n)
        .unwrap_or(u32::MAX)
        .clamp(1, n_layers.max(1));
    // In 64 bits, so that the product fits.
    let cut = |i: u32| {
        let share = u64::from(n_layers) * u64::from(i) / u64::from(n);
        layers.start + u32::try_from(share).unwrap_or(n_layers)
    };
    (0..n)
        .map(|i| Selection {
            layers: cut(i)..cut(i + 1),
            ..selection.clone()
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    #![expect(
        clippy::single_range_in_vec_init,
        reason = "there may be a single part"
    )]

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

    /// All that a server with the whole model has.
    pub(crate) fn shard() -> Shard {
        Shard {
            layout: layout(),
            heads: 0..2,
        }
    }

    /// Some blocks of the whole model, in the same size.
    pub(crate) fn selection(blocks: Range<u32>) -> Selection {
        Selection {
            layers: 0..3,
            heads: 0..2,
            blocks,
            block_size: 2,
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

    /// The byte at a place of the model's KV, never 0.
    fn byte(layer: u32, head: u32, is_value: bool, token: u32, dim: usize) -> u8 {
        let mut n = u64::from(layer) << 40 | u64::from(head) << 32 | u64::from(token) << 8;
        n |= (dim as u64) << 1 | u64::from(is_value);
        (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1
    }

    /// A selection's bytes by definition; tokens from `end` on are not there.
    fn canonical(layout: &KvLayout, selection: &Selection, end: u32) -> Vec<u8> {
        let (bs, mut bytes) = (selection.block_size, Vec::new());
        for layer in selection.layers.clone() {
            for head in selection.heads.clone() {
                for block in selection.blocks.clone() {
                    for is_value in [false, true] {
                        for token in block * bs..(block + 1) * bs {
                            for dim in 0..vector_bytes(layout) {
                                let is_there = token < end;
                                let there = || byte(layer, head, is_value, token, dim);
                                bytes.push(if is_there { there() } else { 0 });
                            }
                        }
                    }
                }
            }
        }
        bytes
    }

    fn gathered(source: &Source, parts: &[Vec<u8>], range: Range<usize>) -> Vec<u8> {
        source
            .pieces(range)
            .flat_map(|piece| match piece {
                Piece::Bytes(part, range) => parts[part][range].to_vec(),
                Piece::Zeros(n) => vec![0; n],
            })
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
            let map = ChunkMap::new(&layout(), &selection(0..n_blocks), chunk).unwrap();
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
        fn pieces_gather_what_was_asked_for_whatever_the_producer_keeps(
            (n_heads, first_head, their_heads) in (1u32..9, 0u32..4, 1u32..5),
            (bs, their_bs) in (1u32..9, 1u32..9),
            layers in (0u32..3, 1u32..4),
            cuts in prop::collection::vec(1u32..5, 1..5),
            (first, n) in (0u32..12, 1u32..12),
            chunk in 1usize..999,
        ) {
            let layout = KvLayout { block_size: their_bs, n_kv_heads: 12, ..layout() };
            let theirs = Shard { layout: layout.clone(), heads: first_head..first_head + their_heads };
            let mut parts: Vec<Range<u32>> = Vec::new();
            for n in cuts {
                let begin = parts.last().map_or(0, |part| part.end);
                parts.push(begin..begin + n);
            }
            let end = parts.last().unwrap().end * their_bs;
            let asked = Selection {
                layers: layers.0..(layers.0 + layers.1).min(3),
                heads: first_head..first_head + n_heads,
                blocks: first..first + n,
                block_size: bs,
            };
            let source = Source::new(&theirs, parts.clone(), &asked);
            prop_assert_eq!(source.is_some(), n_heads <= their_heads && (first + n - 1) * bs < end);
            if let Some(source) = source {
                let kept: Vec<_> = parts.iter().map(|blocks| {
                    let of = Selection {
                        layers: 0..3, heads: theirs.heads.clone(), blocks: blocks.clone(), block_size: their_bs,
                    };
                    canonical(&layout, &of, end)
                }).collect();
                let sizes = parts.iter().map(|part| theirs.bytes(part.end - part.start));
                prop_assert!(sizes.eq(kept.iter().map(|kept| Some(kept.len()))));
                let map = ChunkMap::new(&layout, &asked, chunk).unwrap();
                let chunks = (0..map.n_chunks()).map(|c| map.range(c).unwrap());
                let got: Vec<u8> = chunks.flat_map(|range| gathered(&source, &kept, range)).collect();
                prop_assert!(got == canonical(&layout, &asked, end));
            }
        }

        #[test]
        fn stripes_follow_each_other(n in 0usize..9, layers in (0u32..5, 1u32..7)) {
            let whole = Selection { layers: layers.0..layers.0 + layers.1, ..selection(0..4) };
            let cut = stripes(&whole, n);
            prop_assert_eq!(cut.len(), n.clamp(1, layers.1 as usize));
            let bytes = |s: &Selection| ChunkMap::new(&layout(), s, 100).unwrap().total_bytes();
            prop_assert_eq!(cut.iter().map(bytes).sum::<usize>(), bytes(&whole));
            prop_assert!(cut.windows(2).all(|two| two[0].layers.end == two[1].layers.start));
            prop_assert!(cut[0].layers.start == whole.layers.start && cut[cut.len() - 1].layers.end == whole.layers.end);
        }

        #[test]
        fn the_prefix_is_the_longest_that_misses_nothing(
            n_blocks in 1u32..9, chunk in 1usize..400, gaps in prop::collection::vec(any::<u32>(), 0..4),
        ) {
            let layout = layout();
            let map = ChunkMap::new(&layout, &selection(0..n_blocks), chunk).unwrap();
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
            let map = ChunkMap::new(&layout, &selection(0..n_blocks), 100).unwrap();
            let data = pattern(map.total_bytes());
            let mut compacted = data.clone();
            let len = map.compact(&mut compacted, keep);
            prop_assert_eq!(&compacted[..len], select(&layout, &data, 0..keep));
        }
    }

    #[test]
    fn blocks_of_one_size_in_one_part_are_one_piece() {
        let source = |parts| Source::new(&shard(), parts, &selection(0..4)).unwrap();
        let total = 4 * shard().block_bytes();
        let whole: Vec<_> = source(vec![0..4]).pieces(0..total).collect();
        assert_eq!(whole, [Piece::Bytes(0, 0..total)]);
        let longer = source(vec![0..5]).pieces(0..total).count();
        assert_eq!(longer, 6, "a piece for each head of each layer");
    }

    #[test]
    fn impossible_sizes_make_no_map() {
        let huge = KvLayout {
            head_dim: u32::MAX,
            ..layout()
        };
        let all = Selection {
            layers: 0..u32::MAX,
            heads: 0..u32::MAX,
            blocks: 0..u32::MAX,
            block_size: u32::MAX,
        };
        assert_eq!(ChunkMap::new(&huge, &all, 1), None);
        assert_eq!(ChunkMap::new(&layout(), &selection(0..0), 1), None);
        assert_eq!(ChunkMap::new(&layout(), &selection(0..1), 0), None);
        assert_eq!(Source::new(&shard(), vec![0..u32::MAX], &all), None);
        #[expect(clippy::reversed_empty_ranges, reason = "a peer may say anything")]
        let backwards = selection(3..1);
        assert_eq!(Source::new(&shard(), vec![0..9], &backwards), None);
        assert_eq!(ChunkMap::new(&layout(), &backwards, 1), None);
    }
}
