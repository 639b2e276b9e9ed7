//! Prefill and decode at once: `sglang`, `mooncake`, `offloading`.
//!
//! Decode waits for prefill under an id that both were given. If prefill fails before decode has begun to answer,
//! decode is called off and the request goes on as if it had not been sent; later, decode's answer tells of it.

use crate::answer_body::{Answer, Companion};
use crate::attempts::{Attempts, Deadline};
use crate::connector::{self, Connector, mooncake, offloading, sglang};
use crate::fallback::Failure;
use crate::front::{Journey, Sidecar, passed, random, random_bytes};
use crate::legs::{self, Failed, Head, Reading};
use crate::refusal::Refusal;
use crate::target::Target;
use baton_http::Pieces;
use http::{HeaderName, HeaderValue, Response};
use hyper::body::Incoming;
use std::sync::Arc;
use tokio::sync::oneshot;

const DP_RANK: HeaderName = HeaderName::from_static("x-data-parallel-rank");

/// What either server is told.
struct Bodies {
    prefill: Pieces,
    decode: Pieces,
    /// Data-parallel rank of prefill.
    rank: Option<u32>,
}

/// How the race between the legs ended.
enum Race {
    Decode(Result<Response<Incoming>, Refusal>, Companion),
    PrefillFailed(Failed),
}

impl Sidecar {
    /// Asks decode and one of `targets` at once; another target if prefill fails in time.
    pub(crate) async fn both_at_once(
        self: &Arc<Self>,
        journey: &Journey,
        targets: &[Target],
        source: Option<Target>,
    ) -> Result<Response<Answer>, Refusal> {
        let mut attempts = self.attempts(journey, targets);
        loop {
            let failed = match self.race(journey, &attempts, source.as_ref()).await {
                Ok(Race::Decode(response, prefill)) => {
                    let response = passed(response?);
                    return Ok(match response.status().is_success() {
                        true => response.map(|body| body.beside(prefill)),
                        false => response,
                    });
                }
                Ok(Race::PrefillFailed(failed)) | Err(failed) => failed,
            };
            if let Some(target) = attempts.target() {
                self.engines.forget(target);
            }
            if let Some(answer) = self.after(failed, &mut attempts, journey).await {
                return answer;
            }
        }
    }

    async fn race(
        self: &Arc<Self>,
        journey: &Journey,
        attempts: &Attempts<'_>,
        source: Option<&Target>,
    ) -> Result<Race, Failed> {
        let target = attempts.target().ok_or(Failure::Malformed)?;
        let bodies = self.bodies(journey, target, source).await?;
        let mut head = journey.head.read_here();
        if let Some(rank) = bodies.rank {
            head.headers.insert(DP_RANK, HeaderValue::from(rank));
        }
        let (companion, mut done) =
            self.prefill_beside(target.clone(), head, bodies.prefill, attempts.deadline());
        let decode = self.decode(journey, bodies.decode);
        tokio::pin!(decode);
        tokio::select! {
            response = &mut decode => Ok(Race::Decode(response, companion)),
            ended = &mut done => match ended {
                Ok(Err(failed)) => Ok(Race::PrefillFailed(failed)),
                // Done, or ended by a shutdown: decode knows what to make of it.
                Ok(Ok(())) | Err(_) => Ok(Race::Decode(decode.await, companion)),
            },
        }
    }

    /// Sends the prefill leg as a task of its own, which outlives decode's head and ends with decode's answer.
    fn prefill_beside(
        self: &Arc<Self>,
        target: Target,
        head: Head,
        body: Pieces,
        deadline: Deadline,
    ) -> (Companion, oneshot::Receiver<Result<(), Failed>>) {
        let (tell, done) = oneshot::channel();
        let sidecar = self.clone();
        let task = tokio::spawn(async move {
            let asked = legs::prefill(&sidecar.prefill, &target, &head, body, Reading::End);
            let ended = sidecar.measured(asked, deadline).await;
            if let Err(failed) = &ended {
                tracing::warn!(server = %target, failure = ?failed.failure, "prefill failed beside decode");
            }
            // Nobody listens once decode answers.
            let _ = tell.send(ended.map(|_| ()));
        });
        (Companion::new(task), done)
    }

    async fn bodies(
        &self,
        journey: &Journey,
        target: &Target,
        source: Option<&Target>,
    ) -> Result<Bodies, Failed> {
        let Journey { route, body, .. } = journey;
        match self.config.connector {
            Connector::Mooncake => {
                let engines = self.engines.of(target).await.ok_or(Failure::Unreachable)?;
                let pick = usize::try_from(random() % engines.len().max(1) as u64).unwrap_or(0);
                let engine = engines.get(pick).ok_or(Failure::Malformed)?;
                let transfer = format!("xfer-{}", connector::uuid4(random_bytes()));
                Ok(Bodies {
                    prefill: mooncake::prefill(*route, body, &transfer),
                    decode: mooncake::decode(
                        body,
                        &transfer,
                        &self.engines.bootstrap(target),
                        engine,
                    ),
                    rank: Some(engine.rank),
                })
            }
            Connector::Offloading => {
                let id = connector::uuid4(random_bytes());
                let source = source.and_then(|source| self.source(source, Some(target)));
                Ok(Bodies {
                    prefill: offloading::prefill(*route, body, &id, source.as_ref()),
                    decode: offloading::decode(body, &self.at(target, id)),
                    rank: None,
                })
            }
            _ => {
                let room = sglang::room(random_bytes());
                let both = sglang::both(body, target, self.config.sglang_port, room);
                Ok(Bodies {
                    prefill: both.clone(),
                    decode: both,
                    rank: None,
                })
            }
        }
    }
}
