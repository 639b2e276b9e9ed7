//! KV that another server has for a request: the lease held, its blocks fetched when the engine has room for them, and
//! what is told of that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_engine::SeqId;
use baton_kv::{Fingerprint, KvTransferParams};
use baton_kv_transfer::{Held, KvClient, PullGuard, Pulled, TransferError};
use tracing::{Span, field};

use crate::app::App;
use crate::inbox::{Inbox, Lost};
use crate::metrics::Metrics;
use crate::prefiller::{Asked, Running};

/// KV that another server has for this request.
pub(crate) struct Incoming {
    client: Arc<KvClient>,
    params: KvTransferParams,
    held: Option<Held>,
    transfer: Option<PullGuard>,
    has_arrived: Arc<AtomicBool>,
    /// The prefill that still runs; it ends with the request.
    prefill: Option<Running>,
    metrics: Arc<Metrics>,
    span: Span,
}

impl Incoming {
    /// Takes hold of the KV that was `asked` for the request `id`, so that it stays while the request waits.
    ///
    /// KV of other tokens is another prompt's, whoever mixed them up.
    ///
    /// # Errors
    /// Why the KV cannot be had.
    pub(crate) fn hold(
        app: &App,
        client: &Arc<KvClient>,
        asked: Asked,
        prompt: &[u32],
        id: &str,
    ) -> Result<Self, Lost> {
        let Asked { params, running } = asked;
        let metrics = Arc::clone(&app.metrics);
        let span = span(&params, id);
        let held = client.hold(&params).map_err(|error| {
            span.in_scope(|| failed(&error, &metrics));
            Lost(error.code())
        })?;
        let theirs = params.kvx.as_ref().and_then(|kvx| kvx.ph);
        let is_ours = held.n_tokens() as usize == prompt.len()
            && theirs == Some(Fingerprint::of_tokens(prompt));
        if !is_ours {
            span.in_scope(|| tracing::warn!("KV is of another prompt"));
            metrics.kv.failed(OTHER_PROMPT);
            return Err(Lost(OTHER_PROMPT));
        }
        Ok(Self {
            client: Arc::clone(client),
            params,
            held: Some(held),
            transfer: None,
            has_arrived: Arc::default(),
            prefill: running,
            metrics,
            span,
        })
    }

    /// Tokens of the prompt whose KV can be had.
    pub(crate) fn n_tokens(&self) -> u32 {
        self.held.as_ref().map_or(0, Held::n_tokens)
    }

    /// The object that moved the KV, if any came.
    pub(crate) async fn moved(&mut self) -> Option<KvTransferParams> {
        if !self.has_arrived.load(Ordering::Acquire) {
            return None;
        }
        let whole = match self.prefill.take() {
            Some(running) => running.told().await,
            None => None,
        };
        Some(whole.as_ref().unwrap_or(&self.params).client_view())
    }

    /// Begins to fetch blocks for a sequence; the inbox hears of each part. `None` if the lease was let go before.
    pub(crate) fn fetch(
        &mut self,
        seq: SeqId,
        first_block: u32,
        n_blocks: u32,
        inbox: &Inbox,
    ) -> Option<()> {
        let held = self.held.as_ref()?;
        let (inbox, has_arrived) = (inbox.clone(), Arc::clone(&self.has_arrived));
        let mut account = Account::new(self.span.clone(), Arc::clone(&self.metrics));
        let done = Box::new(move |result: Result<Pulled, TransferError>| {
            account.enter(&result);
            has_arrived.fetch_or(account.n_blocks > 0, Ordering::AcqRel);
            inbox.transfer_ended(seq, result.map_err(|error| Lost(error.code())));
        });
        self.transfer = Some(self.client.pull(held, first_block, n_blocks, done));
        Some(())
    }

    /// Lets go of whatever has not come by now.
    pub(crate) fn settle(&mut self) {
        self.transfer = None;
        self.held = None;
    }
}

/// The code of KV that was computed from other tokens.
const OTHER_PROMPT: &str = "other_prompt";

/// One transfer in the log; what is not known yet is entered when it ends.
fn span(params: &KvTransferParams, id: &str) -> Span {
    tracing::info_span!(
        "kv_transfer",
        request = id,
        uuid = params.uuid,
        peer = format_args!("{}:{}", params.remote_host, params.remote_port),
        blocks = field::Empty,
        bytes = field::Empty,
        path = field::Empty,
        outcome = field::Empty,
    )
}

/// What a transfer has brought so far.
struct Account {
    span: Span,
    metrics: Arc<Metrics>,
    n_blocks: u32,
    n_bytes: u64,
}

impl Account {
    fn new(span: Span, metrics: Arc<Metrics>) -> Self {
        Self {
            span,
            metrics,
            n_blocks: 0,
            n_bytes: 0,
        }
    }

    /// Enters one part, and closes the account with the last.
    fn enter(&mut self, result: &Result<Pulled, TransferError>) {
        let shortfall = match result {
            Err(error) => Some(error),
            Ok(pulled) => {
                self.n_blocks += pulled.n_blocks;
                self.n_bytes += pulled.data().len() as u64;
                if pulled.more {
                    return;
                }
                let path = if pulled.is_shared { "shm" } else { "tcp" };
                self.span.record("path", path);
                pulled.shortfall.as_ref()
            }
        };
        self.span.record("blocks", self.n_blocks);
        self.span.record("bytes", self.n_bytes);
        let _entered = self.span.enter();
        match shortfall {
            None => {
                self.span.record("outcome", "complete");
                tracing::debug!("KV came over");
            }
            Some(error) => {
                self.span.record("outcome", error.code());
                failed(error, &self.metrics);
            }
        }
    }
}

/// Tells of KV that did not come. Whoever cancels knows.
fn failed(error: &TransferError, metrics: &Metrics) {
    if matches!(error, TransferError::Cancelled) {
        tracing::debug!("the transfer was cancelled");
    } else {
        tracing::warn!(%error, code = error.code(), "KV did not come over");
        metrics.kv.failed(error.code());
    }
}
