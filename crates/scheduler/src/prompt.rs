//! A prompt as the scheduler sees it: chained hashes of its bytes, and about how many tokens they are.
//!
//! The hashes are private to this process and decide nothing but where a request goes, so a collision costs time, never
//! an answer. They are keyed, so that a client cannot aim for one.

use crate::Approximate;

/// Bytes of a prompt in one block: about 16 tokens.
pub const BLOCK_BYTES: usize = 64;

/// English text, on average, for vocabularies of some ten thousand tokens.
const BYTES_PER_TOKEN: u64 = 4;

/// Most blocks that are hashed; what follows them does not distinguish prompts.
pub const MAX_BLOCKS: usize = 2048;

/// Hash of a block and everything before it, model and tools included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash(pub(crate) u64);

impl BlockHash {
    /// A hash that somebody else made. It, too, must stand for the block and everything before it.
    #[must_use]
    pub fn new(hash: u64) -> Self {
        Self(hash)
    }

    /// The number, for somebody who makes the same hashes.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }
}

/// A prompt's prefix blocks and length; or those of several prompts that one request asks for.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    pub(crate) blocks: Vec<BlockHash>,
    /// Where in `blocks` each prompt but the first begins.
    starts: Vec<usize>,
    block_bytes: u32,
    bytes: u64,
    tokens: u32,
}

impl Prompt {
    /// A prompt of `tokens` tokens that somebody else cut into `blocks` of `block_tokens` tokens.
    #[must_use]
    pub fn of_blocks(blocks: Vec<BlockHash>, block_tokens: u32, tokens: u32) -> Self {
        Self {
            blocks,
            starts: Vec::new(),
            block_bytes: block_tokens.saturating_mul(BYTES_PER_TOKEN as u32),
            bytes: u64::from(tokens) * BYTES_PER_TOKEN,
            tokens,
        }
    }

    /// Length in tokens, exact or estimated.
    #[must_use]
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// About how many tokens a block has.
    pub(crate) fn block_tokens(&self) -> u32 {
        self.block_bytes / BYTES_PER_TOKEN as u32
    }

    /// The blocks of each prompt.
    pub fn chains(&self) -> impl Iterator<Item = &[BlockHash]> {
        let starts = std::iter::once(0).chain(self.starts.iter().copied());
        let ends = (self.starts.iter().copied()).chain(std::iter::once(self.blocks.len()));
        starts
            .zip(ends)
            .map(|(start, end)| &self.blocks[start..end])
    }

    /// Tokens that lie beyond `matched` leading blocks, by proportion of bytes.
    pub(crate) fn tokens_beyond(&self, matched: usize) -> u32 {
        let matched_bytes = (matched as u64 * u64::from(self.block_bytes)).min(self.bytes);
        let cached = u64::from(self.tokens) * matched_bytes / self.bytes.max(1);
        // cached <= tokens, because matched_bytes <= bytes.
        self.tokens - u32::try_from(cached).unwrap_or(self.tokens)
    }
}

/// Hashes the bytes of prompts.
#[derive(Clone, Copy, Debug)]
pub struct PromptHasher {
    key: u64,
    block_bytes: usize,
    most_blocks: usize,
}

impl PromptHasher {
    /// A hasher keyed with `key`, a number that clients do not know.
    #[must_use]
    pub fn new(key: u64) -> Self {
        Self {
            key,
            block_bytes: BLOCK_BYTES,
            most_blocks: MAX_BLOCKS,
        }
    }

    /// The same hasher with the blocks that a plan wants.
    #[must_use]
    pub fn with_blocks(self, of: &Approximate) -> Self {
        let bytes = u64::from(of.block_tokens.max(1)) * BYTES_PER_TOKEN;
        Self {
            block_bytes: bytes.min(1 << 20) as usize,
            most_blocks: of.most_blocks,
            ..self
        }
    }

    /// The prompt that `pieces`, one after another, make for `model`. Without a count of `tokens` it is taken that four
    /// bytes are one.
    #[must_use]
    pub fn prompt(&self, model: &str, pieces: &[&[u8]], tokens: Option<u32>) -> Prompt {
        self.prompts(model, &[pieces], tokens)
    }

    /// Several prompts of one request, each made of its pieces. `tokens` is the count of all of them.
    #[must_use]
    pub fn prompts(&self, model: &str, prompts: &[&[&[u8]]], tokens: Option<u32>) -> Prompt {
        let bytes = prompts
            .iter()
            .copied()
            .flatten()
            .map(|p| p.len() as u64)
            .sum();
        let tokens =
            tokens.unwrap_or_else(|| u32::try_from(bytes / BYTES_PER_TOKEN).unwrap_or(u32::MAX));
        let expected = usize::try_from(bytes).unwrap_or(usize::MAX) / self.block_bytes;
        let mut blocks = Vec::with_capacity(expected.min(self.most_blocks));
        let mut starts = Vec::new();
        for (i, pieces) in prompts.iter().enumerate() {
            if i > 0 {
                starts.push(blocks.len());
            }
            self.hash(model, pieces, &mut blocks);
        }
        Prompt {
            blocks,
            starts,
            block_bytes: self.block_bytes as u32,
            bytes,
            tokens,
        }
    }

    /// Bytes of a block: hashers with one key and one size make the same hashes.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// A number for the name of a session, which no client can aim at.
    #[must_use]
    pub fn session(&self, name: &str) -> u64 {
        chain(!self.key, name.as_bytes())
    }

    /// Appends the blocks of one prompt. A part of a block at the end does not count.
    fn hash(&self, model: &str, pieces: &[&[u8]], blocks: &mut Vec<BlockHash>) {
        let mut parent = chain(self.key, model.as_bytes());
        // Begun in one piece, to be completed from the next.
        let mut begun: Vec<u8> = Vec::new();
        for mut piece in pieces.iter().copied() {
            while blocks.len() < self.most_blocks {
                let missing = self.block_bytes - begun.len();
                let Some((head, rest)) = piece.split_at_checked(missing) else {
                    begun.extend_from_slice(piece);
                    break;
                };
                piece = rest;
                parent = if begun.is_empty() {
                    chain(parent, head)
                } else {
                    begun.extend_from_slice(head);
                    let hash = chain(parent, &begun);
                    begun.clear();
                    hash
                };
                blocks.push(BlockHash(parent));
            }
        }
    }
}

/// Folded multiplication, eight bytes a round: fast, and unpredictable without the key that `parent` began with.
pub(crate) fn chain(parent: u64, bytes: &[u8]) -> u64 {
    let mut state = parent ^ 0x9e37_79b9_7f4a_7c15;
    for word in bytes.chunks(8) {
        let mut padded = [0u8; 8];
        padded[..word.len()].copy_from_slice(word);
        state = fold(
            state ^ u64::from_le_bytes(padded),
            0xd6e8_feb8_6659_fd93 ^ parent.rotate_left(32),
        );
    }
    fold(state ^ bytes.len() as u64, 0xa076_1d64_78bd_642f)
}

pub(crate) fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b | 1);
    (product as u64) ^ ((product >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(model: &str, pieces: &[&[u8]]) -> Vec<BlockHash> {
        PromptHasher::new(7).prompt(model, pieces, None).blocks
    }

    #[test]
    fn prompts_share_the_hashes_of_their_common_prefix_and_no_more() {
        let (mut a, mut b) = (vec![b'x'; 1000], vec![b'x'; 1000]);
        a[500] = b'a';
        b[500] = b'b';
        let (a, b) = (blocks("m", &[&a]), blocks("m", &[&b]));
        assert_eq!(a.len(), 1000 / BLOCK_BYTES);
        assert_eq!(a[..500 / BLOCK_BYTES], b[..500 / BLOCK_BYTES]);
        assert!(
            a[500 / BLOCK_BYTES..]
                .iter()
                .zip(&b[500 / BLOCK_BYTES..])
                .all(|(a, b)| a != b)
        );
    }

    #[test]
    fn how_a_prompt_is_cut_into_pieces_does_not_matter() {
        let text: Vec<u8> = (0..=255).cycle().take(700).collect();
        assert_eq!(
            blocks("m", &[&text]),
            blocks("m", &[&text[..3], &[], &text[3..130], &text[130..]])
        );
    }

    #[test]
    fn the_tokens_beyond_a_match_go_by_bytes() {
        let prompt = PromptHasher::new(7).prompt("m", &[&[b'x'; 640 + 20]], None);
        assert_eq!((prompt.tokens(), prompt.tokens_beyond(0)), (165, 165));
        assert_eq!((prompt.tokens_beyond(5), prompt.tokens_beyond(10)), (85, 5));
        let counted = PromptHasher::new(7).prompt("m", &[&[b'x'; 640]], Some(1000));
        assert_eq!(
            (
                counted.tokens_beyond(5),
                counted.tokens_beyond(10),
                counted.tokens_beyond(99)
            ),
            (500, 0, 0)
        );
        assert_eq!(
            PromptHasher::new(7).prompt("m", &[], None).tokens_beyond(0),
            0
        );
    }

    #[test]
    fn another_model_or_key_gives_other_hashes() {
        let text = [b'x'; 64];
        assert_ne!(blocks("m", &[&text]), blocks("n", &[&text]));
        assert_ne!(
            blocks("m", &[&text]),
            PromptHasher::new(8).prompt("m", &[&text], None).blocks
        );
    }

    #[test]
    fn several_prompts_are_chains_of_their_own() {
        let (a, b) = ([b'a'; 150], [b'b'; 70]);
        let both = PromptHasher::new(7).prompts("m", &[&[&a], &[], &[&b]], None);
        let chains: Vec<_> = both.chains().map(<[BlockHash]>::to_vec).collect();
        assert_eq!(chains, [blocks("m", &[&a]), vec![], blocks("m", &[&b])]);
        assert_eq!((both.tokens(), both.tokens_beyond(3)), (55, 7));
    }

    #[test]
    fn blocks_are_as_long_as_a_plan_wants() {
        let of = Approximate {
            block_tokens: 64,
            most_blocks: 3,
            ..Approximate::default()
        };
        let hasher = PromptHasher::new(7).with_blocks(&of);
        let prompt = hasher.prompt("m", &[&[b'x'; 600], &[b'x'; 600]], None);
        assert_eq!((prompt.blocks.len(), prompt.block_tokens()), (3, 64));
        assert_eq!(prompt.tokens_beyond(3), 300 - 192);
        assert_eq!(hasher.prompt("m", &[&[b'x'; 600]], None).blocks.len(), 2);
    }

    #[test]
    fn a_huge_prompt_is_hashed_up_to_the_bound() {
        assert_eq!(
            blocks("m", &[&vec![0; BLOCK_BYTES * (MAX_BLOCKS + 10)]]).len(),
            MAX_BLOCKS
        );
        assert_eq!(blocks("m", &[b"short"]).len(), 0);
    }
}
