//! What it costs to watch a fleet: cores used for 100 and 1000 servers, idle and busy.
//!
//! All servers are one made-up server on loopback, in a thread of its own whose time does not count, with a metrics page
//! as long as vLLM's. `cargo bench -p baton-fleet --bench scrape [-- SERVERS...]`
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program whose purpose is to print a measurement"
)]

use baton_fleet::{Address, EndpointSpec, Fleet, Probing, watch};
use baton_scheduler::{Health, Policy, PrefixIndex, Scheduler};
use rustix::time::{ClockId, clock_gettime};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;

const WARM_UP: Duration = Duration::from_secs(4);
const MEASURED: Duration = Duration::from_secs(6);

/// What the made-up server was asked, what that cost it, and whether its numbers change.
#[derive(Default)]
struct Mock {
    scrapes: AtomicU64,
    nanos: AtomicU64,
    is_busy: AtomicBool,
}

fn nanos(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    u64::try_from(time.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap()
}

/// About 600 lines in the form of vLLM's: gauges, then histograms, the size of the cache near the end.
fn page(running: u64) -> String {
    let labels = r#"engine="0",model_name="meta-llama/Llama-3.3-70B-Instruct""#;
    let mut text = String::new();
    for (name, value) in [
        ("num_requests_running", running),
        ("num_requests_waiting", 0),
        ("kv_cache_usage_perc", 0),
    ] {
        writeln!(text, "# HELP vllm:{name} What it is, in a line of words.\n# TYPE vllm:{name} gauge\nvllm:{name}{{{labels}}} {value}.0").unwrap();
    }
    for i in 0..15 {
        let name = format!("vllm:histogram_of_something_in_seconds_{i}");
        writeln!(
            text,
            "# HELP {name} Histogram of something in seconds.\n# TYPE {name} histogram"
        )
        .unwrap();
        for bucket in 0..35 {
            writeln!(
                text,
                "{name}_bucket{{{labels},le=\"{bucket}.5\"}} {}.0",
                bucket * 7
            )
            .unwrap();
        }
        writeln!(
            text,
            "{name}_count{{{labels}}} 9.0\n{name}_sum{{{labels}}} 1.25"
        )
        .unwrap();
    }
    writeln!(text, "vllm:cache_config_info{{block_size=\"16\",cache_dtype=\"auto\",num_gpu_blocks=\"20000\"}} 1.0").unwrap();
    text
}

async fn serve(mut stream: TcpStream, mock: Arc<Mock>, pages: Arc<[Vec<u8>; 2]>) {
    stream.set_nodelay(true).unwrap();
    let mut request = [0u8; 4096];
    while let Ok(n @ 1..) = stream.read(&mut request).await {
        let answer: &[u8] = if request[..n].starts_with(b"GET /metrics") {
            let count = mock.scrapes.fetch_add(1, Relaxed);
            &pages[usize::from(mock.is_busy.load(Relaxed) && count.is_multiple_of(2))]
        } else {
            b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n{\"data\":[]}"
        };
        if stream.write_all(answer).await.is_err() {
            return;
        }
        mock.nanos.store(nanos(ClockId::ThreadCPUTime), Relaxed);
    }
}

/// MiB that this process has in memory.
fn memory() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: f64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages / 256.0
}

fn start_mock(mock: Arc<Mock>) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let pages = [0, 3].map(|running| {
        let page = page(running);
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{page}",
            page.len()
        )
        .into_bytes()
    });
    let pages = Arc::new(pages);
    std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, mock.clone(), pages.clone()));
            }
        });
    });
    address
}

fn fleet(address: SocketAddr, servers: usize) -> Arc<Fleet> {
    let scheduler = Scheduler::new(Policy::default(), PrefixIndex::new(31_250));
    let fleet = Arc::new(Fleet::new(scheduler, 7));
    let specs: Vec<EndpointSpec> = (0..servers)
        .map(|i| EndpointSpec::new(format!("s{i}"), Address::from(address)))
        .collect();
    fleet.set_endpoints(&specs).unwrap();
    fleet
}

/// Cores used, scrapes a second, microseconds a scrape (health checks included), and MiB of memory, those of the made-up
/// server's connections included.
fn measure(mock: &Mock, threads: usize, address: SocketAddr, servers: usize) -> [f64; 4] {
    let runtime = match threads {
        1 => Builder::new_current_thread().enable_all().build(),
        n => Builder::new_multi_thread()
            .worker_threads(n)
            .enable_all()
            .build(),
    };
    let runtime = runtime.unwrap();
    let fleet = fleet(address, servers);
    runtime.block_on(async {
        let probes = tokio::spawn(watch(fleet.clone(), Probing::default()));
        tokio::time::sleep(WARM_UP).await;
        let used = || nanos(ClockId::ProcessCPUTime) - mock.nanos.load(Relaxed);
        let (began, before, asked) = (Instant::now(), used(), mock.scrapes.load(Relaxed));
        tokio::time::sleep(MEASURED).await;
        let seconds = began.elapsed().as_secs_f64();
        let cpu = (used() - before) as f64 / 1e9;
        let scrapes = (mock.scrapes.load(Relaxed) - asked) as f64;
        let servers_now = fleet.servers();
        let healthy = servers_now.iter().filter(|s| s.health() == Health::Healthy);
        assert_eq!(healthy.count(), servers);
        probes.abort();
        [
            cpu / seconds,
            scrapes / seconds,
            cpu / scrapes * 1e6,
            memory(),
        ]
    })
}

fn main() {
    let asked: Vec<usize> = (std::env::args().skip(1))
        .filter_map(|arg| arg.parse().ok())
        .collect();
    let sizes = if asked.is_empty() {
        vec![100, 1000]
    } else {
        asked
    };
    let mock = Arc::new(Mock::default());
    let address = start_mock(mock.clone());
    println!(
        "page of {} bytes, {} lines",
        page(0).len(),
        page(0).lines().count()
    );
    println!("servers  numbers   threads  cores   scrapes/s  us/scrape  MiB");
    for servers in sizes {
        for (is_busy, numbers) in [(false, "idle"), (true, "changing")] {
            for threads in [1, 2] {
                mock.is_busy.store(is_busy, Relaxed);
                let [cores, rate, micros, mib] = measure(&mock, threads, address, servers);
                println!(
                    "{servers:7}  {numbers:8}  {threads:7}  {cores:5.3}  {rate:9.0}  {micros:9.1}  {mib:3.0}"
                );
            }
        }
    }
}
