//! Which server holds which prefix, by what the servers report of their caches.
//!
//! A server names its blocks as it likes, so each report is translated: the server's name for the parent gives our key of
//! the parent, and that and the tokens give our key of the block. Keys that a request was just sent for are added for a
//! while, since a report of them comes only after they are computed.
//!
//! A server's blocks of a prompt are taken to have no gaps, on the device and in all: a cache lets go of tails before
//! roots. A lookup relies on that, and looks only where holders change. If a server breaks it, a lookup may count blocks
//! of the gap (at most [`STRIDE`] of them between two looks); it is never led beyond a place where it looked.

use super::approximate::{Certainty, PrefixIndex, table_bytes};
use super::holders::{Holders, Sets, Slot, Tiers, add, missing};
use super::{Keys, Match, TokenHasher};
use crate::{BlockHash, EndpointId};
use baton_kv::{BlockEvent, EngineHash, Medium, Removed, Stored};
use orphans::{Orphan, Orphans};
use rustc_hash::FxHashMap;

mod orphans;

/// Most blocks between two looks at who holds them.
const STRIDE: usize = 64;

/// Most tokens in a block that is believed.
const MOST_BLOCK_TOKENS: u32 = 4096;

/// Bounds and weights of a [`PreciseIndex`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PreciseConfig {
    /// Most blocks of one server; more are not noted. Those that are refused are younger than those that are known, and
    /// a chain that lacks its tail is still right, while one that lacks its root is useless.
    pub most_per_source: usize,
    /// Most tokens of one server's blocks whose parent is not known yet; the oldest make room.
    pub most_orphan_tokens: usize,
    /// What a block counts that is not in the accelerator's memory, beside 1 for one that is.
    pub weight_off_device: f32,
    /// Most blocks of one server that are expected and not reported yet.
    pub most_expected: usize,
}

impl Default for PreciseConfig {
    fn default() -> Self {
        Self {
            most_per_source: 1 << 20,
            most_orphan_tokens: 1 << 16,
            weight_off_device: 0.8,
            most_expected: 1 << 17,
        }
    }
}

/// What became of the events and of lookups, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PreciseStats {
    /// Blocks noted.
    pub stored: u64,
    /// Blocks that are no longer noted because their server said so.
    pub removed: u64,
    /// Blocks kept until their parent is known.
    pub orphaned: u64,
    /// Blocks not noted because their server had too many.
    pub refused: u64,
    /// Events that contradict themselves.
    pub odd: u64,
    /// Removals of blocks that had been stored once more, and are still there.
    pub outlived: u64,
    /// All other removals.
    pub heeded: u64,
    /// Prompts looked up.
    pub lookups: u64,
    /// Leading blocks of theirs that the best server had, or was expected to have.
    pub hits: u64,
}

/// What a server holds of a prompt, in blocks of its own size.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Found {
    /// Tokens of a block; 0 if no server has reported a block yet.
    pub block_tokens: u32,
    /// Full blocks of the prompt.
    pub total: usize,
    /// Leading blocks that it reported.
    pub computed: usize,
    /// Leading blocks that it reported, or that were sent there: at least `computed`.
    pub expected: usize,
    /// As `expected`, each block with the weight of the nearest tier that has it.
    pub weighted: f32,
}

/// The precise prefix index.
#[derive(Debug)]
pub struct PreciseIndex {
    hasher: TokenHasher,
    config: PreciseConfig,
    sources: FxHashMap<EndpointId, Slot>,
    slots: Vec<Source>,
    free: Vec<Slot>,
    blocks: FxHashMap<BlockHash, Holders>,
    /// Sizes of blocks in use, ascending, and by how many sources.
    sizes: Vec<(u32, u32)>,
    expected: PrefixIndex,
    stats: PreciseStats,
    scratch: Scratch,
}

/// A server that reports.
#[derive(Debug, Default)]
struct Source {
    block_tokens: u32,
    held: FxHashMap<EngineHash, Held>,
    /// Blocks that it holds under more than one name: how many names more.
    twins: FxHashMap<BlockHash, u32>,
    orphans: Orphans,
}

/// A block of a server.
#[derive(Clone, Copy, Debug)]
struct Held {
    key: BlockHash,
    /// How often it was stored and not removed again, on each tier.
    stored: [u16; 3],
}

/// What a lookup needs, kept for its memory.
#[derive(Debug, Default)]
struct Scratch {
    /// Those who hold all blocks so far.
    alive: Sets,
    probe: Sets,
    /// For each slot, where its server is among those asked for.
    places: Vec<usize>,
    /// For each of these servers: blocks on any tier, and on the device.
    lengths: Vec<(usize, usize)>,
    expected: Vec<Match>,
}

impl PreciseIndex {
    /// An empty index. `hasher` makes the keys, here and for the prompts that are looked up.
    #[must_use]
    pub fn new(hasher: TokenHasher, config: PreciseConfig) -> Self {
        Self {
            hasher,
            config,
            sources: FxHashMap::default(),
            slots: Vec::new(),
            free: Vec::new(),
            blocks: FxHashMap::default(),
            sizes: Vec::new(),
            expected: PrefixIndex::new(config.most_expected),
            stats: PreciseStats::default(),
            scratch: Scratch::default(),
        }
    }

    /// The sizes of blocks for which prompts need keys, in ascending order.
    pub fn block_sizes(&self) -> impl Iterator<Item = u32> {
        self.sizes.iter().map(|(size, _)| *size)
    }

    /// What became of the events and of lookups.
    #[must_use]
    pub fn stats(&self) -> PreciseStats {
        self.stats
    }

    /// Notes what `source`, which serves `model`, reports. Reports must come in the order in which they were made; after a
    /// hole, [`reset`](Self::reset) first.
    pub fn apply(&mut self, source: EndpointId, model: &str, event: &BlockEvent) {
        match event {
            BlockEvent::Stored(stored) => self.store(source, model, stored),
            BlockEvent::Removed(removed) => self.unstore(source, removed),
            BlockEvent::Cleared => self.reset(source),
        }
    }

    /// Forgets what `source` holds: it has begun anew, or reports were lost.
    pub fn reset(&mut self, source: EndpointId) {
        self.expected.forget(source);
        let Some(&slot) = self.sources.get(&source) else {
            return;
        };
        let its = &mut self.slots[usize::from(slot)];
        its.orphans.clear();
        its.twins.clear();
        for held in std::mem::take(&mut its.held).into_values() {
            self.set_tiers(held.key, slot, Tiers::default());
        }
    }

    /// Forgets `source` altogether: it is gone.
    pub fn remove(&mut self, source: EndpointId) {
        self.reset(source);
        if let Some(slot) = self.sources.remove(&source) {
            self.set_block_tokens(slot, 0);
            self.free.push(slot);
        }
    }

    /// Notes that a prompt with `keys` was sent to `server` at the time `now`, so that it will soon hold it.
    pub fn expect(&mut self, server: EndpointId, keys: &Keys, now: u64) {
        let size = self
            .sources
            .get(&server)
            .map_or(0, |&slot| self.slots[usize::from(slot)].block_tokens);
        for (_, keys) in keys.iter().filter(|(s, _)| size == 0 || size == *s) {
            self.expected
                .insert_at(server, keys, Certainty::Expected, now);
        }
    }

    /// Stops expecting what was sent before `time`.
    pub fn expire(&mut self, time: u64) {
        self.expected.expire(time);
    }

    /// How many blocks `source` is known to hold.
    #[must_use]
    pub fn len_of(&self, source: EndpointId) -> usize {
        self.sources
            .get(&source)
            .map_or(0, |&slot| self.slots[usize::from(slot)].held.len())
    }

    /// How many blocks all servers together are known to hold, a block that several hold counted for each.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.iter().map(|s| s.held.len()).sum()
    }

    /// Whether nothing is known of any server.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory in bytes, about. Looks at everything: for reports, not for every request.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let sources: usize = (self.slots.iter())
            .map(|s| table_bytes::<(EngineHash, Held)>(s.held.capacity()) + size_of::<Source>())
            .sum();
        let holders: usize = self.blocks.values().map(Holders::bytes).sum();
        sources + holders + table_bytes::<(BlockHash, Holders)>(self.blocks.capacity())
    }

    /// Finds what each server of `servers` (in ascending order) holds of the prompt with `keys`. `found` gets one entry a
    /// server, in the same order.
    pub fn matches(&mut self, keys: &Keys, servers: &[EndpointId], found: &mut Vec<Found>) {
        found.clear();
        found.resize(servers.len(), Found::default());
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut best = 0;
        for (block_tokens, keys) in keys.iter() {
            self.walk(keys, servers, &mut scratch);
            self.expected.matches(keys, servers, &mut scratch.expected);
            for ((found, &(computed, on_device)), expected) in
                (found.iter_mut().zip(&scratch.lengths)).zip(&scratch.expected)
            {
                let expected = expected.expected.max(computed);
                best = best.max(expected);
                let off_device = (computed - on_device) as f32;
                let here = Found {
                    block_tokens,
                    total: keys.len(),
                    computed,
                    expected,
                    weighted: (expected - computed + on_device) as f32
                        + off_device * self.config.weight_off_device,
                };
                if found.block_tokens == 0 || here.tokens() > found.tokens() {
                    *found = here;
                }
            }
        }
        self.scratch = scratch;
        self.stats.lookups += 1;
        self.stats.hits += best as u64;
    }

    /// Finds how far each server holds `keys`: `scratch.lengths`.
    fn walk(&self, keys: &[BlockHash], servers: &[EndpointId], scratch: &mut Scratch) {
        scratch.begin(servers, self.slots.len(), |server| {
            self.sources.get(server).copied()
        });
        let Scratch {
            alive,
            probe,
            places,
            lengths,
            ..
        } = scratch;
        let look = |at: usize, alive: &Sets, probe: &mut Sets| {
            (self.blocks.get(&keys[at]).unwrap_or(&Holders::Nobody)).narrow(alive, probe);
            probe == alive
        };
        let (mut done, mut step) = (0, 1);
        while done < keys.len() && alive.any.iter().any(|&word| word != 0) {
            let end = (done + step).min(keys.len());
            if look(end - 1, alive, probe) {
                (done, step) = (end, (step * 2).min(STRIDE));
                continue;
            }
            // Somewhere in done..end somebody drops out; the first place is in from..=to.
            let (mut from, mut to) = (done, end - 1);
            while from < to {
                let middle = from.midpoint(to);
                if look(middle, alive, probe) {
                    from = middle + 1;
                } else {
                    to = middle;
                }
            }
            look(from, alive, probe);
            for slot in missing(&alive.any, &probe.any) {
                lengths[places[usize::from(slot)]].0 = from;
            }
            for slot in missing(&alive.device, &probe.device) {
                lengths[places[usize::from(slot)]].1 = from;
            }
            std::mem::swap(alive, probe);
            (done, step) = (from + 1, 1);
        }
        for slot in missing(&alive.any, &[]) {
            lengths[places[usize::from(slot)]].0 = keys.len();
        }
        for slot in missing(&alive.device, &[]) {
            lengths[places[usize::from(slot)]].1 = keys.len();
        }
    }

    fn store(&mut self, source: EndpointId, model: &str, stored: &Stored) {
        let Some(slot) = self.slot_of(source) else {
            self.stats.refused += stored.hashes.len() as u64;
            return;
        };
        if stored.tokens.is_empty() {
            return self.store_known(slot, stored);
        }
        let size = stored.block_size;
        let fits = stored.tokens.len() == stored.hashes.len().saturating_mul(size as usize);
        if size == 0 || size > MOST_BLOCK_TOKENS || !fits {
            self.stats.odd += 1;
            return;
        }
        self.set_block_tokens(slot, size);
        let adapter = stored.adapter.as_deref();
        let mut parent = match stored.parent.map(|p| name(p, stored.group)) {
            None => Ok(self.hasher.root(model, adapter, size)),
            Some(parent) => self.key_of(slot, parent).ok_or(parent),
        };
        let tier = tier(stored.medium);
        let blocks = stored.tokens.chunks_exact(size as usize);
        for (i, (&hash, tokens)) in stored.hashes.iter().zip(blocks).enumerate() {
            let hash = name(hash, stored.group);
            // Some servers list the adapter among the rest; it is in the root already.
            let extra = (stored.extra.get(i).into_iter().flatten().map(|e| &**e))
                .filter(|e| Some(*e) != adapter);
            match parent {
                Ok(key) => {
                    let key = self.hasher.block(key, tokens, extra);
                    if !self.admit(slot, hash, key, tier) {
                        self.stats.refused += (stored.hashes.len() - i) as u64;
                        return;
                    }
                    parent = Ok(key);
                }
                Err(unknown) => {
                    let orphan = Orphan::new(hash, tokens, extra, tier);
                    let most = self.config.most_orphan_tokens;
                    self.slots[usize::from(slot)]
                        .orphans
                        .add(unknown, orphan, most);
                    self.stats.orphaned += 1;
                    parent = Err(hash);
                }
            }
        }
    }

    /// Notes that blocks that are known are on another tier too.
    fn store_known(&mut self, slot: Slot, stored: &Stored) {
        for &hash in &stored.hashes {
            let hash = name(hash, stored.group);
            if let Some(key) = self.key_of(slot, hash) {
                self.admit(slot, hash, key, tier(stored.medium));
            }
        }
    }

    fn unstore(&mut self, source: EndpointId, removed: &Removed) {
        let Some(&slot) = self.sources.get(&source) else {
            return;
        };
        let tier = tier(removed.medium);
        for &hash in &removed.hashes {
            let hash = name(hash, removed.group);
            let its = &mut self.slots[usize::from(slot)];
            let Some(held) = its.held.get_mut(&hash) else {
                its.orphans.remove(hash);
                self.stats.heeded += 1;
                continue;
            };
            let count = &mut held.stored[tier_at(tier)];
            let last = *count == 1;
            match *count {
                0 | 1 => self.stats.heeded += 1,
                _ => self.stats.outlived += 1,
            }
            *count = count.saturating_sub(1);
            let (key, gone) = (held.key, held.stored == [0; 3]);
            if gone {
                self.drop_name(slot, hash);
                self.stats.removed += 1;
            } else if last && !self.slots[usize::from(slot)].twins.contains_key(&key) {
                let tiers = self.tiers_of(key, slot);
                self.set_tiers(key, slot, Tiers(tiers.0 & !tier.0));
            }
        }
    }

    /// Notes that the server at `slot` holds the block `key` under the name `hash`, and what was waiting for it. False if
    /// it holds too many.
    fn admit(&mut self, slot: Slot, hash: EngineHash, key: BlockHash, tier: Tiers) -> bool {
        if !self.admit_one(slot, hash, key, tier) {
            return false;
        }
        if self.slots[usize::from(slot)].orphans.is_empty() {
            return true;
        }
        let mut known = vec![(hash, key)];
        while let Some((hash, key)) = known.pop() {
            for orphan in self.slots[usize::from(slot)].orphans.take(hash) {
                let key = self.hasher.block(key, orphan.tokens(), orphan.extra());
                if self.admit_one(slot, orphan.hash, key, orphan.tier) {
                    known.push((orphan.hash, key));
                } else {
                    self.stats.refused += 1;
                }
            }
        }
        true
    }

    fn admit_one(&mut self, slot: Slot, hash: EngineHash, key: BlockHash, tier: Tiers) -> bool {
        let most = self.config.most_per_source;
        let its = &mut self.slots[usize::from(slot)];
        let full = its.held.len() >= most;
        match its.held.get_mut(&hash) {
            Some(held) if held.key == key => {
                let count = &mut held.stored[tier_at(tier)];
                *count = count.saturating_add(1);
            }
            // The name means another block now.
            Some(_) => {
                self.drop_name(slot, hash);
                return self.admit_one(slot, hash, key, tier);
            }
            None if full => return false,
            None => {
                let mut stored = [0; 3];
                stored[tier_at(tier)] = 1;
                its.held.insert(hash, Held { key, stored });
                if self.tiers_of(key, slot) != Tiers::default() {
                    let twins = &mut self.slots[usize::from(slot)].twins;
                    *twins.entry(key).or_insert(0) += 1;
                }
                self.stats.stored += 1;
            }
        }
        let tiers = self.tiers_of(key, slot);
        if !tiers.has(tier) {
            self.set_tiers(key, slot, Tiers(tiers.0 | tier.0));
        }
        true
    }

    /// Forgets a name of a block, and with the last of its names the block.
    fn drop_name(&mut self, slot: Slot, hash: EngineHash) {
        let its = &mut self.slots[usize::from(slot)];
        let Some(held) = its.held.remove(&hash) else {
            return;
        };
        match its.twins.get_mut(&held.key) {
            Some(1) => {
                its.twins.remove(&held.key);
            }
            Some(more) => *more -= 1,
            None => self.set_tiers(held.key, slot, Tiers::default()),
        }
    }

    fn key_of(&self, slot: Slot, hash: EngineHash) -> Option<BlockHash> {
        let held = &self.slots[usize::from(slot)].held;
        held.get(&hash).map(|h| h.key)
    }

    fn tiers_of(&self, key: BlockHash, slot: Slot) -> Tiers {
        self.blocks
            .get(&key)
            .map_or(Tiers::default(), |holders| holders.tiers_of(slot))
    }

    fn set_tiers(&mut self, key: BlockHash, slot: Slot, tiers: Tiers) {
        let holders = self.blocks.entry(key).or_default();
        holders.set(slot, tiers);
        if holders.is_empty() {
            self.blocks.remove(&key);
        }
    }

    /// The place of `source`, given to it now if it has none. `None` if there are too many.
    fn slot_of(&mut self, source: EndpointId) -> Option<Slot> {
        if let Some(&slot) = self.sources.get(&source) {
            return Some(slot);
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = Slot::try_from(self.slots.len()).ok()?;
                self.slots.push(Source::default());
                slot
            }
        };
        self.sources.insert(source, slot);
        Some(slot)
    }

    fn set_block_tokens(&mut self, slot: Slot, size: u32) {
        let old = std::mem::replace(&mut self.slots[usize::from(slot)].block_tokens, size);
        if old == size {
            return;
        }
        if let Ok(at) = self.sizes.binary_search_by_key(&old, |s| s.0) {
            self.sizes[at].1 -= 1;
            if self.sizes[at].1 == 0 {
                self.sizes.remove(at);
            }
        }
        match self.sizes.binary_search_by_key(&size, |s| s.0) {
            Ok(at) => self.sizes[at].1 += 1,
            Err(_) if size == 0 => {}
            Err(at) => self.sizes.insert(at, (size, 1)),
        }
    }
}

impl Found {
    /// Leading tokens that it holds or is expected to hold.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.expected as u64 * u64::from(self.block_tokens)
    }
}

impl Scratch {
    /// Everybody is alive, and nothing is known of anybody.
    fn begin(
        &mut self,
        servers: &[EndpointId],
        slots: usize,
        slot_of: impl Fn(&EndpointId) -> Option<Slot>,
    ) {
        let words = slots.div_ceil(64);
        for set in [
            &mut self.alive.any,
            &mut self.alive.device,
            &mut self.probe.any,
            &mut self.probe.device,
        ] {
            set.clear();
            set.resize(words, 0);
        }
        self.places.clear();
        self.places.resize(slots, 0);
        self.lengths.clear();
        self.lengths.resize(servers.len(), (0, 0));
        for (place, server) in servers.iter().enumerate() {
            if let Some(slot) = slot_of(server) {
                add(&mut self.alive.any, slot);
                add(&mut self.alive.device, slot);
                self.places[usize::from(slot)] = place;
            }
        }
    }
}

/// A server's name for a block of a group of layers: groups may use the same number for different things.
fn name(hash: EngineHash, group: Option<u32>) -> EngineHash {
    let group = u64::from(group.unwrap_or(0));
    EngineHash(hash.0 ^ group.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn tier(medium: Medium) -> Tiers {
    match medium {
        Medium::Device => Tiers::DEVICE,
        Medium::Host => Tiers::HOST,
        Medium::Other => Tiers::OTHER,
    }
}

fn tier_at(tier: Tiers) -> usize {
    tier.0.trailing_zeros() as usize
}

#[cfg(test)]
mod tests;
