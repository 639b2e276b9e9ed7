//! The way from the engine's thread to the publisher: never waited on, bounded, and honest about what did not fit.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use baton_kv::CacheChange;
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;

use super::Counters;

/// Most blocks of changes that wait for room in the queue.
const MAX_WAITING_BLOCKS: usize = 1 << 16;

/// Changes of one step or more, and when they were seen.
#[derive(Debug)]
pub(super) struct Step {
    /// Seconds since 1970.
    pub(super) ts: f64,
    pub(super) changes: Vec<CacheChange>,
}

/// Takes the changes of an engine, one step after the other.
#[derive(Debug)]
pub struct Feed {
    queue: Sender<Step>,
    /// What did not fit into the queue yet.
    waiting: Vec<CacheChange>,
    counters: Arc<Counters>,
}

impl Feed {
    pub(super) const fn new(queue: Sender<Step>, counters: Arc<Counters>) -> Self {
        Self {
            queue,
            waiting: Vec::new(),
            counters,
        }
    }

    /// Hands over what a step changed; `changes` is empty afterwards. Never waits: what does not fit goes with the next
    /// call. If too much waits, followers are told instead that nothing is cached. They then know too little until they
    /// have heard of new blocks, but nothing that is wrong.
    pub fn offer(&mut self, changes: &mut Vec<CacheChange>) {
        self.waiting.append(changes);
        if self.waiting.is_empty() {
            return;
        }
        let step = Step {
            ts: now(),
            changes: std::mem::take(&mut self.waiting),
        };
        match self.queue.try_send(step) {
            // Nobody publishes any more: the server is going down.
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(step)) => {
                self.waiting = step.changes;
                self.bound_waiting();
            }
        }
    }

    /// Whether something waits for another call of [`offer`](Self::offer).
    #[must_use]
    pub const fn is_behind(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn bound_waiting(&mut self) {
        let n_blocks = |change: &CacheChange| match change {
            CacheChange::Stored { hashes, .. } | CacheChange::Removed(hashes) => hashes.len(),
            CacheChange::Cleared => 1,
        };
        if self.waiting.iter().map(n_blocks).sum::<usize>() > MAX_WAITING_BLOCKS {
            self.counters.overflows.fetch_add(1, Ordering::Relaxed);
            self.waiting.clear();
            self.waiting.push(CacheChange::Cleared);
        }
    }
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_kv::BlockHash;
    use tokio::sync::mpsc::channel;

    fn removed(n: usize) -> Vec<CacheChange> {
        vec![CacheChange::Removed(vec![BlockHash([7; 32]); n])]
    }

    #[test]
    fn what_does_not_fit_goes_with_the_next_step() {
        let (queue, mut steps) = channel(1);
        let mut feed = Feed::new(queue, Arc::default());
        feed.offer(&mut Vec::new());
        for n in 1..=3 {
            let mut changes = removed(n);
            feed.offer(&mut changes);
            assert!(changes.is_empty());
        }
        assert_eq!(steps.try_recv().unwrap().changes, removed(1));
        assert!(feed.is_behind());
        feed.offer(&mut Vec::new());
        assert!(!feed.is_behind());
        assert_eq!(
            steps.try_recv().unwrap().changes,
            [removed(2), removed(3)].concat()
        );
    }

    #[test]
    fn too_much_becomes_nothing_is_cached() {
        let (queue, mut steps) = channel(1);
        let counters = Arc::new(Counters::default());
        let mut feed = Feed::new(queue, Arc::clone(&counters));
        feed.offer(&mut removed(1));
        feed.offer(&mut removed(MAX_WAITING_BLOCKS));
        assert_eq!(counters.overflows.load(Ordering::Relaxed), 0);
        feed.offer(&mut removed(1));
        assert_eq!(counters.overflows.load(Ordering::Relaxed), 1);
        let _ = steps.try_recv();
        feed.offer(&mut removed(2));
        let expected = [vec![CacheChange::Cleared], removed(2)].concat();
        assert_eq!(steps.try_recv().unwrap().changes, expected);
    }
}
