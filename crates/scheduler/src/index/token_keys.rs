//! A prompt's blocks by its tokens: the keys under which servers' own reports are kept and looked up.
//!
//! The keys are private to this process, as those of [`crate::PromptHasher`] are, and made with the same keyed hash. A
//! chain's root is the model and the adapter, and the size of its blocks, so that chains of different sizes never meet.

use crate::BlockHash;
use crate::prompt::{chain, fold};

/// Most tokens of a prompt that get keys; what follows them does not distinguish prompts.
pub const MAX_KEY_TOKENS: usize = 131_072;

/// Makes keys from tokens.
#[derive(Clone, Copy, Debug)]
pub struct TokenHasher {
    key: u64,
}

/// What of a prompt decides which cached blocks it can use.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenPrompt<'a> {
    /// The base model, as the servers call it in their reports.
    pub model: &'a str,
    /// The adapter, by name; `None` for the base model.
    pub adapter: Option<&'a str>,
    /// The tokens.
    pub tokens: &'a [u32],
    /// Keeps the prompt's blocks apart from those without it, or with another.
    pub salt: Option<&'a str>,
    /// Images and the like, by place.
    pub features: &'a [Feature<'a>],
}

/// An image, or the like, whose placeholder tokens say nothing of its content.
#[derive(Clone, Copy, Debug)]
pub struct Feature<'a> {
    /// Its first placeholder token.
    pub start: usize,
    /// How many placeholder tokens it has.
    pub len: usize,
    /// The hash of its content, as the servers report it.
    pub hash: &'a str,
}

/// A prompt's keys, for each size of block that was asked for.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    of_size: Vec<(u32, Vec<BlockHash>)>,
}

impl Keys {
    /// Sizes and keys, in ascending order of sizes.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &[BlockHash])> {
        self.of_size.iter().map(|(size, keys)| (*size, &keys[..]))
    }

    /// The keys of full blocks of `size` tokens.
    #[must_use]
    pub fn of_size(&self, size: u32) -> &[BlockHash] {
        self.of_size
            .iter()
            .find(|(s, _)| *s == size)
            .map_or(&[], |(_, keys)| keys)
    }
}

impl TokenHasher {
    /// A hasher keyed with `key`, a random number of this process.
    #[must_use]
    pub fn new(key: u64) -> Self {
        Self { key }
    }

    /// The keys of `prompt` for blocks of each of `sizes` tokens, sizes in ascending order. A partial block has none.
    #[must_use]
    pub fn keys(&self, prompt: &TokenPrompt<'_>, sizes: impl IntoIterator<Item = u32>) -> Keys {
        let of_size = sizes
            .into_iter()
            .filter(|&size| size > 0)
            .map(|size| (size, self.keys_of_size(prompt, size)))
            .collect();
        Keys { of_size }
    }

    fn keys_of_size(&self, prompt: &TokenPrompt<'_>, size: u32) -> Vec<BlockHash> {
        let tokens = &prompt.tokens[..prompt.tokens.len().min(MAX_KEY_TOKENS)];
        let size_here = size as usize;
        let mut parent = self.root(prompt.model, prompt.adapter, size);
        (tokens.chunks_exact(size_here).enumerate())
            .map(|(i, block)| {
                let range = i * size_here..(i + 1) * size_here;
                let features = (prompt.features.iter())
                    .filter(|f| f.start < range.end && f.start.saturating_add(f.len) > range.start)
                    .map(|f| f.hash);
                let salt = prompt.salt.filter(|_| i == 0);
                parent = self.block(parent, block, features.chain(salt));
                parent
            })
            .collect()
    }

    /// The parent of first blocks.
    pub(super) fn root(&self, model: &str, adapter: Option<&str>, size: u32) -> BlockHash {
        let mut root = chain(self.key, model.as_bytes());
        if let Some(adapter) = adapter {
            root = chain(root, adapter.as_bytes());
        }
        BlockHash(chain(root, &size.to_le_bytes()))
    }

    /// The key of the block after `parent` that holds `tokens`; `extra` is what else distinguishes it.
    pub(super) fn block<'a>(
        &self,
        parent: BlockHash,
        tokens: &[u32],
        extra: impl Iterator<Item = &'a str>,
    ) -> BlockHash {
        let mut state = parent.0 ^ self.key;
        for pair in tokens.chunks(2) {
            let high = pair
                .get(1)
                .map_or(u64::from(u32::MAX) << 32, |&t| u64::from(t) << 32);
            state = fold(
                state ^ (high | u64::from(pair[0])),
                0xe703_7ed1_a0b4_28db ^ parent.0.rotate_left(32),
            );
        }
        BlockHash(extra.fold(state, |state, extra| chain(state, extra.as_bytes())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(prompt: &TokenPrompt<'_>) -> Vec<BlockHash> {
        TokenHasher::new(3).keys(prompt, [4]).of_size(4).to_vec()
    }

    #[test]
    fn prompts_share_the_keys_of_their_common_full_blocks() {
        let (mut a, mut b): (Vec<u32>, Vec<u32>) = ((0..19).collect(), (0..19).collect());
        (a[9], b[9]) = (77, 78);
        let of = |tokens| {
            keys(&TokenPrompt {
                model: "m",
                tokens,
                ..TokenPrompt::default()
            })
        };
        let (a, b) = (of(&a), of(&b));
        assert_eq!((a.len(), &a[..2]), (4, &b[..2]));
        assert!(a[2..].iter().zip(&b[2..]).all(|(a, b)| a != b));
    }

    #[test]
    fn model_adapter_salt_images_and_block_size_keep_prompts_apart() {
        let tokens: Vec<u32> = (0..16).collect();
        let plain = TokenPrompt {
            model: "m",
            tokens: &tokens,
            ..TokenPrompt::default()
        };
        let image = |start, hash| {
            [Feature {
                start,
                len: 2,
                hash,
            }]
        };
        let (early, late) = (image(1, "x"), image(11, "x"));
        let first = keys(&plain);
        for other in [
            TokenPrompt {
                model: "n",
                ..plain
            },
            TokenPrompt {
                adapter: Some("a"),
                ..plain
            },
            TokenPrompt {
                salt: Some("s"),
                ..plain
            },
            TokenPrompt {
                features: &early,
                ..plain
            },
        ] {
            let other = keys(&other);
            assert!(first.iter().zip(&other).all(|(a, b)| a != b), "{other:?}");
        }
        let late = keys(&TokenPrompt {
            features: &late,
            ..plain
        });
        assert_eq!(first[..2], late[..2]);
        assert!(first[2] != late[2] && first[3] != late[3]);
        let sizes = TokenHasher::new(3).keys(&plain, [4, 8]);
        assert_eq!((sizes.of_size(4).len(), sizes.of_size(8).len()), (4, 2));
        assert_ne!(sizes.of_size(4)[1], sizes.of_size(8)[0]);
        assert!(sizes.of_size(16).is_empty());
    }
}
