//! Which server probably holds which prefix: chained block hashes, and for each the servers that were sent it.
//!
//! It remembers what was sent and what was answered, not what is cached; each server's memory here is bounded and forgets the least recently
//! used, as the server's own cache does. Every holder is a node in two structures at once: the short list of a hash's
//! holders, and its server's list in order of use.

use crate::{BlockHash, EndpointId};
use rustc_hash::FxHashMap;

/// No node.
const NONE: u32 = u32::MAX;

/// The approximate prefix index.
#[derive(Debug)]
pub struct PrefixIndex {
    most_per_server: usize,
    holders: FxHashMap<BlockHash, Vec<Holder>>,
    servers: FxHashMap<EndpointId, Recency>,
    nodes: Vec<Node>,
    free: Vec<u32>,
}

/// How sure it is that a server holds what it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Certainty {
    /// It was sent there and may still wait in a queue.
    Expected,
    /// An answer came, so that it has been computed or fetched.
    Computed,
}

/// How many of a prompt's leading blocks a server holds without a gap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// Including those that are only expected: at least `computed`.
    pub expected: usize,
    /// Those that have been computed.
    pub computed: usize,
}

/// One server's copy of a block.
#[derive(Clone, Copy, Debug)]
struct Holder {
    server: EndpointId,
    node: u32,
    certainty: Certainty,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    hash: BlockHash,
    newer: u32,
    older: u32,
}

/// A server's list: its ends, its length, and how long it may get.
#[derive(Clone, Copy, Debug)]
struct Recency {
    newest: u32,
    oldest: u32,
    len: usize,
    capacity: usize,
}

impl PrefixIndex {
    /// An empty index that remembers at most `most_per_server` blocks of each server.
    #[must_use]
    pub fn new(most_per_server: usize) -> Self {
        Self {
            most_per_server,
            holders: FxHashMap::default(),
            servers: FxHashMap::default(),
            nodes: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Finds, for every server of `servers` (in ascending order), how much of the leading `blocks` it holds. `found` gets
    /// one entry a server, in the same order. Looks at one block more than the longest match.
    pub fn matches(&self, blocks: &[BlockHash], servers: &[EndpointId], found: &mut Vec<Match>) {
        found.clear();
        found.resize(servers.len(), Match::default());
        for (depth, block) in blocks.iter().enumerate() {
            let holders = self.holders.get(block).map_or(&[][..], Vec::as_slice);
            let mut somebody = false;
            for holder in holders {
                let Ok(i) = servers.binary_search(&holder.server) else {
                    continue;
                };
                if found[i].expected == depth {
                    found[i].expected += 1;
                    somebody = true;
                }
                if found[i].computed == depth && holder.certainty == Certainty::Computed {
                    found[i].computed += 1;
                }
            }
            if !somebody {
                return;
            }
        }
    }

    /// Notes that `server` was sent a prompt of `blocks`, or has answered it.
    pub fn insert(&mut self, server: EndpointId, blocks: &[BlockHash], certainty: Certainty) {
        // Last block first, so that a prefix is younger than what builds on it: the tail is forgotten before the root.
        for &hash in blocks.iter().take(self.capacity_of(server)).rev() {
            match self.find(server, hash) {
                Some(holder) => {
                    holder.certainty = holder.certainty.max(certainty);
                    let node = holder.node;
                    self.unlink(server, node);
                    self.link_newest(server, node);
                }
                None => self.add(server, hash, certainty),
            }
        }
    }

    /// Remembers at most `blocks` blocks of `server` from now on, if that is less than of others; 0 is taken for "unknown".
    pub fn set_capacity(&mut self, server: EndpointId, blocks: usize) {
        let capacity = if blocks == 0 {
            self.most_per_server
        } else {
            blocks.min(self.most_per_server)
        };
        self.list(server).capacity = capacity;
        while self.len_of(server) > capacity {
            self.drop_oldest(server);
        }
    }

    /// Forgets `server`: it is gone, or came back without its cache.
    pub fn forget(&mut self, server: EndpointId) {
        while self.drop_oldest(server) {}
        self.servers.remove(&server);
    }

    /// How many blocks of `server` are remembered.
    #[must_use]
    pub fn len_of(&self, server: EndpointId) -> usize {
        self.servers.get(&server).map_or(0, |r| r.len)
    }

    fn capacity_of(&self, server: EndpointId) -> usize {
        self.servers
            .get(&server)
            .map_or(self.most_per_server, |r| r.capacity)
    }

    fn list(&mut self, server: EndpointId) -> &mut Recency {
        let capacity = self.most_per_server;
        self.servers.entry(server).or_insert(Recency {
            newest: NONE,
            oldest: NONE,
            len: 0,
            capacity,
        })
    }

    fn find(&mut self, server: EndpointId, hash: BlockHash) -> Option<&mut Holder> {
        self.holders
            .get_mut(&hash)?
            .iter_mut()
            .find(|h| h.server == server)
    }

    fn add(&mut self, server: EndpointId, hash: BlockHash, certainty: Certainty) {
        if self.len_of(server) >= self.capacity_of(server) {
            self.drop_oldest(server);
        }
        let fresh = Node {
            hash,
            newer: NONE,
            older: NONE,
        };
        let node = match self.free.pop() {
            Some(node) => {
                self.nodes[node as usize] = fresh;
                node
            }
            None => {
                let Ok(node) = u32::try_from(self.nodes.len()) else {
                    return;
                };
                self.nodes.push(fresh);
                node
            }
        };
        self.holders.entry(hash).or_default().push(Holder {
            server,
            node,
            certainty,
        });
        self.link_newest(server, node);
    }

    fn link_newest(&mut self, server: EndpointId, node: u32) {
        let ends = self.list(server);
        let newest = std::mem::replace(&mut ends.newest, node);
        ends.len += 1;
        if newest == NONE {
            ends.oldest = node;
        } else {
            self.nodes[newest as usize].newer = node;
        }
        let linked = &mut self.nodes[node as usize];
        (linked.older, linked.newer) = (newest, NONE);
    }

    fn unlink(&mut self, server: EndpointId, node: u32) {
        let Some(ends) = self.servers.get_mut(&server) else {
            return;
        };
        let Node { newer, older, .. } = self.nodes[node as usize];
        match newer {
            NONE => ends.newest = older,
            newer => self.nodes[newer as usize].older = older,
        }
        match older {
            NONE => ends.oldest = newer,
            older => self.nodes[older as usize].newer = newer,
        }
        ends.len -= 1;
    }

    /// Whether there was one.
    fn drop_oldest(&mut self, server: EndpointId) -> bool {
        let Some(node) = self
            .servers
            .get(&server)
            .map(|r| r.oldest)
            .filter(|&n| n != NONE)
        else {
            return false;
        };
        self.unlink(server, node);
        let hash = self.nodes[node as usize].hash;
        if let Some(holders) = self.holders.get_mut(&hash) {
            holders.retain(|h| h.node != node);
            if holders.is_empty() {
                self.holders.remove(&hash);
            }
        }
        self.free.push(node);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const A: EndpointId = EndpointId(1);
    const B: EndpointId = EndpointId(2);

    fn chain(of: &[u64]) -> Vec<BlockHash> {
        of.iter().copied().map(BlockHash).collect()
    }

    fn matches(index: &PrefixIndex, blocks: &[u64], servers: &[EndpointId]) -> Vec<usize> {
        let mut found = Vec::new();
        index.matches(&chain(blocks), servers, &mut found);
        found.iter().map(|m| m.expected).collect()
    }

    #[test]
    fn each_server_is_matched_up_to_its_first_gap() {
        let mut index = PrefixIndex::new(10);
        index.insert(A, &chain(&[1, 2, 3]), Certainty::Expected);
        index.insert(B, &chain(&[1]), Certainty::Expected);
        index.insert(B, &chain(&[3]), Certainty::Expected);
        assert_eq!(matches(&index, &[1, 2, 3, 4], &[A, B]), [3, 1]);
        assert_eq!(matches(&index, &[2, 3], &[B]), [0]);
        assert_eq!(matches(&index, &[], &[A, B]), [0, 0]);
    }

    #[test]
    fn what_was_answered_is_sure_and_what_was_only_sent_is_not() {
        let mut index = PrefixIndex::new(10);
        index.insert(A, &chain(&[1, 2, 3]), Certainty::Expected);
        index.insert(A, &chain(&[1]), Certainty::Computed);
        index.insert(A, &chain(&[1, 2, 3]), Certainty::Expected);
        let mut found = Vec::new();
        index.matches(&chain(&[1, 2, 3, 4]), &[A], &mut found);
        assert_eq!(
            found,
            [Match {
                expected: 3,
                computed: 1
            }]
        );
        index.insert(A, &chain(&[1, 2, 3]), Certainty::Computed);
        index.matches(&chain(&[1, 2, 3, 4]), &[A], &mut found);
        assert_eq!(
            found,
            [Match {
                expected: 3,
                computed: 3
            }]
        );
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
        assert!(index.holders.is_empty() && index.free.len() == index.nodes.len());
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

    proptest! {
        /// Against a list of hashes a server, newest first.
        #[test]
        fn the_index_remembers_what_a_plain_list_would(
            ops in prop::collection::vec((0u32..3, 0u64..12, 1usize..6, prop::bool::weighted(0.1)), 1..60),
            capacity in 1usize..8,
        ) {
            let mut index = PrefixIndex::new(capacity);
            let mut model: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
            for (server, first, len, forget) in ops {
                let list = model.entry(server).or_default();
                if forget {
                    index.forget(EndpointId(server));
                    list.clear();
                } else {
                    let hashes: Vec<u64> = (first..first + len as u64).collect();
                    index.insert(EndpointId(server), &chain(&hashes), Certainty::Expected);
                    for &hash in hashes.iter().take(capacity).rev() {
                        list.retain(|&h| h != hash);
                        list.insert(0, hash);
                        list.truncate(capacity);
                    }
                }
                let ids: Vec<EndpointId> = (0..3).map(EndpointId).collect();
                for start in 0..12 {
                    let query: Vec<u64> = (start..16).collect();
                    let expected: Vec<usize> = (0..3)
                        .map(|s| query.iter().take_while(|h| model.get(&s).is_some_and(|l| l.contains(h))).count())
                        .collect();
                    prop_assert_eq!(matches(&index, &query, &ids), expected);
                }
                prop_assert_eq!(index.nodes.len() - index.free.len(), model.values().map(Vec::len).sum::<usize>());
            }
        }
    }
}
