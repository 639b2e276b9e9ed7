//! KV that comes from another server for a sequence, or leaves for one.

use std::time::Instant;

use baton_engine::{Engine, NewSequence, RunnerError, SeqId, Then};
use baton_kv::BlockId;
use baton_kv_transfer::Pulled;

use super::{Driver, Open};
use crate::inbox::{Admission, Lost, Update};
use crate::metrics::{Finished, Metrics};

impl Open {
    /// Adds blocks to what the other side can fetch, which is complete when the prompt is.
    pub(super) fn hand_on(
        &mut self,
        engine: &mut Engine,
        blocks: &[BlockId],
        n_tokens: u32,
        metrics: &Metrics,
    ) -> Result<(), RunnerError> {
        let Some(mut leaving) = self.leaving.take() else {
            return Ok(());
        };
        let begun = Instant::now();
        let added = match leaving.building.room(blocks.len()) {
            Ok(mut room) => {
                leaving.promise.keep(room.len());
                engine.export(blocks, &mut room)?;
                leaving.building.append(blocks, room)
            }
            Err(full) => Err(full),
        };
        leaving.copying += begun.elapsed();
        match added {
            Ok(()) if n_tokens < leaving.building.n_tokens() => self.leaving = Some(leaving),
            Ok(()) => {
                metrics.kv.left(leaving.copying);
                if let Some(params) = leaving.building.finish() {
                    let _ = self.updates.try_send(Update::Published(params));
                }
            }
            // The other side computes the prompt itself then.
            Err(error) => tracing::debug!(%error, "nothing handed over"),
        }
        Ok(())
    }
}

impl Driver {
    /// Places KV that came for a sequence, which runs once all of it is there.
    pub(super) fn place(&mut self, seq: SeqId, pulled: &Pulled) -> Result<(), RunnerError> {
        let begun = Instant::now();
        let lost = pulled.shortfall.as_ref().map(|error| Lost(error.code()));
        let is_last = !pulled.more && lost.is_none();
        let then = if is_last { Then::Compute } else { Then::Fetch };
        self.engine
            .kv_arrived(seq, pulled.first_block, pulled.data(), then)?;
        if let Some(sequence) = self.open.get_mut(&seq) {
            sequence.spent.opening += pulled.opening;
            sequence.spent.pulling += pulled.took;
            sequence.spent.placing += begun.elapsed();
            sequence.spent.bytes += pulled.data().len();
            if !pulled.more {
                self.metrics.kv.came(&sequence.spent);
            }
        }
        if let Some(lost) = lost {
            self.lose(seq, lost);
        }
        Ok(())
    }

    /// No more KV will come for a sequence: what is missing is computed, or the sequence ends.
    pub(super) fn lose(&mut self, seq: SeqId, lost: Lost) {
        let missing = self.engine.awaited(seq);
        let is_busy = self.open.len() > 1;
        match self.open.get_mut(&seq) {
            Some(sequence) if !sequence.recompute.allows(missing, is_busy) => {
                self.give_up(seq, lost, missing);
            }
            Some(sequence) => {
                sequence.books.lose(lost);
                self.engine.kv_failed(seq);
            }
            // It was ended meanwhile.
            None => {}
        }
    }

    fn give_up(&mut self, seq: SeqId, lost: Lost, missing: usize) {
        self.engine.cancel(seq);
        if let Some(sequence) = self.open.remove(&seq) {
            sequence.books.close(Finished::Error, &self.metrics);
            // If the receiver is gone, nobody wants to know.
            let _ = sequence.updates.try_send(Update::GivenUp(lost, missing));
        }
    }

    /// What would have to be computed of prompts whose KV was lost before they came here, if that is too much.
    pub(super) fn too_much(&self, admission: &Admission) -> Option<Update> {
        let lost = admission.lost?;
        let missing = |new: &NewSequence| {
            (new.prompt.len() - self.engine.found(&new.prompt)).saturating_sub(1)
        };
        let missing = admission.sequences.iter().map(missing).sum();
        let is_busy = !self.open.is_empty();
        let is_allowed = admission.recompute.allows(missing, is_busy);
        (!is_allowed).then_some(Update::GivenUp(lost, missing))
    }
}
