//! The least that can be called an endpoint picker: round robin. For tests and measurements, and as a pattern.
//!
//! A request may ask for what tests need by its headers: `test-refuse: STATUS`, `test-wait-ms: N` before the decision,
//! `test-evict-ms: N` after its begin, `test-response: watch|rewrite`, `test-prefill: ADDRESS`. With `--log`, every exchange writes a line when it ends.
#![allow(
    clippy::print_stdout,
    reason = "the ready line and the log are the example's output"
)]

use baton_ext_proc::{
    Destination, Ended, Exchange, Health, Limits, Picker, Refusal, Reply, RequestHead,
    ResponseBody, ResponseHead, Routed, ServingStatus, serve, serve_health,
};
use baton_http::{Http2Config, Identity, Pieces};
use baton_openai::ErrorKind;
use bytes::Bytes;
use clap::Parser;
use std::future::Future as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;

#[derive(Parser)]
struct Args {
    /// Where the proxy connects.
    #[arg(long, default_value_t = 9002)]
    grpc_port: u16,
    /// Where health is asked for, in plain text.
    #[arg(long, default_value_t = 9003)]
    grpc_health_port: u16,
    /// Serve TLS.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    secure_serving: bool,
    /// Folder with tls.crt and tls.key; a certificate is made without it.
    #[arg(long)]
    cert_path: Option<PathBuf>,
    /// Endpoints to choose from.
    #[arg(long = "endpoint", required = true)]
    endpoints: Vec<SocketAddr>,
    /// Longest wait for a decision, in milliseconds.
    #[arg(long, default_value_t = 10_000)]
    decision_ms: u64,
    /// Longest body of a request, in bytes.
    #[arg(long, default_value_t = 64 << 20)]
    max_body: usize,
    /// Bytes of bodies held at a time, all requests together.
    #[arg(long, default_value_t = 1 << 30)]
    max_held: usize,
    /// Most exchanges at a time.
    #[arg(long, default_value_t = 40_000)]
    max_exchanges: usize,
    /// Write a line for every exchange that ended.
    #[arg(long)]
    log: bool,
}

struct RoundRobin {
    endpoints: Vec<(SocketAddr, Destination)>,
    next: AtomicUsize,
    log: bool,
}

struct Turn {
    routed: Option<Result<Routed, Refusal>>,
    wait: Option<Pin<Box<Sleep>>>,
    evicted: Option<Pin<Box<Sleep>>>,
    response: ResponseBody,
    log: Option<String>,
    seen: usize,
    served: Option<String>,
}

impl Picker for RoundRobin {
    type Exchange = Turn;

    fn begin(&self, head: RequestHead) -> Result<Turn, Refusal> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let n = self.endpoints.len();
        let mut in_turn = (turn..turn + n).map(|i| &self.endpoints[i % n]);
        let chosen = in_turn.find(|(address, _)| head.allows(address));
        let says = |name: &str| head.headers.text(name);
        let routed = match (
            says("test-refuse").and_then(|status| status.parse().ok()),
            chosen,
        ) {
            (Some(status), _) => {
                let kind = ErrorKind::of_status(status);
                Err(Refusal::new(kind, "as asked").dropped("rejected-saturated"))
            }
            (None, None) => Err(Refusal::no_endpoint()),
            (None, Some((_, destination))) => {
                let mut routed = Routed::to(destination.clone());
                let prefill = head.headers.bytes("test-prefill");
                routed
                    .set
                    .extend(prefill.map(|prefill| ("x-prefiller-host-port", prefill)));
                Ok(routed)
            }
        };
        let after = |name| {
            let ms = says(name)?.parse().ok()?;
            Some(Box::pin(tokio::time::sleep(Duration::from_millis(ms))))
        };
        Ok(Turn {
            routed: Some(routed),
            wait: after("test-wait-ms"),
            evicted: after("test-evict-ms"),
            response: match says("test-response") {
                Some("watch") => ResponseBody::Watch,
                Some("rewrite") => ResponseBody::Rewrite,
                _ => ResponseBody::Pass,
            },
            log: self
                .log
                .then(|| says("x-request-id").unwrap_or("-").to_owned()),
            seen: 0,
            served: None,
        })
    }
}

impl Exchange for Turn {
    fn request_piece(&mut self, piece: &Bytes) {
        self.seen += piece.len();
    }

    fn poll_decide(&mut self, cx: &mut Context<'_>, _: &Pieces) -> Poll<Result<Routed, Refusal>> {
        if let Some(wait) = &mut self.wait {
            ready!(wait.as_mut().poll(cx));
        }
        let again = || Err(Refusal::new(ErrorKind::Internal, "decided already"));
        Poll::Ready(self.routed.take().unwrap_or_else(again))
    }

    fn poll_evicted(&mut self, cx: &mut Context<'_>) -> Poll<Refusal> {
        let Some(evicted) = &mut self.evicted else {
            return Poll::Pending;
        };
        let refusal = || Refusal::new(ErrorKind::TooManyRequests, "as asked").dropped("evicted");
        evicted.as_mut().poll(cx).map(|()| refusal())
    }

    fn response_head(&mut self, head: &ResponseHead) -> Reply {
        self.served.clone_from(&head.served);
        let served = head
            .served
            .clone()
            .map(|served| ("x-served", served.into()));
        Reply {
            set: served.into_iter().collect(),
            remove: Vec::new(),
            body: self.response,
        }
    }

    fn rewrite_piece(&mut self, piece: Bytes, _: bool, out: &mut Pieces) {
        out.push(piece.to_ascii_uppercase());
    }

    fn ended(&mut self, why: Ended) {
        if let Some(id) = &self.log {
            println!(
                "ended {id} {why:?} body={} served={:?}",
                self.seen, self.served
            );
        }
    }
}

fn identity(args: &Args) -> Result<Option<Identity>, Box<dyn std::error::Error>> {
    Ok(match (args.secure_serving, &args.cert_path) {
        (false, _) => None,
        (true, None) => Some(Identity::self_signed()?.for_http2()),
        (true, Some(folder)) => {
            let identity = Identity::from_folder(folder)?.for_http2();
            tokio::spawn(identity.clone().follow_folder(folder.clone()));
            Some(identity)
        }
    })
}

/// Serving until `shutdown`.
fn health(shutdown: CancellationToken) -> Health {
    Health::new(
        &["envoy.service.ext_proc.v3.ExternalProcessor"],
        move |_| match shutdown.is_cancelled() {
            true => ServingStatus::NotServing,
            false => ServingStatus::Serving,
        },
    )
}

fn terminated() -> std::io::Result<CancellationToken> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let token = CancellationToken::new();
    let cancel = token.clone();
    tokio::spawn(async move {
        terminate.recv().await;
        cancel.cancel();
    });
    Ok(token)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let config = Http2Config {
        tls: identity(&args)?,
        ..Http2Config::default()
    };
    let endpoints = args.endpoints.iter();
    let picker = RoundRobin {
        endpoints: endpoints
            .map(|&address| (address, address.into()))
            .collect(),
        next: AtomicUsize::new(0),
        log: args.log,
    };
    let limits = Limits {
        decision: Duration::from_millis(args.decision_ms),
        max_body: args.max_body,
        max_held: args.max_held,
        max_exchanges: args.max_exchanges,
        ..Limits::default()
    };
    let shutdown = terminated()?;
    let health = health(shutdown.clone());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, args.grpc_port)).await?;
    let for_health = TcpListener::bind((Ipv4Addr::LOCALHOST, args.grpc_health_port)).await?;
    println!(
        "picker on {}, health on {}",
        listener.local_addr()?,
        for_health.local_addr()?
    );
    // Health is told to the end.
    let never = CancellationToken::new();
    tokio::spawn(serve_health(
        for_health,
        health.clone(),
        Http2Config::default(),
        never,
    ));
    serve(
        listener,
        Arc::new(picker),
        limits,
        Some(health),
        config,
        shutdown,
    )
    .await;
    Ok(())
}
