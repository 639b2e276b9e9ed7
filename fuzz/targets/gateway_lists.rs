//! The endpoints file, a gateway's configuration, and servers' lists of models.
#![no_main]

use baton_gateway::GatewayConfig;
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|text: &[u8]| {
    if let Some(addresses) = baton_gateway::fuzzing::endpoints(text) {
        assert!(addresses.iter().all(|a| a.contains(':')));
    }
    if let Ok(config) = serde_json::from_slice::<GatewayConfig>(text)
        && config.endpoints_file.is_none()
    {
        let _ = config.check();
    }
    let list = Bytes::copy_from_slice(text);
    let merged = baton_gateway::fuzzing::merged([&list, &list]);
    let value: Value = serde_json::from_slice(&merged).expect("a list is always JSON");
    assert!(value["data"].is_array());
});
