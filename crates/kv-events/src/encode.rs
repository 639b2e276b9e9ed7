//! Batches of our own cache's changes, written as vLLM writes them.

use baton_kv::{BlockHash, CacheChange, EngineHash};

use crate::fields::{BATCH, CLEARED, OF_REMOVED, OF_STORED, REMOVED, STORED, TAG};
use crate::msgpack::{
    put_array, put_binary, put_float, put_nil, put_small_map, put_text, put_unsigned,
};

/// How an event is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventForm {
    /// As an array: vLLM until 0.23, SGLang. Whatever follows such events reads this form.
    #[default]
    Array,
    /// As a map: vLLM since 0.24.
    Map,
}

/// How a block's hash is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HashForm {
    /// Its last eight bytes, as a number.
    #[default]
    Int,
    /// All of it, as bytes: vLLM with `VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0`.
    Bytes,
}

/// How batches are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// Their events.
    pub events: EventForm,
    /// Hashes in these.
    pub hashes: HashForm,
}

/// vLLM's word for an accelerator's memory, and for whatever KV is first in.
const MEDIUM: &str = "GPU";

/// Appends a batch: changes of a cache whose blocks have `block_size` tokens, seen at `ts` (seconds since 1970), on the
/// server's only rank.
pub fn encode(ts: f64, changes: &[CacheChange], block_size: u32, form: Form, out: &mut Vec<u8>) {
    put_array(out, BATCH.len());
    put_float(out, ts);
    put_array(out, changes.len());
    let mut pen = Pen { form, out };
    for change in changes {
        match change {
            CacheChange::Stored {
                parent,
                hashes,
                tokens,
            } => pen.stored(parent.as_ref(), hashes, tokens, block_size),
            CacheChange::Removed(hashes) => pen.removed(hashes),
            CacheChange::Cleared => pen.begin(CLEARED, 0),
        }
    }
    put_unsigned(pen.out, 0);
}

struct Pen<'a> {
    form: Form,
    out: &'a mut Vec<u8>,
}

impl Pen<'_> {
    fn begin(&mut self, tag: &str, n_fields: u8) {
        match self.form.events {
            EventForm::Array => put_array(self.out, usize::from(n_fields) + 1),
            EventForm::Map => {
                put_small_map(self.out, n_fields + 1);
                put_text(self.out, TAG);
            }
        }
        put_text(self.out, tag);
    }

    fn key(&mut self, key: &str) {
        if self.form.events == EventForm::Map {
            put_text(self.out, key);
        }
    }

    /// All that has no default in vLLM, up to the adapter's name.
    fn stored(
        &mut self,
        parent: Option<&BlockHash>,
        hashes: &[BlockHash],
        tokens: &[u32],
        block_size: u32,
    ) {
        let [
            of_hashes,
            of_parent,
            of_tokens,
            of_size,
            of_lora,
            of_medium,
            of_name,
            ..,
        ] = OF_STORED
        else {
            return;
        };
        self.begin(STORED, 7);
        self.key(of_hashes);
        self.hashes(hashes);
        self.key(of_parent);
        match parent {
            None => put_nil(self.out),
            Some(parent) => self.hash(parent),
        }
        self.key(of_tokens);
        put_array(self.out, tokens.len());
        for &token in tokens {
            put_unsigned(self.out, token.into());
        }
        self.key(of_size);
        put_unsigned(self.out, block_size.into());
        self.key(of_lora);
        put_nil(self.out);
        self.key(of_medium);
        put_text(self.out, MEDIUM);
        self.key(of_name);
        put_nil(self.out);
    }

    fn removed(&mut self, hashes: &[BlockHash]) {
        let [of_hashes, of_medium, ..] = OF_REMOVED else {
            return;
        };
        self.begin(REMOVED, 2);
        self.key(of_hashes);
        self.hashes(hashes);
        self.key(of_medium);
        put_text(self.out, MEDIUM);
    }

    fn hashes(&mut self, hashes: &[BlockHash]) {
        put_array(self.out, hashes.len());
        for hash in hashes {
            self.hash(hash);
        }
    }

    fn hash(&mut self, hash: &BlockHash) {
        match self.form.hashes {
            HashForm::Int => put_unsigned(self.out, EngineHash::from(*hash).0),
            HashForm::Bytes => put_binary(self.out, &hash.0),
        }
    }
}
