//! `kv_transfer_params` of a client or a prefill server: what is understood survives being written and read.
#![no_main]

use baton_kv::{KvTransferParams, KvTransferRequest, UUID_LIMIT};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(KvTransferRequest::Consume(params)) = KvTransferRequest::from_json(text) {
        assert!(params.uuid < UUID_LIMIT);
        let written = serde_json::to_string(&params).expect("a handle can be written");
        let read: KvTransferParams = serde_json::from_str(&written).expect("our own JSON");
        assert_eq!(read, params);
        assert!(params.client_view().kvx.is_none());
    }
});
