//! Where requests wait while servers are busy: who goes next, who has waited too long, who is refused.
//!
//! The queue is divided into bands by priority, bands into flows by tenant. Bands go strictly by priority; inside a band
//! [`Fairness`] says whose turn it is, inside a flow [`Ordering`] says which request. What may go is said by [`Room`]:
//! how busy the servers are, counted on by every request that is let go, so that a burst between two looks at the
//! servers cannot overshoot.
//!
//! Who blocks whom: a request that needs only decode servers is not held up by busy prefill servers, and nothing else
//! passes a request of higher priority. Without room on decode servers nothing goes, since everything needs them; where
//! that is wanted, sheddable requests that run there then [make room](FlowControl::give_up).
//!
//! Pure like the rest of this crate: no clock (`now` is the time since any fixed moment), no channels, no waiting. The
//! caller keeps something of its own with each request, its ticket, and gets it back when the request leaves.
//! Invariants: every request that came in leaves exactly once; flows, bands and requests are bounded, whatever clients
//! make up; every operation is O(log n) in requests and flows, and linear in bands that exist.

mod band;
mod config;
mod evict;
mod gauge;
mod heap;
mod outcome;
mod room;
mod slab;

pub use config::{BandConfig, Fairness, FlowConfig, Ordering};
pub use evict::{EVICTION_PATIENCE, Running};
pub use outcome::{Outcome, Refusal};
pub use room::{Gauge, Need, Room};
pub use slab::Handle;

use band::{Band, Flow, Place};
use evict::Evictor;
use heap::{Heap, Key};
use room::Pending;
use slab::Slab;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// The flow of requests that name none.
pub const DEFAULT_FLOW: &str = "default-flow";
/// The flow that requests share whose own would be one too many.
pub const OTHER_FLOW: &str = "other";

/// Most bands at a time; requests of further priorities go to the next lower band there is.
const MAX_BANDS: usize = 256;
/// Longest name that a flow of its own may have, in bytes.
const MAX_FLOW_NAME: usize = 256;
/// Most requests of all bands, whatever the configuration says.
const MAX_ITEMS: u64 = 1 << 24;
/// How long flows and bands are remembered without requests.
const FLOW_IDLE: Duration = Duration::from_secs(300);
const BAND_IDLE: Duration = Duration::from_secs(600);
/// How often bands are looked at.
const SWEEP: Duration = Duration::from_secs(1);

/// A request that wants to be let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival<'a> {
    /// Whose it is: its fairness id.
    pub flow: &'a str,
    /// How important it is: higher goes first.
    pub priority: i32,
    /// Bytes that it holds while it waits.
    pub bytes: u64,
    /// Tokens of its prompt, about.
    pub tokens: u32,
    /// Which servers it needs.
    pub need: Need,
    /// How long it may wait, if not as long as the configuration says.
    pub ttl: Option<Duration>,
    /// How soon its first token is wanted.
    pub slo: Option<Duration>,
}

impl Arrival<'_> {
    /// A request without any wishes.
    #[must_use]
    pub fn new() -> Self {
        Self {
            flow: DEFAULT_FLOW,
            priority: 0,
            bytes: 0,
            tokens: 0,
            need: Need::Decode,
            ttl: None,
            slo: None,
        }
    }
}

impl Default for Arrival<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// A request that leaves the queue.
#[derive(Clone, Debug, PartialEq)]
pub struct Departure<T> {
    /// What the caller kept with it.
    pub ticket: T,
    /// Why it leaves.
    pub outcome: Outcome,
    /// The band that it waited in.
    pub priority: i32,
    /// What it takes of the servers' room until it is counted there: to be given to [`FlowControl::placed`].
    pub grant: Grant,
    /// What it is while it runs, if that is kept: to be given to [`FlowControl::finished`].
    pub running: Option<Running>,
}

/// What a request that was let go takes of the servers' room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    need: Need,
    tokens: u32,
}

/// A request that was not taken in.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused<T> {
    /// What the caller wanted to keep with it.
    pub ticket: T,
    /// Why.
    pub outcome: Outcome,
}

/// Requests that wait, and the bytes that they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Requests.
    pub requests: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Usage {
    fn add(&mut self, bytes: u64) {
        self.requests += 1;
        self.bytes += bytes;
    }

    fn sub(&mut self, bytes: u64) {
        self.requests -= 1;
        self.bytes -= bytes;
    }

    fn fits(&self, bytes: u64, max_requests: u64, max_bytes: u64) -> bool {
        self.requests < max_requests && self.bytes.saturating_add(bytes) <= max_bytes
    }
}

/// A request that waits.
#[derive(Debug)]
struct Item<T> {
    ticket: T,
    flow: u32,
    bytes: u64,
    tokens: u32,
    /// Its places in its flow's queue, in `deadlines`, and in `patience`.
    at: u32,
    deadline_at: Option<u32>,
    patience_at: Option<u32>,
}

/// Time with servers and time without: a request's time to live passes only while somebody could serve it.
#[derive(Debug, Default)]
struct Clock {
    last: Duration,
    with_servers: Duration,
    without: Duration,
}

/// The queue. `T` is the caller's ticket.
#[derive(Debug)]
pub struct FlowControl<T> {
    config: FlowConfig,
    items: Slab<Item<T>>,
    flows: Slab<Flow>,
    bands: BTreeMap<Reverse<i32>, Band>,
    /// When requests have waited too long, on the clock with servers.
    deadlines: Heap,
    /// When they have waited too long for a first server, on the clock without.
    patience: Heap,
    /// Flows without requests, the longest idle first.
    idle: Heap,
    usage: Usage,
    clock: Clock,
    room: Room,
    /// Let go, and not counted at a server yet.
    pending: Pending,
    /// Let go, and not over yet, if any of it may be given up.
    evictor: Evictor,
    seq: u64,
    next_sweep: Duration,
    closed: bool,
}

impl Clock {
    /// Lets the time pass until `now`, on one of both clocks.
    fn advance(&mut self, now: Duration, no_servers: bool) {
        let passed = now.saturating_sub(self.last);
        self.last += passed;
        if no_servers {
            self.without += passed;
        } else {
            self.with_servers += passed;
        }
    }
}

/// Nanoseconds; 584 years are enough.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl<T> FlowControl<T> {
    /// An empty queue before servers that nothing is known of yet.
    #[must_use]
    pub fn new(config: FlowConfig) -> Self {
        let kept = config.bands.iter().map(|(p, _)| *p).chain([0]);
        let bands = kept.map(|p| (Reverse(p), Band::new(config.band(p))));
        Self {
            bands: bands.collect(),
            config,
            items: Slab::default(),
            flows: Slab::default(),
            deadlines: Heap::default(),
            patience: Heap::default(),
            idle: Heap::default(),
            usage: Usage::default(),
            clock: Clock::default(),
            room: Room::no_servers(),
            pending: Pending::default(),
            evictor: Evictor::default(),
            seq: 0,
            next_sweep: Duration::ZERO,
            closed: false,
        }
    }

    /// Says how much room servers have. What was let go and is not [placed](Self::placed) yet is taken off it.
    pub fn set_room(&mut self, now: Duration, room: Room) {
        self.clock.advance(now, self.room.has_no_servers());
        self.room = room;
        self.room.take_pending(&self.pending);
    }

    /// A request that was let go is counted at its server now, or does not go to one after all.
    pub fn placed(&mut self, grant: Grant) {
        self.pending.sub(grant);
    }

    /// Takes in a request. It goes once [`dispatch`](Self::dispatch) says so, perhaps at once.
    ///
    /// # Errors
    /// [`Refused`], if the queue is full or closed; nothing has changed then.
    pub fn enqueue(
        &mut self,
        now: Duration,
        arrival: &Arrival<'_>,
        ticket: T,
    ) -> Result<Handle, Refused<T>> {
        self.clock.advance(now, self.room.has_no_servers());
        if let Some(outcome) = self.refusal(arrival) {
            return Err(Refused { ticket, outcome });
        }
        let flow = self.flow_of(arrival);
        let ttl = arrival.ttl.or(self.config.default_ttl);
        let deadline = ttl.map(|ttl| nanos(self.clock.with_servers.saturating_add(ttl)));
        let item = self.items.insert(Item {
            ticket,
            flow,
            bytes: arrival.bytes,
            tokens: arrival.tokens,
            at: 0,
            deadline_at: None,
            patience_at: None,
        });
        self.seq += 1;
        self.watch(item, deadline);
        let due = match self.band_mut(flow).config.ordering {
            Ordering::Arrival => 0,
            Ordering::Deadline => deadline.unwrap_or(u64::MAX),
            Ordering::SloDeadline => arrival.slo.map_or(u64::MAX, |slo| nanos(now + slo)),
        };
        self.usage.add(arrival.bytes);
        let band = self.band_mut(flow);
        band.usage.add(arrival.bytes);
        band.last_used = now;
        let items = &mut self.items;
        (self.flows[flow].queue).push((due, self.seq), item, |id, at| items[id].at = at);
        self.settle(flow);
        Ok(self.items.handle(item))
    }

    /// Lets the next request go, if there is room. Call it again until it says `None`, and [`expire`](Self::expire)
    /// before it: what has waited too long goes like everything else.
    pub fn dispatch(&mut self, now: Duration) -> Option<Departure<T>> {
        self.clock.advance(now, self.room.has_no_servers());
        let (tag, flow) = self.next()?;
        let band = self.band_mut(flow);
        band.served(tag.0);
        let time = band.virtual_time;
        self.seq += 1;
        self.flows[flow].had_turn(time, self.seq);
        let (_, item) = self.flows[flow].queue.first()?;
        let mut departure = self.leave(item, Outcome::Dispatched);
        self.room.take(departure.grant);
        self.pending.add(departure.grant);
        if self.config.eviction {
            let running = Running::new(self.seq, departure.priority, now);
            self.evictor.started(running);
            departure.running = Some(running);
        }
        Some(departure)
    }

    /// A request that was let go is over. Returns how long ago it was told to end, if it was.
    pub fn finished(&mut self, now: Duration, running: &Running) -> Option<Duration> {
        self.evictor.ended(now, running)
    }

    /// Who of those that run is to be ended, and the priority of those who wait although their time has come, for whom
    /// that is. Nobody is named twice; whoever is named is over when [`finished`](Self::finished) says so.
    pub fn give_up(&mut self, now: Duration) -> impl Iterator<Item = (Running, i32)> + use<T> {
        let levels = (self.room.decode(), self.config.ceiling);
        let could = !self.evictor.is_empty() && !self.room.has_no_servers();
        let blocked = could.then(|| self.blocked()).flatten();
        let victims = blocked.map(|priority| {
            let victims = self.evictor.victims(now, priority, levels);
            victims.map(move |running| (running, priority))
        });
        victims.into_iter().flatten()
    }

    /// The next request that has waited too long.
    pub fn expire(&mut self, now: Duration) -> Option<Departure<T>> {
        let no_servers = self.room.has_no_servers();
        self.clock.advance(now, no_servers);
        let (heap, time, outcome) = if no_servers {
            let outcome = Outcome::EvictedNoEndpoints;
            (&self.patience, self.clock.without, outcome)
        } else {
            (
                &self.deadlines,
                self.clock.with_servers,
                Outcome::EvictedTtl,
            )
        };
        match heap.first() {
            Some(((due, _), item)) if due <= nanos(time) => Some(self.leave(item, outcome)),
            _ => {
                self.sweep(now);
                None
            }
        }
    }

    /// Takes out a request whose client went away; `None` if it has left already.
    pub fn cancel(&mut self, now: Duration, handle: Handle) -> Option<Departure<T>> {
        self.clock.advance(now, self.room.has_no_servers());
        let item = self.items.find(handle)?;
        Some(self.leave(item, Outcome::EvictedContextCancelled))
    }

    /// Closes the queue for ever and takes out what is left, one request at a time.
    pub fn drain(&mut self, now: Duration) -> Option<Departure<T>> {
        self.clock.advance(now, self.room.has_no_servers());
        self.closed = true;
        let (_, flow) = self.bands.values().find_map(|band| band.next(true))?;
        let (_, item) = self.flows[flow].queue.first()?;
        Some(self.leave(item, Outcome::EvictedOther))
    }

    /// When [`expire`](Self::expire) or [`give_up`](Self::give_up) has something to do next, if nothing else happens
    /// until then.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Duration> {
        // What is past was seen to already.
        let evictor = (self.evictor.next_wakeup()).filter(|at| *at > self.clock.last);
        let evictor = evictor.filter(|_| !self.is_empty());
        self.next_expiry().into_iter().chain(evictor).min()
    }

    fn next_expiry(&self) -> Option<Duration> {
        let (heap, time) = if self.room.has_no_servers() {
            (&self.patience, self.clock.without)
        } else {
            (&self.deadlines, self.clock.with_servers)
        };
        let ((due, _), _) = heap.first()?;
        let left = Duration::from_nanos(due).saturating_sub(time);
        Some(self.clock.last.saturating_add(left))
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.usage.requests == 0
    }

    /// What waits, all bands together.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// What it was told.
    #[must_use]
    pub fn config(&self) -> &FlowConfig {
        &self.config
    }

    /// How busy servers are, with what was let go since that was last said.
    #[must_use]
    pub fn room(&self) -> &Room {
        &self.room
    }

    /// Bands from the highest priority down: priority, what waits, bounds.
    pub fn bands(&self) -> impl Iterator<Item = (i32, Usage, &BandConfig)> {
        (self.bands.iter()).map(|(priority, band)| (priority.0, band.usage, &band.config))
    }

    /// The highest priority of requests that wait although their time has come: those for which others may be given up.
    #[must_use]
    pub fn blocked(&self) -> Option<i32> {
        let waiting = |(_, band): &(_, &Band)| band.usage.requests > 0;
        let (priority, _) = self.bands.iter().find(waiting)?;
        self.next().is_none().then_some(priority.0)
    }
}

impl<T> FlowControl<T> {
    fn refusal(&self, arrival: &Arrival<'_>) -> Option<Outcome> {
        if self.closed {
            return Some(Outcome::RejectedOther);
        }
        let own = self.bands.get(&Reverse(arrival.priority));
        let (usage, band) = match own {
            Some(band) => (band.usage, band.config),
            None => (Usage::default(), self.config.band(arrival.priority)),
        };
        let max_requests = self.config.max_requests.unwrap_or(MAX_ITEMS).min(MAX_ITEMS);
        let max_bytes = self.config.max_bytes.unwrap_or(u64::MAX);
        let fits = self.usage.fits(arrival.bytes, max_requests, max_bytes)
            && usage.fits(arrival.bytes, band.max_requests, band.max_bytes);
        match (fits, self.room.has_no_servers()) {
            (true, _) => None,
            (false, true) => Some(Outcome::RejectedNoEndpoints),
            (false, false) => Some(Outcome::RejectedCapacity),
        }
    }

    /// Whose turn it is, with its key, if there is room for it.
    fn next(&self) -> Option<(Key, u32)> {
        let ceiling = self.config.ceiling;
        if !self.room.fits(Need::Decode, ceiling) {
            return None;
        }
        let prefill_too = self.room.fits(Need::PrefillAndDecode, ceiling);
        self.bands.values().find_map(|band| band.next(prefill_too))
    }

    /// Notes when `item` has waited too long.
    fn watch(&mut self, item: u32, deadline: Option<u64>) {
        let items = &mut self.items;
        if let Some(deadline) = deadline {
            let place = |id: u32, at| items[id].deadline_at = Some(at);
            self.deadlines.push((deadline, self.seq), item, place);
        }
        if let Some(ttl) = self.config.no_endpoint_ttl {
            let key = (nanos(self.clock.without.saturating_add(ttl)), self.seq);
            let place = |id: u32, at| items[id].patience_at = Some(at);
            self.patience.push(key, item, place);
        }
    }

    /// Takes `item` out of everything.
    fn leave(&mut self, item: u32, outcome: Outcome) -> Departure<T> {
        let items = &mut self.items;
        let Item {
            flow,
            at,
            deadline_at,
            patience_at,
            bytes,
            ..
        } = items[item];
        let queue = &mut self.flows[flow].queue;
        queue.remove(at, |id, at| items[id].at = at);
        if let Some(at) = deadline_at {
            self.deadlines
                .remove(at, |id, at| items[id].deadline_at = Some(at));
        }
        if let Some(at) = patience_at {
            self.patience
                .remove(at, |id, at| items[id].patience_at = Some(at));
        }
        let Item { ticket, tokens, .. } = items.remove(item);
        self.usage.sub(bytes);
        self.band_mut(flow).usage.sub(bytes);
        self.settle(flow);
        let flow = &self.flows[flow];
        Departure {
            ticket,
            outcome,
            priority: flow.priority,
            grant: Grant {
                need: flow.need,
                tokens,
            },
            running: None,
        }
    }

    /// Puts a flow where it belongs after its queue has changed: in its ring, under the right key, or among the idle.
    fn settle(&mut self, id: u32) {
        let flow = &self.flows[id];
        let (at, place, ring) = (flow.at, flow.place, flow.need as usize);
        let Some((head, item)) = flow.queue.first() else {
            if place == Place::Ring {
                let flows = &mut self.flows;
                let band = self.bands.get_mut(&Reverse(flows[id].priority));
                let ring = &mut band.expect(BAND).rings[ring].waiting;
                ring.remove(at, |id, at| flows[id].at = at);
                self.rest(id);
            }
            return;
        };
        let tokens = self.items[item].tokens;
        let flows = &mut self.flows;
        let band = self.bands.get_mut(&Reverse(flows[id].priority));
        let band = band.expect(BAND);
        if place == Place::Idle {
            self.idle.remove(at, |id, at| flows[id].at = at);
            flows[id].wake(band.virtual_time, self.seq);
        }
        let key = flows[id].key(band.config.fairness, head, tokens);
        let ring = &mut band.rings[ring].waiting;
        let tell = |id: u32, at| flows[id].at = at;
        match place {
            Place::Idle => ring.push(key, id, tell),
            Place::Ring => ring.update(at, key, tell),
        }
    }

    /// Puts a flow among the idle.
    fn rest(&mut self, id: u32) {
        let flows = &mut self.flows;
        flows[id].place = Place::Idle;
        let key = (nanos(self.clock.last), id.into());
        self.idle.push(key, id, |id, at| flows[id].at = at);
    }

    /// The flow of `arrival`, made if need be.
    fn flow_of(&mut self, arrival: &Arrival<'_>) -> u32 {
        let priority = self.band_for(arrival.priority);
        let ring = arrival.need as usize;
        let find = |this: &Self, name: &str| {
            let band = this.bands.get(&Reverse(priority)).expect(BAND);
            band.rings[ring].flows.get(name).copied()
        };
        let mut name = arrival.flow;
        if name.len() > MAX_FLOW_NAME {
            name = OTHER_FLOW;
        }
        if let Some(known) = find(self, name) {
            return known;
        }
        if self.flows.len() >= self.config.max_flows {
            match self.idle.first() {
                Some((_, longest)) => self.forget(longest),
                None => name = OTHER_FLOW,
            }
        }
        find(self, name).unwrap_or_else(|| self.make_flow(name.into(), priority, arrival.need))
    }

    fn make_flow(&mut self, name: Arc<str>, priority: i32, need: Need) -> u32 {
        let id = self.flows.insert(Flow::new(name.clone(), priority, need));
        let band = self.bands.get_mut(&Reverse(priority)).expect(BAND);
        band.rings[need as usize].flows.insert(name, id);
        self.rest(id);
        id
    }

    /// Forgets an idle flow.
    fn forget(&mut self, id: u32) {
        let flows = &mut self.flows;
        let at = flows[id].at;
        self.idle.remove(at, |id, at| flows[id].at = at);
        let flow = flows.remove(id);
        let band = self.bands.get_mut(&Reverse(flow.priority)).expect(BAND);
        band.rings[flow.need as usize].flows.remove(&flow.name);
    }

    /// The band that requests of `priority` wait in, made if need be.
    fn band_for(&mut self, priority: i32) -> i32 {
        let key = Reverse(priority);
        if self.bands.len() >= MAX_BANDS && !self.bands.contains_key(&key) {
            let below = self.bands.range(key..).next();
            let nearest = below.or_else(|| self.bands.last_key_value());
            return nearest.map_or(0, |(priority, _)| priority.0);
        }
        let config = &self.config;
        self.bands
            .entry(key)
            .or_insert_with(|| Band::new(config.band(priority)));
        priority
    }

    fn band_mut(&mut self, flow: u32) -> &mut Band {
        let priority = self.flows[flow].priority;
        self.bands.get_mut(&Reverse(priority)).expect(BAND)
    }

    /// Forgets flows and bands that were not used for long.
    fn sweep(&mut self, now: Duration) {
        if now < self.next_sweep {
            return;
        }
        self.next_sweep = now + SWEEP;
        let old = nanos(now.saturating_sub(FLOW_IDLE));
        while let Some(((since, _), flow)) = self.idle.first()
            && since < old
        {
            self.forget(flow);
        }
        let config = &self.config;
        self.bands.retain(|priority, band| {
            config.is_kept(priority.0) || band.is_used() || now < band.last_used + BAND_IDLE
        });
    }
}

/// Why a band is there.
const BAND: &str = "a band outlives its flows";

#[cfg(test)]
mod tests;
