//! KV that other servers may fetch: announced before it is computed, told in the answer once all of it is there.

use std::sync::Arc;
use std::time::Duration;

use baton_kv::{Fingerprint, KvTransferParams};
use baton_kv_transfer::{Building, KvServer, PublishError};

use crate::exports::Promise;

/// KV that another server may fetch. Dropped before anybody was told of all of it, it is let go.
pub(crate) struct Outgoing {
    server: Arc<KvServer>,
    prompt: Fingerprint,
    /// How it can be fetched, as far as that is known before the first block is computed.
    early: KvTransferParams,
    /// Until the engine has it.
    leaving: Option<Leaving>,
    /// How it can be fetched, once all of it is there.
    params: Option<KvTransferParams>,
    is_told: bool,
}

/// KV on its way from the device to where others can fetch it. Dropped before its end, the other side is told.
#[derive(Debug)]
pub(crate) struct Leaving {
    pub(crate) building: Building,
    /// Room for what is yet to come.
    pub(crate) promise: Promise,
    /// Time that copying out of the device took.
    pub(crate) copying: Duration,
}

impl Outgoing {
    /// Announces the KV of `prompt`.
    ///
    /// # Errors
    /// When nothing can be handed over.
    pub(crate) fn begin(
        server: &Arc<KvServer>,
        prompt: &[u32],
        promise: Promise,
    ) -> Result<Self, PublishError> {
        let n_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let (early, building) = server.begin(n_tokens)?;
        Ok(Self {
            server: Arc::clone(server),
            prompt: Fingerprint::of_tokens(prompt),
            early,
            leaving: Some(Leaving {
                building,
                promise,
                copying: Duration::ZERO,
            }),
            params: None,
            is_told: false,
        })
    }

    /// How the KV can be fetched while it is being computed.
    pub(crate) fn early(&self) -> KvTransferParams {
        self.of_prompt(self.early.clone())
    }

    /// For the engine; there once.
    pub(crate) fn take_leaving(&mut self) -> Option<Leaving> {
        self.leaving.take()
    }

    /// All of it is there.
    pub(crate) fn published(&mut self, params: KvTransferParams) {
        self.params = Some(self.of_prompt(params));
    }

    /// How it can be fetched, if all of it is there: for whoever asked.
    pub(crate) fn tell(&mut self) -> Option<KvTransferParams> {
        self.is_told = self.params.is_some();
        self.params.clone()
    }

    fn of_prompt(&self, mut params: KvTransferParams) -> KvTransferParams {
        if let Some(kvx) = &mut params.kvx {
            kvx.ph = Some(self.prompt);
        }
        params
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if !self.is_told {
            self.server.release(self.early.uuid);
        }
    }
}
