//! Whether telling each other is worth it: conversations that come to any of several pickers, and servers whose caches
//! are known to the test.

use crate::hear::Hearer;
use crate::tell::Teller;
use baton_fleet::{Address, EndpointSpec, Fleet, Note, Route};
use baton_scheduler::{Health, Policy, PrefixIndex, Request, Scheduler, Weights};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tokio::sync::broadcast::Receiver;

const SERVERS: usize = 8;
const CONVERSATIONS: u64 = 40;
const REQUESTS: usize = 2000;
/// Requests that begin while one lasts, at most.
const LASTS: u64 = 48;
/// Bytes of a turn.
const TURN: usize = 640;
/// Requests after which pickers hear of each other's.
const DELAY: usize = 2;

/// A fleet of healthy servers.
pub(crate) fn fleet(seed: u64) -> Arc<Fleet> {
    let policy = Policy {
        decode: Weights {
            prefix_cache_scorer: 3.0,
            active_request_scorer: 2.0,
            ..Weights::default()
        },
        ..Policy::default()
    };
    let scheduler = Scheduler::new(policy, PrefixIndex::new(31_250));
    let fleet = Fleet::new(scheduler, 1).drawing_from(seed);
    list(&fleet, 0..SERVERS);
    Arc::new(fleet)
}

fn list(fleet: &Fleet, names: impl Iterator<Item = usize>) {
    let at = Address::parse("127.0.0.1:1").unwrap();
    let specs: Vec<EndpointSpec> = names
        .map(|n| EndpointSpec::new(format!("server {n}"), at.clone()))
        .collect();
    fleet.set_endpoints(&specs).unwrap();
    for server in fleet.servers().iter() {
        server.set_health(Health::Healthy);
    }
}

/// One picker, and what it says to the others.
struct Picker {
    fleet: Arc<Fleet>,
    notes: Receiver<Arc<Note>>,
    teller: Teller,
}

impl Picker {
    fn new(seed: u64) -> Self {
        let fleet = fleet(seed);
        Self {
            notes: fleet.notes(),
            fleet,
            teller: Teller::default(),
        }
    }

    /// What is new.
    fn says(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        self.teller.loads(&self.fleet, &mut out);
        while let Ok(note) = self.notes.try_recv() {
            self.teller.note(&note, &mut out);
        }
        out
    }
}

/// What became of the conversations.
#[derive(Debug)]
struct Outcome {
    /// Part of all prompts that was cached where they went.
    cached: f64,
    /// Requests at the busiest server, on average, where 1 is what an even spread would have.
    busiest: f64,
}

fn draw(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// `pickers` serve the conversations, and perhaps tell each other of it.
fn serve(pickers: usize, telling: bool) -> Outcome {
    let mut all: Vec<Picker> = (0..pickers as u64).map(|i| Picker::new(100 + i)).collect();
    // hearers[i][j]: what i hears of j.
    let mut hearers: Vec<Vec<Hearer>> = all
        .iter()
        .map(|p| {
            (0..pickers)
                .map(|_| Hearer::new(p.fleet.clone(), true))
                .collect()
        })
        .collect();
    let mut chance = 0x1234_5678_9abc_def1;
    let mut turns = [0usize; CONVERSATIONS as usize];
    let mut caches: Vec<BTreeMap<u64, usize>> = vec![BTreeMap::new(); SERVERS];
    let mut under_way: VecDeque<(usize, Route)> = VecDeque::new();
    let (mut cached, mut total, mut busiest) = (0, 0, 0.0);
    for now in 0..REQUESTS {
        under_way.retain(|(end, _)| *end > now);
        let conversation = draw(&mut chance) % CONVERSATIONS;
        let turn = &mut turns[conversation as usize];
        *turn = *turn % 12 + 1;
        let prompt: Vec<u8> = (0..*turn * TURN)
            .map(|i| (i / 64) as u8 ^ conversation as u8)
            .collect();
        let mut text = conversation.to_le_bytes().to_vec();
        text.resize(64, 0);
        text.extend(prompt);
        let picker = (draw(&mut chance) % pickers as u64) as usize;
        let fleet = all[picker].fleet.clone();
        let prompt = fleet.prompt("m", &[&text], None);
        let route = fleet.route(&Request::new(&prompt)).unwrap();
        fleet.answered(&route.decode, &prompt);
        let cache = &mut caches[route.decode.id.0 as usize];
        let had = cache.insert(conversation, *turn).unwrap_or(0).min(*turn);
        (cached, total) = (cached + had, total + *turn);
        under_way.push_back((now + 1 + (draw(&mut chance) % LASTS) as usize, route));
        let mut at = [0usize; SERVERS];
        under_way
            .iter()
            .for_each(|(_, r)| at[r.decode.id.0 as usize] += 1);
        let most = at.iter().max().copied().unwrap_or(0);
        busiest += most as f64 * SERVERS as f64 / under_way.len() as f64;
        if telling && now % DELAY == 0 {
            for teller in 0..pickers {
                let said = all[teller].says();
                for (hearer, heard) in hearers.iter_mut().enumerate() {
                    if hearer != teller {
                        assert_eq!(heard[teller].hear(&said), Ok(said.len()));
                    }
                }
            }
        }
    }
    Outcome {
        cached: cached as f64 / total as f64,
        busiest: busiest / REQUESTS as f64,
    }
}

#[test]
fn pickers_that_tell_each_other_route_nearly_as_one_does() {
    let (one, told, alone) = (serve(1, false), serve(3, true), serve(3, false));
    assert!(told.cached > 0.97 * one.cached, "{told:?} {one:?}");
    assert!(told.busiest < 1.05 * one.busiest, "{told:?} {one:?}");
    assert!(alone.cached < 0.9 * told.cached, "{alone:?} {told:?}");
}

#[test]
fn servers_that_come_and_go_are_told_by_name() {
    let mut teller = Picker::new(1);
    let hears = fleet(2);
    let mut hearer = Hearer::new(hears.clone(), true);
    let prompt = teller.fleet.prompt("m", &[&[9; 640]], None);
    let flights: Vec<Route> = (0..2 * SERVERS)
        .map(|_| teller.fleet.route(&Request::new(&prompt)).unwrap())
        .collect();
    hearer.hear(&teller.says()).unwrap();
    let active = |fleet: &Fleet, name: &str| {
        let snapshot = fleet.snapshot();
        let found = snapshot.iter().find(|e| *e.identity.name == *name);
        found.map(|e| e.load.active)
    };
    let both = |name: &str| (active(&teller.fleet, name), active(&hears, name));
    for n in 0..SERVERS {
        let (told, heard) = both(&format!("server {n}"));
        assert_eq!(told, heard);
    }
    // The hearer lists other servers, in another order, and one that the teller does not have.
    list(&hears, (2..SERVERS + 1).rev());
    hearer.hear(&[]).unwrap();
    assert_eq!(active(&hears, "server 0"), None);
    assert_eq!(
        active(&hears, "server 2"),
        active(&teller.fleet, "server 2")
    );
    // The teller's list changes: what leaves it is not counted any more, whoever gets its number.
    list(&teller.fleet, (2..4).chain(SERVERS..SERVERS + 2));
    let said = teller.says();
    hearer.hear(&said).unwrap();
    assert_eq!(active(&hears, "server 5"), Some(0));
    assert_eq!(
        active(&hears, "server 3"),
        active(&teller.fleet, "server 3")
    );
    assert_eq!(active(&hears, "server 8"), Some(0));
    drop(flights);
    hearer.hear(&teller.says()).unwrap();
    drop(hearer);
    assert!(hears.snapshot().iter().all(|e| e.load.active == 0));
}
