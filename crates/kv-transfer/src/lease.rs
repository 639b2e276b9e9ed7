//! Leases of a producer: who may fetch what, until when. Pure: time, ids and bytes are arguments.
//!
//! A lease grows block by block while they are computed, and can be fetched from all the while, by one consumer at a time:
//! as long as a transfer runs the lease is its session's. It is gone for good once released or expired. What is gone keeps
//! its reason for a while, so that a late consumer learns why.
//! Not here: memory accounting; a lease's bytes are freed when the last reference to them goes.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::RejectCode;

/// Reasons remembered.
const MAX_GONE: usize = 4096;

/// Names a control connection of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SessionId(pub(crate) u64);

/// Some of a lease's blocks, shared with the transfers that send them.
#[derive(Debug)]
pub(crate) struct Part<B> {
    pub(crate) bytes: B,
    /// Counted from the first of the lease.
    pub(crate) blocks: Range<u32>,
    /// Set once the lease is gone: transfers stop at the next chunk.
    revoked: Arc<AtomicBool>,
}

impl<B> Part<B> {
    pub(crate) fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }
}

#[derive(Debug)]
struct Lease<B> {
    /// Back to back from block 0.
    parts: Vec<Arc<Part<B>>>,
    n_blocks: u32,
    revoked: Arc<AtomicBool>,
    expires: Instant,
    /// No heartbeat reaches beyond this.
    cap: Instant,
    /// Whose transfers run, and how many.
    open_by: Option<(SessionId, u32)>,
    /// Whether a consumer has all of something.
    is_fetched: bool,
}

impl<B> Lease<B> {
    fn n_ready(&self) -> u32 {
        self.parts.last().map_or(0, |part| part.blocks.end)
    }

    fn is_elsewhere(&self, by: SessionId) -> bool {
        self.open_by.is_some_and(|(other, _)| other != by)
    }
}

/// How long leases live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeaseTerms {
    pub(crate) ttl: Duration,
    pub(crate) cap: Duration,
}

/// All leases of one producer.
#[derive(Debug)]
pub(crate) struct LeaseTable<B> {
    terms: LeaseTerms,
    live: BTreeMap<u64, Lease<B>>,
    gone: BTreeMap<u64, RejectCode>,
    gone_order: VecDeque<u64>,
    n_fetched: u64,
}

impl<B> LeaseTable<B> {
    pub(crate) fn new(terms: LeaseTerms) -> Self {
        Self {
            terms,
            live: BTreeMap::new(),
            gone: BTreeMap::new(),
            gone_order: VecDeque::new(),
            n_fetched: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.live.len()
    }

    /// Whose transfers run of a lease, and how many; `None` if it is gone.
    #[cfg(test)]
    pub(crate) fn open_by(&self, id: u64) -> Option<Option<(SessionId, u32)>> {
        self.live.get(&id).map(|lease| lease.open_by)
    }

    /// Leases whose blocks are not all there yet.
    pub(crate) fn n_building(&self) -> usize {
        let is_building = |lease: &&Lease<B>| lease.n_ready() < lease.n_blocks;
        self.live.values().filter(is_building).count()
    }

    /// Leases that a consumer has released after fetching from them.
    pub(crate) fn n_fetched(&self) -> u64 {
        self.n_fetched
    }

    /// Whether `id` was ever seen, as far as is remembered.
    pub(crate) fn knows(&self, id: u64) -> bool {
        self.live.contains_key(&id) || self.gone.contains_key(&id)
    }

    /// A lease of blocks that are yet to come. It does not end before its cap: whoever computes them ends it.
    pub(crate) fn begin(&mut self, id: u64, n_blocks: u32, now: Instant) {
        let cap = now + self.terms.cap;
        let lease = Lease {
            parts: Vec::new(),
            n_blocks,
            revoked: Arc::default(),
            expires: cap,
            cap,
            open_by: None,
            is_fetched: false,
        };
        self.live.insert(id, lease);
    }

    /// The next of the lease's blocks; with the last one its time begins to run. Returns whether the lease is there and
    /// has so many to come.
    pub(crate) fn append(&mut self, id: u64, bytes: B, n_blocks: u32, now: Instant) -> bool {
        let ttl = self.terms.ttl;
        let Some(lease) = self.live.get_mut(&id) else {
            return false;
        };
        let begin = lease.n_ready();
        let end = begin.saturating_add(n_blocks);
        if n_blocks == 0 || end > lease.n_blocks {
            return false;
        }
        lease.parts.push(Arc::new(Part {
            bytes,
            blocks: begin..end,
            revoked: Arc::clone(&lease.revoked),
        }));
        if end == lease.n_blocks {
            lease.expires = (now + ttl).min(lease.cap);
        }
        true
    }

    /// Blocks that can be fetched, and blocks in all; `None` if the lease is gone.
    pub(crate) fn progress(&self, id: u64) -> Option<(u32, u32)> {
        let lease = self.live.get(&id)?;
        Some((lease.n_ready(), lease.n_blocks))
    }

    /// Prolongs a lease to its ttl from now, within its cap. Returns what remains: nothing if it is gone.
    pub(crate) fn heartbeat(&mut self, id: u64, now: Instant) -> Duration {
        let Some(lease) = self.live.get_mut(&id).filter(|lease| now < lease.expires) else {
            return Duration::ZERO;
        };
        if lease.n_ready() == lease.n_blocks {
            lease.expires = lease.expires.max((now + self.terms.ttl).min(lease.cap));
        }
        lease.expires - now
    }

    /// The parts in which `blocks` lie, all of which must be there.
    pub(crate) fn parts(
        &self,
        id: u64,
        blocks: Range<u32>,
    ) -> Result<Vec<Arc<Part<B>>>, RejectCode> {
        let lease = self.live.get(&id).ok_or(RejectCode::UnknownLease)?;
        if blocks.is_empty() || blocks.end > lease.n_ready() {
            return Err(RejectCode::Range);
        }
        let parts = &lease.parts;
        let first = parts.partition_point(|part| part.blocks.end <= blocks.start);
        let end = parts.partition_point(|part| part.blocks.start < blocks.end);
        Ok(parts[first..end].to_vec())
    }

    /// Why `by` cannot fetch from the lease.
    pub(crate) fn refusal(&self, id: u64, by: SessionId, now: Instant) -> Option<RejectCode> {
        let Some(lease) = self.live.get(&id) else {
            let why = self.gone.get(&id).copied();
            return Some(why.unwrap_or(RejectCode::UnknownLease));
        };
        if now >= lease.expires {
            return Some(RejectCode::Expired);
        }
        lease.is_elsewhere(by).then_some(RejectCode::Busy)
    }

    /// A transfer begins, which [`refusal`](Self::refusal) has nothing against.
    pub(crate) fn open(&mut self, id: u64, by: SessionId) {
        if let Some(lease) = self.live.get_mut(&id) {
            let n_open = lease.open_by.map_or(0, |(_, n)| n);
            lease.open_by = Some((by, n_open + 1));
        }
    }

    /// A transfer ended. When it was the last, others can open the lease as long as it lives.
    pub(crate) fn close(&mut self, id: u64, by: SessionId) {
        if let Some(lease) = self.live.get_mut(&id)
            && let Some((session, n_open)) = lease.open_by.filter(|(session, _)| *session == by)
        {
            lease.open_by = (n_open > 1).then_some((session, n_open - 1));
        }
    }

    /// A transfer ended, and its consumer has everything of it.
    pub(crate) fn received(&mut self, id: u64, by: SessionId) {
        self.close(id, by);
        if let Some(lease) = self.live.get_mut(&id) {
            lease.is_fetched = true;
        }
    }

    /// Not needed any more, says a holder. One that another session is fetching right now stays: two consumers
    /// may hold the same lease, and the one that gives up must not cut off the other.
    pub(crate) fn release(&mut self, id: u64, by: SessionId) -> bool {
        let Some(lease) = self.live.get(&id).filter(|lease| !lease.is_elsewhere(by)) else {
            return false;
        };
        self.n_fetched += u64::from(lease.is_fetched);
        self.consume(id)
    }

    /// Fetched, or withdrawn by its owner. Returns whether it was there.
    pub(crate) fn consume(&mut self, id: u64) -> bool {
        self.end(id, RejectCode::Consumed)
    }

    /// Will not be completed.
    pub(crate) fn abort(&mut self, id: u64) -> bool {
        self.end(id, RejectCode::Expired)
    }

    /// Ends what has outlived its time, and returns how many that were.
    pub(crate) fn expire(&mut self, now: Instant) -> usize {
        let late: Vec<u64> = self
            .live
            .iter()
            .filter(|(_, l)| now >= l.expires)
            .map(|(&id, _)| id)
            .collect();
        late.iter()
            .filter(|&&id| self.end(id, RejectCode::Expired))
            .count()
    }

    /// When the next lease expires unless a heartbeat comes.
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.live.values().map(|lease| lease.expires).min()
    }

    fn end(&mut self, id: u64, why: RejectCode) -> bool {
        let Some(lease) = self.live.remove(&id) else {
            return false;
        };
        lease.revoked.store(true, Ordering::Release);
        if self.gone_order.len() >= MAX_GONE
            && let Some(oldest) = self.gone_order.pop_front()
        {
            self.gone.remove(&oldest);
        }
        self.gone.insert(id, why);
        self.gone_order.push_back(id);
        true
    }
}

#[cfg(test)]
mod tests {
    #![expect(
        clippy::single_range_in_vec_init,
        reason = "there may be a single part"
    )]

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const ME: SessionId = SessionId(1);

    fn table() -> (LeaseTable<()>, Instant) {
        let terms = LeaseTerms {
            ttl: 15 * SECOND,
            cap: 40 * SECOND,
        };
        let (mut table, start) = (LeaseTable::new(terms), Instant::now());
        table.begin(7, 1, start);
        assert!(table.append(7, (), 1, start));
        (table, start)
    }

    fn refusal(table: &LeaseTable<()>, id: u64, now: Instant) -> Option<RejectCode> {
        table.refusal(id, ME, now)
    }

    #[test]
    fn a_lease_ends_after_its_ttl_and_its_reason_is_remembered() {
        let (mut table, start) = table();
        assert_eq!(table.next_expiry(), Some(start + 15 * SECOND));
        assert_eq!(table.expire(start + 14 * SECOND), 0);
        assert_eq!(refusal(&table, 7, start + 14 * SECOND), None);
        assert_eq!(
            refusal(&table, 7, start + 15 * SECOND),
            Some(RejectCode::Expired)
        );
        assert_eq!(table.expire(start + 15 * SECOND), 1);
        assert_eq!(refusal(&table, 7, start), Some(RejectCode::Expired));
        assert_eq!(refusal(&table, 8, start), Some(RejectCode::UnknownLease));
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn heartbeats_prolong_up_to_the_cap_and_never_revive() {
        let (mut table, start) = table();
        assert_eq!(table.heartbeat(7, start + 10 * SECOND), 15 * SECOND);
        assert_eq!(table.heartbeat(7, start + 24 * SECOND), 15 * SECOND);
        assert_eq!(table.heartbeat(7, start + 38 * SECOND), 2 * SECOND);
        assert_eq!(table.heartbeat(7, start + 40 * SECOND), Duration::ZERO);
        assert_eq!(table.heartbeat(8, start), Duration::ZERO);
    }

    #[test]
    fn an_open_lease_is_busy_for_others_until_its_session_has_closed_all_transfers() {
        let (mut table, start) = table();
        let other = SessionId(2);
        let busy = Some(RejectCode::Busy);
        table.open(7, ME);
        table.open(7, ME);
        assert_eq!(
            (table.refusal(7, other, start), refusal(&table, 7, start)),
            (busy, None)
        );
        table.close(7, other);
        table.close(7, ME);
        assert_eq!(table.refusal(7, other, start), busy);
        table.close(7, ME);
        assert_eq!(table.refusal(7, other, start), None);
    }

    #[test]
    fn a_lease_that_was_fetched_from_counts_once_it_is_released() {
        let (mut table, start) = table();
        table.begin(8, 1, start);
        table.open(7, ME);
        table.received(7, ME);
        assert_eq!((table.n_fetched(), table.n_building()), (0, 1));
        assert!(table.release(7, ME) && table.release(8, ME) && !table.release(7, ME));
        assert_eq!(table.n_fetched(), 1);
    }

    #[test]
    fn a_holder_that_gives_up_does_not_cut_off_another_that_fetches() {
        let (mut table, start) = table();
        table.open(7, ME);
        assert!(!table.release(7, SessionId(2)));
        assert_eq!(refusal(&table, 7, start), None);
        assert!(table.release(7, ME));
    }

    #[test]
    fn a_consumed_lease_is_revoked_once() {
        let (mut table, start) = table();
        let part = Arc::clone(&table.parts(7, 0..1).unwrap()[0]);
        assert!(!part.is_revoked());
        assert!(table.consume(7));
        assert!(!table.consume(7));
        assert!(part.is_revoked());
        assert_eq!(refusal(&table, 7, start), Some(RejectCode::Consumed));
    }

    #[test]
    fn a_lease_can_be_fetched_from_while_it_grows() {
        let (mut table, start) = table();
        table.begin(8, 5, start);
        assert_eq!(table.progress(8), Some((0, 5)));
        let parts = |table: &LeaseTable<()>, blocks| {
            let parts = table.parts(8, blocks)?;
            Ok(parts
                .iter()
                .map(|part| part.blocks.clone())
                .collect::<Vec<_>>())
        };
        assert_eq!(parts(&table, 0..1), Err(RejectCode::Range));
        assert!(table.append(8, (), 3, start));
        assert_eq!(parts(&table, 2..3), Ok(vec![0..3]));
        assert_eq!(parts(&table, 2..4), Err(RejectCode::Range));
        assert!(!table.append(8, (), 3, start), "more than was announced");
        assert!(!table.append(8, (), 0, start));
        assert!(table.append(8, (), 2, start));
        assert_eq!(parts(&table, 3..5), Ok(vec![3..5]));
        assert_eq!(parts(&table, 2..4), Ok(vec![0..3, 3..5]));
        assert_eq!(parts(&table, 4..4), Err(RejectCode::Range));
        assert_eq!(table.progress(8), Some((5, 5)));
        assert!(table.abort(8));
        assert_eq!(table.progress(8), None);
        assert!(!table.append(8, (), 1, start));
    }

    #[test]
    fn the_time_of_a_lease_runs_from_its_last_block() {
        let (mut table, start) = table();
        table.begin(8, 2, start);
        assert!(table.append(8, (), 1, start));
        assert_eq!(table.heartbeat(8, start), 40 * SECOND);
        assert_eq!(table.expire(start + 20 * SECOND), 1, "the other one");
        assert!(table.append(8, (), 1, start + 20 * SECOND));
        assert_eq!(table.expire(start + 34 * SECOND), 0);
        assert_eq!(table.expire(start + 35 * SECOND), 1);
    }

    #[test]
    fn the_memory_of_what_is_gone_is_bounded() {
        let (mut table, start) = table();
        for id in 100..100 + 2 * MAX_GONE as u64 {
            table.begin(id, 1, start);
            table.consume(id);
        }
        assert_eq!(table.gone.len(), MAX_GONE);
        assert_eq!(table.gone_order.len(), MAX_GONE);
        assert!(!table.knows(100));
    }
}
