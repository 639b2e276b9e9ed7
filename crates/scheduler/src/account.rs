//! What is under way at a server: what it said when it was last asked, and what was sent to it and came back, taken
//! together. Whoever sends requests keeps one [`Account`] a server; a decision sees it as a [`Load`].

use crate::Load;
use crate::work::Backlog;
use std::time::Duration;

/// What a server said of itself when it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Said {
    /// Requests that wait for a place in the batch.
    pub waiting: u32,
    /// Requests in the batch.
    pub running: u32,
    /// Part of the KV pool in use, 0 to 1.
    pub kv_usage: f32,
    /// Requests there when it was asked, ours and others'.
    pub sent: u32,
    /// Until when it is recent enough to be believed.
    pub until: Duration,
}

/// What a request counts at a server, besides being one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    /// Tokens, until it is over.
    pub tokens: u64,
    /// Work that has to be done before its answer begins, as [`Costs::work`](crate::Costs::work) counts it; 0 if its
    /// prompt is computed elsewhere.
    pub work: f64,
}

/// What a sender has under way at a server, as it tells others.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UnderWay {
    /// Requests.
    pub requests: u32,
    /// Their tokens.
    pub tokens: u64,
    /// Those of them whose prompts are to be computed there.
    pub queued: u32,
    /// What is probably left of that work.
    pub work: f64,
}

/// What a server said, and the requests that were sent to it and are not over.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Account {
    said: Said,
    requests: u32,
    tokens: u64,
    backlog: Backlog,
    /// What all others have there.
    others: UnderWay,
}

impl UnderWay {
    /// The same within bounds, whoever said it: sums of some hundred stay sums.
    #[must_use]
    pub fn bounded(self) -> Self {
        Self {
            requests: self.requests.min(1 << 20),
            tokens: self.tokens.min(1 << 48),
            queued: self.queued.min(1 << 20),
            // Not-a-number is none.
            work: if self.work > 0.0 {
                self.work.min(1e15)
            } else {
                0.0
            },
        }
    }

    /// Whether whoever was told `told` should hear of it. What is left of work changes all the time, so little of that is
    /// no news.
    #[must_use]
    pub fn is_news(&self, told: &Self) -> bool {
        let counts = |u: &Self| (u.requests, u.tokens, u.queued);
        counts(self) != counts(told) || (self.work - told.work).abs() > told.work / 8.0
    }
}

impl Account {
    /// Notes what the server said.
    pub fn said(&mut self, said: Said) {
        self.said = said;
    }

    /// Notes that a request was sent at the time `now`.
    pub fn sent(&mut self, share: Share, now: Duration) {
        self.requests += 1;
        self.tokens = self.tokens.saturating_add(share.tokens);
        if share.work > 0.0 {
            self.backlog.send(share.work, now);
        }
    }

    /// Notes that the answer of a request has begun, so that its prompt is computed.
    pub fn answered(&mut self, share: Share, now: Duration) {
        if share.work > 0.0 {
            self.backlog.answer(share.work, now);
        }
    }

    /// Notes that a request will not be answered. It still counts as under way until it is over.
    pub fn given_up(&mut self, share: Share) {
        if share.work > 0.0 {
            self.backlog.give_up(share.work);
        }
    }

    /// Notes that a request is over that was answered or given up before.
    pub fn over(&mut self, share: Share) {
        self.requests = self.requests.saturating_sub(1);
        self.tokens = self.tokens.saturating_sub(share.tokens);
    }

    /// Notes that somebody else has `now` under way there instead of `before`. Both are [bounded](UnderWay::bounded).
    pub fn others(&mut self, before: UnderWay, now: UnderWay) {
        let others = &mut self.others;
        others.requests = (others.requests + now.requests).saturating_sub(before.requests);
        others.tokens = (others.tokens + now.tokens).saturating_sub(before.tokens);
        others.queued = (others.queued + now.queued).saturating_sub(before.queued);
        // Sums of fractions leave something; of nothing nothing is left.
        let work = (others.work + now.work - before.work).max(0.0);
        others.work = if others.queued == 0 { 0.0 } else { work };
    }

    /// What we have under way there at the time `now`.
    #[must_use]
    pub fn under_way(&self, now: Duration) -> UnderWay {
        UnderWay {
            requests: self.requests,
            tokens: self.tokens,
            queued: self.backlog.requests(),
            work: self.backlog.left(now),
        }
    }

    /// Requests there, ours and others'.
    #[must_use]
    pub fn requests_of_all(&self) -> u32 {
        self.requests.saturating_add(self.others.requests)
    }

    /// Requests that are on their way to the server or there.
    #[must_use]
    pub fn requests(&self) -> u32 {
        self.requests
    }

    /// Their tokens.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Work of prompts that are not answered yet, what is probably done of it included.
    #[must_use]
    pub fn queued_work(&self) -> f64 {
        self.backlog.work()
    }

    /// How busy the server is at the time `now`.
    #[must_use]
    pub fn load(&self, now: Duration) -> Load {
        let (said, others) = (&self.said, &self.others);
        let requests = self.requests_of_all();
        Load {
            waiting: said.waiting,
            running: said.running,
            active: active(said, requests),
            unseen: requests.saturating_sub(said.sent),
            tokens: self.tokens.saturating_add(others.tokens),
            queued_work: self.backlog.left(now) + others.work,
            pace: self.backlog.pace(),
            kv_usage: said.kv_usage,
            fresh: now < said.until,
        }
    }
}

/// What a server said, and what was sent to it and came back since: both are needed, because what it says is some
/// hundred milliseconds old. What is under way there counts in any case: a decode server may not show yet whose prompt
/// is computed elsewhere.
fn active(said: &Said, requests: u32) -> u32 {
    let shown = said.waiting.saturating_add(said.running);
    shown
        .saturating_add(requests)
        .saturating_sub(said.sent)
        .max(said.waiting)
        .max(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn load_is_what_was_said_and_what_happened_since() {
        let said = |waiting, running, sent| Said {
            waiting,
            running,
            sent,
            ..Said::default()
        };
        let shown = |now| active(&said(2, 3, 4), now);
        assert_eq!((shown(4), shown(7), shown(1)), (5, 8, 2));
        let silent = |sent, now| active(&said(0, 0, sent), now);
        assert_eq!((silent(0, 3), silent(9, 3)), (3, 3));
        assert_eq!(active(&said(u32::MAX, u32::MAX, 0), u32::MAX), u32::MAX);
    }

    #[test]
    fn a_request_counts_until_it_is_over_and_its_work_until_it_is_answered_or_given_up() {
        let mut account = Account::default();
        account.said(Said {
            waiting: 2,
            kv_usage: 0.5,
            sent: 1,
            until: secs(100),
            ..Said::default()
        });
        let (first, second) = (
            Share {
                tokens: 7,
                work: 50.0,
            },
            Share {
                tokens: 8,
                work: 60.0,
            },
        );
        account.sent(first, secs(0));
        account.sent(second, secs(0));
        account.answered(first, secs(1));
        let load = account.load(secs(1));
        let expected = Load {
            waiting: 2,
            active: 3,
            unseen: 1,
            tokens: 15,
            queued_work: 60.0,
            pace: Some(50.0),
            kv_usage: 0.5,
            ..Load::default()
        };
        assert_eq!(load, expected);
        assert!(!account.load(secs(100)).fresh);
        account.given_up(second);
        account.over(second);
        account.over(first);
        assert_eq!((account.requests(), account.tokens()), (0, 0));
        let load = account.load(secs(9));
        assert!(load.queued_work.abs() < 1e-9);
    }

    #[test]
    fn what_others_have_there_counts_until_they_are_gone() {
        let mut account = Account::default();
        let under_way = |requests, tokens, queued, work| {
            let (others, nothing) = (
                UnderWay {
                    requests,
                    tokens,
                    queued,
                    work,
                },
                UnderWay::default(),
            );
            (others.bounded(), nothing)
        };
        let ours = Share {
            tokens: 7,
            work: 5.0,
        };
        account.sent(ours, secs(0));
        let (first, nothing) = under_way(2, 20, 1, 0.1);
        let (less, _) = under_way(1, 10, 0, 0.0);
        let (second, _) = under_way(1, 1, 1, 0.7);
        account.others(nothing, first);
        account.others(nothing, second);
        account.others(first, less);
        let load = account.load(secs(0));
        assert_eq!((load.active, load.tokens), (3, 18));
        assert!((load.queued_work - 5.7).abs() < 1e-9);
        assert_eq!((account.requests(), account.requests_of_all()), (1, 3));
        let (most, _) = under_way(u32::MAX, u64::MAX, u32::MAX, f64::INFINITY);
        assert_eq!(under_way(0, 0, 0, f64::NAN).0, nothing);
        account.others(less, most);
        assert!(account.load(secs(0)).active > 1 << 20);
        account.others(most, nothing);
        account.others(second, nothing);
        let alone = account.load(secs(0));
        assert_eq!((alone.active, alone.tokens), (1, 7));
        assert_eq!(alone.queued_work, 5.0);
        let told = account.under_way(secs(0));
        assert_eq!(told, under_way(1, 7, 1, 5.0).0);
        assert!(!account.under_way(secs(0)).is_news(&told) && told.is_news(&nothing));
        let later = UnderWay { work: 4.0, ..told };
        assert!(later.is_news(&told) && !UnderWay { work: 4.5, ..told }.is_news(&told));
    }

    #[test]
    fn a_prompt_that_is_computed_elsewhere_is_no_work() {
        let mut account = Account::default();
        let share = Share {
            tokens: 9,
            work: 0.0,
        };
        account.sent(share, secs(0));
        assert_eq!(
            (account.under_way(secs(0)).queued, account.requests()),
            (0, 1)
        );
        account.answered(share, secs(9));
        assert_eq!(account.load(secs(9)).pace, None);
    }
}
