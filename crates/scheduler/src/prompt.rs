//! A prompt as the scheduler sees it: chained hashes of its bytes, and about how many tokens they are.
//!
//! The hashes are private to this process and decide nothing but where a request goes, so a collision costs time, never
//! an answer. They are keyed, so that a client cannot aim for one.

/// Bytes of a prompt in one block: about 16 tokens.
pub const BLOCK_BYTES: usize = 64;

/// English text, on average, for vocabularies of some ten thousand tokens.
const BYTES_PER_TOKEN: u64 = 4;

/// Most blocks that are hashed; what follows them does not distinguish prompts.
pub const MAX_BLOCKS: usize = 2048;

/// Hash of a block and everything before it, model and tools included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash(pub(crate) u64);

/// A prompt's prefix blocks and length.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    pub(crate) blocks: Vec<BlockHash>,
    bytes: u64,
    tokens: u32,
}

impl Prompt {
    /// Length in tokens, exact or estimated.
    #[must_use]
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Tokens that lie beyond the first `matched` blocks, by proportion of bytes.
    pub(crate) fn tokens_beyond(&self, matched: usize) -> u32 {
        let matched_bytes = (matched as u64 * BLOCK_BYTES as u64).min(self.bytes);
        let cached = u64::from(self.tokens) * matched_bytes / self.bytes.max(1);
        // cached <= tokens, because matched_bytes <= bytes.
        self.tokens - u32::try_from(cached).unwrap_or(self.tokens)
    }
}

/// Hashes the bytes of prompts.
#[derive(Clone, Copy, Debug)]
pub struct PromptHasher {
    key: u64,
}

impl PromptHasher {
    /// A hasher keyed with `key`, a random number of this process.
    #[must_use]
    pub fn new(key: u64) -> Self {
        Self { key }
    }

    /// The prompt that `pieces`, one after another, make for `model`. Without a count of `tokens` it is taken that four
    /// bytes are one.
    #[must_use]
    pub fn prompt(&self, model: &str, pieces: &[&[u8]], tokens: Option<u32>) -> Prompt {
        let bytes = pieces.iter().map(|p| p.len() as u64).sum();
        let tokens =
            tokens.unwrap_or_else(|| u32::try_from(bytes / BYTES_PER_TOKEN).unwrap_or(u32::MAX));
        Prompt {
            blocks: self.blocks(model, pieces),
            bytes,
            tokens,
        }
    }

    fn blocks(&self, model: &str, pieces: &[&[u8]]) -> Vec<BlockHash> {
        let mut parent = chain(self.key, model.as_bytes());
        let mut block = [0u8; BLOCK_BYTES];
        let mut filled = 0;
        let total: usize = pieces.iter().map(|p| p.len()).sum();
        let mut blocks = Vec::with_capacity((total / BLOCK_BYTES).min(MAX_BLOCKS));
        for mut piece in pieces.iter().copied() {
            while !piece.is_empty() && blocks.len() < MAX_BLOCKS {
                let n = piece.len().min(BLOCK_BYTES - filled);
                block[filled..filled + n].copy_from_slice(&piece[..n]);
                (filled, piece) = (filled + n, &piece[n..]);
                if filled == BLOCK_BYTES {
                    parent = chain(parent, &block);
                    blocks.push(BlockHash(parent));
                    filled = 0;
                }
            }
        }
        blocks
    }
}

/// Folded multiplication, eight bytes a round: fast, and unpredictable without the key that `parent` began with.
fn chain(parent: u64, bytes: &[u8]) -> u64 {
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

fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b | 1);
    (product as u64) ^ ((product >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(model: &str, pieces: &[&[u8]]) -> Vec<BlockHash> {
        PromptHasher::new(7).blocks(model, pieces)
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
            PromptHasher::new(8).blocks("m", &[&text])
        );
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
