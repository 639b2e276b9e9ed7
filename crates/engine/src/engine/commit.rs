//! What the device computed enters the sequences: tokens, findable blocks, ends.

use super::{Engine, register, release};
use crate::{Event, RunnerError, Sampled};

impl Engine {
    pub(super) fn commit(&mut self, events: &mut Vec<Event>) -> Result<(), RunnerError> {
        self.stats.iterations += 1;
        self.stats.iteration_tokens += self.batch.tokens.len() as u64;
        self.stats.last_iteration_tokens = self.batch.tokens.len() as u32;
        for row in 0..self.rows.len() {
            let i = self.rows[row];
            let sampled = self.output.rows[row].take();
            self.commit_row(i, sampled, events)?;
        }
        let max_len = self.max_len();
        let (pool, stats) = (&mut self.pool, &mut self.stats);
        self.running.retain_mut(|seq| {
            let over = seq.tokens.len() > seq.n_prompt
                && seq.pending() == 1
                && seq.finish(max_len).is_some();
            if over {
                release(pool, seq);
                stats.finished += 1;
            }
            !over
        });
        Ok(())
    }

    fn commit_row(
        &mut self,
        i: usize,
        sampled: Option<Sampled>,
        events: &mut Vec<Event>,
    ) -> Result<(), RunnerError> {
        let max_len = self.max_len();
        let block_size = self.block_size();
        let seq = &mut self.running[i];
        let prompt_before = seq.n_prompt - seq.computed.min(seq.n_prompt);
        seq.computed += std::mem::take(&mut seq.scheduled);
        self.stats.prompt_tokens +=
            (prompt_before - (seq.n_prompt - seq.computed.min(seq.n_prompt))) as u64;
        register(seq, &mut self.pool, &self.hasher, &self.cfg, block_size);
        self.export_done(i, events);
        let seq = &mut self.running[i];
        if seq.pending() > 0 {
            return Ok(());
        }
        let sampled = sampled
            .ok_or_else(|| RunnerError("a row that asked for a token got none".to_owned()))?;
        if sampled.token >= self.spec.vocab_size {
            return Err(RunnerError(format!(
                "sampled token {} is outside the vocabulary",
                sampled.token
            )));
        }
        seq.tokens.push(sampled.token);
        self.stats.generation_tokens += 1;
        let finish = seq.finish(max_len);
        events.push(Event::Token {
            seq: seq.id,
            sampled,
            finish,
            cached_tokens: seq.cached.unwrap_or(0) as u32,
        });
        Ok(())
    }

    /// Hands on what the step finished of a prompt that leaves: the transfer then runs beside the next chunk.
    fn export_done(&mut self, i: usize, events: &mut Vec<Event>) {
        let block_size = self.block_size();
        let seq = &mut self.running[i];
        let done = seq.exportable(block_size);
        if done <= seq.exported {
            return;
        }
        let blocks = seq.blocks[seq.exported..done].to_vec();
        seq.exported = done;
        events.push(Event::Export {
            seq: seq.id,
            blocks,
            n_tokens: (done * block_size).min(seq.n_prompt) as u32,
        });
    }
}
