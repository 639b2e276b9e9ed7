//! What the prefix indices cost: `cargo bench -p baton-scheduler --bench index [-- MILLIONS]`, with MILLIONS of blocks of
//! other prompts in the tables (16), so that they are far larger than a processor's cache.
//!
//! A prompt has 2048 blocks, the fleet 1000 servers. Shared by a part: every server holds that part of it. Ragged: each
//! server holds another part. Turns: a conversation in twenty parts, the later ones with ever fewer servers. Of these two, each server's
//! prompt goes on in its own way after its part.
#![expect(clippy::print_stdout, reason = "the figures are the output")]

use baton_kv::{BlockEvent, EngineHash, Removed, Stored};
use baton_scheduler::{
    BlockHash, Certainty, EndpointId, Found, Keys, Match, PreciseConfig, PreciseIndex, PrefixIndex,
    TokenHasher, TokenPrompt,
};
use std::time::Instant;

const SERVERS: u32 = 1000;
const BLOCKS: usize = 2048;
const BLOCK_TOKENS: u32 = 16;
/// Prompts of each kind, used in turn so that no one of them stays in the processor's cache.
const PROMPTS: usize = 8;
const ROUNDS: usize = 400;

/// How long each server's part of a shared prompt is.
#[derive(Clone, Copy)]
enum Shape {
    Part(usize),
    Ragged,
    Turns,
}

const SHAPES: [(&str, Shape); 5] = [
    ("shared by 0 %", Shape::Part(0)),
    ("shared by 50 %", Shape::Part(BLOCKS / 2)),
    ("shared by 100 %", Shape::Part(BLOCKS)),
    ("ragged", Shape::Ragged),
    ("turns", Shape::Turns),
];

/// A small generator of numbers: the bench depends on nothing else.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Shape {
    fn len(self, server: u32, numbers: &mut Numbers) -> usize {
        match self {
            Self::Part(len) => len,
            Self::Ragged => 1 + (numbers.next() as usize) % BLOCKS,
            Self::Turns => {
                // Turn t ends after t twentieths and is held by a share of servers that shrinks by a quarter each turn.
                let share = f64::from(server) / f64::from(SERVERS);
                let turn = (1..20).take_while(|&t| 0.75f64.powi(t) > share).count() + 1;
                turn * BLOCKS / 20
            }
        }
    }
}

fn tokens(numbers: &mut Numbers) -> Vec<u32> {
    (0..BLOCKS * BLOCK_TOKENS as usize)
        .map(|_| (numbers.next() % 128_000) as u32)
        .collect()
}

fn prompts(hasher: &TokenHasher, numbers: &mut Numbers, n: usize) -> Vec<(Vec<u32>, Keys)> {
    (0..n)
        .map(|_| {
            let tokens = tokens(numbers);
            let keys = hasher.keys(&prompt(&tokens), [BLOCK_TOKENS]);
            (tokens, keys)
        })
        .collect()
}

fn prompt(tokens: &[u32]) -> TokenPrompt<'_> {
    TokenPrompt {
        model: "model",
        tokens,
        ..TokenPrompt::default()
    }
}

/// Prints the median and the 99th percentile of some times in microseconds.
fn report(what: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    let at = |p: f64| times[((times.len() - 1) as f64 * p) as usize];
    println!(
        "{what:<44} p50 {:>8.1} µs   p99 {:>8.1} µs",
        at(0.5),
        at(0.99)
    );
}

fn time<T>(times: &mut Vec<f64>, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let out = std::hint::black_box(work());
    times.push(start.elapsed().as_secs_f64() * 1e6);
    out
}

fn approximate(hasher: &TokenHasher, blocks: usize, numbers: &mut Numbers, ids: &[EndpointId]) {
    let mut index = PrefixIndex::new(1 << 20);
    let mut inserts = Vec::new();
    for i in 0..blocks / BLOCKS {
        let own: Vec<BlockHash> = own_blocks(hasher, numbers);
        let server = EndpointId(i as u32 % SERVERS);
        time(&mut inserts, || {
            index.insert(server, &own, Certainty::Computed);
        });
    }
    let size = index.size();
    println!(
        "approximate: {:.1} M blocks, {:.1} bytes each",
        size.held as f64 / 1e6,
        size.bytes as f64 / size.held as f64
    );
    report("insert 2048 new blocks", inserts);
    let mut found: Vec<Match> = Vec::new();
    for (name, shape) in SHAPES {
        let shared = prompts(hasher, numbers, PROMPTS);
        let mut inserts = Vec::new();
        for (_, keys) in &shared {
            for server in 0..SERVERS {
                let len = shape.len(server, numbers);
                let mut part = keys.of_size(BLOCK_TOKENS)[..len].to_vec();
                if !matches!(shape, Shape::Part(_)) {
                    part.extend((0..4).map(|_| BlockHash::new(numbers.next())));
                }
                time(&mut inserts, || {
                    index.insert(EndpointId(server), &part, Certainty::Computed);
                });
            }
        }
        report(&format!("insert, {name}"), inserts);
        let mut times = Vec::new();
        for round in 0..ROUNDS {
            let keys = shared[round % PROMPTS].1.of_size(BLOCK_TOKENS);
            time(&mut times, || index.matches(keys, ids, &mut found));
        }
        report(&format!("matches, {name}"), times);
    }
    let mut evicts = Vec::new();
    for server in 0..SERVERS.min(200) {
        index.set_capacity(EndpointId(server), index.len_of(EndpointId(server)));
        let own = own_blocks(hasher, numbers);
        time(&mut evicts, || {
            index.insert(EndpointId(server), &own, Certainty::Computed);
        });
    }
    report("insert 2048 new blocks, evicting as many", evicts);
    let start = Instant::now();
    index.forget(EndpointId(0));
    println!(
        "forget a server: {:.1} µs",
        start.elapsed().as_secs_f64() * 1e6
    );
}

fn own_blocks(hasher: &TokenHasher, numbers: &mut Numbers) -> Vec<BlockHash> {
    let tokens = tokens(numbers);
    hasher
        .keys(&prompt(&tokens), [BLOCK_TOKENS])
        .of_size(BLOCK_TOKENS)
        .to_vec()
}

/// The report of a server that now holds the first `blocks` of a prompt.
fn report_of(tokens: &[u32], blocks: usize, first_name: u64) -> BlockEvent {
    BlockEvent::Stored(Stored {
        hashes: (0..blocks as u64)
            .map(|i| EngineHash(first_name + i))
            .collect(),
        tokens: tokens[..blocks * BLOCK_TOKENS as usize].to_vec(),
        block_size: BLOCK_TOKENS,
        ..Stored::default()
    })
}

fn precise(hasher: &TokenHasher, blocks: usize, numbers: &mut Numbers, ids: &[EndpointId]) {
    let mut index = PreciseIndex::new(*hasher, PreciseConfig::default());
    let (mut spent, mut names) = (0.0, 0);
    let mut times = Vec::new();
    for i in 0..blocks / BLOCKS {
        let event = report_of(&tokens(numbers), BLOCKS, names);
        names += BLOCKS as u64;
        time(&mut times, || {
            index.apply(EndpointId(i as u32 % SERVERS), "model", &event);
        });
        spent += times[i];
    }
    let held: usize = ids.iter().map(|&id| index.len_of(id)).sum();
    println!(
        "precise: {:.1} M blocks, {:.1} bytes each; {:.2} M blocks stored a second",
        held as f64 / 1e6,
        index.bytes() as f64 / held as f64,
        held as f64 / spent
    );
    let mut found: Vec<Found> = Vec::new();
    for (name, shape) in SHAPES {
        let shared = prompts(hasher, numbers, 2);
        let mut spent = Vec::new();
        for (tokens, _) in &shared {
            for server in 0..SERVERS {
                let len = shape.len(server, numbers);
                let event = report_of(tokens, len, names);
                names += len as u64;
                time(&mut spent, || {
                    index.apply(EndpointId(server), "model", &event);
                });
            }
        }
        report(&format!("events of one prompt, {name}"), spent);
        let mut times = Vec::new();
        for round in 0..ROUNDS {
            let keys = &shared[round % shared.len()].1;
            time(&mut times, || index.matches(keys, ids, &mut found));
        }
        report(&format!("matches, {name}"), times);
    }
    let mut times = Vec::new();
    for server in 0..SERVERS.min(200) {
        // The first prompt of this server: its names are known.
        let first = u64::from(server) * BLOCKS as u64;
        let hashes = (first..first + BLOCKS as u64)
            .rev()
            .map(EngineHash)
            .collect();
        let event = BlockEvent::Removed(Removed {
            hashes,
            ..Removed::default()
        });
        time(&mut times, || {
            index.apply(EndpointId(server), "model", &event);
        });
    }
    report("remove 2048 blocks", times);
}

fn main() {
    let millions = std::env::args()
        .filter_map(|a| a.parse::<usize>().ok())
        .next();
    let blocks = millions.unwrap_or(16) * 1_000_000;
    let hasher = TokenHasher::new(1);
    let mut numbers = Numbers(7);
    let ids: Vec<EndpointId> = (0..SERVERS).map(EndpointId).collect();
    let mut times = Vec::new();
    let long = tokens(&mut numbers);
    for _ in 0..200 {
        time(&mut times, || hasher.keys(&prompt(&long), [BLOCK_TOKENS]));
    }
    report("keys of 32768 tokens", times);
    approximate(&hasher, blocks, &mut numbers, &ids);
    precise(&hasher, blocks, &mut numbers, &ids);
}
