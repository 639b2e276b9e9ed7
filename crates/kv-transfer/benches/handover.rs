//! GB/s of a hand-over through loopback, next to a bare socket copy through the same loopback, a memcpy, and the
//! checksum that each side of a hand-over computes.
//!
//! They take turns, so that whatever else the machine does hits them alike; the best and the median of each
//! are shown, and what the hand-over reaches of the other two. SmolLM2-135M, 1008 tokens in f32: 46 MB.
//! `cargo bench -p baton-kv-transfer`
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program whose purpose is to print a measurement"
)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use baton_kv::{BlockId, DType, KvLayout};
use baton_kv_transfer::{Export, KvClient, KvClientConfig, KvServer, KvServerConfig, Secret};

const ROUNDS: usize = 40;
const N_BLOCKS: u32 = 63;

fn smollm2() -> KvLayout {
    KvLayout {
        n_layers: 30,
        n_kv_heads: 3,
        head_dim: 64,
        block_size: 16,
        dtype: DType::F32,
        model_fingerprint: 1,
    }
}

/// Sends `data` each time it is asked, as fast as `write_all` goes.
fn bare_sender(data: Vec<u8>) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let receiver = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut sender, _) = listener.accept().unwrap();
    sender.set_nodelay(true).unwrap();
    receiver.set_nodelay(true).unwrap();
    thread::spawn(
        move || while sender.read_exact(&mut [0]).is_ok() && sender.write_all(&data).is_ok() {},
    );
    receiver
}

struct HandOver {
    server: KvServer,
    client: KvClient,
}

impl HandOver {
    fn start() -> Self {
        let secret = Secret::new(&[1; 32]).unwrap();
        let mut cfg =
            KvServerConfig::new("127.0.0.1:0".parse().unwrap(), secret.clone(), smollm2());
        if let Some(bytes) = std::env::var("CHUNK_BYTES")
            .ok()
            .and_then(|text| text.parse().ok())
        {
            cfg.chunk_bytes = bytes;
        }
        let client = KvClient::new(KvClientConfig::new(secret, smollm2(), 1 << 30)).unwrap();
        Self {
            server: KvServer::start(cfg).unwrap(),
            client,
        }
    }

    /// From the pull to its callback; the lease is published and held before.
    fn time(&self, data: Vec<u8>) -> Duration {
        let blocks = (0..N_BLOCKS).map(BlockId).collect();
        let export = Export {
            blocks,
            n_tokens: N_BLOCKS * 16,
            data,
        };
        let held = self
            .client
            .hold(&self.server.publish(&export).unwrap())
            .unwrap();
        let (tx, rx) = channel();
        let begun = Instant::now();
        let done = Box::new(move |result| drop(tx.send((Instant::now(), result))));
        let _guard = self.client.pull(&held, 0, N_BLOCKS, done);
        let (end, pulled) = rx.recv().unwrap();
        assert_eq!(pulled.unwrap().n_blocks, N_BLOCKS);
        end - begun
    }
}

fn timed(body: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    body();
    begun.elapsed()
}

/// Best and median, in GB/s.
fn rates(mut times: Vec<Duration>, bytes: usize) -> (f64, f64) {
    times.sort_unstable();
    let rate = |time: Duration| bytes as f64 / time.as_secs_f64() / 1e9;
    (rate(times[0]), rate(times[times.len() / 2]))
}

fn main() {
    let bytes = smollm2().block_bytes() * N_BLOCKS as usize;
    let data: Vec<u8> = (0..bytes).map(|i| (i * 31 % 251) as u8).collect();
    let mut target = vec![1; bytes];
    let mut bare = bare_sender(data.clone());
    let hand_over = HandOver::start();
    let [mut handed, mut copied, mut moved, mut summed] = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        handed.push(hand_over.time(data.clone()));
        copied.push(timed(|| {
            bare.write_all(&[0]).unwrap();
            bare.read_exact(&mut target).unwrap();
        }));
        moved.push(timed(|| {
            std::hint::black_box(&mut target).copy_from_slice(&data);
        }));
        summed.push(timed(|| _ = std::hint::black_box(crc32c::crc32c(&data))));
    }
    let [handed, copied, moved, summed] =
        [handed, copied, moved, summed].map(|times| rates(times, bytes));
    println!("{bytes} bytes, {ROUNDS} rounds, GB/s: best / median");
    println!("hand-over      {:6.2} / {:6.2}", handed.0, handed.1);
    println!("socket copy    {:6.2} / {:6.2}", copied.0, copied.1);
    println!("memcpy         {:6.2} / {:6.2}", moved.0, moved.1);
    println!("checksum       {:6.2} / {:6.2}", summed.0, summed.1);
    let percent = |part: f64, whole: f64| 100.0 * part / whole;
    println!(
        "hand-over is {:.0} % / {:.0} % of the socket copy, {:.0} % / {:.0} % of memcpy",
        percent(handed.0, copied.0),
        percent(handed.1, copied.1),
        percent(handed.0, moved.0),
        percent(handed.1, moved.1),
    );
}
