//! What all requests share, and how they find out whether the server lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_kv_events::Publisher;
use baton_kv_transfer::{KvClient, KvServer};
use baton_text::{ChatTemplate, Tokenizer};
use tokio_util::sync::CancellationToken;

use crate::body::BodyLimits;
use crate::exports::ExportRoom;
use crate::inbox::Inbox;
use crate::metrics::Metrics;
use crate::prefiller::Prefillers;
use crate::validate::Rules;
use crate::{ModelCard, ServerConfig};

/// What all requests share. Nothing in it changes but counters.
pub(crate) struct App {
    pub(crate) config: ServerConfig,
    pub(crate) card: ModelCard,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) chat_template: Option<ChatTemplate>,
    pub(crate) vocab_size: u32,
    /// A text of more characters cannot fit into the context.
    pub(crate) max_prompt_chars: usize,
    /// Goes out as `system_fingerprint`.
    pub(crate) fingerprint: String,
    /// When the server started, in seconds since 1970.
    pub(crate) created: u64,
    pub(crate) bodies: BodyLimits,
    pub(crate) inbox: Inbox,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) kv_server: Option<Arc<KvServer>>,
    pub(crate) kv_client: Option<Arc<KvClient>>,
    /// Works until it is dropped.
    pub(crate) publisher: Option<Publisher>,
    pub(crate) exports: ExportRoom,
    pub(crate) prefillers: Prefillers,
    pub(crate) life: Life,
    /// Requests that are being answered.
    pub(crate) load: Arc<AtomicUsize>,
}

impl App {
    pub(crate) fn rules(&self) -> Rules<'_> {
        Rules {
            card: &self.card,
            config: &self.config,
            vocab_size: self.vocab_size,
        }
    }
}

/// Whether the server lives.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    /// The engine thread has ended.
    pub(crate) engine_ended: CancellationToken,
    /// Shutdown was asked for.
    pub(crate) shutdown: CancellationToken,
}

impl Life {
    pub(crate) fn is_ready(&self) -> bool {
        !self.engine_ended.is_cancelled() && !self.shutdown.is_cancelled()
    }
}

/// One request that is being answered; counts until its last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct InFlight(#[expect(dead_code, reason = "kept for its drop")] Arc<Entered>);

#[derive(Debug)]
struct Entered(Arc<AtomicUsize>);

impl InFlight {
    pub(crate) fn enter(load: &Arc<AtomicUsize>) -> Self {
        load.fetch_add(1, Ordering::Relaxed);
        Self(Arc::new(Entered(Arc::clone(load))))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
