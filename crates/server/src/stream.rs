//! A streamed answer: one event a piece, made when the client is ready to read it.
//!
//! The stream is the body's own state, not a task: when the client hangs up, the body is dropped and the call with it.

use std::convert::Infallible;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use baton_openai::{
    ApiError, ChatChunk, ChatChunkChoice, ChatRole, CompletionChunk, CompletionChunkChoice, Delta,
    StreamUsage, sse,
};
use bytes::Bytes;
use http::header;

use crate::answer::{Answer, Dialect, Tally, index};
use crate::app::InFlight;
use crate::call::{Call, Token};
use crate::choice::{Choice, Piece};
use crate::validate::StreamedUsage;

/// Answers with a stream whose first token is known already.
pub(crate) fn respond(
    answer: Answer,
    call: Call,
    choices: Vec<Choice>,
    first: Option<Token>,
    in_flight: InFlight,
) -> Response {
    let lines = choices.into_iter().map(Line::new).collect();
    let events = Events::new(answer, lines);
    let source = Source {
        call,
        first,
        events,
        is_over: false,
        _in_flight: in_flight,
    };
    let frames = futures_util::stream::unfold(source, async |mut source| {
        let frame = source.next().await?;
        Some((Ok::<_, Infallible>(frame), source))
    });
    let head = [(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")];
    (head, Body::from_stream(frames)).into_response()
}

/// Tokens in, frames out.
struct Source {
    call: Call,
    first: Option<Token>,
    events: Events,
    is_over: bool,
    _in_flight: InFlight,
}

impl Source {
    /// The next frame; `None` after the last. Tokens that show nothing yet make no frame.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.is_over {
            let token = match self.first.take() {
                Some(first) => Ok(Some(first)),
                None => self.call.next().await,
            };
            match token {
                Ok(Some(token)) => self.events.token(token, &mut self.call),
                Ok(None) => {
                    self.events.end();
                    self.is_over = true;
                }
                Err(error) => {
                    self.events.fail(&error);
                    self.is_over = true;
                }
            }
            if let Some(frame) = self.events.take() {
                return Some(frame);
            }
        }
        None
    }
}

/// One choice on its way out.
struct Line {
    choice: Choice,
    is_open: bool,
    /// Characters of log-probability text so far.
    offset: u64,
}

impl Line {
    fn new(choice: Choice) -> Self {
        Self {
            choice,
            is_open: false,
            offset: 0,
        }
    }
}

/// Writes events into a buffer that is reused.
struct Events {
    answer: Answer,
    lines: Vec<Line>,
    tally: Tally,
    /// Whether chat's opening events are out.
    is_open: bool,
    buffer: Vec<u8>,
    /// Token ids of the piece that is written; reused.
    ids: Vec<u32>,
}

impl Events {
    fn new(answer: Answer, lines: Vec<Line>) -> Self {
        let tally = Tally::new(lines.len());
        Self {
            answer,
            lines,
            tally,
            is_open: false,
            buffer: Vec::new(),
            ids: Vec::new(),
        }
    }

    /// What is written and not yet taken.
    fn take(&mut self) -> Option<Bytes> {
        let frame = (!self.buffer.is_empty()).then(|| Bytes::copy_from_slice(&self.buffer));
        self.buffer.clear();
        frame
    }

    fn token(&mut self, token: Token, call: &mut Call) {
        let i = token.choice;
        if !self.is_open {
            self.is_open = true;
            self.open();
        }
        self.tally.count(i, token.cached_tokens);
        let line = &mut self.lines[i];
        if let Some(piece) = line.choice.push(token.sampled, token.finish) {
            if piece.end.is_some() {
                call.stop(i);
            }
            let mut pen = Pen {
                answer: &self.answer,
                tally: &self.tally,
                buffer: &mut self.buffer,
                ids: &mut self.ids,
                offset: &mut line.offset,
                is_first: !line.is_open,
            };
            line.is_open = true;
            pen.piece(i, &piece);
            piece.tokens.clear();
        }
    }

    /// Chat opens every choice before the first token.
    fn open(&mut self) {
        let Dialect::Chat { echo } = &self.answer.dialect else {
            return;
        };
        let answer = &self.answer;
        let prompt_tokens = answer.prompt_tokens();
        let usage = (answer.shape.usage == StreamedUsage::Always)
            .then(|| StreamUsage::new(prompt_tokens, 0, None));
        let ids = answer
            .shape
            .token_ids
            .then(|| answer.prompts[0].ids.as_slice());
        for i in 0..self.lines.len() {
            let mut choice = chat_delta(i, Some(ChatRole::Assistant), "");
            let chunk =
                ChatChunk::opening(answer.head(), std::slice::from_ref(&choice), usage, ids);
            sse::write_event(&mut self.buffer, &chunk);
            if let Some(turn) = echo {
                choice = chat_delta(i, None, turn);
                let chunk =
                    ChatChunk::new(answer.head(), std::slice::from_ref(&choice), usage, None);
                sse::write_event(&mut self.buffer, &chunk);
            }
        }
    }

    fn end(&mut self) {
        if self.answer.shape.usage != StreamedUsage::Never {
            self.usage();
        }
        self.buffer.extend_from_slice(sse::DONE);
    }

    /// A failure after the first token has no status any more.
    fn fail(&mut self, error: &ApiError) {
        sse::write_event(&mut self.buffer, error);
        self.buffer.extend_from_slice(sse::DONE);
    }

    fn usage(&mut self) {
        let answer = &self.answer;
        let cached = answer.cached_tokens(&self.tally);
        let usage = StreamUsage::new(answer.prompt_tokens(), self.tally.generated(), cached);
        let fingerprint = Some(answer.head().system_fingerprint);
        match answer.dialect {
            Dialect::Completion(_) => {
                let chunk = CompletionChunk::new(answer.head(), &[], Some(usage), fingerprint);
                sse::write_event(&mut self.buffer, &chunk);
            }
            Dialect::Chat { .. } => {
                let chunk = ChatChunk::new(answer.head(), &[], Some(usage), fingerprint);
                sse::write_event(&mut self.buffer, &chunk);
            }
        }
    }
}

fn chat_delta(i: usize, role: Option<ChatRole>, content: &str) -> ChatChunkChoice<'_> {
    ChatChunkChoice {
        index: index(i),
        delta: Delta { role, content },
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
    }
}

/// What one piece is written with.
struct Pen<'a> {
    answer: &'a Answer,
    tally: &'a Tally,
    buffer: &'a mut Vec<u8>,
    ids: &'a mut Vec<u32>,
    offset: &'a mut u64,
    /// Whether this is the choice's first piece.
    is_first: bool,
}

impl Pen<'_> {
    fn piece(&mut self, i: usize, piece: &Piece<'_>) {
        self.ids.clear();
        if self.answer.shape.token_ids {
            self.ids.extend(piece.tokens.iter().map(|token| token.id));
        }
        match self.answer.dialect {
            Dialect::Completion(_) => self.completion(i, piece),
            Dialect::Chat { .. } => self.chat(i, piece),
        }
    }

    fn completion(&mut self, i: usize, piece: &Piece<'_>) {
        let answer = self.answer;
        let opening = if self.is_first { answer.opening(i) } else { "" };
        let joined;
        let text = match (opening, answer.is_echo_only()) {
            ("", _) => piece.text,
            (opening, true) => opening,
            (opening, false) => {
                joined = [opening, piece.text].concat();
                &joined
            }
        };
        // vLLM shows the prompt's ids with an echo even if nobody asked.
        let shows_prompt = self.is_first && (answer.shape.token_ids || !opening.is_empty());
        let choice = CompletionChunkChoice {
            index: index(i),
            text,
            logprobs: answer
                .logprobs
                .map(|k| answer.speller.completion(piece.tokens, k, self.offset)),
            finish_reason: piece.end.map(|end| end.reason),
            stop_reason: piece.end.and_then(|end| end.stop.as_ref()),
            prompt_token_ids: shows_prompt.then(|| answer.prompt(i).ids.as_slice()),
            token_ids: answer.shape.token_ids.then_some(self.ids.as_slice()),
        };
        let (usage, fingerprint) = self.attachments(i, piece);
        let chunk = CompletionChunk::new(
            answer.head(),
            std::slice::from_ref(&choice),
            usage,
            fingerprint,
        );
        sse::write_event(self.buffer, &chunk);
    }

    fn chat(&mut self, i: usize, piece: &Piece<'_>) {
        let answer = self.answer;
        let choice = ChatChunkChoice {
            logprobs: answer
                .logprobs
                .map(|k| answer.speller.chat(piece.tokens, k)),
            finish_reason: piece.end.map(|end| end.reason),
            stop_reason: piece.end.map(|end| end.stop.as_ref()),
            token_ids: Some(answer.shape.token_ids.then_some(self.ids.as_slice())),
            ..chat_delta(i, None, piece.text)
        };
        let (usage, fingerprint) = self.attachments(i, piece);
        let chunk = ChatChunk::new(
            answer.head(),
            std::slice::from_ref(&choice),
            usage,
            fingerprint,
        );
        sse::write_event(self.buffer, &chunk);
    }

    /// Usage if every event has it; the fingerprint with a choice's last event unless a usage event follows.
    fn attachments<'s>(&self, i: usize, piece: &Piece<'_>) -> (Option<StreamUsage>, Option<&'s str>)
    where
        Self: 's,
    {
        let answer = self.answer;
        let usage = (answer.shape.usage == StreamedUsage::Always).then(|| {
            StreamUsage::new(
                answer.prompt(i).ids.len() as u64,
                self.tally.generated_of(i),
                None,
            )
        });
        let is_last = piece.end.is_some() && answer.shape.usage == StreamedUsage::Never;
        (usage, is_last.then(|| answer.head().system_fingerprint))
    }
}
