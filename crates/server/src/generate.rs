//! One request from end to end: parse → validate → tokenize → admit → answer. Each station is a file; this one is the
//! list of them.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::Response;
use baton_engine::{Handover, Limits, NewSequence, Sampling};
use baton_kv::{KvTransferParams, KvTransferRequest};
use baton_kv_transfer::KvClient;
use baton_openai::{ApiError, ChatCompletionRequest, CompletionRequest};
use http::HeaderMap;
use tokio::sync::mpsc;

use crate::answer::{Answer, Dialect, Echo};
use crate::app::{App, InFlight};
use crate::body::Received;
use crate::call::{Call, Handing};
use crate::choice::Choice;
use crate::conversation;
use crate::early;
use crate::id;
use crate::inbox::{Admission, Ending, InboxError};
use crate::incoming::Incoming;
use crate::outgoing::Outgoing;
use crate::patience::Recompute;
use crate::prefiller::{self, Asked, Errand};
use crate::rejection::{self, Rejection};
use crate::tokens::{self, Encoded};
use crate::validate::{self, Ask};

/// Events besides tokens that one sequence can cause: a refusal, a fetch, an export.
const SPARE_UPDATES: usize = 4;

/// `POST /v1/completions`.
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Rejection> {
    let arrival = Arrival::read(&app, request).await?;
    let answered = complete(&app, &arrival).await;
    answered.map_err(|rejection| arrival.refused(&app, rejection))
}

async fn complete(app: &Arc<App>, arrival: &Arrival) -> Result<Response, Rejection> {
    arrival.check(app)?;
    let CompletionRequest { fields, sampling } = CompletionRequest::from_slice(&arrival.body)?;
    let ask = validate::completion(&fields, &sampling, app.rules(), id::random())?;
    let default = Some(tokens::DEFAULT_MAX_TOKENS);
    let echo = match fields.echo {
        true => Echo::Prompt {
            only: sampling.max_tokens == Some(0),
        },
        false => Echo::No,
    };
    let prompts = tokens::prompts(app, fields.prompt, &ask, echo).await?;
    let id = id::answer_id("cmpl", &arrival.headers, sampling.request_id.as_deref());
    let job = Job {
        ask,
        prompts,
        default_max_tokens: default,
        dialect: Dialect::Completion(echo),
        id,
        recompute: arrival.recompute(app)?,
    };
    job.run(app, arrival).await
}

/// `POST /v1/chat/completions`.
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Rejection> {
    let arrival = Arrival::read(&app, request).await?;
    let answered = converse(&app, &arrival).await;
    answered.map_err(|rejection| arrival.refused(&app, rejection))
}

async fn converse(app: &Arc<App>, arrival: &Arrival) -> Result<Response, Rejection> {
    arrival.check(app)?;
    let ChatCompletionRequest { fields, sampling } =
        ChatCompletionRequest::from_slice(&arrival.body)?;
    let ask = validate::chat(&fields, &sampling, app.rules(), id::random())?;
    let default = app.card.defaults.max_tokens;
    let prompt = tokens::conversation(app, &fields, &ask).await?;
    let id = id::answer_id("chatcmpl", &arrival.headers, sampling.request_id.as_deref());
    let dialect = Dialect::Chat {
        echo: conversation::echoed_turn(&fields),
    };
    let job = Job {
        ask,
        prompts: vec![prompt],
        default_max_tokens: default,
        dialect,
        id,
        recompute: arrival.recompute(app)?,
    };
    job.run(app, arrival).await
}

/// A request as it came in.
struct Arrival {
    at: Instant,
    path: String,
    headers: HeaderMap,
    body: Received,
    in_flight: InFlight,
}

impl Arrival {
    async fn read(app: &App, request: Request) -> Result<Self, Rejection> {
        let at = Instant::now();
        let in_flight = InFlight::enter(&app.load);
        let (head, body) = request.into_parts();
        let body = app.bodies.read(&head.headers, body).await?;
        Ok(Self {
            at,
            path: head.uri.path().to_owned(),
            headers: head.headers,
            body,
            in_flight,
        })
    }

    /// What can be said before the body is looked at, but after it was read: it may name KV that is to be let go.
    fn check(&self, app: &App) -> Result<(), ApiError> {
        if app.life.engine_ended.is_cancelled() {
            return Err(rejection::engine_dead());
        }
        if app.life.shutdown.is_cancelled() {
            return Err(rejection::draining());
        }
        check_rank(&self.headers)
    }

    fn prefillers(&self) -> Option<&str> {
        let value = self.headers.get(prefiller::HEADER)?.to_str().ok()?;
        (!value.trim().is_empty()).then_some(value)
    }

    fn recompute(&self, app: &App) -> Result<Recompute, ApiError> {
        Recompute::of_request(&self.headers, app.config.recompute_max)
    }

    /// A refused request frees the KV that another server keeps for it, as far as it can be told what that is; one that
    /// asked for KV hears whether another server might do better.
    fn refused(&self, app: &App, rejection: Rejection) -> Rejection {
        #[derive(serde::Deserialize)]
        struct Keeps {
            kv_transfer_params: KvTransferRequest,
        }
        let keeps = serde_json::from_slice(&self.body).ok();
        match (
            keeps.map(|keeps: Keeps| keeps.kv_transfer_params),
            rejection,
        ) {
            (Some(KvTransferRequest::Produce), Rejection::Api(error)) => Rejection::Export(error),
            (Some(KvTransferRequest::Consume(params)), rejection) => {
                let_go(app, &params);
                rejection
            }
            (_, rejection) => rejection,
        }
    }

    fn wants_early(&self) -> bool {
        self.headers.contains_key(early::WANTED)
    }
}

/// Holding a lease and letting it go releases it; one that cannot be held is none of ours.
fn let_go(app: &App, params: &KvTransferParams) {
    if let Some(client) = &app.kv_client {
        drop(client.hold(params));
    }
}

/// There is one data-parallel rank.
fn check_rank(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(rank) = headers.get("x-data-parallel-rank") else {
        return Ok(());
    };
    match rank.to_str().ok().and_then(|rank| rank.trim().parse().ok()) {
        Some(0u32) => Ok(()),
        Some(rank) => Err(ApiError::bad_request(format!(
            "data_parallel_rank {rank} is out of range [0, 1)."
        ))),
        None => Err(ApiError::bad_request(
            "x-data-parallel-rank is not a number",
        )),
    }
}

/// A request that is understood and tokenized.
struct Job {
    ask: Ask,
    prompts: Vec<Encoded>,
    default_max_tokens: Option<u32>,
    dialect: Dialect,
    id: String,
    recompute: Recompute,
}

impl Job {
    async fn run(self, app: &App, arrival: &Arrival) -> Result<Response, Rejection> {
        let n_sequences = self.prompts.len() * self.ask.n as usize;
        let limit = app.config.max_sequences_per_request;
        if n_sequences > limit {
            let message =
                format!("{n_sequences} sequences in one request; at most {limit} are allowed");
            return Err(ApiError::bad_request(message).into());
        }
        let max_tokens = self.max_tokens(app)?;
        let handing = self.handing(app, arrival).await?;
        let early = handing.early();
        let call = self.admit(app, &max_tokens, handing, arrival.at)?;
        let choices = self.choices(app);
        let answer = Answer::new(app, self.ask, self.prompts, self.dialect, self.id);
        let answered = answer.respond(call, choices, arrival.in_flight.clone());
        match early {
            Some(params) if arrival.wants_early() => early::respond(&params, answered),
            Some(_) => answered.await.map(early::offer),
            None => answered.await,
        }
    }

    /// What is to be done with KV. Only one sequence can be handed over: with several, their client would get the
    /// parameters of one of them.
    async fn handing(&self, app: &App, arrival: &Arrival) -> Result<Handing, ApiError> {
        let client = app.kv_client.as_ref().filter(|_| app.config.role.imports());
        let is_one = self.prompts.len() * self.ask.n as usize == 1;
        match (client, arrival.prefillers(), &self.ask.kv) {
            (Some(client), Some(named), _) if is_one => {
                Ok(self.ask_prefiller(app, client, arrival, named).await)
            }
            (Some(client), _, KvTransferRequest::Consume(params)) if is_one => {
                Ok(self.take_over(app, client, params.clone().into()))
            }
            (_, _, KvTransferRequest::Consume(params)) => {
                let_go(app, params);
                Ok(Handing::Keep)
            }
            // The parameters could not be told in a stream.
            (_, _, KvTransferRequest::Produce) if is_one && !self.ask.shape.stream => {
                self.hand_over(app)
            }
            _ => Ok(Handing::Keep),
        }
    }

    fn hand_over(&self, app: &App) -> Result<Handing, ApiError> {
        let server = app.kv_server.as_ref().filter(|_| app.config.role.exports());
        let Some(server) = server else {
            return Ok(Handing::Keep);
        };
        let held = server.stats().lease_bytes;
        let promise = app.exports.promise(self.first_prompt().len(), held);
        let promise = promise.ok_or_else(rejection::export_busy)?;
        match Outgoing::begin(server, self.first_prompt(), promise) {
            Ok(outgoing) => Ok(Handing::Out(Box::new(outgoing))),
            Err(error) => {
                tracing::debug!(%error, id = %self.id, "nothing handed over");
                Ok(Handing::Keep)
            }
        }
    }

    async fn ask_prefiller(
        &self,
        app: &App,
        client: &Arc<KvClient>,
        arrival: &Arrival,
        named: &str,
    ) -> Handing {
        let id = self
            .id
            .split_once('-')
            .map_or(self.id.as_str(), |(_, id)| id);
        let errand = Errand {
            path: &arrival.path,
            headers: &arrival.headers,
            body: &arrival.body,
            id,
        };
        match app.prefillers.ask(named, errand).await {
            Ok(asked) => self.take_over(app, client, asked),
            Err(error) => {
                tracing::warn!(%error, id = %self.id, "no prefill");
                Handing::Lost(error.lost())
            }
        }
    }

    fn first_prompt(&self) -> &[u32] {
        self.prompts.first().map_or(&[], |prompt| &prompt.ids)
    }

    fn take_over(&self, app: &App, client: &Arc<KvClient>, asked: Asked) -> Handing {
        match Incoming::hold(app, client, asked, self.first_prompt(), &self.id) {
            Ok(incoming) => Handing::In(Box::new(incoming)),
            Err(lost) => Handing::Lost(lost),
        }
    }

    fn admit(
        &self,
        app: &App,
        max_tokens: &[u32],
        mut handing: Handing,
        arrived: Instant,
    ) -> Result<Call, ApiError> {
        let handover = match &handing {
            Handing::Keep | Handing::Lost(_) => Handover::None,
            Handing::Out(_) => Handover::Export,
            Handing::In(incoming) => Handover::Import {
                n_tokens: incoming.n_tokens(),
            },
        };
        let sequences = self.sequences(app, max_tokens, handover);
        let endings: Vec<_> = sequences.iter().map(|_| Ending::default()).collect();
        let tokens: usize = sequences
            .iter()
            .map(|s| s.limits.max_tokens as usize + SPARE_UPDATES)
            .sum();
        let (updates, received) = mpsc::channel(tokens);
        app.metrics.sizes.n.observe(f64::from(self.ask.n));
        let (outgoing, lost) = match &mut handing {
            Handing::Out(outgoing) => (outgoing.take_leaving(), None),
            Handing::Lost(lost) => (None, Some(*lost)),
            Handing::Keep | Handing::In(_) => (None, None),
        };
        let call = Call::new(
            received,
            endings.clone(),
            app.inbox.clone(),
            handing,
            app.card.max_model_len,
        );
        let admission = Admission {
            sequences,
            endings,
            updates,
            arrived,
            outgoing,
            lost,
            recompute: self.recompute,
        };
        app.inbox.admit(admission).map_err(|e| match e {
            InboxError::Full => rejection::queue_full(),
            InboxError::Closed => rejection::engine_dead(),
        })?;
        Ok(call)
    }

    /// The limit of every prompt.
    fn max_tokens(&self, app: &App) -> Result<Vec<u32>, ApiError> {
        let asked = self.ask.max_tokens.or(self.default_max_tokens);
        let room =
            |prompt: &Encoded| validate::room(prompt.ids.len(), asked, app.card.max_model_len);
        self.prompts.iter().map(room).collect()
    }

    fn sequences(&self, app: &App, max_tokens: &[u32], handover: Handover) -> Vec<NewSequence> {
        let stopping = &self.ask.stopping;
        let sequence = |prompt: &Encoded, max_tokens: u32, i: u32| NewSequence {
            id: app.inbox.next_id(),
            prompt: prompt.ids.clone(),
            sampling: Sampling {
                seed: self.ask.sampling.seed.wrapping_add(u64::from(i)),
                ..self.ask.sampling.clone()
            },
            limits: Limits {
                max_tokens,
                min_tokens: 0,
                eos: app.card.eos.clone(),
                stop_token_ids: stopping.tokens.clone(),
                ignore_eos: stopping.ignore_eos,
            },
            handover,
        };
        let prompts = self.prompts.iter().zip(max_tokens);
        prompts
            .flat_map(|(prompt, &max)| (0..self.ask.n).map(move |i| sequence(prompt, max, i)))
            .collect()
    }

    fn choices(&self, app: &App) -> Vec<Choice> {
        let n_choices = self.prompts.len() * self.ask.n as usize;
        (0..n_choices)
            .map(|_| Choice::new(&app.tokenizer, &self.ask))
            .collect()
    }
}
