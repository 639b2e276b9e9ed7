//! Text to tokens and back: tokenizers, streaming detokenization, stop strings, conversations, chat templates.
//!
//! Takes bytes and values; callers open files and know the time.
#![forbid(unsafe_code)]

mod conversation;
mod day;
mod detokenizer;
mod gguf_vocab;
mod split;
mod stop;
mod template;
mod token_bytes;
mod tokenizer;
mod whitespace;

pub use conversation::Conversation;
pub use day::day;
pub use detokenizer::Detokenizer;
pub use gguf_vocab::{GgufVocab, TokenKind, VocabModel};
pub use stop::{IncludeStop, StopStrings};
pub use template::{ChatInput, ChatTemplate, ContentFormat, Ending, TemplateError};
pub use tokenizer::{AddSpecial, SpecialTokens, Tokenizer, TokenizerError};
