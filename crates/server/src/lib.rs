//! The model server: OpenAI's HTTP API, as vLLM speaks it, in front of an [`Engine`](baton_engine::Engine).
//!
//! A request passes five stations, each a file: `body` (parse) → `validate` → `tokens` (tokenize) → `call` (admit) →
//! `answer` and `stream`; `generate` is the list of them. The engine is one plain thread (`engine_thread`). KV comes from
//! and goes to other servers through [`baton_kv_transfer`]; `prefiller` asks another server for it.
//!
//! Not here: devices (any [`Runner`](baton_engine::Runner) will do), files, flags. What stays true: a request that
//! nobody waits for holds nothing; a hand-over that fails costs time, or for a long prompt the answer, never a wrong token.
#![forbid(unsafe_code)]

mod answer;
mod app;
mod auth;
mod body;
mod books;
mod call;
mod choice;
mod clock;
mod config;
mod conversation;
mod early;
mod engine_thread;
mod exports;
mod generate;
mod id;
mod inbox;
mod incoming;
mod logprobs;
mod metrics;
mod outgoing;
mod patience;
mod prefiller;
mod refuse;
mod rejection;
mod routes;
mod run;
mod stream;
mod tokens;
mod validate;

pub use config::{
    ApiKey, GenerationDefaults, ModelCard, Parts, PrefillerPolicy, Role, ServerConfig,
};
pub use engine_thread::EngineFailure;
pub use run::{ServerError, run};
