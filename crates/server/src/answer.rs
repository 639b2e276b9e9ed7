//! Station 5, answer: what has been generated, in the form that the client asked for.
//!
//! A whole answer and a stream are made of the same pieces: the whole one is the pieces joined.

use std::sync::Arc;

use axum::response::Response;
use baton_kv::KvTransferParams;
use baton_openai::{
    AnswerHead, ApiError, ChatChoice, ChatResponse, CompletionChoice, CompletionResponse, Usage,
};
use http::StatusCode;
use serde_json::value::{RawValue, to_raw_value};

use crate::app::{App, InFlight};
use crate::call::Call;
use crate::choice::{Choice, End, Piece, Spoken};
use crate::clock;
use crate::logprobs::Speller;
use crate::rejection::{Rejection, json};
use crate::stream;
use crate::tokens::Encoded;
use crate::validate::{Ask, Shape};

/// Which endpoint's form an answer has.
#[derive(Clone, Debug)]
pub(crate) enum Dialect {
    Completion(Echo),
    /// With the assistant's last turn, if it is to be repeated.
    Chat {
        echo: Option<String>,
    },
}

/// Whether a completion begins with its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Echo {
    No,
    /// `only`: with nothing after it.
    Prompt {
        only: bool,
    },
}

/// All of an answer that does not change while it grows.
pub(crate) struct Answer {
    id: String,
    created: u64,
    model: Arc<str>,
    fingerprint: String,
    pub(crate) n: usize,
    pub(crate) prompts: Vec<Encoded>,
    pub(crate) dialect: Dialect,
    pub(crate) shape: Shape,
    /// Likeliest tokens to report; `None`: no log-probabilities.
    pub(crate) logprobs: Option<u32>,
    pub(crate) speller: Speller,
    tells_cached_tokens: bool,
}

impl Answer {
    pub(crate) fn new(
        app: &App,
        ask: Ask,
        prompts: Vec<Encoded>,
        dialect: Dialect,
        id: String,
    ) -> Self {
        Self {
            id,
            created: clock::unix_seconds(),
            model: ask.model,
            fingerprint: app.fingerprint.clone(),
            n: ask.n as usize,
            prompts,
            dialect,
            shape: ask.shape,
            logprobs: ask.sampling.logprobs,
            speller: Speller::new(&app.tokenizer, ask.shape.spelling),
            tells_cached_tokens: app.config.prompt_tokens_details,
        }
    }

    /// Answers as soon as the first token is there: until then a failure has a status of its own.
    pub(crate) async fn respond(
        self,
        mut call: Call,
        choices: Vec<Choice>,
        in_flight: InFlight,
    ) -> Result<Response, Rejection> {
        if self.shape.stream {
            let first = call.next().await?;
            return Ok(stream::respond(self, call, choices, first, in_flight));
        }
        let (parts, tally) = gather(&mut call, choices).await?;
        let moved = call.moved().await.and_then(|params| raw(&params));
        Ok(json(
            StatusCode::OK,
            self.whole(parts, &tally, moved.as_deref()),
        ))
    }

    pub(crate) fn head(&self) -> AnswerHead<'_> {
        AnswerHead {
            id: &self.id,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
        }
    }

    /// The prompt of a choice.
    pub(crate) fn prompt(&self, choice: usize) -> &Encoded {
        &self.prompts[choice / self.n]
    }

    pub(crate) fn prompt_tokens(&self) -> u64 {
        self.prompts
            .iter()
            .map(|prompt| prompt.ids.len() as u64)
            .sum()
    }

    pub(crate) fn cached_tokens(&self, tally: &Tally) -> Option<u64> {
        self.tells_cached_tokens
            .then(|| tally.cached.iter().step_by(self.n).sum())
    }

    /// What a choice's text begins with.
    pub(crate) fn opening(&self, choice: usize) -> &str {
        match &self.dialect {
            Dialect::Completion(Echo::Prompt { .. }) => {
                self.prompt(choice).text.as_deref().unwrap_or("")
            }
            Dialect::Chat { echo: Some(turn) } => turn,
            _ => "",
        }
    }

    /// Whether the generated text is to be left out.
    pub(crate) fn is_echo_only(&self) -> bool {
        matches!(
            self.dialect,
            Dialect::Completion(Echo::Prompt { only: true })
        )
    }

    fn whole(&self, parts: Vec<Part>, tally: &Tally, moved: Option<&RawValue>) -> Vec<u8> {
        let usage = Usage::new(
            self.prompt_tokens(),
            tally.generated(),
            self.cached_tokens(tally),
        );
        let parts = parts.into_iter().enumerate();
        let body = match self.dialect {
            Dialect::Completion(_) => {
                let choices = parts
                    .map(|(i, part)| self.completion_choice(i, part))
                    .collect();
                serde_json::to_vec(&CompletionResponse::new(self.head(), choices, usage, moved))
            }
            Dialect::Chat { .. } => {
                let choices = parts.map(|(i, part)| self.chat_choice(i, part)).collect();
                let ids = self.shape.token_ids.then(|| self.prompts[0].ids.as_slice());
                serde_json::to_vec(&ChatResponse::new(self.head(), choices, usage, ids, moved))
            }
        };
        body.unwrap_or_default()
    }

    fn completion_choice(&self, i: usize, part: Part) -> CompletionChoice {
        let logprobs = self
            .logprobs
            .map(|k| self.speller.completion(&part.tokens, k, &mut 0));
        let (finish_reason, stop_reason) = End::split(part.end);
        CompletionChoice {
            index: index(i),
            text: self.text(i, part.text),
            logprobs,
            finish_reason,
            stop_reason,
            token_ids: self.shape.token_ids.then(|| ids(&part.tokens)),
            prompt_token_ids: self.shape.token_ids.then(|| self.prompt(i).ids.clone()),
            ..CompletionChoice::default()
        }
    }

    fn chat_choice(&self, i: usize, part: Part) -> ChatChoice {
        let (finish_reason, stop_reason) = End::split(part.end);
        ChatChoice {
            logprobs: self.logprobs.map(|k| self.speller.chat(&part.tokens, k)),
            finish_reason,
            stop_reason,
            token_ids: self.shape.token_ids.then(|| ids(&part.tokens)),
            ..ChatChoice::new(index(i), self.text(i, part.text))
        }
    }

    fn text(&self, choice: usize, generated: String) -> String {
        match self.opening(choice) {
            "" => generated,
            opening if self.is_echo_only() => opening.to_owned(),
            opening => [opening, &generated].concat(),
        }
    }
}

/// How many tokens each choice has.
#[derive(Debug)]
pub(crate) struct Tally {
    generated: Vec<u64>,
    cached: Vec<u64>,
}

impl Tally {
    pub(crate) fn new(n_choices: usize) -> Self {
        Self {
            generated: vec![0; n_choices],
            cached: vec![0; n_choices],
        }
    }

    pub(crate) fn count(&mut self, choice: usize, cached_tokens: u32) {
        self.generated[choice] += 1;
        self.cached[choice] = u64::from(cached_tokens);
    }

    pub(crate) fn generated(&self) -> u64 {
        self.generated.iter().sum()
    }

    pub(crate) fn generated_of(&self, choice: usize) -> u64 {
        self.generated[choice]
    }
}

/// A choice as it has become.
#[derive(Debug, Default)]
struct Part {
    text: String,
    tokens: Vec<Spoken>,
    end: Option<End>,
}

impl Part {
    fn add(&mut self, piece: &mut Piece<'_>) {
        self.text.push_str(piece.text);
        self.tokens.append(piece.tokens);
        self.end = piece.end.cloned();
    }
}

async fn gather(call: &mut Call, mut choices: Vec<Choice>) -> Result<(Vec<Part>, Tally), ApiError> {
    let mut parts: Vec<_> = choices.iter().map(|_| Part::default()).collect();
    let mut tally = Tally::new(choices.len());
    while let Some(token) = call.next().await? {
        let i = token.choice;
        tally.count(i, token.cached_tokens);
        if let Some(mut piece) = choices[i].push(token.sampled, token.finish) {
            if piece.end.is_some() {
                call.stop(i);
            }
            parts[i].add(&mut piece);
        }
    }
    Ok((parts, tally))
}

fn raw(params: &KvTransferParams) -> Option<Box<RawValue>> {
    to_raw_value(params).ok()
}

pub(crate) fn index(choice: usize) -> u32 {
    u32::try_from(choice).unwrap_or(u32::MAX)
}

fn ids(tokens: &[Spoken]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}
