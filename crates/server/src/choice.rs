//! One choice as it grows: tokens in, pieces of text out. Pure.
//!
//! Text is held back while it may still change (part of a character) or may turn out to be a stop text; tokens and
//! log-probabilities wait for the text they belong to. The pieces, joined, are the answer.

use std::sync::Arc;

use baton_engine::{FinishReason as EngineFinish, Sampled, TokenLogprobs};
use baton_openai::{FinishReason, StopReason};
use baton_text::{Detokenizer, IncludeStop, SpecialTokens, StopStrings, Tokenizer};

use crate::validate::{Ask, Stopping};

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
        Self::with(tokenizer, &ask.stopping, ask.special_tokens)
    }

    fn with(tokenizer: &Arc<Tokenizer>, stopping: &Stopping, special: SpecialTokens) -> Self {
        let include = if stopping.include_text {
            IncludeStop::Yes
        } else {
            IncludeStop::No
        };
        Self {
            tokenizer: Arc::clone(tokenizer),
            detokenizer: Detokenizer::new(special),
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Tokens `a`, `b`, `c` and the two bytes of `é`.
    pub(crate) fn tokenizer() -> Arc<Tokenizer> {
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false},
            "post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
            "model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,
            "fuse_unk":false,"byte_fallback":false,"vocab":{"a":0,"b":1,"c":2,"\u00c3":3,"\u00a9":4},"merges":[]}}"#;
        Arc::new(Tokenizer::from_json(json.as_bytes()).unwrap())
    }

    /// What comes out after each token: text, number of tokens, `!` at the end.
    fn check(
        stops: &[&str],
        include_text: bool,
        tokens: &[u32],
        finish: EngineFinish,
    ) -> Vec<String> {
        let stopping = Stopping {
            texts: stops.iter().map(|stop| (*stop).to_owned()).collect(),
            include_text,
            tokens: Box::default(),
            ignore_eos: false,
        };
        let mut choice = Choice::with(&tokenizer(), &stopping, SpecialTokens::Skip);
        let mut shown = Vec::new();
        for (i, &token) in tokens.iter().enumerate() {
            let finish = (i + 1 == tokens.len()).then_some(finish);
            let Some(piece) = choice.push(
                Sampled {
                    token,
                    logprobs: None,
                },
                finish,
            ) else {
                continue;
            };
            let end = piece.end.map_or("", |_| "!");
            shown.push(format!("{}{}{end}", piece.text, piece.tokens.len()));
            piece.tokens.clear();
            if !end.is_empty() {
                break;
            }
        }
        shown
    }

    const LENGTH: EngineFinish = EngineFinish::Length;
    const EOS: EngineFinish = EngineFinish::Stop { token: None };

    #[test]
    fn tokens_wait_for_the_character_they_are_part_of() {
        assert_eq!(
            check(&[], false, &[0, 3, 4, 1], LENGTH),
            ["a1", "é2", "b1!"]
        );
        assert_eq!(check(&[], false, &[0, 3], LENGTH), ["a1", "\u{fffd}1!"]);
    }

    #[test]
    fn what_may_be_a_stop_text_is_held_back_and_comes_out_if_it_is_none() {
        assert_eq!(
            check(&["bc"], false, &[0, 1, 0, 1], LENGTH),
            ["a1", "ba2", "b1!"]
        );
        assert_eq!(check(&["bc"], false, &[0, 1, 2, 0], LENGTH), ["a1", "2!"]);
        assert_eq!(check(&["bc"], true, &[0, 1, 2, 0], LENGTH), ["a1", "bc2!"]);
    }

    #[test]
    fn the_token_that_ends_a_choice_is_counted_and_not_shown() {
        assert_eq!(check(&[], false, &[0, 2], EOS), ["a1", "1!"]);
        assert_eq!(check(&[], true, &[0, 2], EOS), ["a1", "c1!"]);
    }
}
