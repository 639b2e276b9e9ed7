//! Prefill first, then decode: `nixlv2` and `shared-storage`.

use crate::answer_body::{Answer, Companion};
use crate::attempts::Attempts;
use crate::connector::{Connector, nixl, shared_storage};
use crate::fallback::Failure;
use crate::front::{Journey, Sidecar, counted, passed};
use crate::legs::{self, Failed, Head, Reading, Said};
use crate::refusal::Refusal;
use crate::target::Target;
use crate::usage::Cached;
use baton_http::{Pieces, collect};
use http::Response;
use http::header::CONTENT_TYPE;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

/// Most bytes of a stream that are held back to see whether decode declines.
const MAX_BEGINNING: usize = 1 << 20;

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
        let mut attempts = self.attempts(journey, targets);
        loop {
            let asked = self.ask_prefill(journey, &head, &attempts, source.as_ref());
            let failed = match asked.await {
                Ok(prefilled) => {
                    return self.hand_over(journey, attempts.target(), prefilled).await;
                }
                Err(failed) => failed,
            };
            if let Some(answer) = self.after(failed, &mut attempts, journey).await {
                return answer;
            }
        }
    }

    async fn ask_prefill(
        &self,
        journey: &Journey,
        head: &Head,
        attempts: &Attempts<'_>,
        source: Option<&Target>,
    ) -> Result<Option<Said>, Failed> {
        let target = attempts.target().ok_or(Failure::Malformed)?;
        let Journey { route, body, .. } = journey;
        let (body, reading) = match self.config.connector {
            Connector::SharedStorage => (shared_storage::prefill(*route, body), Reading::End),
            _ => {
                let source = source.and_then(|source| self.source(source, Some(target)));
                let body = nixl::prefill(*route, body, source.as_ref());
                (body, Reading::Params(self.config.max_body, &self.early))
            }
        };
        let mut head = head.clone();
        self.early.ask(target, &mut head.headers);
        let asked = legs::prefill(&self.prefill, target, &head, body, reading);
        self.measured(asked, attempts.deadline()).await
    }

    /// Prefill is done, or has said where its KV will be: decode goes on.
    async fn hand_over(
        &self,
        journey: &Journey,
        target: Option<&Target>,
        said: Option<Said>,
    ) -> Result<Response<Answer>, Refusal> {
        let (Some(Said { prefilled, rest }), Some(target)) = (said, target) else {
            return self.decode_alone(journey).await;
        };
        if prefilled.params == "null" {
            tracing::warn!(server = %target, "prefill hands nothing over");
        }
        let (cached, companion) = match rest {
            None => (prefilled.cached.into(), None),
            Some(rest) => {
                let cached = Cached::default();
                let reading = self.read_beside(target, rest, cached.clone());
                (cached, Some(reading))
            }
        };
        let held = self.releases.hold(target, prefilled.lease);
        let body = nixl::decode(&journey.body, prefilled.params);
        let response = self.decode(journey, body).await?;
        if response.status().is_success() {
            held.taken();
        }
        let answer = counted(response, journey.route, cached);
        Ok(match companion {
            None => answer,
            Some(companion) => answer.map(|body| body.beside(companion)),
        })
    }

    /// Reads the rest of prefill's answer while decode fetches the KV. Should prefill fail now, decode learns it from the
    /// lease, which ends.
    fn read_beside(&self, target: &Target, rest: Incoming, cached: Cached) -> Companion {
        let (target, limit) = (target.clone(), self.config.max_body);
        Companion::new(tokio::spawn(async move {
            match legs::whole(rest, limit).await {
                Ok(prefilled) => cached.tell(prefilled.cached),
                Err(failure) => {
                    tracing::warn!(server = %target, ?failure, "prefill failed beside decode");
                }
            }
        }))
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
