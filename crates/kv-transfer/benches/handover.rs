//! How fast KV goes from one process to another, beside what the machine can do at all: a bare copy through as many sockets,
//! and a plain memory copy.
//!
//! They take turns, so that whatever else the machine does hits them alike; the median and the best of each are shown, and
//! the CPU time of both processes for each GB. `cargo bench -p baton-kv-transfer --bench handover`.
//! `FAR` is put before the command that starts the producer, such as `ip netns exec NAME`, and `FAR_HOST` is where it is
//! reached; `tests/bench/handover.sh` does that. `LINES` chooses lines of the table, `ROUNDS` how often each is measured.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a program whose purpose is to print a measurement"
)]

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::ops::Range;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use baton_kv::{BlockId, DType, KvLayout, KvTransferParams};
use baton_kv_transfer::{KvClient, KvClientConfig, KvServer, KvServerConfig, PeerPolicy, Secret};

/// Sockets of the bare copy, and data connections of a transfer.
const STREAMS: usize = 4;
/// At most so much is pulled at once; a longer prompt comes in several pulls.
const MAX_PULL_BYTES: usize = 2 << 30;
/// What one write of the bare copy takes.
const WRITE: usize = 1 << 20;

#[derive(Clone, Copy)]
struct Line {
    model: &'static str,
    n_tokens: u32,
}

const LINES: [Line; 7] = [
    Line {
        model: "smollm2",
        n_tokens: 128,
    },
    Line {
        model: "smollm2",
        n_tokens: 1024,
    },
    Line {
        model: "smollm2",
        n_tokens: 8192,
    },
    Line {
        model: "llama-70b",
        n_tokens: 128,
    },
    Line {
        model: "llama-70b",
        n_tokens: 1024,
    },
    Line {
        model: "llama-70b",
        n_tokens: 8192,
    },
    Line {
        model: "llama-70b",
        n_tokens: 32768,
    },
];

fn layout(model: &str) -> KvLayout {
    let (n_layers, n_kv_heads, head_dim, block_size) = match model {
        "smollm2" => (30, 3, 64, 16),
        _ => (80, 8, 128, 64),
    };
    KvLayout {
        n_layers,
        n_kv_heads,
        head_dim,
        block_size,
        dtype: DType::BF16,
        model_fingerprint: 1,
    }
}

fn secret() -> Secret {
    Secret::new(&[1; 32]).unwrap()
}

// ---- the far end: a producer, and a sender of bare bytes; obeys lines on its standard input

fn far_end() {
    let host: IpAddr =
        env::var("FAR_HOST").map_or(Ipv4Addr::LOCALHOST.into(), |h| h.parse().unwrap());
    let bare = TcpListener::bind((host, 0)).unwrap();
    println!("{}", bare.local_addr().unwrap().port());
    thread::spawn(move || serve_bare(&bare));
    let mut server: Option<(String, KvServer)> = None;
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (model, n_tokens) = line.split_once(' ').unwrap();
        if server.as_ref().is_none_or(|(of, _)| of != model) {
            drop(server.take());
            let mut cfg = KvServerConfig::new((host, 0).into(), secret(), layout(model));
            cfg.pool_bytes = 12 << 30;
            server = Some((model.to_owned(), KvServer::start(cfg).unwrap()));
        }
        let (_, server) = server.as_ref().unwrap();
        let params = publish(server, &layout(model), n_tokens.parse().unwrap());
        println!("{}", serde_json::to_string(&params).unwrap());
    }
}

fn publish(server: &KvServer, layout: &KvLayout, n_tokens: u32) -> KvTransferParams {
    let n_blocks = layout.blocks_for(n_tokens as usize) as u32;
    let (_, mut building) = server.begin(n_tokens).unwrap();
    let mut room = building.room(n_blocks as usize).unwrap();
    // As an engine would: written before it is sent. What is written there matters to nobody.
    room.fill(n_blocks as u8);
    let ids: Vec<_> = (0..n_blocks).map(BlockId).collect();
    building.append(&ids, room).unwrap();
    building.finish().unwrap()
}

/// Sends as many bytes as each connection asks for, out of a buffer too large for the cache.
fn serve_bare(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        stream.set_nodelay(true).unwrap();
        thread::spawn(move || {
            let data = vec![1; 64 * WRITE];
            let mut wanted = [0; 8];
            while stream.read_exact(&mut wanted).is_ok() {
                let n = u64::from_le_bytes(wanted) as usize;
                for at in (0..n).step_by(WRITE) {
                    let begin = at % data.len();
                    let len = WRITE.min(n - at);
                    if stream.write_all(&data[begin..begin + len]).is_err() {
                        return;
                    }
                }
            }
        });
    }
}

// ---- the near end

struct Far {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    bare: Vec<TcpStream>,
}

impl Far {
    fn start() -> Self {
        let far = env::var("FAR").unwrap_or_default();
        let me = env::current_exe().unwrap();
        let mut words = far.split_whitespace();
        let mut command = match words.next() {
            None => Command::new(me),
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg(me);
                command
            }
        };
        let mut child = command
            .env("FAR_END", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let host = env::var("FAR_HOST").unwrap_or_else(|_| "127.0.0.1".into());
        let port: u16 = line(&mut answers).parse().unwrap();
        let connect = |_| {
            let stream = TcpStream::connect((host.as_str(), port)).unwrap();
            stream.set_nodelay(true).unwrap();
            stream
        };
        Self {
            child,
            commands,
            answers,
            bare: (0..STREAMS).map(connect).collect(),
        }
    }

    fn publish(&mut self, line_: Line) -> KvTransferParams {
        writeln!(self.commands, "{} {}", line_.model, line_.n_tokens).unwrap();
        serde_json::from_str(&line(&mut self.answers)).unwrap()
    }

    /// CPU time of both processes so far.
    fn cpu(&self) -> f64 {
        cpu(std::process::id()) + cpu(self.child.id())
    }

    /// Fills `target` through all sockets at once.
    fn bare_copy(&mut self, target: &mut [u8]) {
        let share = target.len().div_ceil(self.bare.len());
        thread::scope(|scope| {
            for (stream, part) in self.bare.iter_mut().zip(target.chunks_mut(share)) {
                scope.spawn(move || {
                    stream
                        .write_all(&(part.len() as u64).to_le_bytes())
                        .unwrap();
                    stream.read_exact(part).unwrap();
                });
            }
        });
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

/// Seconds of CPU that a process has had, to a hundredth.
fn cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    let ticks: u64 = fields
        .skip(11)
        .take(2)
        .map(|n| n.parse::<u64>().unwrap())
        .sum();
    ticks as f64 / 100.0
}

/// Times of one way, and what CPU they took.
#[derive(Default)]
struct Taken {
    times: Vec<Duration>,
    cpu: f64,
    bytes: usize,
}

impl Taken {
    /// Median and best, in GB/s.
    fn rates(&self) -> (f64, f64) {
        let mut times = self.times.clone();
        times.sort_unstable();
        let each = self.bytes as f64 / times.len() as f64 / 1e9;
        let rate = |time: Duration| each / time.as_secs_f64();
        (rate(times[times.len() / 2]), rate(times[0]))
    }

    fn cpu_per_gb(&self) -> f64 {
        self.cpu / (self.bytes as f64 / 1e9)
    }
}

fn client(layout: &KvLayout, shares_memory: bool) -> KvClient {
    let mut cfg = KvClientConfig::new(secret(), layout.clone(), 6 << 30);
    cfg.shares_memory = shares_memory;
    cfg.n_streams = STREAMS;
    cfg.peers = PeerPolicy::Allow(std::sync::Arc::new(|_, _| true));
    KvClient::new(cfg).unwrap()
}

/// From the pull to its last callback; the lease is published and held before.
fn hand_over(far: &mut Far, client: &KvClient, of: Line, taken: &mut Taken) {
    let layout = layout(of.model);
    let held = client.hold(&far.publish(of)).unwrap();
    // The first heartbeat is through by then, and with it the connection.
    thread::sleep(Duration::from_millis(5));
    let per_pull = (MAX_PULL_BYTES / layout.block_bytes()) as u32;
    let before = far.cpu();
    let begun = Instant::now();
    let mut time = Duration::ZERO;
    for first in (0..held.n_blocks()).step_by(per_pull as usize) {
        let blocks: Range<u32> = first..held.n_blocks().min(first + per_pull);
        let (tx, rx) = channel();
        let done = Box::new(move |result| drop(tx.send(result)));
        let begun = Instant::now();
        let _guard = client.pull(&held, blocks.start, blocks.end - blocks.start, done);
        let pulled = rx.recv().unwrap().unwrap();
        time += begun.elapsed();
        assert_eq!(pulled.n_blocks, blocks.end - blocks.start);
    }
    assert!(begun.elapsed() >= time);
    taken.cpu += far.cpu() - before;
    taken.times.push(time);
    taken.bytes += layout.block_bytes() * held.n_blocks() as usize;
}

fn timed(far: &mut Far, bytes: usize, taken: &mut Taken, body: impl FnOnce(&mut Far)) {
    let before = far.cpu();
    let begun = Instant::now();
    body(far);
    taken.times.push(begun.elapsed());
    taken.cpu += far.cpu() - before;
    taken.bytes += bytes;
}

fn measure(far: &mut Far, of: Line, is_near: bool) {
    let layout = layout(of.model);
    let bytes = layout.block_bytes() * layout.blocks_for(of.n_tokens as usize);
    let part = bytes.min(MAX_PULL_BYTES);
    let rounds = env::var("ROUNDS").ok().and_then(|n| n.parse().ok());
    let rounds: usize = rounds.unwrap_or((8_000_000_000 / bytes).clamp(5, 60));
    let tcp = client(&layout, false);
    let shm = is_near.then(|| client(&layout, true));
    let (mut by_tcp, mut bare, mut by_shm, mut copied) = <(Taken, Taken, Taken, Taken)>::default();
    let (from, mut target) = (vec![1u8; part], vec![2u8; part]);
    // The first round only touches memory and connects.
    for round in 0..=rounds {
        hand_over(far, &tcp, of, &mut by_tcp);
        timed(far, part, &mut bare, |far| far.bare_copy(&mut target));
        if let Some(shm) = &shm {
            hand_over(far, shm, of, &mut by_shm);
            timed(far, part, &mut copied, |_| {
                std::hint::black_box(&mut target).copy_from_slice(&from);
            });
        }
        if round == 0 {
            (by_tcp, bare, by_shm, copied) = Default::default();
        }
    }
    let name = format!(
        "{} {:>6} {:>8.1} MB",
        of.model,
        of.n_tokens,
        bytes as f64 / 1e6
    );
    print!("| {name:<28} ");
    show(&by_tcp, &bare);
    if is_near {
        show(&by_shm, &copied);
    }
    println!("|");
}

fn show(ours: &Taken, ceiling: &Taken) {
    let ((median, best), (limit, limit_best)) = (ours.rates(), ceiling.rates());
    print!(
        "| {median:.2} ({best:.2}) | {limit:.2} ({limit_best:.2}) | {:.0} % ({:.0} %) | {:.2} | {:.2} ",
        100.0 * median / limit,
        100.0 * best / limit_best,
        ours.cpu_per_gb(),
        ceiling.cpu_per_gb(),
    );
}

fn main() {
    if env::var("FAR_END").is_ok() {
        return far_end();
    }
    let is_near = env::var("FAR").is_err();
    let only = env::var("LINES").unwrap_or_default();
    let mut far = Far::start();
    print!("| KV | tcp GB/s, median (best) | {STREAMS} bare sockets | of that | CPU s/GB | bare ");
    if is_near {
        print!("| shared memory GB/s | memcpy | of that | CPU s/GB | memcpy ");
    }
    println!("|\n|---|{}", "---|".repeat(if is_near { 10 } else { 5 }));
    let is_chosen = |line: &Line| format!("{} {}", line.model, line.n_tokens).contains(&only);
    for line in LINES.into_iter().filter(is_chosen) {
        measure(&mut far, line, is_near);
    }
}
