//! The protocol's decisions on a network that does what it likes, in time that only passes when the schedule says so.
//!
//! Everything that decides is real: handshakes, lease tables, sessions, holdings, fetches, and every byte on the wire.
//! Sockets, threads, shared memory and the clock are played, as small as they can be; where a thread has a rule of its own,
//! its player says so. A schedule follows from its seed alone. At each step it picks what happens next: some bytes arrive
//! somewhere, some thread runs, a lease grows or ends, a caller asks or changes its mind, time passes, or something
//! breaks. What must hold is checked after every step ([`World::check`]) and when all has become quiet.
//!
//! Not here: a producer of the pool that lies with right checksums, or whoever can forge segments at will; nothing but
//! encryption helps against the latter.

mod arena;
mod consumer;
mod dice;
mod ledger;
mod net;
mod producer;
mod pull;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use baton_kv::LeaseToken;

use crate::geometry::Shard;
use crate::wire::Selection;
use arena::truth;
use dice::Dice;
use net::{ConnId, Net};
use world::{Total, World};

const TTL: Duration = Duration::from_secs(5);
const CAP: Duration = Duration::from_secs(20);
/// A consumer waits so long for a byte or an answer.
const IDLE: Duration = Duration::from_secs(2);
/// And so long for a transfer.
const TOTAL: Duration = Duration::from_secs(8);
/// A producer waits so long for a transfer's progress.
const PROGRESS: Duration = Duration::from_secs(3);
/// For a stranger's proof.
const STRANGER: Duration = Duration::from_secs(2);
/// For a word on a control connection.
const CONTROL_SILENCE: Duration = Duration::from_secs(15);
const LINGER: Duration = Duration::from_secs(6);
const RETRY_PAUSE: Duration = Duration::from_millis(500);
const CANCEL_CHECK: Duration = Duration::from_millis(50);

/// What everybody lives in.
#[derive(Debug)]
struct Air {
    now: Instant,
    dice: Dice,
    net: Net,
    /// Memory of a producer.
    arena_bytes: usize,
    /// What a consumer said last to prove itself, for whoever would replay it.
    recorded: Vec<Vec<u8>>,
    /// Connections of those who do.
    strangers: Vec<ConnId>,
}

impl Air {
    fn may_enter(&self, conn: ConnId) -> bool {
        !self.strangers.contains(&conn)
    }
}

/// How to fetch a lease, and what it must bring.
#[derive(Debug)]
struct Params {
    producer: usize,
    lease: u64,
    token: LeaseToken,
    n_tokens: u32,
    theirs: Shard,
    /// Its bytes follow from this; `None` for parameters that give no right to any.
    seed: Option<u64>,
}

impl Params {
    /// # Panics
    /// When these are not the lease's bytes.
    fn check(&self, selection: &Selection, bytes: &[u8]) {
        let seed = self.seed.expect("nobody without the right gets bytes");
        let layout = &self.theirs.layout;
        let end = layout.blocks_for(self.n_tokens as usize) as u32 * layout.block_size;
        let right = truth(seed, layout, selection, end);
        assert!(
            right == bytes,
            "wrong bytes of lease {}: {selection:?}",
            self.lease
        );
    }
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn run(seed: u64) -> Total {
    let played = catch_unwind(AssertUnwindSafe(|| World::new(seed, false).play()));
    played.unwrap_or_else(|_| {
        let mut world = World::new(seed, true);
        let _ = catch_unwind(AssertUnwindSafe(|| world.play()));
        let last = world.told().join("\n");
        panic!("schedule {seed} breaks a rule; BATON_SIMULATION_SEED={seed} plays it alone. Its end:\n{last}");
    })
}

#[test]
fn whatever_happens_on_the_network_no_schedule_breaks_a_rule() {
    if let Some(seed) = number("BATON_SIMULATION_SEED") {
        run(seed);
        return;
    }
    let n = number("BATON_SIMULATIONS").unwrap_or(10_000);
    let mut total = Total::default();
    (0..n).for_each(|seed| total.add(&run(seed)));
    let Total { asked, whole, .. } = total;
    assert!(
        whole * 4 > asked && whole * 20 < asked * 19,
        "the dice test nothing: {total:?}"
    );
    assert!(
        total.partial > 0 && total.copied > 0 && total.lost > 0,
        "{total:?}"
    );
}
