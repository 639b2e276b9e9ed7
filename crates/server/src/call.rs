//! Station 4, admit: a request's sequences while the engine has them, and the KV they bring or hand over.
//!
//! Everything that a request occupies (places in the batch, blocks, a lease, a transfer) hangs on its [`Call`]:
//! dropping it, as happens when the client hangs up, frees all of it.

use baton_engine::{AdmitError, FinishReason, Sampled, SeqId};
use baton_kv::KvTransferParams;
use baton_openai::ApiError;
use tokio::sync::mpsc;

use crate::inbox::{Ending, Inbox, Lost, Update};
use crate::incoming::Incoming;
use crate::outgoing::Outgoing;
use crate::rejection;
use crate::validate;

/// One token of one of the request's sequences.
#[derive(Debug)]
pub(crate) struct Token {
    pub(crate) choice: usize,
    pub(crate) sampled: Sampled,
    pub(crate) finish: Option<FinishReason>,
    /// Prompt tokens of this sequence that were not computed.
    pub(crate) cached_tokens: u32,
}

/// A request in the engine.
pub(crate) struct Call {
    updates: mpsc::Receiver<Update>,
    endings: Vec<Ending>,
    is_done: Vec<bool>,
    n_open: usize,
    inbox: Inbox,
    handing: Handing,
    max_model_len: u32,
}

/// What a request does with KV besides computing it.
pub(crate) enum Handing {
    /// Nothing.
    Keep,
    /// Hands the prompt's KV over as it is computed.
    Out(Box<Outgoing>),
    /// Takes the prompt's KV over.
    In(Box<Incoming>),
    /// Should have taken it over.
    Lost(Lost),
}

impl Call {
    /// The request whose sequences were admitted with `endings`.
    pub(crate) fn new(
        updates: mpsc::Receiver<Update>,
        endings: Vec<Ending>,
        inbox: Inbox,
        handing: Handing,
        max_model_len: u32,
    ) -> Self {
        let n_open = endings.len();
        let is_done = vec![false; n_open];
        Self {
            updates,
            endings,
            is_done,
            n_open,
            inbox,
            handing,
            max_model_len,
        }
    }

    /// The next token; `None` when all sequences have ended. Cancel safe.
    ///
    /// # Errors
    /// When the engine refuses the request, or has failed.
    pub(crate) async fn next(&mut self) -> Result<Option<Token>, ApiError> {
        while self.n_open > 0 {
            match self.updates.recv().await {
                None => return Err(rejection::engine_dead()),
                Some(Update::Refused(error)) => return Err(self.refused(&error)),
                Some(Update::GivenUp(lost, missing)) => {
                    return Err(rejection::kv_lost(lost, missing));
                }
                Some(Update::Published(params)) => self.handing.published(params),
                Some(Update::FetchKv {
                    seq,
                    first_block,
                    n_blocks,
                }) => {
                    self.handing.fetch(seq, first_block, n_blocks, &self.inbox);
                }
                Some(Update::Token {
                    choice,
                    sampled,
                    finish,
                    cached_tokens,
                }) => {
                    self.handing.settle();
                    if self.is_done[choice] {
                        continue;
                    }
                    if finish.is_some() {
                        self.close(choice);
                    }
                    return Ok(Some(Token {
                        choice,
                        sampled,
                        finish,
                        cached_tokens,
                    }));
                }
            }
        }
        Ok(None)
    }

    /// Ends one sequence because its text is complete.
    pub(crate) fn stop(&mut self, choice: usize) {
        if !self.is_done[choice] {
            self.close(choice);
            self.endings[choice].stop();
            self.inbox.wake();
        }
    }

    /// The object that moved this request's KV, for its client: with the right to fetch, if KV was handed out;
    /// without, if KV came in.
    pub(crate) async fn moved(&mut self) -> Option<KvTransferParams> {
        match &mut self.handing {
            Handing::Keep | Handing::Lost(_) => None,
            Handing::Out(outgoing) => outgoing.tell(),
            Handing::In(incoming) => incoming.moved().await,
        }
    }

    fn close(&mut self, choice: usize) {
        self.is_done[choice] = true;
        self.n_open -= 1;
    }

    fn refused(&self, error: &AdmitError) -> ApiError {
        match error {
            AdmitError::QueueFull { .. } => rejection::queue_full(),
            AdmitError::TooLong { .. } => validate::too_long(self.max_model_len),
            other => ApiError::bad_request(other.to_string()),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.n_open > 0 {
            let open = self
                .endings
                .iter()
                .zip(&self.is_done)
                .filter(|(_, is_done)| !**is_done);
            open.for_each(|(ending, _)| ending.abandon());
            self.inbox.wake();
        }
    }
}

impl Handing {
    /// How KV can be fetched that is yet to be computed.
    pub(crate) fn early(&self) -> Option<KvTransferParams> {
        match self {
            Self::Out(outgoing) => Some(outgoing.early()),
            Self::Keep | Self::In(_) | Self::Lost(_) => None,
        }
    }

    fn published(&mut self, params: KvTransferParams) {
        if let Self::Out(outgoing) = self {
            outgoing.published(params);
        }
    }

    fn fetch(&mut self, seq: SeqId, first_block: u32, n_blocks: u32, inbox: &Inbox) {
        let incoming = match self {
            Self::In(incoming) => Some(incoming),
            _ => None,
        };
        let started = incoming.and_then(|i| i.fetch(seq, first_block, n_blocks, inbox));
        if started.is_none() {
            fail(seq, inbox.clone());
        }
    }

    /// The first token is there: what has not come by now is not needed.
    fn settle(&mut self) {
        if let Self::In(incoming) = self {
            incoming.settle();
        }
    }
}

/// Tells the engine that nothing comes. The inbox may be full, and async code must not wait for it on its own thread.
fn fail(seq: SeqId, inbox: Inbox) {
    const LET_GO: Lost = Lost("let_go");
    if !inbox.try_transfer_failed(seq, LET_GO) {
        tokio::task::spawn_blocking(move || inbox.transfer_ended(seq, Err(LET_GO)));
    }
}
