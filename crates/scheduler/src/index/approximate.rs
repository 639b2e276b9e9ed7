//! Which server probably holds which prefix, by what it was sent and has answered.
//!
//! It remembers what was sent, not what is cached; each server's memory here is bounded in blocks and forgets the least
//! recently used, as the server's own cache does.
//!
//! A block's hash stands for everything before it too, so prompts form a forest. It is kept as *runs*: stretches of blocks
//! between two places where prompts part. That two runs agree in one block says that they agree before it, so a run is
//! compared by bisection; and one record tells how far a server holds a run, whatever its length. Cost and memory go by
//! runs, not by blocks times servers.
//!
//! Invariants, each by the order in which blocks are touched (a prompt's last block first, so that a root is younger than
//! what builds on it, and tails are forgotten before roots):
//! - who holds a block of a run holds the blocks before it in the run, and all of the runs above;
//! - who holds a block for sure ([`Certainty::Computed`]) holds those before it for sure;
//! - every run is held to its end by at least one server.

use crate::{BlockHash, EndpointId};
use rustc_hash::FxHashMap;

/// No run, no record.
const NONE: u32 = u32::MAX;

/// Most blocks in a run: lengths are kept in sixteen bits.
const MAX_RUN: usize = u16::MAX as usize;

/// The approximate prefix index.
#[derive(Debug)]
pub struct PrefixIndex {
    most_per_server: usize,
    /// Runs by their first block.
    starts: FxHashMap<BlockHash, u32>,
    runs: Vec<Run>,
    free_runs: Vec<u32>,
    records: Vec<Record>,
    free_records: Vec<u32>,
    servers: FxHashMap<EndpointId, Recency>,
    /// The runs of the prompt that is being inserted; kept for its memory.
    path: Vec<u32>,
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

/// How much an index holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Blocks of servers, a block that several hold counted for each.
    pub held: usize,
    /// Different blocks.
    pub blocks: usize,
    /// Stretches of blocks between two places where prompts part.
    pub runs: usize,
    /// Memory in bytes, about: what is allocated, without the allocator's own.
    pub bytes: usize,
}

/// A stretch of blocks, each the parent of the next.
#[derive(Debug, Default)]
struct Run {
    blocks: Vec<BlockHash>,
    parent: u32,
    /// How many runs follow it.
    children: u32,
    /// How many holders have computed some of it.
    computed: u32,
    /// In ascending order of servers.
    holders: Vec<Holder>,
}

/// How far a server holds a run.
#[derive(Clone, Copy, Debug)]
struct Holder {
    server: EndpointId,
    record: u32,
    /// Leading blocks of the run, at least one.
    expected: u16,
    /// Those of them that were computed.
    computed: u16,
}

/// A server's run in the server's list, which is in order of use.
#[derive(Clone, Copy, Debug)]
struct Record {
    run: u32,
    newer: u32,
    older: u32,
    /// When it was last used, in the caller's units.
    used: u64,
}

/// A server's list: its ends, its length in blocks, and how long it may get.
#[derive(Clone, Copy, Debug)]
struct Recency {
    newest: u32,
    oldest: u32,
    len: usize,
    capacity: usize,
}

/// A run as a prompt meets it.
#[derive(Clone, Copy)]
struct Met<'a> {
    run: &'a Run,
    /// Blocks of the prompt before it.
    depth: usize,
    /// Blocks of the run that are the prompt's.
    common: usize,
}

impl PrefixIndex {
    /// An empty index that remembers at most `most_per_server` blocks of each server.
    #[must_use]
    pub fn new(most_per_server: usize) -> Self {
        Self {
            most_per_server,
            starts: FxHashMap::default(),
            runs: Vec::new(),
            free_runs: Vec::new(),
            records: Vec::new(),
            free_records: Vec::new(),
            servers: FxHashMap::default(),
            path: Vec::new(),
        }
    }

    /// Finds, for every server of `servers` (in ascending order), how much of the leading `blocks` it holds. `found` gets
    /// one entry a server, in the same order.
    pub fn matches(&self, blocks: &[BlockHash], servers: &[EndpointId], found: &mut Vec<Match>) {
        found.clear();
        found.resize(servers.len(), Match::default());
        let mut above: Option<Met<'_>> = None;
        let (mut parent, mut depth) = (NONE, 0);
        while let Some(id) = blocks.get(depth).and_then(|&b| self.child(parent, b)) {
            let run = &self.runs[id as usize];
            let common = common(&run.blocks, &blocks[depth..]);
            if let Some(above) = above {
                above.tell_before(run, servers, found);
            }
            above = Some(Met { run, depth, common });
            if common < run.blocks.len() {
                break;
            }
            (parent, depth) = (id, depth + common);
        }
        if let Some(last) = above {
            last.tell(servers, found);
        }
    }

    /// Notes that `server` was sent a prompt of `blocks`, or has answered it.
    pub fn insert(&mut self, server: EndpointId, blocks: &[BlockHash], certainty: Certainty) {
        self.insert_at(server, blocks, certainty, 0);
    }

    /// As [`insert`](Self::insert), at the time `now`, in whatever unit [`expire`](Self::expire) is asked in later.
    pub fn insert_at(
        &mut self,
        server: EndpointId,
        blocks: &[BlockHash],
        certainty: Certainty,
        now: u64,
    ) {
        let wanted = &blocks[..blocks.len().min(self.capacity_of(server))];
        let mut path = std::mem::take(&mut self.path);
        path.clear();
        let (mut parent, mut done) = (NONE, 0);
        while done < wanted.len() {
            let Some((run, taken)) = self.enter(server, parent, &wanted[done..]) else {
                break;
            };
            if !self.hold(server, run, taken, certainty) {
                break;
            }
            path.push(run);
            (parent, done) = (run, done + taken);
        }
        // Last run first, so that a prefix is younger than what builds on it.
        for &run in path.iter().rev() {
            self.touch(server, run, now);
        }
        self.path = path;
        self.shrink(server);
    }

    /// Remembers at most `blocks` blocks of `server` from now on, if that is less than of others; 0 is taken for "unknown".
    pub fn set_capacity(&mut self, server: EndpointId, blocks: usize) {
        let capacity = if blocks == 0 {
            self.most_per_server
        } else {
            blocks.min(self.most_per_server)
        };
        self.list(server).capacity = capacity;
        self.shrink(server);
    }

    /// Forgets `server`: it is gone, or came back without its cache.
    pub fn forget(&mut self, server: EndpointId) {
        while self.drop_oldest(server, usize::MAX) {}
        self.servers.remove(&server);
    }

    /// Forgets what no insertion since `time` has touched. Takes time for every server.
    pub fn expire(&mut self, time: u64) {
        let servers: Vec<EndpointId> = self.servers.keys().copied().collect();
        for server in servers {
            while self.oldest(server).is_some_and(|r| r.used < time) {
                self.drop_oldest(server, usize::MAX);
            }
        }
    }

    /// How many blocks of `server` are remembered.
    #[must_use]
    pub fn len_of(&self, server: EndpointId) -> usize {
        self.servers.get(&server).map_or(0, |r| r.len)
    }

    /// Blocks of servers, a block that several hold counted for each.
    #[must_use]
    pub fn held(&self) -> usize {
        self.servers.values().map(|s| s.len).sum()
    }

    /// How much it holds. Looks at everything: for reports, not for every request.
    #[must_use]
    pub fn size(&self) -> Size {
        let blocks: usize = self.runs.iter().map(|r| r.blocks.capacity()).sum();
        let holders: usize = self.runs.iter().map(|r| r.holders.capacity()).sum();
        Size {
            held: self.held(),
            blocks: self.runs.iter().map(|r| r.blocks.len()).sum(),
            runs: self.runs.len() - self.free_runs.len(),
            bytes: blocks * size_of::<BlockHash>()
                + holders * size_of::<Holder>()
                + self.runs.capacity() * size_of::<Run>()
                + self.records.capacity() * size_of::<Record>()
                + (self.free_runs.capacity() + self.free_records.capacity()) * size_of::<u32>()
                + table_bytes::<(BlockHash, u32)>(self.starts.capacity())
                + table_bytes::<(EndpointId, Recency)>(self.servers.capacity()),
        }
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

    fn oldest(&self, server: EndpointId) -> Option<&Record> {
        let oldest = self.servers.get(&server)?.oldest;
        self.records.get(oldest as usize)
    }

    /// The run after `parent` that begins with `block`.
    fn child(&self, parent: u32, block: BlockHash) -> Option<u32> {
        let id = *self.starts.get(&block)?;
        (self.runs[id as usize].parent == parent).then_some(id)
    }

    /// The run that takes the next blocks of a prompt of `server`, made, lengthened or split as needed, and how many
    /// blocks it takes. `None` if there is no room for another run.
    fn enter(
        &mut self,
        server: EndpointId,
        parent: u32,
        rest: &[BlockHash],
    ) -> Option<(u32, usize)> {
        let first = *rest.first()?;
        let Some(id) = self.child(parent, first) else {
            return self.add_run(parent, rest);
        };
        let run = &mut self.runs[id as usize];
        let common = common(&run.blocks, rest);
        if common == run.blocks.len() {
            // Where nobody has gone on yet, the run does.
            if run.children == 0 {
                let taken = rest.len().min(MAX_RUN).max(common);
                run.blocks.extend_from_slice(&rest[common..taken]);
                return Some((id, taken));
            }
            return Some((id, common));
        }
        // What a server touches becomes younger than the rest of the run that it holds.
        let parts = rest.len() > common
            || run
                .holder(server)
                .is_some_and(|h| usize::from(h.expected) > common);
        if parts {
            return self.split(id, common).map(|upper| (upper, common));
        }
        Some((id, common))
    }

    fn add_run(&mut self, parent: u32, rest: &[BlockHash]) -> Option<(u32, usize)> {
        let blocks = rest[..rest.len().min(MAX_RUN)].to_vec();
        let (first, taken) = (*blocks.first()?, blocks.len());
        let id = self.new_run(Run {
            blocks,
            parent,
            children: 0,
            computed: 0,
            holders: Vec::new(),
        })?;
        if let Some(parent) = self.runs.get_mut(parent as usize) {
            parent.children += 1;
        }
        self.starts.insert(first, id);
        Some((id, taken))
    }

    fn new_run(&mut self, run: Run) -> Option<u32> {
        if let Some(id) = self.free_runs.pop() {
            self.runs[id as usize] = run;
            return Some(id);
        }
        let id = u32::try_from(self.runs.len()).ok().filter(|&n| n != NONE)?;
        self.runs.push(run);
        Some(id)
    }

    /// Splits a run after `at` blocks, 0 < `at` < its length; returns the new run, which is the upper part.
    fn split(&mut self, id: u32, at: usize) -> Option<u32> {
        let upper = self.new_run(Run::default())?;
        let lower = &mut self.runs[id as usize];
        let tail = lower.blocks.split_off(at);
        let head = std::mem::replace(&mut lower.blocks, tail);
        let firsts = [
            (head.first().copied(), upper),
            (lower.blocks.first().copied(), id),
        ];
        let holders = std::mem::take(&mut lower.holders);
        self.runs[upper as usize] = Run {
            blocks: head,
            parent: std::mem::replace(&mut lower.parent, upper),
            children: 1,
            computed: lower.computed,
            holders: Vec::new(),
        };
        for (first, run) in firsts {
            first.map(|first| self.starts.insert(first, run));
        }
        self.share_holders(upper, id, &holders, u16::try_from(at).unwrap_or(u16::MAX));
        Some(upper)
    }

    /// Gives the `holders` of a run that was split after `at` blocks to its parts.
    fn share_holders(&mut self, upper: u32, lower: u32, holders: &[Holder], at: u16) {
        let mut above = Vec::with_capacity(holders.len());
        let mut below = Vec::new();
        for &holder in holders {
            let mut head = Holder {
                expected: holder.expected.min(at),
                computed: holder.computed.min(at),
                ..holder
            };
            if holder.expected > at {
                below.push(Holder {
                    expected: holder.expected - at,
                    computed: holder.computed.saturating_sub(at),
                    ..holder
                });
                let used = self.records[holder.record as usize].used;
                let Some(record) = self.new_record(upper, used) else {
                    continue;
                };
                self.link_before(holder.server, holder.record, record);
                head.record = record;
            } else {
                self.records[holder.record as usize].run = upper;
            }
            above.push(head);
        }
        let computed = below.iter().filter(|h| h.computed > 0).count();
        self.runs[upper as usize].holders = above;
        let lower = &mut self.runs[lower as usize];
        lower.computed = u32::try_from(computed).unwrap_or(u32::MAX);
        lower.holders = below;
    }

    /// Notes that `server` holds the first `blocks` of a run. False if there is no room for another record.
    fn hold(&mut self, server: EndpointId, id: u32, blocks: usize, certainty: Certainty) -> bool {
        let blocks = u16::try_from(blocks).unwrap_or(u16::MAX);
        let place = self.runs[id as usize].place_of(server);
        let at = match place {
            Ok(at) => at,
            Err(at) => {
                let Some(record) = self.new_record(id, 0) else {
                    return false;
                };
                self.link_newest(server, record);
                let fresh = Holder {
                    server,
                    record,
                    expected: 0,
                    computed: 0,
                };
                self.runs[id as usize].holders.insert(at, fresh);
                at
            }
        };
        let run = &mut self.runs[id as usize];
        let holder = &mut run.holders[at];
        let more = blocks.saturating_sub(holder.expected);
        holder.expected += more;
        if certainty == Certainty::Computed {
            run.computed += u32::from(holder.computed == 0);
            holder.computed = holder.computed.max(blocks);
        }
        self.list(server).len += usize::from(more);
        true
    }

    fn touch(&mut self, server: EndpointId, id: u32, now: u64) {
        let Some(record) = self.runs[id as usize].holder(server).map(|h| h.record) else {
            return;
        };
        self.unlink(server, record);
        self.link_newest(server, record);
        self.records[record as usize].used = now;
    }

    fn shrink(&mut self, server: EndpointId) {
        while let Some(excess) = self
            .servers
            .get(&server)
            .and_then(|r| r.len.checked_sub(r.capacity))
            .filter(|&excess| excess > 0)
        {
            if !self.drop_oldest(server, excess) {
                return;
            }
        }
    }

    /// Forgets up to `most` blocks of what `server` used longest ago. Whether there was something.
    fn drop_oldest(&mut self, server: EndpointId, most: usize) -> bool {
        let Some(list) = self.servers.get_mut(&server).filter(|r| r.oldest != NONE) else {
            return false;
        };
        let record = list.oldest;
        let id = self.records[record as usize].run;
        let run = &mut self.runs[id as usize];
        let Ok(at) = run.place_of(server) else {
            return false;
        };
        let holder = &mut run.holders[at];
        let (held, was_computed) = (usize::from(holder.expected), holder.computed > 0);
        let kept = u16::try_from(held - held.min(most)).unwrap_or(0);
        holder.expected = kept;
        holder.computed = holder.computed.min(kept);
        list.len -= held - usize::from(kept);
        if kept == 0 {
            run.computed -= u32::from(was_computed);
            run.holders.remove(at);
            self.unlink(server, record);
            self.free_records.push(record);
        }
        self.tidy(id, held);
        true
    }

    /// After somebody who held `held` blocks of a run holds fewer: lets go of what nobody holds.
    fn tidy(&mut self, id: u32, held: usize) {
        let run = &mut self.runs[id as usize];
        if run.holders.is_empty() {
            let first = run.blocks.first().copied();
            let parent = run.parent;
            (run.blocks, run.holders) = (Vec::new(), Vec::new());
            if let Some(first) = first
                && self.starts.get(&first) == Some(&id)
            {
                self.starts.remove(&first);
            }
            if let Some(parent) = self.runs.get_mut(parent as usize) {
                parent.children -= 1;
            }
            self.free_runs.push(id);
        } else if run.children == 0 && held == run.blocks.len() {
            let longest = run.holders.iter().map(|h| h.expected).max().unwrap_or(0);
            run.blocks.truncate(usize::from(longest));
            if run.blocks.capacity() / 2 > run.blocks.len() {
                run.blocks.shrink_to_fit();
            }
        }
    }

    fn new_record(&mut self, run: u32, used: u64) -> Option<u32> {
        let fresh = Record {
            run,
            newer: NONE,
            older: NONE,
            used,
        };
        if let Some(record) = self.free_records.pop() {
            self.records[record as usize] = fresh;
            return Some(record);
        }
        let record = u32::try_from(self.records.len())
            .ok()
            .filter(|&n| n != NONE)?;
        self.records.push(fresh);
        Some(record)
    }

    fn link_newest(&mut self, server: EndpointId, record: u32) {
        let ends = self.list(server);
        let newest = std::mem::replace(&mut ends.newest, record);
        if newest == NONE {
            ends.oldest = record;
        } else {
            self.records[newest as usize].newer = record;
        }
        let linked = &mut self.records[record as usize];
        (linked.older, linked.newer) = (newest, NONE);
    }

    /// Links `record` as the next younger than `older`.
    fn link_before(&mut self, server: EndpointId, older: u32, record: u32) {
        let newer = std::mem::replace(&mut self.records[older as usize].newer, record);
        let linked = &mut self.records[record as usize];
        (linked.older, linked.newer) = (older, newer);
        if newer == NONE {
            self.list(server).newest = record;
        } else {
            self.records[newer as usize].older = record;
        }
    }

    fn unlink(&mut self, server: EndpointId, record: u32) {
        let Some(ends) = self.servers.get_mut(&server) else {
            return;
        };
        let Record { newer, older, .. } = self.records[record as usize];
        match newer {
            NONE => ends.newest = older,
            newer => self.records[newer as usize].older = older,
        }
        match older {
            NONE => ends.oldest = newer,
            older => self.records[older as usize].newer = newer,
        }
    }
}

impl Run {
    fn place_of(&self, server: EndpointId) -> Result<usize, usize> {
        self.holders.binary_search_by_key(&server, |h| h.server)
    }

    fn holder(&self, server: EndpointId) -> Option<&Holder> {
        self.place_of(server).ok().map(|at| &self.holders[at])
    }
}

impl Met<'_> {
    /// Writes what this run tells, as far as `next`, the run after it, will not tell it again, and more: for those that
    /// do not hold anything of `next`.
    fn tell_before(&self, next: &Run, servers: &[EndpointId], found: &mut [Match]) {
        let (here, there) = (&self.run.holders, &next.holders);
        let n_gone = here.len().saturating_sub(there.len());
        // Who has computed something there has here: if as many have, the same have.
        if next.computed != self.run.computed || n_gone * 16 > here.len() + there.len() {
            self.tell(servers, found);
            return;
        }
        // Both are in order and `there` is part of `here`: where they have the same server in the same place, they are the
        // same up to there, so the next that is gone is found by bisection.
        let mut same = 0;
        for gone in 0..n_gone {
            let (mut from, mut to) = (same, there.len());
            while from < to {
                let middle = from.midpoint(to);
                if here[middle + gone].server == there[middle].server {
                    from = middle + 1;
                } else {
                    to = middle;
                }
            }
            same = from;
            let holder = &here[same + gone];
            if let Ok(at) = servers.binary_search(&holder.server) {
                self.tell_one(holder, &mut found[at]);
            }
        }
    }

    /// Writes what this run tells of its holders.
    fn tell(&self, servers: &[EndpointId], found: &mut [Match]) {
        let holders = &self.run.holders;
        if holders.len() * 8 < servers.len() {
            for holder in holders {
                if let Ok(at) = servers.binary_search(&holder.server) {
                    self.tell_one(holder, &mut found[at]);
                }
            }
            return;
        }
        let mut at = 0;
        for holder in holders {
            while servers.get(at).is_some_and(|&s| s < holder.server) {
                at += 1;
            }
            match servers.get(at) {
                Some(&server) if server == holder.server => self.tell_one(holder, &mut found[at]),
                Some(_) => {}
                None => return,
            }
        }
    }

    fn tell_one(&self, holder: &Holder, found: &mut Match) {
        found.expected = self.depth + self.common.min(holder.expected.into());
        if holder.computed > 0 {
            found.computed = self.depth + self.common.min(holder.computed.into());
        }
    }
}

/// How many leading blocks `run` and `rest` share, of which the first is known to be shared.
fn common(run: &[BlockHash], rest: &[BlockHash]) -> usize {
    let shorter = run.len().min(rest.len());
    if shorter == 0 || run[shorter - 1] == rest[shorter - 1] {
        return shorter;
    }
    // Blocks agree up to some place and differ from there on.
    let (mut same, mut differ) = (0, shorter - 1);
    while same < differ {
        let middle = same.midpoint(differ);
        if run[middle] == rest[middle] {
            same = middle + 1;
        } else {
            differ = middle;
        }
    }
    same.max(1)
}

/// Bytes of a hash table with room for `capacity` entries, which is at most seven eighths of its slots.
pub(super) const fn table_bytes<T>(capacity: usize) -> usize {
    capacity / 7 * 8 * (size_of::<T>() + 1)
}

#[cfg(test)]
mod tests;
