//! A model server that does not think, for tests and measurements behind a proxy.
//!
//! Answers by the beginning of the path: `/seen` with what it got (`{"headers": {...}, "bytes": N, "sum": S}`), `/stream?n=N&gap_ms=G` with
//! N events of a hundred bytes, `/v1/models` with the model `m`, anything else with one kilobyte of JSON; with `wait_ms=N`,
//! after so long.
#![allow(clippy::print_stdout, reason = "the ready line")]

use baton_http::{ServeConfig, serve};
use bytes::Bytes;
use clap::Parser;
use http::{HeaderValue, Request, Response, header::CONTENT_TYPE};
use http_body::{Body, Frame};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::{Interval, interval};
use tokio_util::sync::CancellationToken;

const MODELS: &str = r#"{"object":"list","data":[{"id":"m","object":"model","owned_by":"vllm"}]}"#;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 0)]
    port: u16,
}

/// Some pieces of the same text, a pause before each.
struct Answer {
    piece: Bytes,
    left: usize,
    gap: Option<Interval>,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        if let Some(gap) = &mut self.gap {
            ready!(gap.poll_tick(cx));
        }
        self.left -= 1;
        Poll::Ready(Some(Ok(Frame::data(self.piece.clone()))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self.left {
            1 => http_body::SizeHint::with_exact(self.piece.len() as u64),
            _ => http_body::SizeHint::default(),
        }
    }
}

impl Answer {
    fn whole(piece: Bytes) -> Self {
        Self {
            piece,
            left: 1,
            gap: None,
        }
    }
}

async fn answer(request: Request<Incoming>, usual: Bytes) -> Response<Answer> {
    let (head, mut body) = request.into_parts();
    let (mut bytes, mut sum) = (0usize, 0u64);
    let seen = head.uri.path().starts_with("/seen");
    while let Some(Ok(frame)) = body.frame().await {
        if let Ok(data) = frame.into_data() {
            bytes += data.len();
            if seen {
                sum = data
                    .iter()
                    .fold(sum, |sum, &b| sum.wrapping_mul(31).wrapping_add(b.into()));
            }
        }
    }
    let number = |name: &str| -> Option<u64> {
        let pairs = head
            .uri
            .query()?
            .split('&')
            .filter_map(|pair| pair.split_once('='));
        pairs
            .filter(|(key, _)| *key == name)
            .find_map(|(_, value)| value.parse().ok())
    };
    if let Some(ms) = number("wait_ms") {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
    let (answer, kind) = match head.uri.path() {
        path if path.starts_with("/seen") => {
            let headers = head
                .headers
                .iter()
                .map(|(k, v)| (k.as_str(), String::from_utf8_lossy(v.as_bytes())));
            let headers: std::collections::BTreeMap<_, _> = headers.collect();
            let seen =
                serde_json::json!({"headers": headers, "bytes": bytes, "sum": sum.to_string()});
            (Answer::whole(seen.to_string().into()), "application/json")
        }
        path if path.starts_with("/stream") => {
            let gap = number("gap_ms").filter(|&ms| ms > 0);
            let answer = Answer {
                piece: Bytes::from(format!(
                    "data: {:93}\n\n",
                    r#"{"choices":[{"text":"word"}]}"#
                )),
                left: number("n").unwrap_or(10) as usize,
                gap: gap.map(|ms| interval(Duration::from_millis(ms))),
            };
            (answer, "text/event-stream")
        }
        "/v1/models" => (Answer::whole(MODELS.into()), "application/json"),
        _ => (Answer::whole(usual), "application/json"),
    };
    let mut response = Response::new(answer);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, args.port)).await?;
    println!("upstream on {}", listener.local_addr()?);
    let usual = Bytes::from(format!(r#"{{"choices":[{{"text":"{:1000}"}}]}}"#, "word"));
    let service = service_fn(move |request| {
        let usual = usual.clone();
        async move { Ok::<_, Infallible>(answer(request, usual).await) }
    });
    let config = ServeConfig {
        head_timeout: Duration::from_secs(600),
        ..ServeConfig::default()
    };
    serve(listener, service, config, CancellationToken::new()).await;
    Ok(())
}
