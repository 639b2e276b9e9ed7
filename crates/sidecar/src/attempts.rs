//! One prompt's prefill, tried as often and on as many servers as the policy allows.

use crate::answer_body::Answer;
use crate::fallback::{Failure, Next, Tries};
use crate::front::{Journey, Sidecar};
use crate::legs::Failed;
use crate::refusal::Refusal;
use crate::target::Target;
use http::Response;
use std::time::Instant;

/// Where the time for prefill ends, if it does.
pub(crate) type Deadline = Option<tokio::time::Instant>;

/// The server that is asked, and what is left to try.
#[derive(Debug)]
pub(crate) struct Attempts<'a> {
    target: Option<&'a Target>,
    others: std::slice::Iter<'a, Target>,
    tries: Tries,
    deadline: Deadline,
}

impl<'a> Attempts<'a> {
    /// The server to ask now; nothing if none was named properly.
    pub(crate) fn target(&self) -> Option<&'a Target> {
        self.target
    }

    /// For all attempts together.
    pub(crate) fn deadline(&self) -> Deadline {
        self.deadline
    }
}

impl Sidecar {
    /// Nothing tried yet; `targets` are asked in order.
    pub(crate) fn attempts<'a>(&self, journey: &Journey, targets: &'a [Target]) -> Attempts<'a> {
        let mut others = targets.iter();
        let target = others.next();
        let alone = self.config.connector.decodes_alone();
        let len = journey.body.text().len();
        let now = tokio::time::Instant::now();
        Attempts {
            target,
            tries: self.config.policy.tries(len, others.len(), alone),
            others,
            deadline: self.config.prefill_timeout.and_then(|t| now.checked_add(t)),
        }
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

    /// The request's answer now that prefill has failed; nothing if it is to be tried again, after a pause if need be.
    pub(crate) async fn after(
        &self,
        Failed { failure, said }: Failed,
        attempts: &mut Attempts<'_>,
        journey: &Journey,
    ) -> Option<Result<Response<Answer>, Refusal>> {
        let next = attempts.tries.after(failure);
        tracing::warn!(?failure, ?next, "prefill failed");
        match next {
            Next::Again(pause) => {
                self.metrics.retry("same");
                tokio::time::sleep(pause).await;
                None
            }
            Next::Another => {
                self.metrics.retry("another");
                attempts.target = attempts.others.next();
                None
            }
            Next::DecodeAlone => {
                self.metrics.fallback(failure.name());
                Some(self.decode_alone(journey).await)
            }
            Next::Tell => Some(said.map_or(Err(Refusal::PrefillFailed), |said| {
                Ok(said.map(|body| Answer::whole(body.into())))
            })),
            Next::TooLong => Some(Err(Refusal::TooLongAlone)),
        }
    }
}
