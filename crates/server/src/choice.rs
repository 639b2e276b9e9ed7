//! One choice as it grows: tokens in, pieces of text out. Pure.
//!
//! Text is held back while it may still change (part of a character) or may turn out to be a stop text; tokens and
//! log-probabilities wait for the text they belong to. The pieces, joined, are the answer.

use std::sync::Arc;

use baton_engine::{FinishReason as EngineFinish, Sampled, TokenLogprobs};
use baton_openai::{FinishReason, StopReason};
use baton_text::{Detokenizer, IncludeStop, StopStrings, Tokenizer};

use crate::validate::Ask;

/// A token of the answer.
#[derive(Debug)]
pub(crate) struct Spoken {
    pub(crate) id: u32,
    pub(crate) logprobs: Option<Box<TokenLogprobs>>,
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) reason: FinishReason,
    pub(crate) stop: Option<StopReason>,
}

impl End {
    /// As two fields of an answer.
    pub(crate) fn split(end: Option<Self>) -> (Option<FinishReason>, Option<StopReason>) {
        match end {
            Some(Self { reason, stop }) => (Some(reason), stop),
            None => (None, None),
        }
    }
}

/// What is new in a choice. Whoever takes it empties `tokens`.
#[derive(Debug)]
pub(crate) struct Piece<'a> {
    pub(crate) text: &'a str,
    pub(crate) tokens: &'a mut Vec<Spoken>,
    pub(crate) end: Option<&'a End>,
}

/// One choice.
pub(crate) struct Choice {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// The stop texts, to name the one that was found.
    texts: Arc<[String]>,
    /// Show the text of the token that ended the choice.
    shows_stop: bool,
    end: Option<End>,
    /// Detokenized, not yet searched for stop texts. Reused.
    fresh: String,
    /// Released, not yet handed out. Reused.
    text: String,
    tokens: Vec<Spoken>,
    is_taken: bool,
}

impl Choice {
    /// A choice without tokens.
    pub(crate) fn new(tokenizer: &Arc<Tokenizer>, ask: &Ask) -> Self {
        let stopping = &ask.stopping;
        let include = if stopping.include_text {
            IncludeStop::Yes
        } else {
            IncludeStop::No
        };
        Self {
            tokenizer: Arc::clone(tokenizer),
            detokenizer: Detokenizer::new(ask.special_tokens),
            stops: StopStrings::new(stopping.texts.iter().cloned(), include),
            texts: Arc::clone(&stopping.texts),
            shows_stop: stopping.include_text,
            end: None,
            fresh: String::new(),
            text: String::new(),
            tokens: Vec::new(),
            is_taken: false,
        }
    }

    /// Takes the next token. Returns what can be shown; the last token always shows something.
    pub(crate) fn push(
        &mut self,
        sampled: Sampled,
        finish: Option<EngineFinish>,
    ) -> Option<Piece<'_>> {
        self.forget_taken();
        let is_stop = matches!(finish, Some(EngineFinish::Stop { .. }));
        if !is_stop || self.shows_stop {
            self.detokenizer
                .push(&self.tokenizer, sampled.token, &mut self.fresh);
        }
        if finish.is_some() {
            self.detokenizer.finish(&mut self.fresh);
        }
        self.tokens.push(Spoken {
            id: sampled.token,
            logprobs: sampled.logprobs,
        });
        self.end = self.search();
        if self.end.is_none() && finish.is_some() {
            self.stops.finish(&mut self.text);
            self.end = finish.map(ended);
        }
        if self.text.is_empty() && self.end.is_none() {
            return None;
        }
        self.is_taken = true;
        Some(Piece {
            text: &self.text,
            tokens: &mut self.tokens,
            end: self.end.as_ref(),
        })
    }

    /// Moves fresh text through the stop texts.
    fn search(&mut self) -> Option<End> {
        let found = self.stops.push(&self.fresh, &mut self.text);
        self.fresh.clear();
        let text = self.texts.get(found?)?.clone();
        Some(End {
            reason: FinishReason::Stop,
            stop: Some(StopReason::Text(text)),
        })
    }

    fn forget_taken(&mut self) {
        if self.is_taken {
            self.text.clear();
            self.tokens.clear();
            self.is_taken = false;
        }
    }
}

fn ended(finish: EngineFinish) -> End {
    match finish {
        EngineFinish::Length => End {
            reason: FinishReason::Length,
            stop: None,
        },
        EngineFinish::Stop { token } => End {
            reason: FinishReason::Stop,
            stop: token.map(StopReason::Token),
        },
    }
}
