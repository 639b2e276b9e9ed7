//! OpenAI's API as vLLM 0.32 speaks it: requests, responses, stream chunks, errors; and [`facts`], what routers need to
//! know of requests that they pass on.
//!
//! Plain data and pure functions. What a request *means* (defaults, limits, what is refused) is the server's matter;
//! here is only what it *says*. Requests are read as leniently as vLLM reads them (numbers in strings, unknown fields
//! ignored); responses keep vLLM's field order and its explicit nulls.
#![forbid(unsafe_code)]

mod chat;
mod completion;
mod error;
pub mod facts;
mod lax;
mod logprobs;
mod models;
mod parse;
mod prompt;
mod sampling;
pub mod sse;
mod tokenize;
mod usage;

pub use chat::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletionRequest, ChatFields, ChatResponse,
    ChatRole, Content, ContentPart, Delta, Message, ResponseMessage,
};
pub use completion::{
    AnswerHead, CompletionChoice, CompletionChunk, CompletionChunkChoice, CompletionFields,
    CompletionRequest, CompletionResponse, FinishReason, StopReason,
};
pub use error::{ApiError, ErrorKind};
pub use logprobs::{
    ChatLogprobs, ChatTokenLogprob, ChatTopLogprob, CompletionLogprobs, TopLogprobs, json_logprob,
};
pub use models::{Model, ModelList};
pub use prompt::Prompt;
pub use sampling::{SamplingFields, StreamOptions};
pub use tokenize::{
    DetokenizeRequest, DetokenizeResponse, TokenizeInput, TokenizeRequest, TokenizeResponse,
};
pub use usage::{PromptTokensDetails, StreamPromptTokensDetails, StreamUsage, Usage};

/// A field that vLLM writes and that is always `null` here.
pub type AlwaysNull = ();
