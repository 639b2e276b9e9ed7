//! Examples, and the index against plain lists.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const A: EndpointId = EndpointId(1);
const B: EndpointId = EndpointId(2);

/// The hashes of a prompt of these blocks: each stands for all before it.
fn chain(of: &[u64]) -> Vec<BlockHash> {
    let mut parent = 7u64;
    of.iter()
        .map(|&block| {
            parent = (parent ^ (block + 1))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29);
            BlockHash(parent)
        })
        .collect()
}

fn matches(index: &PrefixIndex, blocks: &[u64], servers: &[EndpointId]) -> Vec<usize> {
    both(index, blocks, servers)
        .iter()
        .map(|m| m.expected)
        .collect()
}

fn both(index: &PrefixIndex, blocks: &[u64], servers: &[EndpointId]) -> Vec<Match> {
    let mut found = Vec::new();
    index.matches(&chain(blocks), servers, &mut found);
    found
}

fn certain(expected: usize, computed: usize) -> Match {
    Match { expected, computed }
}

#[test]
fn each_server_is_matched_up_to_where_its_prompts_part() {
    let mut index = PrefixIndex::new(10);
    index.insert(A, &chain(&[1, 2, 3]), Certainty::Expected);
    index.insert(B, &chain(&[1]), Certainty::Expected);
    index.insert(B, &chain(&[3]), Certainty::Expected);
    assert_eq!(matches(&index, &[1, 2, 3, 4], &[A, B]), [3, 1]);
    assert_eq!(matches(&index, &[2, 3], &[B]), [0]);
    assert_eq!(matches(&index, &[], &[A, B]), [0, 0]);
    index.insert(B, &chain(&[1, 2, 9]), Certainty::Expected);
    assert_eq!(matches(&index, &[1, 2, 3, 4], &[A, B]), [3, 2]);
    assert_eq!(matches(&index, &[1, 2, 9], &[B]), [3]);
}

#[test]
fn what_was_answered_is_sure_and_what_was_only_sent_is_not() {
    let mut index = PrefixIndex::new(10);
    index.insert(A, &chain(&[1, 2, 3]), Certainty::Expected);
    index.insert(A, &chain(&[1]), Certainty::Computed);
    index.insert(A, &chain(&[1, 2, 3]), Certainty::Expected);
    assert_eq!(both(&index, &[1, 2, 3, 4], &[A]), [certain(3, 1)]);
    index.insert(A, &chain(&[1, 2, 3]), Certainty::Computed);
    assert_eq!(both(&index, &[1, 2, 3, 4], &[A]), [certain(3, 3)]);
}

#[test]
fn what_is_sure_above_is_told_when_nobody_drops_out_below() {
    let mut index = PrefixIndex::new(20);
    for (tail, server) in [(8, A), (9, B)] {
        index.insert(server, &chain(&[1, 2]), Certainty::Computed);
        index.insert(server, &chain(&[1, 2, 3, tail]), Certainty::Expected);
        index.insert(server, &chain(&[1, 2, 3, 7, tail]), Certainty::Expected);
    }
    assert_eq!(
        both(&index, &[1, 2, 3, 7, 9], &[A, B]),
        [certain(4, 2), certain(5, 2)]
    );
}

#[test]
fn of_many_servers_those_that_go_another_way_are_told_apart() {
    let mut index = PrefixIndex::new(1000);
    let ids: Vec<EndpointId> = (0..100).map(EndpointId).collect();
    let main: Vec<u64> = (0..40).collect();
    let end_of = |server: u32| 1 + (server as usize * 7) % 39;
    for &id in &ids {
        let mut prompt = main[..end_of(id.0)].to_vec();
        prompt.push(100 + u64::from(id.0));
        index.insert(id, &chain(&prompt), Certainty::Computed);
    }
    let expected: Vec<Match> = (ids.iter())
        .map(|id| certain(end_of(id.0), end_of(id.0)))
        .collect();
    assert_eq!(both(&index, &main, &ids), expected);
    assert_eq!(both(&index, &main, &ids[30..60]), expected[30..60]);
}

#[test]
fn a_full_server_forgets_the_tail_of_what_it_used_longest_ago() {
    let mut index = PrefixIndex::new(4);
    index.insert(A, &chain(&[1, 2, 3]), Certainty::Expected);
    index.insert(A, &chain(&[7, 8]), Certainty::Expected);
    assert_eq!(matches(&index, &[1, 2, 3], &[A]), [2]);
    assert_eq!(matches(&index, &[7, 8], &[A]), [2]);
    assert_eq!(index.len_of(A), 4);
}

#[test]
fn a_forgotten_server_holds_nothing_and_others_keep_theirs() {
    let mut index = PrefixIndex::new(4);
    index.insert(A, &chain(&[1, 2]), Certainty::Expected);
    index.insert(B, &chain(&[1, 2]), Certainty::Expected);
    index.forget(A);
    assert_eq!(matches(&index, &[1, 2], &[A, B]), [0, 2]);
    index.forget(B);
    assert_eq!((index.size().held, index.size().runs), (0, 0));
    assert!(index.starts.is_empty() && index.free_records.len() == index.records.len());
}

#[test]
fn a_server_with_a_smaller_cache_is_trusted_with_less() {
    let mut index = PrefixIndex::new(4);
    index.insert(A, &chain(&[1, 2, 3, 4]), Certainty::Expected);
    index.set_capacity(A, 2);
    assert_eq!(matches(&index, &[1, 2, 3, 4], &[A]), [2]);
    index.insert(A, &chain(&[5, 6, 7]), Certainty::Expected);
    assert_eq!(
        (index.len_of(A), matches(&index, &[5, 6, 7], &[A])),
        (2, vec![2])
    );
    index.set_capacity(A, 0);
    index.insert(A, &chain(&[1, 2, 3, 4, 5]), Certainty::Expected);
    assert_eq!(index.len_of(A), 4);
}

#[test]
fn what_is_not_used_again_expires() {
    let mut index = PrefixIndex::new(10);
    index.insert_at(A, &chain(&[1, 2, 3]), Certainty::Expected, 10);
    index.insert_at(A, &chain(&[1, 2, 8]), Certainty::Expected, 20);
    index.insert_at(B, &chain(&[1, 2]), Certainty::Expected, 15);
    index.expire(16);
    assert_eq!(matches(&index, &[1, 2, 3], &[A, B]), [2, 0]);
    assert_eq!(matches(&index, &[1, 2, 8], &[A, B]), [3, 0]);
}

#[test]
fn blocks_that_are_no_chain_break_nothing() {
    let mut index = PrefixIndex::new(6);
    let odd = |of: &[u64]| of.iter().copied().map(BlockHash).collect::<Vec<_>>();
    for of in [[1, 2, 3], [3, 2, 1], [2, 2, 2], [1, 3, 2], [3, 1, 1]] {
        index.insert(A, &odd(&of), Certainty::Expected);
        index.insert(B, &odd(&of[1..]), Certainty::Computed);
    }
    index.forget(A);
    index.forget(B);
    assert_eq!((index.size().held, index.size().runs), (0, 0));
}

#[test]
fn shared_runs_cost_no_memory_by_the_block() {
    let mut index = PrefixIndex::new(10_000);
    let prompt = chain(&(0..2000).collect::<Vec<_>>());
    for server in 0..200 {
        index.insert(EndpointId(server), &prompt, Certainty::Computed);
    }
    let size = index.size();
    assert_eq!((size.held, size.blocks, size.runs), (400_000, 2000, 1));
    assert!(size.bytes < 100_000, "{size:?}");
}

/// A server's blocks, newest first, and whether each is sure.
type Plain = Vec<(BlockHash, bool)>;

fn insert_plain(list: &mut Plain, blocks: &[BlockHash], computed: bool, capacity: usize) {
    let blocks = &blocks[..blocks.len().min(capacity)];
    let mut fresh: Plain = (blocks.iter())
        .map(|b| (*b, computed || list.iter().any(|(h, sure)| h == b && *sure)))
        .collect();
    fresh.extend(list.iter().filter(|(h, _)| !blocks.contains(h)));
    fresh.truncate(capacity);
    *list = fresh;
}

fn match_plain(list: &Plain, query: &[BlockHash]) -> Match {
    let held = |sure: bool| {
        query
            .iter()
            .take_while(|b| list.iter().any(|(h, s)| h == *b && (*s || !sure)))
            .count()
    };
    certain(held(false), held(true))
}

/// What happens to the index, on one of four servers.
#[derive(Clone, Debug)]
enum Op {
    Insert(u32, Vec<u64>, bool),
    Forget(u32),
    Resize(u32, usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let prompt = prop::collection::vec(0u64..2, 1..9);
    let op = prop_oneof![
        16 => (0u32..4, prompt, any::<bool>()).prop_map(|(s, p, c)| Op::Insert(s, p, c)),
        1 => (0u32..4).prop_map(Op::Forget),
        1 => (0u32..4, 0usize..12).prop_map(|(s, n)| Op::Resize(s, n)),
    ];
    prop::collection::vec(op, 1..50)
}

proptest! {
    #[test]
    fn the_index_remembers_what_plain_lists_would(ops in ops(), capacity in 1usize..24) {
        let mut index = PrefixIndex::new(capacity);
        let mut plain: BTreeMap<u32, (Plain, usize)> =
            (0..4).map(|s| (s, (Plain::new(), capacity))).collect();
        let ids: Vec<EndpointId> = (0..4).map(EndpointId).collect();
        for op in ops {
            match op {
                Op::Insert(server, prompt, computed) => {
                    let certainty = if computed { Certainty::Computed } else { Certainty::Expected };
                    index.insert(EndpointId(server), &chain(&prompt), certainty);
                    let (list, most) = plain.get_mut(&server).unwrap();
                    insert_plain(list, &chain(&prompt), computed, *most);
                }
                Op::Forget(server) => {
                    index.forget(EndpointId(server));
                    plain.insert(server, (Plain::new(), capacity));
                }
                Op::Resize(server, most) => {
                    index.set_capacity(EndpointId(server), most);
                    let (list, kept) = plain.get_mut(&server).unwrap();
                    *kept = if most == 0 { capacity } else { most.min(capacity) };
                    list.truncate(*kept);
                }
            }
            for bits in 0..32u64 {
                let query: Vec<u64> = (0..9).map(|i| bits >> (i % 5) & 1).collect();
                let expected: Vec<Match> =
                    plain.values().map(|(list, _)| match_plain(list, &chain(&query))).collect();
                prop_assert_eq!(both(&index, &query, &ids), expected);
            }
            for (server, (list, _)) in &plain {
                prop_assert_eq!(index.len_of(EndpointId(*server)), list.len());
            }
            let blocks: std::collections::BTreeSet<u64> =
                plain.values().flat_map(|(list, _)| list.iter().map(|(b, _)| b.0)).collect();
            prop_assert_eq!(index.size().blocks, blocks.len());
        }
    }
}
