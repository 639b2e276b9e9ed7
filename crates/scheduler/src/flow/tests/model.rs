//! The queue against one that does everything by looking through a list.

use super::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Waiting {
    id: usize,
    flow: String,
    priority: i32,
    need: Need,
    tokens: u32,
    deadline: Duration,
    due: (u128, usize),
}

#[derive(Clone, Default)]
struct Turn {
    base: u64,
    since: u64,
}

#[derive(Default)]
struct Model {
    fairness: Fairness,
    waiting: Vec<Waiting>,
    turns: HashMap<(i32, Need, String), Turn>,
    virtual_time: HashMap<i32, u64>,
    slots: (u32, u32),
    turn: u64,
}

impl Model {
    fn enqueue(&mut self, item: Waiting) {
        self.turn += 1;
        let key = (item.priority, item.need, item.flow.clone());
        let same = |w: &Waiting| (w.priority, w.need, &w.flow) == (key.0, key.1, &key.2);
        if !self.waiting.iter().any(same) {
            let time = self.virtual_time.get(&key.0).copied().unwrap_or(0);
            let turn = self.turns.entry(key).or_default();
            (turn.base, turn.since) = (turn.base.max(time), self.turn);
        }
        self.waiting.push(item);
    }

    fn tag(&self, head: &Waiting) -> (u128, u64) {
        let turn = &self.turns[&(head.priority, head.need, head.flow.clone())];
        match self.fairness {
            Fairness::GlobalStrict => (head.due.0, head.id as u64),
            Fairness::RoundRobin => (u128::from(turn.base) + 1, turn.since),
            Fairness::Tokens => (
                u128::from(turn.base) + u128::from(head.tokens.max(1)),
                turn.since,
            ),
        }
    }

    /// Position of what goes next.
    fn next(&self) -> Option<usize> {
        let fits = |w: &&Waiting| self.slots.0 > 0 && (w.need == Need::Decode || self.slots.1 > 0);
        let head = |w: &&Waiting| {
            let mut flow = self
                .waiting
                .iter()
                .filter(|o| (o.priority, o.need, &o.flow) == (w.priority, w.need, &w.flow));
            flow.all(|o| w.due <= o.due)
        };
        let heads = self.waiting.iter().filter(fits).filter(head);
        let best = heads.min_by_key(|w| (Reverse(w.priority), self.tag(w)))?;
        self.waiting.iter().position(|w| w.id == best.id)
    }

    fn dispatch(&mut self) -> Option<usize> {
        let next = self.next()?;
        let tag = self.tag(&self.waiting[next]).0;
        let item = self.waiting.remove(next);
        let time = self.virtual_time.entry(item.priority).or_default();
        if self.fairness != Fairness::GlobalStrict {
            *time = (*time).max(u64::try_from(tag).unwrap());
        }
        let key = (item.priority, item.need, item.flow);
        let turn = self.turns.get_mut(&key).unwrap();
        self.turn += 1;
        (turn.base, turn.since) = (*time, self.turn);
        self.slots.0 -= 1;
        if item.need == Need::PrefillAndDecode {
            self.slots.1 -= 1;
        }
        Some(item.id)
    }

    fn expire(&mut self, now: Duration) -> Option<usize> {
        let old = self.waiting.iter().filter(|w| w.deadline <= now);
        let first = old.min_by_key(|w| (w.deadline, w.id))?.id;
        self.waiting.retain(|w| w.id != first);
        Some(first)
    }
}

#[derive(Clone, Debug)]
enum Op {
    In {
        flow: u8,
        priority: i32,
        tokens: u32,
        ttl: u64,
        slo: u64,
        prefill: bool,
    },
    Cancel(usize),
    Room(u32, u32),
    Go,
    Pass(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let arrival = (
        0u8..4,
        -1i32..2,
        0u32..50,
        1u64..40,
        0u64..30,
        any::<bool>(),
    );
    let arrival = arrival.prop_map(|(flow, priority, tokens, ttl, slo, prefill)| Op::In {
        flow,
        priority,
        tokens,
        ttl,
        slo,
        prefill,
    });
    prop_oneof![
        5 => arrival,
        1 => any::<usize>().prop_map(Op::Cancel),
        2 => (0u32..6, 0u32..4).prop_map(|(d, p)| Op::Room(d, p)),
        3 => Just(Op::Go),
        1 => (0u64..20).prop_map(Op::Pass),
    ]
}

fn policies() -> impl Strategy<Value = (Fairness, Ordering)> {
    use Fairness::{GlobalStrict, RoundRobin, Tokens};
    use Ordering::{Arrival, Deadline, SloDeadline};
    let fairness = prop::sample::select(vec![GlobalStrict, RoundRobin, Tokens]);
    (
        fairness,
        prop::sample::select(vec![Arrival, Deadline, SloDeadline]),
    )
}

struct Both {
    queue: FlowControl<usize>,
    model: Model,
    handles: Vec<Option<Handle>>,
    ordering: Ordering,
    now: Duration,
}

impl Both {
    fn arrive(&mut self, arrival: &Arrival<'_>) {
        let id = self.handles.len();
        let result = self.queue.enqueue(self.now, arrival, id);
        self.handles.push(result.as_ref().ok().copied());
        if result.is_err() {
            return;
        }
        let deadline = self.now + arrival.ttl.unwrap();
        let due = match self.ordering {
            Ordering::Arrival => 0,
            Ordering::Deadline => deadline.as_nanos(),
            Ordering::SloDeadline => (self.now + arrival.slo.unwrap()).as_nanos(),
        };
        self.model.enqueue(Waiting {
            id,
            flow: arrival.flow.to_owned(),
            priority: arrival.priority,
            need: arrival.need,
            tokens: arrival.tokens,
            deadline,
            due: (due, id),
        });
    }

    fn step(&mut self, op: &Op) -> Result<(), TestCaseError> {
        match *op {
            Op::In {
                flow,
                priority,
                tokens,
                ttl,
                slo,
                prefill,
            } => {
                let need = [Need::Decode, Need::PrefillAndDecode][usize::from(prefill)];
                self.arrive(&Arrival {
                    flow: ["a", "b", "c", "d"][usize::from(flow)],
                    priority,
                    bytes: tokens.into(),
                    tokens,
                    need,
                    ttl: Some(Duration::from_millis(ttl)),
                    slo: Some(Duration::from_millis(slo)),
                });
            }
            Op::Cancel(n) if !self.handles.is_empty() => {
                let id = n % self.handles.len();
                let left = self.handles[id].and_then(|h| self.queue.cancel(self.now, h));
                let known = self.model.waiting.iter().position(|w| w.id == id);
                prop_assert_eq!(left.map(|d| d.ticket), known.map(|_| id));
                known.map(|at| self.model.waiting.remove(at));
            }
            Op::Cancel(_) => {}
            Op::Room(decode, prefill) => {
                self.model.slots = (decode, prefill);
                self.queue
                    .set_room(self.now, Room::of_slots(decode, Some(prefill)));
            }
            Op::Go => {
                while let Some(expected) = self.model.dispatch() {
                    let went = self.queue.dispatch(self.now);
                    prop_assert_eq!(went.as_ref().map(|d| d.ticket), Some(expected));
                    went.iter().for_each(|d| self.queue.placed(d.grant));
                }
                prop_assert_eq!(self.queue.dispatch(self.now), None);
            }
            Op::Pass(ms) => {
                self.now += Duration::from_millis(ms);
                while let Some(expected) = self.model.expire(self.now) {
                    let left = self.queue.expire(self.now).map(|d| d.ticket);
                    prop_assert_eq!(left, Some(expected));
                }
                prop_assert_eq!(self.queue.expire(self.now), None);
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let (queue, waiting) = (&self.queue, &self.model.waiting);
        let n = waiting.len() as u64;
        prop_assert_eq!(queue.usage().requests, n);
        let bytes: u64 = waiting.iter().map(|w| u64::from(w.tokens)).sum();
        prop_assert_eq!(queue.usage().bytes, bytes);
        prop_assert_eq!(queue.bands().map(|b| b.1.requests).sum::<u64>(), n);
        let of_flows = queue.flows.iter().map(|f| f.queue.len() as u64);
        prop_assert_eq!(of_flows.sum::<u64>(), n);
        let first = waiting.iter().map(|w| w.deadline).min();
        prop_assert_eq!(queue.next_wakeup(), first.map(|d| d.max(self.now)));
        prop_assert_eq!(
            (queue.items.len() as u64, queue.deadlines.len() as u64),
            (n, n)
        );
        Ok(())
    }
}

proptest! {
    #[test]
    fn the_queue_does_what_a_list_would(
        policies in policies(),
        ops in prop::collection::vec(op(), 0..120),
    ) {
        let (fairness, ordering) = policies;
        let queue = FlowControl::new(with(fairness, ordering));
        let model = Model { fairness, ..Model::default() };
        let mut both = Both { queue, model, handles: Vec::new(), ordering, now: Duration::ZERO };
        both.step(&Op::Room(0, 0))?;
        for op in &ops {
            both.step(op)?;
            both.check()?;
        }
    }
}
