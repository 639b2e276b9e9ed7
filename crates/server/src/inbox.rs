//! The bounded way into the engine thread, and what travels on it in both directions.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Instant;

use baton_engine::{AdmitError, FinishReason, NewSequence, Sampled, SeqId};
use baton_kv::KvTransferParams;
use baton_kv_transfer::Pulled;
use tokio::sync::mpsc;

use crate::metrics::Finished;
use crate::outgoing::Leaving;
use crate::patience::Recompute;

/// What the thread is told.
pub(crate) enum Command {
    /// New sequences, all or none.
    Admit(Admission),
    /// KV of whole blocks came for a sequence.
    KvArrived(SeqId, Pulled),
    /// No more KV will come for a sequence.
    KvFailed(SeqId, Lost),
    /// Look at the endings.
    Wake,
    /// Be done.
    Stop,
}

/// Why KV that was to come did not, in a word for metrics; from a small fixed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost(pub(crate) &'static str);

/// The sequences of one request.
pub(crate) struct Admission {
    pub(crate) sequences: Vec<NewSequence>,
    /// One a sequence, in the same order.
    pub(crate) endings: Vec<Ending>,
    /// Its capacity covers everything that these sequences can cause, so that the engine never waits for a client.
    pub(crate) updates: mpsc::Sender<Update>,
    pub(crate) arrived: Instant,
    /// Where the only sequence's KV goes as it is computed.
    pub(crate) outgoing: Option<Leaving>,
    /// Its KV was to come from another server and will not.
    pub(crate) lost: Option<Lost>,
    /// What may be computed here of KV that does not come.
    pub(crate) recompute: Recompute,
}

/// What a request hears of its sequences.
#[derive(Debug)]
pub(crate) enum Update {
    /// None of them runs.
    Refused(AdmitError),
    /// The KV of so many tokens of the only sequence did not come, and that is more than may be computed.
    GivenUp(Lost, usize),
    /// A token of the sequence with this index in the request.
    Token {
        choice: usize,
        sampled: Sampled,
        finish: Option<FinishReason>,
        cached_tokens: u32,
    },
    /// Blocks of the sequence are ready to receive KV.
    FetchKv {
        seq: SeqId,
        first_block: u32,
        n_blocks: u32,
    },
    /// All of the prompt's KV can be fetched, and this is how.
    Published(KvTransferParams),
}

/// How a request ends a sequence before the engine does. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ending(Arc<AtomicU8>);

impl Ending {
    const STOPPED: u8 = 1;
    const ABANDONED: u8 = 2;

    /// The answer is complete: a stop text was found.
    pub(crate) fn stop(&self) {
        self.0.store(Self::STOPPED, Ordering::Release);
    }

    /// Nobody waits any more.
    pub(crate) fn abandon(&self) {
        // A sequence that was stopped stays so.
        let _ = self
            .0
            .compare_exchange(0, Self::ABANDONED, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Why the sequence is to end, if it is.
    pub(crate) fn asked(&self) -> Option<Finished> {
        match self.0.load(Ordering::Acquire) {
            Self::STOPPED => Some(Finished::Stop),
            Self::ABANDONED => Some(Finished::Abort),
            _ => None,
        }
    }
}

/// Why a command was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InboxError {
    Full,
    Closed,
}

/// The way into the thread. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Inbox {
    commands: SyncSender<Command>,
    next_id: Arc<AtomicU64>,
}

impl Inbox {
    /// A way in with room for `capacity` commands, and its other end.
    pub(crate) fn new(capacity: usize) -> (Self, Receiver<Command>) {
        let (commands, receiver) = sync_channel(capacity.max(1));
        (
            Self {
                commands,
                next_id: Arc::default(),
            },
            receiver,
        )
    }

    /// Asks the thread to be done; waits if the inbox is full. Not for async code.
    pub(crate) fn stop(&self) {
        // Without a thread it is done already.
        let _ = self.commands.send(Command::Stop);
    }

    /// An id that no other sequence has.
    pub(crate) fn next_id(&self) -> SeqId {
        SeqId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Hands sequences over without waiting.
    pub(crate) fn admit(&self, admission: Admission) -> Result<(), InboxError> {
        self.commands
            .try_send(Command::Admit(admission))
            .map_err(|e| match e {
                TrySendError::Full(_) => InboxError::Full,
                TrySendError::Disconnected(_) => InboxError::Closed,
            })
    }

    /// Makes the thread look at the endings. If the inbox is full the thread is awake and will look anyway.
    pub(crate) fn wake(&self) {
        let _ = self.commands.try_send(Command::Wake);
    }

    /// Tells what became of a transfer; waits if the inbox is full. Not for async code.
    pub(crate) fn transfer_ended(&self, seq: SeqId, result: Result<Pulled, Lost>) {
        let command = match result {
            Ok(pulled) => Command::KvArrived(seq, pulled),
            Err(lost) => Command::KvFailed(seq, lost),
        };
        // Without a thread nobody waits for the KV.
        let _ = self.commands.send(command);
    }

    /// As [`Inbox::transfer_ended`] without KV, from async code. `false` if the inbox is full.
    pub(crate) fn try_transfer_failed(&self, seq: SeqId, lost: Lost) -> bool {
        !matches!(
            self.commands.try_send(Command::KvFailed(seq, lost)),
            Err(TrySendError::Full(_))
        )
    }
}
