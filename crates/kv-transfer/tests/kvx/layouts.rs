//! Servers that cut the model, and its tokens, differently: every byte is where its consumer wants it.

use std::ops::Range;

use baton_kv::{BlockId, DType, KvLayout, KvTransferParams};
use baton_kv_transfer::{KvClient, KvServer, TransferError};

use crate::common::*;

const HEADS: u32 = 8;

fn layout(block_size: u32) -> KvLayout {
    KvLayout {
        n_layers: 3,
        n_kv_heads: HEADS,
        head_dim: 8,
        block_size,
        dtype: DType::BF16,
        model_fingerprint: 7,
    }
}

/// A rank's heads, when `size` servers share the model.
fn heads(rank: u32, size: u32) -> Range<u32> {
    HEADS * rank / size..HEADS * (rank + 1) / size
}

/// The KV of some tokens as a server keeps it, by the definition of the canonical order: each element tells where in the
/// model it belongs. Tokens that are not there are zeros.
fn kept(layout: &KvLayout, heads: &Range<u32>, blocks: &Range<u32>, n_tokens: u32) -> Vec<u8> {
    let (bs, mut bytes) = (layout.block_size, Vec::new());
    for layer in 0..layout.n_layers {
        for head in heads.clone() {
            for block in blocks.clone() {
                for value in 0..2 {
                    for token in block * bs..(block + 1) * bs {
                        for dim in 0..layout.head_dim {
                            let place = ((layer * HEADS + head) * 2 + value) * 4096 + token;
                            let mixed = (place * layout.head_dim + dim).wrapping_mul(0x9e37_79b1);
                            let element = if token < n_tokens {
                                (mixed >> 16) as u16 | 1
                            } else {
                                0
                            };
                            bytes.extend(element.to_le_bytes());
                        }
                    }
                }
            }
        }
    }
    bytes
}

/// Zeros what lies beyond the prompt's last token, which nobody may read.
fn cut(layout: &KvLayout, heads: &Range<u32>, blocks: &Range<u32>, n: u32, data: &[u8]) -> Vec<u8> {
    let valid = kept(layout, heads, blocks, n);
    assert_eq!(valid.len(), data.len());
    let both = valid.iter().zip(data);
    // An element of the prompt is never zero.
    let pairs = valid.chunks(2).map(|two| two == [0, 0]);
    both.zip(pairs.flat_map(|is_beyond| [is_beyond; 2]))
        .map(|((_, byte), is_beyond)| if is_beyond { 0 } else { *byte })
        .collect()
}

struct Producers {
    servers: Vec<KvServer>,
    block_size: u32,
}

impl Producers {
    fn start(size: u32, block_size: u32) -> Self {
        let rank = |rank| {
            let mut cfg = server_config();
            cfg.layout = layout(block_size);
            cfg.heads = heads(rank, size);
            start(cfg)
        };
        let servers = (0..size).map(rank).collect();
        Self {
            servers,
            block_size,
        }
    }

    /// Publishes the same prompt on every rank, in parts as it would have been computed.
    fn publish(&self, n_tokens: u32) -> Vec<KvTransferParams> {
        let size = self.servers.len() as u32;
        let n_blocks = n_tokens.div_ceil(self.block_size);
        let layout = layout(self.block_size);
        let cuts = [0, n_blocks / 3, n_blocks / 2, n_blocks];
        (0..size)
            .zip(&self.servers)
            .map(|(rank, server)| {
                let (_, mut building) = server.begin(n_tokens).unwrap();
                for part in cuts
                    .windows(2)
                    .map(|two| two[0]..two[1])
                    .filter(|p| !p.is_empty())
                {
                    let data = kept(&layout, &heads(rank, size), &part, n_tokens);
                    let mut room = building.room(part.len()).unwrap();
                    room.copy_from_slice(&data);
                    let ids: Vec<_> = part.map(BlockId).collect();
                    building.append(&ids, room).unwrap();
                }
                building.finish().unwrap()
            })
            .collect()
    }
}

/// Pulls a consumer rank's share from all producers that have some of it; what each brought, with its heads.
fn share(client: &KvClient, params: &[KvTransferParams], first: u32) -> Vec<(Range<u32>, Vec<u8>)> {
    params
        .iter()
        .filter_map(|params| match client.hold(params) {
            Ok(held) => {
                let pulled = pull(client, &held, first..held.n_blocks()).unwrap();
                assert_eq!(pulled.shortfall, None);
                Some((held.heads(), pulled.data().to_vec()))
            }
            Err(TransferError::Mismatch { what, .. }) => {
                assert_eq!(what, "set of heads");
                None
            }
            Err(other) => panic!("{other}"),
        })
        .collect()
}

fn crossed(n_tokens: u32, [p, d]: [u32; 2], [p_block, d_block]: [u32; 2], shares_memory: bool) {
    let producers = Producers::start(p, p_block);
    let first = 1.min(n_tokens.div_ceil(d_block) - 1);
    for rank in 0..d {
        let params = producers.publish(n_tokens);
        let mut cfg = client_config();
        cfg.layout = layout(d_block);
        cfg.heads = heads(rank, d);
        cfg.shares_memory = shares_memory;
        // So that even this little is fetched on several data connections.
        cfg.stripe_bytes = 1000;
        let client = KvClient::new(cfg.clone()).unwrap();
        let shares = share(&client, &params, first);
        let mut covered = cfg.heads.start;
        for (heads, data) in shares {
            assert_eq!(heads.start, covered, "heads in order, without a hole");
            covered = heads.end;
            let blocks = first..n_tokens.div_ceil(d_block);
            let expected = kept(&cfg.layout, &heads, &blocks, n_tokens);
            let got = cut(&cfg.layout, &heads, &blocks, n_tokens, &data);
            assert!(
                got == expected,
                "{n_tokens} tokens, {p}x{p_block} to {d}x{d_block}, {heads:?}"
            );
        }
        assert_eq!(covered, cfg.heads.end, "all heads");
    }
}

#[test]
fn any_sharding_and_block_size_meets_any_other() {
    for shares_memory in [false, true] {
        for p in [1, 2, 4] {
            for d in [1, 2, 4, 8] {
                for p_block in [16, 64, 128] {
                    for d_block in [16, 64, 128] {
                        crossed(300, [p, d], [p_block, d_block], shares_memory);
                    }
                }
            }
        }
    }
}

#[test]
fn prompts_of_every_length_meet_other_block_sizes() {
    for n_tokens in [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 256] {
        for blocks in [[16, 128], [128, 16], [16, 64], [64, 128], [48, 64]] {
            crossed(n_tokens, [1, 1], blocks, n_tokens % 2 == 0);
        }
    }
}

#[test]
fn a_growing_lease_is_followed_in_the_consumers_blocks() {
    let mut cfg = server_config();
    (cfg.layout, cfg.heads) = (layout(16), 0..HEADS);
    let server = start(cfg);
    let mut cfg = client_config();
    (cfg.layout, cfg.heads) = (layout(64), 0..HEADS);
    let client = KvClient::new(cfg).unwrap();
    let (params, mut building) = server.begin(150).unwrap();
    let held = client.hold(&params).unwrap();
    assert_eq!((held.n_tokens(), held.n_blocks()), (150, 3));
    let (_guard, parts) = start_pull(&client, &held, 0..3);
    let mut append = |blocks: Range<u32>| {
        let data = kept(&layout(16), &(0..HEADS), &blocks, 150);
        let mut room = building.room(blocks.len()).unwrap();
        room.copy_from_slice(&data);
        let ids: Vec<_> = blocks.map(BlockId).collect();
        building.append(&ids, room).unwrap();
    };
    let next = || parts.recv_timeout(PATIENCE).unwrap().unwrap();
    // 48 tokens fill no block of 64; 80 fill one.
    append(0..3);
    append(3..5);
    let first = next();
    assert_eq!(
        (first.first_block, first.n_blocks, first.more),
        (0, 1, true)
    );
    assert!(first.data() == kept(&layout(64), &(0..HEADS), &(0..1), 150));
    append(5..10);
    let rest = next();
    assert_eq!((rest.first_block, rest.n_blocks, rest.more), (1, 2, false));
    let got = cut(&layout(64), &(0..HEADS), &(1..3), 150, rest.data());
    assert!(got == kept(&layout(64), &(0..HEADS), &(1..3), 150));
}
