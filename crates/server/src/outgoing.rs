//! KV that other servers may fetch: announced before it is computed, told in the answer once all of it is there.

use baton_kv::{Fingerprint, KvTransferParams};
use baton_kv_transfer::{Building, KvServer, PublishError};

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

impl Outgoing {
    /// Announces the KV of `prompt`.
    ///
    /// # Errors
    /// When nothing can be handed over.
    pub(crate) fn begin(server: &KvServer, prompt: &[u32]) -> Result<Self, PublishError> {
        let n_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let (early, building) = server.begin(n_tokens)?;
        Ok(Self {
            prompt: Fingerprint::of_tokens(prompt),
            early,
            building: Some(building),
            params: None,
        })
    }

    /// How the KV can be fetched while it is being computed.
    pub(crate) fn early(&self) -> KvTransferParams {
        self.of_prompt(self.early.clone())
    }

    /// For the engine; there once.
    pub(crate) fn take_building(&mut self) -> Option<Building> {
        self.building.take()
    }

    /// All of it is there.
    pub(crate) fn published(&mut self, params: KvTransferParams) {
        self.params = Some(self.of_prompt(params));
    }

    /// How it can be fetched, once all of it is there.
    pub(crate) fn params(&self) -> Option<KvTransferParams> {
        self.params.clone()
    }

    fn of_prompt(&self, mut params: KvTransferParams) -> KvTransferParams {
        if let Some(kvx) = &mut params.kvx {
            kvx.ph = Some(self.prompt);
        }
        params
    }
}
