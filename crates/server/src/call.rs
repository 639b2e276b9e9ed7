//! Station 4, admit: a request's sequences while the engine has them, and the KV they bring or hand over.
//!
//! Everything that a request occupies (places in the batch, blocks, a lease, a transfer) hangs on its [`Call`]:
//! dropping it, as happens when the client hangs up, frees all of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_engine::{AdmitError, FinishReason, Sampled, SeqId};
use baton_kv::{Fingerprint, KvTransferParams};
use baton_kv_transfer::{Building, Held, KvClient, KvServer, PullGuard, Pulled, TransferError};
use baton_openai::ApiError;
use tokio::sync::mpsc;

use crate::inbox::{Ending, Inbox, Update};
use crate::prefiller::{Asked, Running};
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
}

/// KV that another server may fetch.
pub(crate) struct Outgoing {
    prompt: Fingerprint,
    /// How it can be fetched, as far as that is known before the first block is computed.
    early: KvTransferParams,
    /// Until the engine has it.
    building: Option<Building>,
    /// How it can be fetched, once all of it is there.
    params: Option<KvTransferParams>,
}

/// KV that another server has for this request.
pub(crate) struct Incoming {
    client: Arc<KvClient>,
    params: KvTransferParams,
    held: Option<Held>,
    transfer: Option<PullGuard>,
    has_arrived: Arc<AtomicBool>,
    /// The prefill that still runs; it ends with the request.
    prefill: Option<Running>,
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
            Handing::Keep => None,
            Handing::Out(outgoing) => outgoing.params.clone(),
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
            Self::Keep | Self::In(_) => None,
        }
    }

    fn published(&mut self, params: KvTransferParams) {
        if let Self::Out(outgoing) = self {
            outgoing.params = Some(outgoing.of_prompt(params));
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
            incoming.transfer = None;
            incoming.held = None;
        }
    }
}

impl Outgoing {
    /// Makes room for the KV of `prompt`; `None` if there is none.
    pub(crate) fn begin(server: &KvServer, prompt: &[u32]) -> Option<Self> {
        let n_tokens = u32::try_from(prompt.len()).ok()?;
        let (early, building) = server
            .begin(n_tokens)
            .inspect_err(|error| tracing::debug!(%error, "nothing handed over"))
            .ok()?;
        let outgoing = Self {
            prompt: Fingerprint::of_tokens(prompt),
            early,
            building: Some(building),
            params: None,
        };
        Some(outgoing)
    }

    /// How the KV can be fetched while it is being computed.
    pub(crate) fn early(&self) -> KvTransferParams {
        self.of_prompt(self.early.clone())
    }

    /// For the engine; there once.
    pub(crate) fn take_building(&mut self) -> Option<Building> {
        self.building.take()
    }

    fn of_prompt(&self, mut params: KvTransferParams) -> KvTransferParams {
        if let Some(kvx) = &mut params.kvx {
            kvx.ph = Some(self.prompt);
        }
        params
    }
}

impl Incoming {
    /// Takes hold of the KV that `params` names, so that it stays while the request waits; `None` if it can't be had.
    ///
    /// KV of other tokens is another prompt's, whoever mixed them up.
    pub(crate) fn hold(client: &Arc<KvClient>, asked: Asked, prompt: &[u32]) -> Option<Self> {
        let Asked { params, running } = asked;
        let theirs = params.kvx.as_ref().and_then(|kvx| kvx.ph);
        let held = match client.hold(&params) {
            Ok(held)
                if held.n_tokens() as usize == prompt.len()
                    && theirs == Some(Fingerprint::of_tokens(prompt)) =>
            {
                held
            }
            Ok(_) => {
                tracing::warn!("KV is of another prompt; computing");
                return None;
            }
            Err(error) => {
                report(&error);
                return None;
            }
        };
        Some(Self {
            client: Arc::clone(client),
            params,
            held: Some(held),
            transfer: None,
            has_arrived: Arc::default(),
            prefill: running,
        })
    }

    /// Tokens of the prompt whose KV can be had.
    pub(crate) fn n_tokens(&self) -> u32 {
        self.held.as_ref().map_or(0, Held::n_tokens)
    }

    async fn moved(&mut self) -> Option<KvTransferParams> {
        if !self.has_arrived.load(Ordering::Acquire) {
            return None;
        }
        let whole = match self.prefill.take() {
            Some(running) => running.told().await,
            None => None,
        };
        Some(whole.as_ref().unwrap_or(&self.params).client_view())
    }

    fn fetch(&mut self, seq: SeqId, first_block: u32, n_blocks: u32, inbox: &Inbox) -> Option<()> {
        let held = self.held.as_ref()?;
        let (inbox, has_arrived) = (inbox.clone(), Arc::clone(&self.has_arrived));
        let done = Box::new(move |result: Result<Pulled, TransferError>| match result {
            Ok(pulled) => {
                has_arrived.fetch_or(pulled.n_blocks > 0, Ordering::AcqRel);
                inbox.transfer_ended(seq, Some(pulled));
            }
            Err(error) => {
                report(&error);
                inbox.transfer_ended(seq, None);
            }
        });
        self.transfer = Some(self.client.pull(held, first_block, n_blocks, done));
        Some(())
    }
}

fn report(error: &TransferError) {
    tracing::warn!(%error, code = error.code(), "KV cannot be taken over; computing");
}

/// Tells the engine to compute. The inbox may be full, and async code must not wait for it on its own thread.
fn fail(seq: SeqId, inbox: Inbox) {
    if !inbox.try_transfer_failed(seq) {
        tokio::task::spawn_blocking(move || inbox.transfer_ended(seq, None));
    }
}
