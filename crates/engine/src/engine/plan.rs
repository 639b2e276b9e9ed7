//! Who runs in the next step, and on which blocks. Fills the batch; nothing is computed yet.

use super::{Beside, Engine, PrefixCaching};
use crate::sequence::Sequence;
use crate::{Event, Handover, Row};

impl Engine {
    /// Fills `batch`: decodes first, so that a long prompt does not hold up answers, then prompts with what is left of
    /// the budget (less beside decodes), then sequences from the queue.
    pub(super) fn plan(&mut self, events: &mut Vec<Event>) {
        self.batch.rows.clear();
        self.batch.tokens.clear();
        self.batch.blocks.clear();
        self.rows.clear();
        let mut budget = self.cfg.max_num_batched_tokens;
        self.secure_decode_blocks();
        for i in 0..self.running.len() {
            if self.running[i].pending() == 1 {
                self.schedule(i, &mut budget);
            }
        }
        self.n_decodes = self.rows.len();
        if self.n_decodes > 0 {
            budget = budget.min(self.beside(self.n_decodes));
        }
        if self.schedule_tails(&mut budget) {
            return;
        }
        for i in 0..self.running.len() {
            if self.running[i].pending() > 1 {
                self.schedule(i, &mut budget);
            }
        }
        self.admit(&mut budget, events);
    }

    /// Prompt tokens that the step may take beside so many decodes; perhaps none this time.
    fn beside(&self, n_decodes: usize) -> usize {
        match (self.cfg.prefill_beside_decode, &self.pace) {
            (Beside::Tokens(n), _) => n,
            (Beside::Stretch(_), pace) => pace.as_ref().map_or(1, |pace| pace.tokens(n_decodes)),
        }
    }

    /// Gives every decode the block its next token needs, taking from the youngest sequences when the pool is dry.
    fn secure_decode_blocks(&mut self) {
        let block_size = self.block_size();
        let mut i = 0;
        while i < self.running.len() {
            let seq = &mut self.running[i];
            if seq.tokens.len().div_ceil(block_size) <= seq.blocks.len() {
                i += 1;
            } else if let Some(block) = self.pool.allocate() {
                seq.blocks.push(block);
            } else {
                self.preempt_youngest();
            }
        }
    }

    /// The youngest running sequence goes back to the front of the queue with its tokens and without its blocks.
    fn preempt_youngest(&mut self) {
        if let Some(mut seq) = self.running.pop() {
            self.free_blocks(&mut seq);
            seq.computed = 0;
            seq.registered = 0;
            seq.is_at_tail = false;
            self.stats.preemptions += 1;
            self.waiting.push_front(seq);
        }
    }

    /// Adds the ends of prompts that leave; if there are any, no other prompt holds them up.
    fn schedule_tails(&mut self, budget: &mut usize) -> bool {
        let n_rows = self.rows.len();
        for i in 0..self.running.len() {
            if self.running[i].is_at_tail && self.running[i].pending() > 1 {
                self.schedule(i, budget);
            }
        }
        self.rows.len() > n_rows
    }

    /// Adds a row for `running[i]` if the step has room for it.
    fn schedule(&mut self, i: usize, budget: &mut usize) {
        let (tail, block_size) = (self.cfg.export_tail, self.block_size());
        let seq = &mut self.running[i];
        let most = seq.pending().min(*budget).min(self.spec.max_chunk);
        let n = seq.before_tail(most, tail, block_size);
        if n == 0 || self.rows.len() >= self.cfg.max_num_seqs.min(self.spec.max_batch) {
            return;
        }
        *budget -= n;
        seq.scheduled = n;
        seq.is_at_tail = n < most;
        let reach = seq.computed + n;
        let tokens = self.batch.tokens.len();
        self.batch
            .tokens
            .extend_from_slice(&seq.tokens[seq.computed..reach]);
        let blocks = self.batch.blocks.len();
        let n_blocks = reach.div_ceil(self.spec.layout.block_size as usize);
        self.batch.blocks.extend_from_slice(&seq.blocks[..n_blocks]);
        self.batch.rows.push(Row {
            tokens: tokens..tokens + n,
            blocks: blocks..blocks + n_blocks,
            start: seq.computed,
            sampling: (reach == seq.tokens.len()).then(|| seq.sampling.clone()),
        });
        self.rows.push(i);
    }

    /// Takes sequences from the queue while places, blocks and budget last. The first that does not fit blocks the rest:
    /// a long prompt is not overtaken for ever.
    fn admit(&mut self, budget: &mut usize, events: &mut Vec<Event>) {
        while *budget > 0
            && self.running.len() + self.fetching.len()
                < self.cfg.max_num_seqs.min(self.spec.max_batch)
        {
            let Some(mut seq) = self.waiting.pop_front() else {
                return;
            };
            if !self.take_blocks(&mut seq) {
                self.waiting.push_front(seq);
                return;
            }
            match seq.missing_import() {
                Some(n_tokens) => {
                    events.push(seq.fetch_event(
                        seq.computed / self.block_size(),
                        n_tokens,
                        self.block_size(),
                    ));
                    self.stats.external_queries += (n_tokens - seq.computed) as u64;
                    self.fetching.push(seq);
                }
                None => {
                    if matches!(seq.handover, Handover::Import { .. }) {
                        seq.handover = Handover::None;
                    }
                    self.running.push(seq);
                    self.schedule(self.running.len() - 1, budget);
                }
            }
        }
    }

    /// Gives a sequence blocks for all its tokens: what the prefix cache has, the rest fresh. All or nothing.
    fn take_blocks(&mut self, seq: &mut Sequence) -> bool {
        let block_size = self.block_size();
        let hits = self.find_prefix(seq);
        let n_blocks = seq.tokens.len().div_ceil(block_size);
        let from_free = seq.hashes[..hits]
            .iter()
            .filter_map(|h| self.pool.find(h))
            .filter(|&b| self.pool.is_free(b));
        if n_blocks - hits + from_free.count() > self.pool.n_free() {
            return false;
        }
        for hash in &seq.hashes[..hits] {
            if let Some(block) = self.pool.find(hash) {
                self.pool.share(block);
                seq.blocks.push(block);
            }
        }
        while seq.blocks.len() < n_blocks {
            // Counted above.
            let Some(block) = self.pool.allocate() else {
                break;
            };
            seq.blocks.push(block);
        }
        seq.computed = hits * block_size;
        seq.registered = hits;
        // What a preempted sequence finds again is its own work.
        if seq.cached.is_none() {
            seq.cached = Some(seq.computed);
            self.stats.prefix_queries += seq.tokens.len() as u64;
            self.stats.prefix_hits += seq.computed as u64;
        }
        true
    }

    /// Leading blocks that the pool already holds, never all tokens: the last one is computed for its logits.
    fn find_prefix(&self, seq: &mut Sequence) -> usize {
        if self.cfg.prefix_caching == PrefixCaching::Off {
            return 0;
        }
        let most = (seq.tokens.len() - 1) / self.block_size();
        seq.hash_blocks(&self.hasher, most, self.block_size());
        seq.hashes[..most]
            .iter()
            .take_while(|hash| self.pool.find(hash).is_some())
            .count()
    }
}
