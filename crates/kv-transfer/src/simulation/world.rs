//! One schedule: who there is, what happens next, and what must hold.

use std::rc::Rc;
use std::time::{Duration, Instant};

use baton_kv::{DType, KvLayout};

use super::consumer::{Cfg, Consumer, Tally};
use super::dice::Dice;
use super::net::{At, Net};
use super::producer::Producer;
use super::{Air, LINGER, Params, TOTAL, TTL};
use crate::geometry::Shard;
use crate::secret::Secret;

/// Steps before everything is left to become quiet.
const STEPS: usize = 500;
/// What is remembered for whoever looks at a failure.
const MAX_TOLD: usize = 60;

/// What became of all transfers.
pub(super) type Total = Tally;

impl Total {
    pub(super) fn add(&mut self, other: &Self) {
        self.asked += other.asked;
        self.whole += other.whole;
        self.partial += other.partial;
        self.failed += other.failed;
        self.lost += other.lost;
        self.copied += other.copied;
    }
}

pub(super) struct World {
    air: Air,
    /// `None` while a process is down.
    producers: Vec<Option<Producer>>,
    shards: Vec<Shard>,
    secret: Secret,
    consumers: Vec<Consumer>,
    /// Parameters that were handed out, of leases that live and of others.
    params: Vec<Rc<Params>>,
    /// Leases that may still be announced.
    n_leases: usize,
    /// Nothing breaks, and nobody changes their mind.
    is_fair: bool,
    is_telling: bool,
    told: Vec<String>,
}

fn layout(block_size: u32) -> KvLayout {
    KvLayout {
        n_layers: 3,
        n_kv_heads: 4,
        head_dim: 2,
        block_size,
        dtype: DType::BF16,
        model_fingerprint: 7,
    }
}

/// Some heads of the model, or all.
fn heads(dice: &mut Dice) -> std::ops::Range<u32> {
    dice.pick(&[0..4, 0..4, 0..2, 2..4, 1..3]).unwrap_or(0..4)
}

impl World {
    pub(super) fn new(seed: u64, is_telling: bool) -> Self {
        let mut air = Air {
            // Any time will do: only differences matter.
            now: Instant::now(),
            dice: Dice::new(seed),
            net: Net::default(),
            arena_bytes: 0,
            recorded: Vec::new(),
            strangers: Vec::new(),
        };
        let secret = Secret::new(&[7; 32]).expect("it is long enough");
        let is_fair = air.dice.once_in(5);
        // Little, so that rooms are soon used again; or enough for all.
        let few = 3000 + air.dice.below(6000);
        if is_fair && air.dice.once_in(2) {
            // Damage that sending again makes good.
            air.net.noise = 7;
        }
        air.arena_bytes = if is_fair { 50_000 } else { few };
        let dice = &mut air.dice;
        let n_producers = 1 + dice.below(2);
        let shards: Vec<_> = (0..n_producers)
            .map(|_| Shard {
                layout: layout(dice.within(1..6)),
                heads: heads(dice),
            })
            .collect();
        let producers = (0..n_producers)
            .map(|i| Some(Producer::new(i, &mut air, shards[i].clone(), &secret)))
            .collect();
        let n_consumers = 1 + air.dice.below(3);
        let consumers = (0..n_consumers)
            .map(|_| {
                let cfg = cfg(&mut air.dice, &secret, is_fair);
                Consumer::new(cfg, &mut air)
            })
            .collect();
        Self {
            n_leases: 2 + air.dice.below(8),
            air,
            producers,
            shards,
            secret,
            consumers,
            params: Vec::new(),
            is_fair,
            is_telling,
            told: Vec::new(),
        }
    }

    pub(super) fn told(&self) -> &[String] {
        &self.told
    }

    fn tell(&mut self, what: impl FnOnce() -> String) {
        if self.is_telling {
            if self.told.len() == MAX_TOLD {
                self.told.remove(0);
            }
            self.told.push(what());
        }
    }

    /// Plays the schedule to its end.
    pub(super) fn play(&mut self) -> Total {
        for _ in 0..STEPS {
            self.step();
            self.check();
        }
        self.calm();
        self.leave();
        let mut total = Total::default();
        self.consumers
            .iter()
            .for_each(|consumer| total.add(&consumer.tally));
        if self.is_fair {
            let consumers = self.consumers.iter();
            let failures: Vec<_> = consumers.flat_map(|consumer| &consumer.failures).collect();
            assert_eq!(
                total.whole, total.asked,
                "in spite of nothing: {failures:?}"
            );
        }
        total
    }

    fn step(&mut self) {
        match self.air.dice.below(100) {
            0..40 => self.deliver(),
            40..60 => self.run_producer(),
            60..80 => self.run_consumer(),
            80..85 => self.grow(),
            85..90 => self.ask(),
            90..95 => self.pass_time(),
            95..97 => self.let_go(),
            _ if self.is_fair => {}
            _ => self.break_something(),
        }
    }

    fn deliver(&mut self) {
        let ways = self.air.net.deliverable(self.air.now);
        if let Some((conn, at)) = self.air.dice.pick(&ways) {
            let most = match self.air.dice.once_in(4) {
                true => 1 + self.air.dice.below(60),
                false => usize::MAX,
            };
            self.tell(|| format!("connection {conn} delivers to the {at:?}"));
            self.air.net.deliver(conn, at, most);
        }
    }

    fn run_producer(&mut self) {
        let i = self.air.dice.below(self.producers.len());
        if let Some(producer) = &mut self.producers[i] {
            producer.step(&mut self.air, false);
            self.tell(|| format!("producer {i} runs"));
        }
    }

    fn run_consumer(&mut self) {
        let i = self.air.dice.below(self.consumers.len());
        self.consumers[i].step(&mut self.air, &mut self.producers, false);
        self.tell(|| format!("consumer {i} runs"));
    }

    fn grow(&mut self) {
        let i = self.air.dice.below(self.producers.len());
        if let Some(producer) = &mut self.producers[i] {
            producer.grow(&mut self.air);
            self.tell(|| format!("a lease of producer {i} grows"));
        }
    }

    /// A lease is announced, or an old one asked for again.
    fn ask(&mut self) {
        if self.n_leases == 0 {
            return;
        }
        self.n_leases -= 1;
        let i = self.air.dice.below(self.producers.len());
        let n_tokens = self.air.dice.within(1..24);
        let begun = self.producers[i].as_mut();
        let begun = begun.and_then(|producer| producer.begin(n_tokens, &mut self.air));
        let Some(params) = begun else {
            return;
        };
        self.params.push(Rc::clone(&params));
        self.tell(|| {
            format!(
                "producer {i} announces lease {} of {n_tokens}",
                params.lease
            )
        });
        self.ask_for(&params);
        if !self.is_fair && self.air.dice.once_in(3) {
            self.ask_again();
        }
    }

    fn ask_for(&mut self, params: &Rc<Params>) {
        let suits = |consumer: &Consumer| {
            let (ours, theirs) = (&consumer.cfg.ours.heads, &params.theirs.heads);
            ours.start.max(theirs.start) < ours.end.min(theirs.end)
        };
        let suitable = self.consumers.iter().enumerate().filter(|(_, c)| suits(c));
        let suitable: Vec<_> = suitable.map(|(i, _)| i).collect();
        let Some(i) = self.air.dice.pick(&suitable) else {
            return;
        };
        let from = match self.air.dice.once_in(3) {
            true => self.air.dice.within(1..9),
            false => 0,
        };
        let is_early = self.is_fair || !self.air.dice.once_in(20);
        let now = self.air.now;
        self.consumers[i].pull(params, (from, is_early), now);
        self.tell(|| {
            format!(
                "consumer {i} asks for lease {} from {from} on",
                params.lease
            )
        });
    }

    /// Parameters are used twice, or by somebody without the right, or long after their time.
    fn ask_again(&mut self) {
        let Some(params) = self.air.dice.pick(&self.params) else {
            return;
        };
        if self.air.dice.once_in(3) {
            let i = self.air.dice.below(self.consumers.len());
            return self.consumers[i].keep_alive(&params);
        }
        if self.air.dice.once_in(2) {
            return self.ask_for(&params);
        }
        let Some(other) = self.air.dice.pick(&self.params) else {
            return;
        };
        if (other.producer, other.lease) == (params.producer, params.lease) {
            return self.ask_for(&other);
        }
        let forged = Params {
            producer: params.producer,
            lease: params.lease,
            token: other.token,
            n_tokens: params.n_tokens,
            theirs: params.theirs.clone(),
            seed: None,
        };
        self.ask_for(&Rc::new(forged));
    }

    fn pass_time(&mut self) {
        let most = match self.is_fair {
            true => 20,
            false => self.air.dice.pick(&[1, 20, 200, 900]).unwrap_or(1),
        };
        let passed = Duration::from_millis(1 + self.air.dice.roll() % most);
        self.advance(passed);
    }

    /// Time passes, and everybody looks at the clock.
    fn advance(&mut self, passed: Duration) {
        self.air.now += passed;
        self.tell(|| format!("{passed:?} pass"));
        for producer in self.producers.iter_mut().flatten() {
            producer.keep_time(&mut self.air);
        }
        for consumer in &mut self.consumers {
            consumer.step(&mut self.air, &mut self.producers, true);
        }
    }

    fn let_go(&mut self) {
        let i = self.air.dice.below(self.consumers.len());
        self.consumers[i].let_go(&mut self.air);
    }

    fn break_something(&mut self) {
        let i = self.air.dice.below(self.producers.len());
        let j = self.air.dice.below(self.consumers.len());
        let what = match self.air.dice.below(40) {
            0 => self.restart(i),
            1 => {
                self.consumers[j].restart(&mut self.air);
                "a consumer starts anew"
            }
            2..6 => {
                self.consumers[j].cancel(&mut self.air);
                "a transfer is cancelled"
            }
            6..9 => self.release_early(),
            9 => self.with(i, Producer::abort, "a prompt is given up"),
            10 if self.air.dice.once_in(4) => self.with(i, Producer::drain, "a producer drains"),
            11 => self.replay(i),
            12..15 => {
                self.ask_again();
                "parameters are used again"
            }
            _ => self.air.net.harm(&mut self.air.dice, self.air.now),
        };
        self.tell(|| what.into());
    }

    fn with(
        &mut self,
        i: usize,
        act: impl FnOnce(&mut Producer, &mut Air),
        what: &'static str,
    ) -> &'static str {
        if let Some(producer) = &mut self.producers[i] {
            act(producer, &mut self.air);
        }
        what
    }

    /// A producer's process dies, or another one starts in its place.
    fn restart(&mut self, i: usize) -> &'static str {
        match self.producers[i].take() {
            Some(mut producer) => {
                producer.die(&mut self.air);
                if self.air.dice.once_in(2) {
                    self.start(i);
                }
                "a producer dies"
            }
            None => {
                self.start(i);
                "a producer is back"
            }
        }
    }

    fn start(&mut self, i: usize) {
        let shard = self.shards[i].clone();
        self.producers[i] = Some(Producer::new(i, &mut self.air, shard, &self.secret));
    }

    fn release_early(&mut self) -> &'static str {
        if let Some(params) = self.air.dice.pick(&self.params)
            && let Some(producer) = &mut self.producers[params.producer]
        {
            producer.release(params.lease);
        }
        "a lease is released by its owner"
    }

    /// Somebody has listened, and says the same again.
    fn replay(&mut self, i: usize) -> &'static str {
        if let Some(producer) = &mut self.producers[i] {
            let conn = self.air.net.connect(false);
            producer.accept(conn, self.air.now);
            self.air.strangers.push(conn);
            for frame in self.air.recorded.clone() {
                self.air.net.send(conn, At::Producer, frame);
            }
            // Nobody reads the answer.
            self.air.net.close(conn, At::Consumer);
        }
        "a proof is replayed"
    }

    /// What must hold after every step.
    fn check(&self) {
        let producers = self.producers.iter().flatten();
        producers.for_each(|producer| producer.check(self.air.now));
        let consumers = self.consumers.iter();
        consumers.for_each(|consumer| consumer.check(self.air.now));
    }

    /// Nothing breaks any more, and what runs comes to its end.
    fn calm(&mut self) {
        self.air.net.calm();
        for i in 0..self.producers.len() {
            if self.producers[i].is_none() {
                self.start(i);
            }
        }
        let until = self.air.now + 4 * TOTAL + 4 * TTL;
        while self.consumers.iter().any(Consumer::is_busy) {
            self.round();
            self.consumers
                .iter_mut()
                .for_each(|consumer| consumer.let_go(&mut self.air));
            let is_over = self.air.now >= until;
            assert!(!is_over, "a transfer never ends: {:#?}", self.consumers);
        }
    }

    /// Everything that can be delivered is; everybody runs; a moment passes when nothing is left to do.
    fn round(&mut self) {
        let n_unread = self.air.net.n_unread();
        let ways = self.air.net.deliverable(self.air.now);
        for &(conn, at) in &ways {
            self.air.net.deliver(conn, at, usize::MAX);
        }
        for producer in self.producers.iter_mut().flatten() {
            producer.step(&mut self.air, true);
            producer.grow(&mut self.air);
        }
        for consumer in &mut self.consumers {
            consumer.step(&mut self.air, &mut self.producers, true);
        }
        self.check();
        let is_done = n_unread == self.air.net.n_unread();
        if is_done && self.air.net.deliverable(self.air.now).is_empty() {
            self.advance(Duration::from_millis(100));
            self.check();
        }
    }

    /// Callers let go of everything, and time passes.
    fn leave(&mut self) {
        for consumer in &mut self.consumers {
            for _ in 0..100 {
                consumer.let_go(&mut self.air);
            }
        }
        self.pass(2 * TTL);
        for producer in self.producers.iter().flatten() {
            producer.check_quiet();
        }
        self.pass(LINGER + super::CONTROL_SILENCE);
        assert!(
            self.air.net.is_empty(),
            "connections are left: {:#?}",
            self.air.net
        );
        let producers = self.producers.iter().flatten();
        producers.for_each(Producer::check_empty);
        self.consumers.iter().for_each(Consumer::check_empty);
    }

    fn pass(&mut self, time: Duration) {
        let until = self.air.now + time;
        while self.air.now < until {
            self.round();
            if !self.air.net.deliverable(self.air.now).is_empty() {
                continue;
            }
            self.advance(Duration::from_millis(500));
        }
    }
}

fn cfg(dice: &mut Dice, secret: &Secret, is_fair: bool) -> Cfg {
    let is_odd = !is_fair && dice.once_in(12);
    let mut ours = Shard {
        layout: layout(dice.within(1..6)),
        heads: heads(dice),
    };
    let mut secret = secret.clone();
    match is_odd {
        true if dice.once_in(2) => ours.layout.model_fingerprint = 8,
        true => secret = Secret::new(&[8; 32]).expect("it is long enough"),
        false => {}
    }
    Cfg {
        secret,
        ours,
        // At least two chunks.
        window: 400 + dice.roll() % 1000,
        n_streams: 1 + dice.below(if is_fair { 3 } else { 5 }),
        n_workers: 1 + dice.below(3),
        stripe_bytes: 100 + dice.below(600),
        budget: if is_fair {
            usize::MAX
        } else {
            2000 + dice.below(8000)
        },
        shares_memory: dice.once_in(3),
    }
}
