//! The gate before the servers: requests wait here, not in the servers' own queues, until one of them has room.
//!
//! [`FlowControl`] decides; this gives it a clock, wakes whoever may go, and takes out whoever went away. Requests that
//! find room go at once, without another task; the others are woken by [`Admission::run`], which itself wakes when a
//! permit comes back, when servers were looked at, and when somebody has waited too long: nothing is polled. Who runs and
//! has to make room is told by its [`Eviction`].

use crate::fleet::Fleet;
use baton_scheduler::flow::{
    Arrival, Departure, FlowConfig, FlowControl, Grant, Handle, Outcome, Room, Running,
};
use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

/// Between two looks at the servers for what was learnt of them: a large fleet is heard of all the time.
const BREATH: Duration = Duration::from_millis(5);

/// A request at the gate.
#[derive(Clone, Copy, Debug)]
pub struct Asking<'a> {
    /// The model that its client named; empty if it named none. This one and the next are for metrics only.
    pub model: &'a str,
    /// The model that servers are asked for.
    pub target: &'a str,
    /// What it asks of the queue.
    pub arrival: Arrival<'a>,
}

/// Tells how much room servers have, and hears what becomes of requests. Both may be called with the queue locked: they
/// must not come back here.
pub struct Surroundings {
    /// How much room servers have now.
    pub room: Box<dyn Fn() -> Room + Send + Sync>,
    /// Who hears of it.
    pub witness: Arc<dyn Witness>,
}

/// Hears what happens at the gate. Nothing of it has to be noted.
pub trait Witness: Send + Sync {
    /// A request came, and it took so long to take it in.
    fn came(&self, _: &Asking<'_>, _took: Duration) {}
    /// A request came and was not taken in, which took so long.
    fn refused(&self, _: &Asking<'_>, _why: Outcome, _took: Duration) {}
    /// A request that was taken in left, after it had waited so long.
    fn left(&self, _: &Asking<'_>, _why: Outcome, _waited: Duration) {}
    /// It took so long to see who may go.
    fn turned(&self, _took: Duration) {}
    /// A request that runs was told to make room for those of `priority`.
    fn revoked(&self, _priority: i32) {}
    /// It has ended, so long after.
    fn made_room(&self, _after: Duration) {}
}

type Answer = Result<Permit, Outcome>;
/// The queue, with whom to answer.
pub type Queue = FlowControl<oneshot::Sender<Answer>>;

/// What is decided about under one lock.
struct Inner {
    queue: Queue,
    /// Whom to tell that a request is to end, by its name.
    running: HashMap<u64, oneshot::Sender<()>>,
}

/// The gate.
pub struct Admission {
    inner: Mutex<Inner>,
    around: Surroundings,
    /// Whether servers may have more room than the queue knows.
    news: AtomicBool,
    /// Whether anybody waits: news wake nobody otherwise, and are looked at when the next request comes.
    crowded: AtomicBool,
    wake: Notify,
    began: Instant,
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Admission")
    }
}

/// Leave to go to a server. Dropped when the request is over, which may let another one go.
#[derive(Debug)]
pub struct Permit {
    gate: Arc<Admission>,
    /// What it takes of the servers' room, until it is counted there.
    grant: Option<Grant>,
    /// What it is among those that run, if anybody asks.
    running: Option<Running>,
    eviction: Eviction,
}

impl Permit {
    /// The request is counted at its server from now on.
    pub fn placed(&mut self) {
        if let Some(grant) = self.grant.take() {
            self.gate.inner.lock().queue.placed(grant);
        }
    }

    /// Ready when the request is to be given up for others; never once this was called.
    pub fn eviction(&mut self) -> Eviction {
        std::mem::take(&mut self.eviction)
    }

    /// A server that took part in this request is free again, though the request goes on.
    pub fn part_done(&self) {
        self.gate.changed();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.placed();
        if let Some(running) = self.running.take() {
            let (mut inner, now) = self.gate.locked();
            self.gate.over(&mut inner, now, &running);
        }
        self.gate.changed();
    }
}

/// Ready when a request that runs is to be given up for one of higher priority; never, if it may stay.
#[derive(Debug, Default)]
pub struct Eviction(Option<oneshot::Receiver<()>>);

impl Future for Eviction {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(told) = &mut self.0 else {
            return Poll::Pending;
        };
        let told = ready!(Pin::new(told).poll(cx));
        self.0 = None;
        // Nobody is left who could say so.
        told.map_or(Poll::Pending, Poll::Ready)
    }
}

impl Inner {
    /// How a request that is let go will hear that it is to end.
    fn eviction(&mut self, running: Option<&Running>) -> Eviction {
        let Some(running) = running.filter(|r| r.is_sheddable()) else {
            return Eviction::default();
        };
        let (sender, receiver) = oneshot::channel();
        self.running.insert(running.id(), sender);
        Eviction(Some(receiver))
    }
}

/// A request that waits for an answer; leaves the queue when dropped. It is here, where it is borrowed and not kept, that
/// a request's leaving is noted.
struct Waiting<'a> {
    gate: &'a Admission,
    asking: &'a Asking<'a>,
    since: Duration,
    /// Until it hears.
    handle: Option<Handle>,
}

impl Waiting<'_> {
    fn heard(mut self, why: Outcome) {
        self.handle = None;
        self.left(why);
    }

    fn left(&self, why: Outcome) {
        let waited = self.gate.began.elapsed().saturating_sub(self.since);
        self.gate.around.witness.left(self.asking, why, waited);
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some(handle) = self.handle else { return };
        let (mut inner, now) = self.gate.locked();
        inner.queue.cancel(now, handle);
        drop(inner);
        // Even if it was let go meanwhile: it goes nowhere.
        self.left(Outcome::EvictedContextCancelled);
    }
}

impl Admission {
    /// A gate that lets nobody through before `around` says that there is room.
    #[must_use]
    pub fn new(config: FlowConfig, around: Surroundings) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                queue: FlowControl::new(config),
                running: HashMap::new(),
            }),
            around,
            news: AtomicBool::new(true),
            crowded: AtomicBool::new(false),
            wake: Notify::new(),
            began: Instant::now(),
        })
    }

    /// Waits until the request may go to a server. Cancel safe: who stops waiting leaves the queue at once.
    ///
    /// # Errors
    /// Why it may not.
    pub async fn admit(self: &Arc<Self>, asking: &Asking<'_>) -> Result<Permit, Outcome> {
        let (sender, receiver) = oneshot::channel();
        let waiting = {
            let (mut inner, now) = self.locked();
            let handle = self.enqueue(&mut inner, now, asking, sender)?;
            self.turn(&mut inner, now);
            if !inner.queue.is_empty() {
                // Its deadline may be the first one; and there may be news since.
                self.wake.notify_one();
            }
            Waiting {
                gate: self,
                asking,
                since: now,
                handle: Some(handle),
            }
        };
        // The sender is dropped without a word by nobody.
        let answer = receiver.await.unwrap_or(Err(Outcome::EvictedOther));
        waiting.heard(*answer.as_ref().err().unwrap_or(&Outcome::Dispatched));
        answer
    }

    /// Takes a request in, if there is a place for it.
    fn enqueue(
        &self,
        inner: &mut Inner,
        now: Duration,
        asking: &Asking<'_>,
        sender: oneshot::Sender<Answer>,
    ) -> Result<Handle, Outcome> {
        let entered = inner.queue.enqueue(now, &asking.arrival, sender);
        let took = self.began.elapsed().saturating_sub(now);
        let witness = &self.around.witness;
        match &entered {
            Ok(_) => witness.came(asking, took),
            Err(refused) => witness.refused(asking, refused.outcome, took),
        }
        entered.map_err(|refused| refused.outcome)
    }

    /// Servers, or what is known of them, have changed.
    pub fn changed(&self) {
        self.news.store(true, SeqCst);
        if self.crowded.load(SeqCst) {
            self.wake.notify_one();
        }
    }

    /// Refuses everybody from now on, those who wait included.
    pub fn close(self: &Arc<Self>) {
        let (mut inner, now) = self.locked();
        while let Some(left) = inner.queue.drain(now) {
            self.answer(&mut inner, now, left);
        }
    }

    /// Lets requests go and turns them away in time, for as long as it is polled.
    pub async fn run(self: Arc<Self>) {
        loop {
            let wakeup = {
                let (mut inner, now) = self.locked();
                self.turn(&mut inner, now);
                inner.queue.next_wakeup()
            };
            let due = async {
                match wakeup {
                    Some(at) => tokio::time::sleep_until(self.began + at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.wake.notified() => {}
                () = due => {}
            }
        }
    }

    /// Hears of what is learnt of `fleet`'s servers, for as long as it is polled; of much at a time only once.
    pub async fn follow(self: Arc<Self>, fleet: Arc<Fleet>) {
        let mut news = fleet.news();
        while news.changed().await.is_ok() {
            self.changed();
            tokio::time::sleep(BREATH).await;
        }
    }

    /// Looks at the queue, for metrics. It is locked meanwhile.
    pub fn look<R>(&self, look: impl FnOnce(&Queue) -> R) -> R {
        look(&self.inner.lock().queue)
    }

    fn locked(&self) -> (MutexGuard<'_, Inner>, Duration) {
        let inner = self.inner.lock();
        // Only now: time does not go backwards for the queue.
        (inner, self.began.elapsed())
    }

    /// Turns away whoever has waited too long, lets go whoever may, and ends others for who still waits.
    fn turn(self: &Arc<Self>, inner: &mut Inner, now: Duration) {
        // Before the news are looked at: see `changed`.
        self.crowded.store(!inner.queue.is_empty(), SeqCst);
        if self.news.swap(false, SeqCst) {
            inner.queue.set_room(now, (self.around.room)());
        }
        while let Some(left) = inner.queue.expire(now) {
            self.answer(inner, now, left);
        }
        while let Some(went) = inner.queue.dispatch(now) {
            self.answer(inner, now, went);
        }
        self.give_up(inner, now);
        self.crowded.store(!inner.queue.is_empty(), SeqCst);
        self.around
            .witness
            .turned(self.began.elapsed().saturating_sub(now));
    }

    /// Tells those to end that have to make room.
    fn give_up(&self, inner: &mut Inner, now: Duration) {
        for (victim, priority) in inner.queue.give_up(now) {
            self.around.witness.revoked(priority);
            if let Some(told) = inner.running.remove(&victim.id()) {
                // Who does not listen any more is about to end anyway.
                told.send(()).ok();
            }
        }
    }

    /// A request that was let go has ended.
    fn over(&self, inner: &mut Inner, now: Duration, running: &Running) {
        inner.running.remove(&running.id());
        let told = inner.queue.finished(now, running);
        told.into_iter()
            .for_each(|after| self.around.witness.made_room(after));
    }

    fn answer(
        self: &Arc<Self>,
        inner: &mut Inner,
        now: Duration,
        left: Departure<oneshot::Sender<Answer>>,
    ) {
        if left.outcome != Outcome::Dispatched {
            // Who does not listen any more need not be told.
            left.ticket.send(Err(left.outcome)).ok();
            return;
        }
        let permit = Permit {
            gate: self.clone(),
            grant: Some(left.grant),
            running: left.running,
            eviction: inner.eviction(left.running.as_ref()),
        };
        if let Err(Ok(mut unused)) = left.ticket.send(Ok(permit)) {
            // Dropping it as it is would lock the queue once more.
            let (grant, running) = (unused.grant.take(), unused.running.take());
            grant.into_iter().for_each(|g| inner.queue.placed(g));
            running.into_iter().for_each(|r| self.over(inner, now, &r));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    use tokio::task::JoinHandle;
    use tokio::task::yield_now;

    /// A server with so many places.
    struct Server {
        places: AtomicU32,
        outcomes: Mutex<Vec<(Outcome, String)>>,
        evictions: Mutex<Vec<String>>,
    }

    impl Witness for Server {
        fn refused(&self, asking: &Asking<'_>, why: Outcome, _: Duration) {
            self.left(asking, why, Duration::ZERO);
        }

        fn left(&self, asking: &Asking<'_>, why: Outcome, _: Duration) {
            let flow = asking.arrival.flow.to_owned();
            self.outcomes.lock().push((why, flow));
        }

        fn revoked(&self, priority: i32) {
            self.evictions.lock().push(format!("for {priority}"));
        }

        fn made_room(&self, after: Duration) {
            self.evictions.lock().push(format!("after {after:?}"));
        }
    }

    fn gate(places: u32, config: FlowConfig) -> (Arc<Admission>, Arc<Server>) {
        let server = Arc::new(Server {
            places: AtomicU32::new(places),
            outcomes: Mutex::default(),
            evictions: Mutex::default(),
        });
        let free = server.clone();
        let around = Surroundings {
            room: Box::new(move || Room::of_slots(free.places.load(Relaxed), None)),
            witness: server.clone(),
        };
        let gate = Admission::new(config, around);
        tokio::spawn(gate.clone().run());
        (gate, server)
    }

    fn send(gate: &Arc<Admission>, flow: &'static str) -> JoinHandle<Answer> {
        send_at(gate, flow, 0)
    }

    fn send_at(gate: &Arc<Admission>, flow: &'static str, priority: i32) -> JoinHandle<Answer> {
        let gate = gate.clone();
        tokio::spawn(async move {
            let asking = Asking {
                model: "m",
                target: "m",
                arrival: Arrival {
                    flow,
                    priority,
                    ..Arrival::new()
                },
            };
            gate.admit(&asking).await
        })
    }

    async fn settle() {
        for _ in 0..10 {
            yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_permit_that_comes_back_lets_the_next_one_go() {
        let (gate, server) = gate(1, FlowConfig::default());
        let mut first = send(&gate, "a").await.unwrap().unwrap();
        server.places.store(0, Relaxed);
        first.placed();
        let (second, third) = (send(&gate, "a"), send(&gate, "a"));
        settle().await;
        assert!(!second.is_finished() && gate.look(|q| q.usage().requests) == 2);
        server.places.store(1, Relaxed);
        drop(first);
        let second = second.await.unwrap().unwrap();
        settle().await;
        // The second one is not at its server yet: the place is taken all the same.
        assert!(!third.is_finished());
        drop(second);
        third.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_too_long_is_told_without_anything_else_happening() {
        let (gate, server) = gate(0, FlowConfig::default());
        let began = Instant::now();
        assert_eq!(
            send(&gate, "a").await.unwrap().unwrap_err(),
            Outcome::EvictedTtl
        );
        assert_eq!(began.elapsed().as_secs(), 60);
        assert_eq!(
            *server.outcomes.lock(),
            [(Outcome::EvictedTtl, "a".to_owned())]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_away_leaves_the_queue_at_once() {
        let (gate, server) = gate(0, FlowConfig::default());
        let (gone, stays) = (send(&gate, "gone"), send(&gate, "stays"));
        settle().await;
        gone.abort();
        settle().await;
        assert_eq!(gate.look(|q| q.usage().requests), 1);
        server.places.store(1, Relaxed);
        gate.changed();
        let permit = stays.await.unwrap().unwrap();
        let outcomes: Vec<Outcome> = server.outcomes.lock().iter().map(|o| o.0).collect();
        assert_eq!(
            outcomes,
            [Outcome::EvictedContextCancelled, Outcome::Dispatched]
        );
        // Let go, and gone before it heard of it: the place is free again.
        let late = send(&gate, "late");
        settle().await;
        assert!(!late.is_finished());
        drop(permit);
        late.abort();
        settle().await;
        send(&gate, "next").await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_gate_tells_everybody() {
        let (gate, _server) = gate(0, FlowConfig::default());
        let waits = send(&gate, "a");
        settle().await;
        gate.close();
        assert_eq!(waits.await.unwrap().unwrap_err(), Outcome::EvictedOther);
        let late = send(&gate, "a").await.unwrap();
        assert_eq!(late.unwrap_err(), Outcome::RejectedOther);
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_refuses() {
        let config = FlowConfig {
            max_requests: Some(1),
            ..FlowConfig::default()
        };
        let (gate, server) = gate(0, config);
        let _waits = send(&gate, "a");
        settle().await;
        let refused = send(&gate, "b").await.unwrap();
        assert_eq!(refused.unwrap_err(), Outcome::RejectedCapacity);
        assert_eq!(
            *server.outcomes.lock(),
            [(Outcome::RejectedCapacity, "b".to_owned())]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_to_make_room_is_told_once_and_its_place_is_the_others() {
        let config = FlowConfig {
            eviction: true,
            ..FlowConfig::default()
        };
        let (gate, server) = gate(1, config);
        let mut batch = send_at(&gate, "batch", -1).await.unwrap().unwrap();
        let mut eviction = batch.eviction();
        batch.placed();
        server.places.store(0, Relaxed);
        gate.changed();
        settle().await;
        assert!(is_pending(&mut eviction).await);
        let chat = send(&gate, "chat");
        (&mut eviction).await;
        assert!(!chat.is_finished() && is_pending(&mut eviction).await);
        server.places.store(1, Relaxed);
        drop(batch);
        let mut chat = chat.await.unwrap().unwrap();
        // It is not sheddable itself, whoever waits.
        let evictions = server.evictions.lock().join(" ");
        assert!(evictions.starts_with("for 0 after 1"), "{evictions}");
        let urgent = send_at(&gate, "urgent", 9);
        assert!(is_pending(&mut chat.eviction()).await);
        assert!(!urgent.is_finished() && gate.inner.lock().running.is_empty());
    }

    async fn is_pending(eviction: &mut Eviction) -> bool {
        let told = tokio::time::timeout(Duration::from_secs(1), eviction);
        told.await.is_err()
    }
}
