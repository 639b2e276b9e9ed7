//! Prefill first, then decode: `nixlv2` and `shared-storage`.

use crate::answer::Prefilled;
use crate::answer_body::Answer;
use crate::connector::{Connector, nixl, shared_storage};
use crate::fallback::{Failure, Next, Tries};
use crate::front::{Journey, Sidecar, counted, passed};
use crate::legs::{self, Failed, Head, Reading};
use crate::refusal::Refusal;
use crate::target::Target;
use baton_http::{Pieces, collect};
use http::Response;
use http::header::CONTENT_TYPE;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use std::time::Instant;

/// Most bytes of a stream that are held back to see whether decode declines.
const MAX_BEGINNING: usize = 1 << 20;

/// Where the time for prefill ends, if it does.
pub(crate) type Deadline = Option<tokio::time::Instant>;

impl Sidecar {
    /// Asks `targets` for the prompt, one after another if need be, and then decode.
    pub(crate) async fn one_after_the_other(
        &self,
        journey: &Journey,
        targets: &[Target],
        source: Option<Target>,
    ) -> Result<Response<Answer>, Refusal> {
        let store = self.config.connector == Connector::SharedStorage;
        if store
            && shared_storage::tries_decode_first(&journey.body)
            && let Some(answer) = self.try_decode(journey).await?
        {
            return Ok(answer);
        }
        let head = journey.head.read_here();
        let deadline = self.deadline();
        let len = journey.body.text().len();
        let others = targets.len().saturating_sub(1);
        let mut tries = self.config.policy.tries(len, others, true);
        let mut at = targets.iter();
        let mut target = at.next();
        loop {
            let asked = self.ask_prefill(journey, &head, target, source.as_ref(), deadline);
            let Failed { failure, said } = match asked.await {
                Ok(prefilled) => return self.hand_over(journey, target, prefilled).await,
                Err(failed) => failed,
            };
            match self.next(&mut tries, failure).await {
                Next::Another => target = at.next(),
                Next::Again(_) => {}
                Next::DecodeAlone => return self.decode_alone(journey).await,
                end => return self.tell(end, said),
            }
        }
    }

    pub(crate) fn deadline(&self) -> Deadline {
        let limit = self.config.prefill_timeout?;
        tokio::time::Instant::now().checked_add(limit)
    }

    async fn ask_prefill(
        &self,
        journey: &Journey,
        head: &Head,
        target: Option<&Target>,
        source: Option<&Target>,
        deadline: Deadline,
    ) -> Result<Option<Prefilled>, Failed> {
        let target = target.ok_or(Failure::Malformed)?;
        let Journey { route, body, .. } = journey;
        let (body, reading) = match self.config.connector {
            Connector::SharedStorage => (shared_storage::prefill(*route, body), Reading::End),
            _ => {
                let source = source.and_then(|source| self.source(source, Some(target)));
                let body = nixl::prefill(*route, body, source.as_ref());
                (body, Reading::Params(self.config.max_body))
            }
        };
        let asked = legs::prefill(&self.prefill, target, head, body, reading);
        self.measured(asked, deadline).await
    }

    /// `prefill` within the time there is for it, counted.
    pub(crate) async fn measured<T>(
        &self,
        prefill: impl Future<Output = Result<T, Failed>>,
        deadline: Deadline,
    ) -> Result<T, Failed> {
        let started = Instant::now();
        let asked = match deadline {
            None => prefill.await,
            Some(deadline) => tokio::time::timeout_at(deadline, prefill)
                .await
                .unwrap_or(Err(Failure::TimedOut.into())),
        };
        match &asked {
            Ok(_) => self.metrics.prefilled(started),
            Err(failed) => self.metrics.prefill_failed(failed.failure),
        }
        asked
    }

    /// What to do after `failure`; waits as long as is to be waited, and counts.
    pub(crate) async fn next(&self, tries: &mut Tries, failure: Failure) -> Next {
        let next = tries.after(failure);
        tracing::warn!(?failure, ?next, "prefill failed");
        match next {
            Next::Again(pause) => {
                self.metrics.retry("same");
                tokio::time::sleep(pause).await;
            }
            Next::Another => self.metrics.retry("another"),
            Next::DecodeAlone => self.metrics.fallback(failure.name()),
            Next::Relay | Next::BadGateway | Next::TooLong => {}
        }
        next
    }

    /// The client is told how prefill failed.
    pub(crate) fn tell(
        &self,
        end: Next,
        said: Option<Response<bytes::Bytes>>,
    ) -> Result<Response<Answer>, Refusal> {
        match (end, said) {
            (Next::Relay, Some(said)) => Ok(said.map(|body| Answer::whole(body.into()))),
            (Next::TooLong, _) => Err(Refusal::TooLongAlone),
            _ => Err(Refusal::PrefillFailed),
        }
    }

    /// Prefill is done: decode goes on.
    async fn hand_over(
        &self,
        journey: &Journey,
        target: Option<&Target>,
        prefilled: Option<Prefilled>,
    ) -> Result<Response<Answer>, Refusal> {
        let (Some(prefilled), Some(target)) = (prefilled, target) else {
            return self.decode_alone(journey).await;
        };
        if prefilled.params == "null" {
            tracing::warn!(server = %target, "prefill hands nothing over");
        }
        let held = self.releases.hold(target, prefilled.lease);
        let body = nixl::decode(&journey.body, prefilled.params);
        let response = self.decode(journey, body).await?;
        if response.status().is_success() {
            held.taken();
        }
        Ok(counted(response, journey.route, prefilled.cached))
    }

    /// Asks decode, which declines with nothing if too little of the prompt is in the store.
    async fn try_decode(&self, journey: &Journey) -> Result<Option<Response<Answer>>, Refusal> {
        let response = self
            .decode(journey, journey.body.text().clone().into())
            .await?;
        if !response.status().is_success() {
            return Ok(Some(passed(response)));
        }
        let kind = response.headers().get(CONTENT_TYPE);
        let streams = kind.is_some_and(|k| k.as_bytes().starts_with(b"text/event-stream"));
        let (parts, mut body) = response.into_parts();
        if streams {
            let begun = beginning(&mut body).await?;
            let declines = shared_storage::declines(&begun.clone().into_bytes());
            let answer = Response::from_parts(parts, Answer::behind(begun, body));
            return Ok(Some(answer).filter(|_| !declines));
        }
        let whole = collect(body, self.config.max_body)
            .await
            .map_err(|_| Refusal::DecodeFailed)?;
        let declines = shared_storage::declines(&whole);
        let answer = Response::from_parts(parts, Answer::whole(whole.into()));
        Ok(Some(answer).filter(|_| !declines))
    }
}

/// The first two events of a stream, or all there is.
async fn beginning(body: &mut Incoming) -> Result<Pieces, Refusal> {
    let mut begun = Pieces::default();
    let mut events = 0;
    let mut blank = false;
    while events < 2 && begun.len() < MAX_BEGINNING {
        let Some(frame) = body.frame().await else {
            break;
        };
        let Ok(data) = frame.map_err(|_| Refusal::DecodeFailed)?.into_data() else {
            continue;
        };
        for byte in &data {
            events += usize::from(blank && *byte == b'\n');
            blank = *byte == b'\n' || (blank && *byte == b'\r');
        }
        begun.push(data);
    }
    Ok(begun)
}
