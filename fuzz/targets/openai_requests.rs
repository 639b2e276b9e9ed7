//! Bodies of requests to every endpoint: a request, or an error that names a status and can be written.
#![no_main]

use baton_openai::{
    ApiError, ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    refused_well(CompletionRequest::from_slice(body));
    refused_well(ChatCompletionRequest::from_slice(body));
    refused_well(TokenizeRequest::from_slice(body));
    refused_well(DetokenizeRequest::from_slice(body));
});

fn refused_well<T>(result: Result<T, ApiError>) {
    if let Err(error) = result {
        assert!((400..500).contains(&error.kind.status()), "{error:?}");
        assert!(!error.message.is_empty());
        serde_json::to_string(&error).expect("an error can be written");
    }
}
