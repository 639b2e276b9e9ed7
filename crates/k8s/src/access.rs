//! Whether whoever asks for `/metrics` may: the API server knows the token and what its owner may read.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{
    NonResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// How long an answer holds.
const LIFETIME: Duration = Duration::from_secs(60);
/// Answers kept.
const CAPACITY: usize = 1024;
/// Questions under way; whoever makes up tokens must not flood the API server.
const AT_ONCE: usize = 4;
/// No token of Kubernetes is longer.
const MAX_TOKEN: usize = 16 << 10;
/// For one question, waiting for a turn included.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why it is not known whether somebody may read.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The API server did not answer as it should; this process may lack the right to ask.
    #[error("asking the API server")]
    Server(#[source] Box<kube::Error>),
    /// No answer in time, or too many questions before this one.
    #[error("no answer of the API server in time")]
    Late,
}

/// Asks who may read, and remembers the answers for a minute.
pub struct Access {
    client: Client,
    answers: Mutex<Answers>,
    turns: Semaphore,
    started: Instant,
}

impl Access {
    /// Asks through `client`, whose account must be allowed to create token reviews and access reviews.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self {
            client,
            answers: Mutex::new(Answers::new(CAPACITY, LIFETIME)),
            turns: Semaphore::new(AT_ONCE),
            started: Instant::now(),
        }
    }

    /// Whether the owner of this bearer token may `get` this path, such as `/metrics`.
    ///
    /// # Errors
    /// [`AccessError`], if that could not be learnt.
    pub async fn may_get(&self, token: &str, path: &str) -> Result<bool, AccessError> {
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Ok(false);
        }
        let key = key(token, path);
        if let Some(answer) = self.answers.lock().get(&key, self.started.elapsed()) {
            return Ok(answer);
        }
        let asked = tokio::time::timeout(PATIENCE, self.ask(token, path)).await;
        let answer = asked.map_err(|_| AccessError::Late)??;
        self.answers.lock().put(key, answer, self.started.elapsed());
        Ok(answer)
    }

    async fn ask(&self, token: &str, path: &str) -> Result<bool, AccessError> {
        let _turn = self.turns.acquire().await.map_err(|_| AccessError::Late)?;
        let server = |error| AccessError::Server(Box::new(error));
        let Some(user) = self.owner(token).await.map_err(server)? else {
            return Ok(false);
        };
        self.allowed(user, path).await.map_err(server)
    }

    async fn owner(&self, token: &str) -> Result<Option<UserInfo>, kube::Error> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                ..TokenReviewSpec::default()
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let status = api
            .create(&PostParams::default(), &review)
            .await?
            .status
            .unwrap_or_default();
        Ok(status.user.filter(|_| status.authenticated == Some(true)))
    }

    async fn allowed(&self, user: UserInfo, path: &str) -> Result<bool, kube::Error> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: user.username,
                uid: user.uid,
                groups: user.groups,
                extra: user.extra,
                non_resource_attributes: Some(NonResourceAttributes {
                    path: Some(path.to_owned()),
                    verb: Some("get".to_owned()),
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answer = api.create(&PostParams::default(), &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }
}

/// Tokens are not kept, only what cannot be turned back into them.
type Key = [u8; 32];

fn key(token: &str, path: &str) -> Key {
    let mut hash = Sha256::new();
    hash.update(token.as_bytes());
    hash.update([0]);
    hash.update(path.as_bytes());
    hash.finalize().into()
}

/// Answers that still hold, so many at most.
struct Answers {
    known: HashMap<Key, (bool, Duration)>,
    capacity: usize,
    lifetime: Duration,
}

impl Answers {
    fn new(capacity: usize, lifetime: Duration) -> Self {
        Self {
            known: HashMap::new(),
            capacity,
            lifetime,
        }
    }

    fn get(&self, key: &Key, now: Duration) -> Option<bool> {
        let (answer, until) = self.known.get(key)?;
        (*until > now).then_some(*answer)
    }

    fn put(&mut self, key: Key, answer: bool, now: Duration) {
        if self.known.len() >= self.capacity && !self.known.contains_key(&key) {
            self.make_room(now);
        }
        self.known.insert(key, (answer, now + self.lifetime));
    }

    /// Drops what no longer holds, and if that was nothing, what ends first; a refusal before a permission, so that made-up
    /// tokens do not push out the scraper's.
    fn make_room(&mut self, now: Duration) {
        self.known.retain(|_, (_, until)| *until > now);
        if self.known.len() < self.capacity {
            return;
        }
        let first = self
            .known
            .iter()
            .min_by_key(|(_, order)| **order)
            .map(|(key, _)| *key);
        if let Some(first) = first {
            self.known.remove(&first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn answers_hold_for_a_while() {
        let mut answers = Answers::new(2, S(60));
        let (a, b) = (key("a", "/"), key("b", "/"));
        answers.put(a, true, S(0));
        answers.put(b, false, S(10));
        assert_eq!(
            (answers.get(&a, S(59)), answers.get(&b, S(59))),
            (Some(true), Some(false))
        );
        assert_eq!(
            (answers.get(&a, S(60)), answers.get(&b, S(60))),
            (None, Some(false))
        );
        answers.put(a, false, S(60));
        assert_eq!(answers.get(&a, S(61)), Some(false));
    }

    #[test]
    fn refusals_make_room_before_permissions() {
        let mut answers = Answers::new(3, S(60));
        answers.put(key("scraper", "/"), true, S(0));
        for guess in 0..50 {
            answers.put(key(&guess.to_string(), "/"), false, S(1));
            assert!(answers.known.len() <= 3);
        }
        assert_eq!(answers.get(&key("scraper", "/"), S(2)), Some(true));
    }

    #[test]
    fn a_path_is_part_of_the_question() {
        assert_ne!(key("a", "/metrics"), key("a", "/debug"));
        assert_ne!(key("a", "b"), key("ab", ""));
    }
}
