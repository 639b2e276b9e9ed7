//! Chained block hashes, as vLLM's `--prefix-caching-hash-algo sha256_cbor` makes them: SHA-256 over the canonical CBOR
//! of `(parent hash, token ids, extra keys)`. The chain's root is the hash of the seed string
//! (`vllm/v1/core/kv_cache_utils.py`). No allocation: the CBOR goes straight into the hash.

use sha2::{Digest as _, Sha256};

/// Hash of a block's tokens and of every block before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 32]);

/// Hashes blocks of one chain.
#[derive(Clone, Debug)]
pub struct BlockHasher {
    root: BlockHash,
}

/// CBOR major types that occur.
const UNSIGNED: u8 = 0;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const NULL: u8 = 0xf6;

impl BlockHasher {
    /// A hasher whose chains start from `seed` (vLLM: the value of `PYTHONHASHSEED`).
    pub fn new(seed: &str) -> Self {
        let mut sha = Sha256::new();
        put_head(&mut sha, TEXT, seed.len() as u64);
        sha.update(seed);
        Self {
            root: BlockHash(sha.finalize().into()),
        }
    }

    /// The parent of a chain's first block.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// The hash of the block that follows `parent` and holds `tokens`. `salt` separates caches that must not share
    /// blocks; vLLM gives it to a chain's first block only.
    pub fn block(&self, parent: &BlockHash, tokens: &[u32], salt: Option<&str>) -> BlockHash {
        let mut sha = Sha256::new();
        put_head(&mut sha, ARRAY, 3);
        put_head(&mut sha, BYTES, 32);
        sha.update(parent.0);
        put_head(&mut sha, ARRAY, tokens.len() as u64);
        for &token in tokens {
            put_head(&mut sha, UNSIGNED, u64::from(token));
        }
        match salt {
            None => sha.update([NULL]),
            Some(salt) => {
                put_head(&mut sha, ARRAY, 1);
                put_head(&mut sha, TEXT, salt.len() as u64);
                sha.update(salt);
            }
        }
        BlockHash(sha.finalize().into())
    }
}

/// An item's head: major type and argument, in the fewest bytes.
fn put_head(sha: &mut Sha256, major: u8, argument: u64) {
    let major = major << 5;
    let bytes = argument.to_be_bytes();
    match argument {
        0..=23 => sha.update([major | bytes[7]]),
        24..=0xff => sha.update([major | 24, bytes[7]]),
        0x100..=0xffff => sha.update([major | 25, bytes[6], bytes[7]]),
        0x1_0000..=0xffff_ffff => sha.update([major | 26, bytes[4], bytes[5], bytes[6], bytes[7]]),
        _ => {
            sha.update([major | 27]);
            sha.update(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(hash: BlockHash) -> String {
        hash.0.iter().map(|b| format!("{b:02x}")).collect()
    }

    // From tests/reference/block_hash_vectors.py (cbor2 and hashlib).
    #[test]
    fn hashes_are_vllms() {
        let hasher = BlockHasher::new("0");
        assert_eq!(
            hex(hasher.root()),
            "4e1195df020de59e0d65a33a4279f1183e7ae4e5d980e309f8b55adff2e61c3e"
        );
        let first = hasher.block(&hasher.root(), &(0..16).collect::<Vec<_>>(), None);
        assert_eq!(
            hex(first),
            "d830de3d42c00f25a2949b5d12d98642664a44872c1614c5b0147556276afc9c"
        );
        let second = hasher.block(
            &first,
            &[23, 24, 255, 256, 65535, 65536, 49151, u32::MAX],
            None,
        );
        assert_eq!(
            hex(second),
            "9ec725f9f15982e2f29bb48970f886c6eaf4a0c54e19622b073289a1aab25740"
        );
        let salted = hasher.block(&hasher.root(), &[1, 2, 3], Some("tenant-a"));
        assert_eq!(
            hex(salted),
            "c3e5a5cd00d94abdd5d9832358b0b3c5ac9481562779e8be78a8b2e1abbce7c1"
        );
    }
}
