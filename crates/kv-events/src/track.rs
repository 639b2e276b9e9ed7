//! What to make of a source's numbered batches: which to hand on, when to ask for those that were missed, when to forget.
//! Pure: time comes as an argument, in and out go values.
//!
//! A source numbers its batches from 0. Whoever follows knows a subset of its cache as long as nothing was missed since
//! some point, wherever that point is: blocks from before it are unknown, which costs a hit, never a wrong one. So a
//! hole at the beginning is accepted, and a hole after it is healed by forgetting.

use std::collections::VecDeque;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::time::Duration;

use bytes::Bytes;

/// Most bytes of batches that wait for the end of a replay.
const MAX_HELD: usize = 32 << 20;

/// Attempts at a replay that bring nothing, before it is left for a while.
const ATTEMPTS: u8 = 3;

/// How long it is left.
const COOL_DOWN: Duration = Duration::from_secs(30);

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Forget all that was handed on.
    Reset,
    /// Hand this batch on.
    Deliver(Bytes),
    /// Ask for batches from this number on; an earlier request is given up.
    Replay(u64),
}

/// A batch with its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Numbered {
    pub(crate) seq: u64,
    pub(crate) payload: Bytes,
}

/// How far a source has been followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Position {
    /// Nothing is known, and everything may be asked for.
    Start,
    /// Nothing is known, and what comes next is a beginning.
    Anywhere,
    /// All up to this batch, from some beginning on.
    At {
        seq: u64,
        /// Tells the batch from another of this number, by a source that started anew: batches say when they were made.
        digest: u64,
    },
}

impl Position {
    fn at(batch: &Numbered) -> Self {
        let hash = BuildHasherDefault::<DefaultHasher>::default();
        Self::At {
            seq: batch.seq,
            digest: hash.hash_one(&batch.payload),
        }
    }
}

/// A replay that was asked for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    /// The number that should come next.
    next: u64,
    /// It begins with the newest batch known, to see whether the source is still the same.
    checks: bool,
    /// It starts over: what is known is forgotten once it brings something.
    rebuilds: bool,
    /// It asked for all there is.
    from_start: bool,
    /// Whether it has brought anything yet.
    brought: bool,
    /// Attempts that brought nothing.
    failed: u8,
}

/// What a replay is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// To get what was missed.
    Fill,
    /// To see whether the source is the same, and to get what was missed.
    Check,
    /// To start over.
    Rebuild,
}

/// One source, as far as it is known.
#[derive(Debug)]
pub(crate) struct Track {
    replays: bool,
    position: Position,
    /// Whether the source of this connection is known to be the one that `position` is about.
    same: bool,
    connected: bool,
    /// The newest batch of this connection.
    live: Option<u64>,
    asked: Option<Asked>,
    held: VecDeque<Numbered>,
    held_bytes: usize,
    /// Something may be had by asking from the beginning, but not before `cool`.
    behind: bool,
    cool: Duration,
    out: Vec<Action>,
}

impl Track {
    /// A source of which nothing is known; whether it answers replays.
    pub(crate) const fn new(replays: bool) -> Self {
        Self {
            replays,
            position: Position::Start,
            same: false,
            connected: false,
            live: None,
            asked: None,
            held: VecDeque::new(),
            held_bytes: 0,
            behind: false,
            cool: Duration::ZERO,
            out: Vec::new(),
        }
    }

    /// What is to be done now, in order.
    pub(crate) fn actions(&mut self) -> std::vec::Drain<'_, Action> {
        self.out.drain(..)
    }

    /// When to call [`tick`](Self::tick), if ever.
    pub(crate) fn wakes_at(&self) -> Option<Duration> {
        (self.behind && self.connected && self.asked.is_none()).then_some(self.cool)
    }

    /// A connection stands, and batches are subscribed to.
    pub(crate) fn connected(&mut self, now: Duration) {
        self.lost();
        self.connected = true;
        if !self.may_ask(now) {
            return;
        }
        match self.position {
            Position::Start | Position::Anywhere => self.ask(0, Purpose::Fill),
            Position::At { seq, .. } => self.ask(seq, Purpose::Check),
        }
    }

    /// The connection is gone. What is known stays until it is clear that it is wrong.
    pub(crate) fn lost(&mut self) {
        self.connected = false;
        self.same = false;
        self.live = None;
        self.asked = None;
        self.held.clear();
        self.held_bytes = 0;
    }

    /// A batch came as it happened.
    pub(crate) fn live(&mut self, now: Duration, batch: Numbered) {
        match self.live.replace(batch.seq) {
            Some(before) if batch.seq == before => return,
            // Numbers only grow: this is another source in the same place.
            Some(before) if batch.seq < before => self.restarted(now),
            _ => {}
        }
        if self.asked.is_some() {
            self.hold(batch);
        } else {
            self.accept(now, batch);
        }
    }

    /// A batch came in answer to [`Action::Replay`].
    pub(crate) fn replayed(&mut self, batch: Numbered) {
        let Some(asked) = self.asked else { return };
        if asked.checks {
            if self.position == Position::at(&batch) {
                return self.brought(asked, &batch);
            }
            // Another batch under the same number: started anew. A later one: those in between are not to be had.
            self.reset(Position::Start);
            if batch.seq <= asked.next {
                return self.ask(0, Purpose::Fill);
            }
        } else if batch.seq < asked.next {
            return;
        } else if batch.seq > asked.next {
            if asked.brought {
                // Lost on the way. If they are really gone, the next answer begins after them.
                return self.ask(asked.next, Purpose::Fill);
            }
            if asked.next > 0 {
                self.reset(Position::Anywhere);
            }
        }
        if asked.rebuilds {
            self.reset(Position::Anywhere);
        }
        self.brought(asked, &batch);
        self.deliver(batch);
    }

    fn brought(&mut self, asked: Asked, batch: &Numbered) {
        self.same = true;
        self.asked = Some(Asked {
            next: batch.seq.saturating_add(1),
            checks: false,
            rebuilds: false,
            brought: true,
            failed: 0,
            ..asked
        });
    }

    /// The answer is complete.
    pub(crate) fn replay_ended(&mut self, now: Duration) {
        let Some(asked) = self.asked.take() else {
            return;
        };
        if asked.checks {
            // It does not even have what was heard of it last: not the same source, or one that keeps nothing.
            self.reset(Position::Start);
            return self.ask(0, Purpose::Fill);
        }
        self.same = true;
        self.behind &= !asked.from_start;
        let is_hole = |held: &Numbered| held.seq > asked.next;
        if !asked.brought && self.held.front().is_some_and(is_hole) {
            // What is missing is not to be had.
            self.reset(Position::Anywhere);
        }
        self.release(now);
    }

    /// No answer, or one that breaks off or makes no sense.
    pub(crate) fn replay_failed(&mut self, now: Duration) {
        let Some(mut asked) = self.asked.take() else {
            return;
        };
        asked.failed += 1;
        if asked.failed < ATTEMPTS {
            // What was brought stays; the rest is asked for.
            self.out.push(Action::Replay(asked.next));
            asked.brought = false;
            self.asked = Some(asked);
            return;
        }
        self.behind = true;
        self.cool = now + COOL_DOWN;
        if self.position == Position::Start {
            self.position = Position::Anywhere;
        }
        self.release(now);
    }

    /// It is as late as [`wakes_at`](Self::wakes_at) said.
    pub(crate) fn tick(&mut self, now: Duration) {
        if self.wakes_at().is_some_and(|at| at <= now) {
            self.ask(0, Purpose::Rebuild);
        }
    }

    fn may_ask(&self, now: Duration) -> bool {
        self.replays && self.connected && (!self.behind || self.cool <= now)
    }

    fn ask(&mut self, from: u64, purpose: Purpose) {
        self.asked = Some(Asked {
            next: from,
            checks: purpose == Purpose::Check,
            rebuilds: purpose == Purpose::Rebuild,
            from_start: from == 0,
            brought: false,
            failed: 0,
        });
        self.out.push(Action::Replay(from));
    }

    fn hold(&mut self, batch: Numbered) {
        self.held_bytes += batch.payload.len();
        self.held.push_back(batch);
        while self.held_bytes > MAX_HELD {
            // Seen as a hole when its turn comes.
            let Some(oldest) = self.held.pop_front() else {
                break;
            };
            self.held_bytes -= oldest.payload.len();
        }
    }

    /// Takes what was held, until some of it must wait again.
    fn release(&mut self, now: Duration) {
        while self.asked.is_none() {
            let Some(batch) = self.held.pop_front() else {
                return;
            };
            self.held_bytes -= batch.payload.len();
            self.accept(now, batch);
        }
    }

    /// Takes the next live batch, with no replay under way.
    fn accept(&mut self, now: Duration, batch: Numbered) {
        let wanted = match self.position {
            Position::Start if batch.seq > 0 && self.may_ask(now) => return self.fetch(0, batch),
            Position::Start | Position::Anywhere => batch.seq,
            Position::At { seq, .. } => seq.saturating_add(1),
        };
        if batch.seq == wanted {
            self.same = true;
            return self.deliver(batch);
        }
        if !self.same {
            // Nothing tells that this is still the source that is known.
            self.reset(Position::Anywhere);
            self.same = true;
            return self.deliver(batch);
        }
        if batch.seq < wanted {
            // A replay was faster.
            return;
        }
        if self.may_ask(now) {
            return self.fetch(wanted, batch);
        }
        self.reset(Position::Anywhere);
        self.deliver(batch);
    }

    /// Asks for what is missing before `batch`, which waits.
    fn fetch(&mut self, from: u64, batch: Numbered) {
        self.held_bytes += batch.payload.len();
        self.held.push_front(batch);
        self.ask(from, Purpose::Fill);
    }

    fn restarted(&mut self, now: Duration) {
        self.held.clear();
        self.held_bytes = 0;
        self.asked = None;
        self.reset(Position::Start);
        self.same = true;
        if self.may_ask(now) {
            self.ask(0, Purpose::Fill);
        }
    }

    fn reset(&mut self, position: Position) {
        if matches!(self.position, Position::At { .. }) {
            self.out.push(Action::Reset);
        }
        self.position = position;
    }

    fn deliver(&mut self, batch: Numbered) {
        self.position = Position::at(&batch);
        self.out.push(Action::Deliver(batch.payload));
    }
}

#[cfg(test)]
mod tests;
