//! Load for measurements: `--conns` connections that send one POST after the other, `--count` in all.
//!
//! Prints one JSON object: requests per second, latency, errors, and chunks of the answers.
#![allow(clippy::print_stdout, reason = "the result")]

use bytes::Bytes;
use clap::Parser;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

#[derive(Clone, Parser)]
struct Args {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value = "/v1/completions")]
    path: String,
    #[arg(long, default_value_t = 64)]
    conns: usize,
    #[arg(long, default_value_t = 10_000)]
    count: usize,
    /// Length of the prompt, in bytes.
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Different beginnings of prompts.
    #[arg(long, default_value_t = 16)]
    prefixes: usize,
    /// Requests a second, all connections together; as many as possible without it.
    #[arg(long)]
    rate: Option<f64>,
}

#[derive(Default)]
struct Seen {
    started: Cell<usize>,
    errors: Cell<usize>,
    pieces: Cell<usize>,
    times: RefCell<Vec<Duration>>,
}

fn body(args: &Args, i: usize) -> Bytes {
    let word = format!("prefix {:04} of some prompt ", i % args.prefixes);
    let mut prompt = word.repeat(args.prompt / word.len() + 1);
    prompt.truncate(args.prompt);
    format!(r#"{{"model":"m","max_tokens":16,"stream":true,"prompt":"{prompt}"}}"#).into()
}

async fn client(
    args: Args,
    seen: Rc<Seen>,
    bodies: Rc<Vec<Bytes>>,
    begin: Instant,
) -> Result<(), Box<dyn std::error::Error>> {
    let stream = TcpStream::connect(args.to).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    loop {
        let i = seen.started.get();
        if i >= args.count {
            return Ok(());
        }
        seen.started.set(i + 1);
        if let Some(rate) = args.rate {
            tokio::time::sleep_until((begin + Duration::from_secs_f64(i as f64 / rate)).into())
                .await;
        }
        let start = Instant::now();
        let request = Request::post(&args.path)
            .header("host", "model")
            .header("content-type", "application/json")
            .body(Full::new(bodies[i % bodies.len()].clone()))?;
        sender.ready().await?;
        let response = sender.send_request(request).await?;
        let good = response.status() == StatusCode::OK;
        let mut answer = response.into_body();
        while let Some(frame) = answer.frame().await {
            frame?;
            seen.pieces.set(seen.pieces.get() + 1);
        }
        seen.errors.set(seen.errors.get() + usize::from(!good));
        seen.times.borrow_mut().push(start.elapsed());
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let seen: Rc<Seen> = Rc::default();
    let bodies: Rc<Vec<Bytes>> = Rc::new((0..args.prefixes).map(|i| body(&args, i)).collect());
    let begin = Instant::now();
    let local = LocalSet::new();
    for _ in 0..args.conns {
        let (args, seen, bodies) = (args.clone(), seen.clone(), bodies.clone());
        local.spawn_local(async move {
            if client(args, seen.clone(), bodies, begin).await.is_err() {
                seen.errors.set(seen.errors.get() + 1);
            }
        });
    }
    local.await;
    let seconds = begin.elapsed().as_secs_f64();
    let mut times = seen.times.take();
    times.sort_unstable();
    let at = |part: f64| {
        times
            .get((times.len() as f64 * part) as usize)
            .map_or(0.0, |t| t.as_secs_f64() * 1e3)
    };
    println!(
        "{}",
        serde_json::json!({
            "done": times.len(), "errors": seen.errors.get(), "req_s": times.len() as f64 / seconds,
            "p50_ms": at(0.5), "p99_ms": at(0.99), "pieces": seen.pieces.get(),
        })
    );
    Ok(())
}
