//! Examples, and the index against plain sets.

use super::*;
use crate::TokenPrompt;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const A: EndpointId = EndpointId(1);
const B: EndpointId = EndpointId(2);
const SIZE: u32 = 2;

fn index() -> PreciseIndex {
    PreciseIndex::new(TokenHasher::new(5), PreciseConfig::default())
}

/// A run of blocks; the name of a block is `names` plus its place in the run.
fn stored(names: u64, parent: Option<u64>, tokens: &[u32]) -> Stored {
    let blocks = tokens.len() as u64 / u64::from(SIZE);
    Stored {
        hashes: (names..names + blocks).map(EngineHash).collect(),
        parent: parent.map(EngineHash),
        tokens: tokens.to_vec(),
        block_size: SIZE,
        ..Stored::default()
    }
}

fn removed(hashes: &[u64]) -> Removed {
    Removed {
        hashes: hashes.iter().copied().map(EngineHash).collect(),
        ..Removed::default()
    }
}

fn store(index: &mut PreciseIndex, source: EndpointId, stored: Stored) {
    index.apply(source, "m", &BlockEvent::Stored(stored));
}

fn remove(index: &mut PreciseIndex, source: EndpointId, removed: Removed) {
    index.apply(source, "m", &BlockEvent::Removed(removed));
}

fn keys(index: &PreciseIndex, tokens: &[u32]) -> Keys {
    let prompt = TokenPrompt {
        model: "m",
        tokens,
        ..TokenPrompt::default()
    };
    index.hasher.keys(&prompt, index.block_sizes())
}

fn find(index: &mut PreciseIndex, tokens: &[u32], servers: &[EndpointId]) -> Vec<Found> {
    let keys = keys(index, tokens);
    let mut found = Vec::new();
    index.matches(&keys, servers, &mut found);
    found
}

fn computed(index: &mut PreciseIndex, tokens: &[u32], servers: &[EndpointId]) -> Vec<usize> {
    find(index, tokens, servers)
        .iter()
        .map(|f| f.computed)
        .collect()
}

const TEXT: [u32; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

#[test]
fn what_is_stored_is_found_and_what_is_removed_is_not() {
    let mut index = index();
    store(&mut index, A, stored(10, None, &TEXT[..6]));
    store(&mut index, B, stored(10, None, &[1, 2, 9, 9]));
    assert_eq!(computed(&mut index, &TEXT, &[A, B]), [3, 1]);
    store(&mut index, A, stored(20, Some(12), &TEXT[6..]));
    assert_eq!(computed(&mut index, &TEXT, &[A]), [4]);
    remove(&mut index, A, removed(&[20, 12]));
    assert_eq!(computed(&mut index, &TEXT, &[A, B]), [2, 1]);
    index.apply(A, "m", &BlockEvent::Cleared);
    assert_eq!(computed(&mut index, &TEXT, &[A, B]), [0, 1]);
    assert_eq!((index.len_of(A), index.len_of(B)), (0, 2));
    let stats = index.stats();
    assert_eq!((stats.stored, stats.removed, stats.heeded), (6, 2, 2));
    // Of each lookup, what the best server had.
    assert_eq!((stats.lookups, stats.hits), (4, 3 + 4 + 2 + 1));
}

#[test]
fn what_was_stored_twice_is_there_until_it_is_removed_twice() {
    let mut index = index();
    for _ in 0..2 {
        store(&mut index, A, stored(10, None, &TEXT[..2]));
    }
    remove(&mut index, A, removed(&[10]));
    assert_eq!(computed(&mut index, &TEXT, &[A]), [1]);
    remove(&mut index, A, removed(&[10, 10, 99]));
    assert_eq!(computed(&mut index, &TEXT, &[A]), [0]);
    let stats = index.stats();
    assert_eq!((stats.outlived, stats.heeded, stats.removed), (1, 3, 1));
}

#[test]
fn blocks_off_the_device_count_less() {
    let mut index = index();
    store(&mut index, A, stored(10, None, &TEXT));
    let host = |hashes: &[u64]| Stored {
        hashes: hashes.iter().copied().map(EngineHash).collect(),
        medium: Medium::Host,
        ..Stored::default()
    };
    store(&mut index, A, host(&[12, 13]));
    remove(&mut index, A, removed(&[12, 13]));
    let found = find(&mut index, &TEXT, &[A])[0];
    assert_eq!((found.computed, found.total, found.block_tokens), (4, 4, 2));
    assert!((found.weighted - 3.6).abs() < 1e-6, "{found:?}");
    store(&mut index, A, stored(12, Some(11), &TEXT[4..6]));
    assert!((find(&mut index, &TEXT, &[A])[0].weighted - 3.8).abs() < 1e-6);
}

#[test]
fn a_block_waits_for_its_parent() {
    let mut index = index();
    store(&mut index, A, stored(30, Some(21), &TEXT[6..]));
    store(&mut index, A, stored(20, Some(10), &TEXT[2..6]));
    assert_eq!(computed(&mut index, &TEXT, &[A]), [0]);
    assert_eq!((index.stats().orphaned, index.len_of(A)), (3, 0));
    store(&mut index, A, stored(10, None, &TEXT[..2]));
    assert_eq!(computed(&mut index, &TEXT, &[A]), [4]);
    store(&mut index, A, stored(41, Some(40), &TEXT[2..6]));
    remove(&mut index, A, removed(&[42]));
    store(&mut index, A, stored(40, None, &[9, 9]));
    assert_eq!(computed(&mut index, &[9, 9, 3, 4, 5, 6], &[A]), [2]);
}

#[test]
fn orphans_and_blocks_have_a_bound() {
    let config = PreciseConfig {
        most_per_source: 3,
        most_orphan_tokens: 6,
        ..PreciseConfig::default()
    };
    let mut index = PreciseIndex::new(TokenHasher::new(5), config);
    for name in 0..100 {
        store(&mut index, A, stored(name, Some(500 + name), &[1, 2]));
    }
    store(&mut index, A, stored(599, None, &[7, 7]));
    store(&mut index, A, stored(500, None, &[8, 8]));
    assert_eq!(computed(&mut index, &[7, 7, 1, 2], &[A]), [2]);
    assert_eq!(computed(&mut index, &[8, 8, 1, 2], &[A]), [1]);
    store(&mut index, A, stored(700, None, &TEXT));
    assert_eq!((index.len_of(A), index.stats().refused), (3, 4));
}

#[test]
fn names_mean_what_their_server_means() {
    let mut index = index();
    store(&mut index, A, stored(10, None, &TEXT[..2]));
    store(&mut index, B, stored(10, None, &[9, 9]));
    assert_eq!(computed(&mut index, &TEXT, &[A, B]), [1, 0]);
    // A name that means something else now.
    store(&mut index, A, stored(10, None, &[9, 9]));
    assert_eq!(computed(&mut index, &[9, 9], &[A, B]), [1, 1]);
    assert_eq!(computed(&mut index, &TEXT, &[A]), [0]);
}

#[test]
fn layers_of_several_groups_hold_a_block_until_the_last_lets_go() {
    let mut index = index();
    let group = |group| Stored {
        group: Some(group),
        ..stored(10, None, &TEXT[..4])
    };
    store(&mut index, A, group(0));
    store(&mut index, A, group(1));
    let gone = |group| Removed {
        group: Some(group),
        ..removed(&[10, 11])
    };
    remove(&mut index, A, gone(1));
    assert_eq!(computed(&mut index, &TEXT, &[A]), [2]);
    remove(&mut index, A, gone(0));
    assert_eq!(computed(&mut index, &TEXT, &[A]), [0]);
    assert!(index.blocks.is_empty());
}

#[test]
fn what_was_sent_is_expected_until_it_is_reported_or_time_passes() {
    let mut index = index();
    store(&mut index, A, stored(10, None, &TEXT[..2]));
    let sent = keys(&index, &TEXT);
    index.expect(A, &sent, 100);
    let found = find(&mut index, &TEXT, &[A, B]);
    assert_eq!((found[0].computed, found[0].expected), (1, 4));
    assert!((found[0].weighted - 4.0).abs() < 1e-6);
    assert_eq!(found[1].expected, 0);
    index.expire(101);
    assert_eq!(find(&mut index, &TEXT, &[A])[0].expected, 1);
}

#[test]
fn servers_with_other_block_sizes_are_found_by_their_own() {
    let mut index = index();
    store(&mut index, A, stored(10, None, &TEXT[..6]));
    let large = Stored {
        hashes: vec![EngineHash(1)],
        tokens: TEXT[..4].to_vec(),
        block_size: 4,
        ..Stored::default()
    };
    store(&mut index, B, large);
    assert_eq!(index.block_sizes().collect::<Vec<_>>(), [2, 4]);
    let found = find(&mut index, &TEXT, &[A, B]);
    assert_eq!((found[0].tokens(), found[1].tokens()), (6, 4));
    assert_eq!((found[1].total, found[1].block_tokens), (2, 4));
    index.remove(A);
    assert_eq!(index.block_sizes().collect::<Vec<_>>(), [4]);
}

#[test]
fn adapters_keep_blocks_apart_however_they_are_told() {
    let mut index = index();
    let adapted = Stored {
        adapter: Some("l".into()),
        extra: vec![vec!["l".into()], vec![]],
        ..stored(10, None, &TEXT[..4])
    };
    store(&mut index, A, adapted);
    assert_eq!(computed(&mut index, &TEXT, &[A]), [0]);
    let prompt = TokenPrompt {
        model: "m",
        adapter: Some("l"),
        tokens: &TEXT,
        ..TokenPrompt::default()
    };
    let keys = index.hasher.keys(&prompt, [SIZE]);
    let mut found = Vec::new();
    index.matches(&keys, &[A], &mut found);
    assert_eq!(found[0].computed, 2);
}

#[test]
fn contradictions_are_counted_and_change_nothing() {
    let mut index = index();
    for (block_size, tokens) in [(0, vec![1, 2]), (2, vec![1, 2, 3]), (1 << 20, vec![1])] {
        let odd = Stored {
            hashes: vec![EngineHash(1)],
            tokens,
            block_size,
            ..Stored::default()
        };
        store(&mut index, A, odd);
    }
    assert_eq!((index.stats().odd, index.len_of(A)), (3, 0));
    assert_eq!(index.block_sizes().count(), 0);
}

/// One of three servers, with a cache that lets go of tails before roots.
#[derive(Clone, Debug)]
enum Op {
    Store(u32, Vec<u32>, bool),
    /// The n-th of the prefixes on which nothing builds.
    Remove(u32, usize),
    Clear(u32),
    Leave(u32),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let prompt = prop::collection::vec(0u32..2, 1..10);
    let op = prop_oneof![
        12 => (0u32..3, prompt, any::<bool>()).prop_map(|(s, p, h)| Op::Store(s, p, h)),
        8 => (0u32..3, 0usize..64).prop_map(|(s, n)| Op::Remove(s, n)),
        1 => (0u32..3).prop_map(Op::Clear),
        1 => (0u32..3).prop_map(Op::Leave),
    ];
    prop::collection::vec(op, 1..60)
}

/// Prefixes, in blocks, and how often each was stored in the host's and the accelerator's memory.
type Plain = BTreeMap<Vec<u32>, [u32; 2]>;

fn hash_of(server: u32, prefix: &[u32]) -> EngineHash {
    let start = 17 + u64::from(server);
    EngineHash(prefix.iter().fold(start, |h, &t| {
        (h ^ u64::from(t + 1))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(23)
    }))
}

/// Blocks of one token.
fn store_all(index: &mut PreciseIndex, plain: &mut Plain, server: u32, prompt: &[u32], host: bool) {
    let stored = Stored {
        hashes: (1..=prompt.len())
            .map(|n| hash_of(server, &prompt[..n]))
            .collect(),
        tokens: prompt.to_vec(),
        block_size: 1,
        medium: if host { Medium::Host } else { Medium::Device },
        ..Stored::default()
    };
    store(index, EndpointId(server), stored);
    for n in 1..=prompt.len() {
        plain.entry(prompt[..n].to_vec()).or_default()[usize::from(!host)] += 1;
    }
}

fn remove_tail(index: &mut PreciseIndex, plain: &mut Plain, server: u32, n: usize) {
    let inner: BTreeSet<Vec<u32>> = plain.keys().map(|p| p[..p.len() - 1].to_vec()).collect();
    let tails: Vec<Vec<u32>> = plain
        .keys()
        .filter(|p| !inner.contains(*p))
        .cloned()
        .collect();
    let Some(tail) = tails.get(n % tails.len().max(1)) else {
        return;
    };
    let counts = plain.remove(tail).unwrap_or_default();
    for (count, medium) in counts.into_iter().zip([Medium::Host, Medium::Device]) {
        for _ in 0..count {
            let gone = Removed {
                hashes: vec![hash_of(server, tail)],
                medium,
                group: None,
            };
            remove(index, EndpointId(server), gone);
        }
    }
}

proptest! {
    #[test]
    fn the_index_knows_what_plain_sets_would(ops in ops()) {
        let mut index = index();
        let mut plain: BTreeMap<u32, Plain> = (0..3).map(|s| (s, Plain::new())).collect();
        let ids: Vec<EndpointId> = (0..3).map(EndpointId).collect();
        for op in ops {
            match op {
                Op::Store(server, prompt, host) =>
                    store_all(&mut index, plain.get_mut(&server).unwrap(), server, &prompt, host),
                Op::Remove(server, n) =>
                    remove_tail(&mut index, plain.get_mut(&server).unwrap(), server, n),
                Op::Clear(server) => {
                    index.apply(EndpointId(server), "m", &BlockEvent::Cleared);
                    plain.insert(server, Plain::new());
                }
                Op::Leave(server) => {
                    index.remove(EndpointId(server));
                    plain.insert(server, Plain::new());
                }
            }
            for bits in 0..64u32 {
                let query: Vec<u32> = (0..10).map(|i| bits >> (i % 6) & 1).collect();
                let expected: Vec<usize> = plain.values().map(|held| {
                    (1..=query.len()).take_while(|&n| held.contains_key(&query[..n])).count()
                }).collect();
                let found = find(&mut index, &query, &ids);
                prop_assert_eq!(found.iter().map(|f| f.computed).collect::<Vec<_>>(), expected.clone());
                for (found, held) in found.iter().zip(plain.values()) {
                    let on_device = (1..=found.computed).take_while(|&n| held[&query[..n]][1] > 0).count();
                    let weighted = on_device as f32 + 0.8 * (found.computed - on_device) as f32;
                    prop_assert!((found.weighted - weighted).abs() < 1e-4, "{found:?} {weighted}");
                }
            }
        }
        let blocks: BTreeSet<&Vec<u32>> = plain.values().flat_map(BTreeMap::keys).collect();
        prop_assert_eq!(index.blocks.len(), blocks.len());
        ids.iter().for_each(|&id| index.remove(id));
        prop_assert!(index.blocks.is_empty() && index.sizes.is_empty());
    }

    /// Long prompts, holders that end anywhere: the steps of a lookup miss nobody.
    #[test]
    fn a_lookup_finds_every_end(ends in prop::collection::vec(0usize..300, 1..30), len in 1usize..300) {
        let mut index = index();
        let prompt: Vec<u32> = (0..300).collect();
        for (server, &end) in ends.iter().enumerate() {
            let server = server as u32;
            store_all(&mut index, &mut Plain::new(), server, &prompt[..end], false);
            store_all(&mut index, &mut Plain::new(), server, &prompt[..1], false);
        }
        let ids: Vec<EndpointId> = (0..ends.len() as u32).map(EndpointId).collect();
        let expected: Vec<usize> = ends.iter().map(|&end| end.max(1).min(len)).collect();
        prop_assert_eq!(computed(&mut index, &prompt[..len], &ids), expected);
    }

    /// Whatever is reported, nothing panics and everything can be let go.
    #[test]
    fn any_reports_are_survived(
        events in prop::collection::vec(
            (0u32..3, prop::collection::vec(0u64..12, 0..4), prop::option::of(0u64..12), any::<bool>(), 0u32..3, prop::option::of(0u32..2)),
            0..60,
        ),
    ) {
        let config = PreciseConfig { most_per_source: 6, most_orphan_tokens: 8, ..PreciseConfig::default() };
        let mut index = PreciseIndex::new(TokenHasher::new(5), config);
        for (server, names, parent, is_store, size, group) in events {
            let hashes: Vec<EngineHash> = names.iter().copied().map(EngineHash).collect();
            let tokens = (0..hashes.len() as u32 * size).collect();
            let event = if is_store {
                BlockEvent::Stored(Stored {
                    hashes, parent: parent.map(EngineHash), tokens, block_size: size, group, ..Stored::default()
                })
            } else {
                BlockEvent::Removed(Removed { hashes, group, ..Removed::default() })
            };
            index.apply(EndpointId(server), "m", &event);
            prop_assert!((0..3).all(|s| index.len_of(EndpointId(s)) <= 6));
        }
        (0..3).for_each(|s| index.remove(EndpointId(s)));
        prop_assert!(index.blocks.is_empty());
    }
}
