//! What becomes findable and what no longer is, written down for whoever follows the prefix cache. Costs a look at a flag
//! while nobody does.

use baton_kv::{BlockHash, CacheChange};

/// The changes since they were last taken, in order.
#[derive(Debug, Default)]
pub(crate) struct CacheLog {
    is_on: bool,
    changes: Vec<CacheChange>,
}

impl CacheLog {
    pub(crate) const fn new(is_on: bool) -> Self {
        Self {
            is_on,
            changes: Vec::new(),
        }
    }

    /// A block can be found; `parent` is the block before it in a prompt.
    pub(crate) fn stored(&mut self, parent: Option<BlockHash>, block: BlockHash, its: &[u32]) {
        if !self.is_on {
            return;
        }
        if let Some(CacheChange::Stored { hashes, tokens, .. }) = self.changes.last_mut()
            && parent.is_some()
            && hashes.last() == parent.as_ref()
        {
            hashes.push(block);
            tokens.extend_from_slice(its);
            return;
        }
        self.changes.push(CacheChange::Stored {
            parent,
            hashes: vec![block],
            tokens: its.to_vec(),
        });
    }

    /// A block cannot be found any more.
    pub(crate) fn removed(&mut self, block: BlockHash) {
        if !self.is_on {
            return;
        }
        match self.changes.last_mut() {
            Some(CacheChange::Removed(hashes)) => hashes.push(block),
            _ => self.changes.push(CacheChange::Removed(vec![block])),
        }
    }

    /// Moves the changes to `out`.
    pub(crate) fn take(&mut self, out: &mut Vec<CacheChange>) {
        out.append(&mut self.changes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u8) -> BlockHash {
        BlockHash([n; 32])
    }

    #[test]
    fn runs_become_one_change() {
        let mut log = CacheLog::new(true);
        log.stored(None, hash(1), &[1, 2]);
        log.stored(Some(hash(1)), hash(2), &[3, 4]);
        log.stored(Some(hash(1)), hash(3), &[5, 6]);
        log.stored(None, hash(4), &[7, 8]);
        log.removed(hash(1));
        log.removed(hash(2));
        log.stored(Some(hash(2)), hash(5), &[9, 9]);
        let stored = |parent, hashes: &[u8], tokens: &[u32]| CacheChange::Stored {
            parent,
            hashes: hashes.iter().map(|&n| hash(n)).collect(),
            tokens: tokens.to_vec(),
        };
        let mut changes = Vec::new();
        log.take(&mut changes);
        assert_eq!(
            changes,
            [
                stored(None, &[1, 2], &[1, 2, 3, 4]),
                stored(Some(hash(1)), &[3], &[5, 6]),
                stored(None, &[4], &[7, 8]),
                CacheChange::Removed(vec![hash(1), hash(2)]),
                stored(Some(hash(2)), &[5], &[9, 9]),
            ]
        );
        log.take(&mut changes);
        assert_eq!(changes.len(), 5);
    }

    #[test]
    fn nothing_is_written_down_for_nobody() {
        let mut log = CacheLog::new(false);
        log.stored(None, hash(1), &[1]);
        log.removed(hash(1));
        assert!(log.changes.is_empty());
    }
}
