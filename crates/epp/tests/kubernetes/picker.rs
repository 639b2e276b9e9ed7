//! A picker that runs, and what is asked of it from outside.

use baton_epp::Settings;
use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const CHECK: &str = "/grpc.health.v1.Health/Check";
const PROCESS: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
pub(crate) const SERVING: u8 = 1;
pub(crate) const NOT_SERVING: u8 = 2;

static STARTED: AtomicUsize = AtomicUsize::new(0);

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

/// A picker of the pool `pool`, on free ports of loopback.
pub(crate) struct Picker {
    grpc: SocketAddr,
    health: SocketAddr,
    metrics: SocketAddr,
    shutdown: CancellationToken,
    running: JoinHandle<()>,
}

impl Picker {
    pub(crate) async fn start(kubeconfig: &str, namespace: &str, more: &[&str]) -> Self {
        let (process, n) = (std::process::id(), STARTED.fetch_add(1, Relaxed));
        let file = std::env::temp_dir().join(format!("baton-epp-{process}-{n}.json"));
        std::fs::write(&file, kubeconfig).unwrap();
        let always = [
            "epp",
            "--host",
            "127.0.0.1",
            "--grpc-port",
            "0",
            "--grpc-health-port",
            "0",
            "--metrics-port",
            "0",
            "--secure-serving=false",
            "--drain-timeout",
            "0s",
            "--pool-name",
            "pool",
            "--pool-namespace",
            namespace,
            "--kubeconfig",
            file.to_str().unwrap(),
        ];
        let line = Line::try_parse_from(always.iter().chain(more)).unwrap();
        let (config, _) = line.settings.resolve().unwrap();
        let bound = baton_epp::bind(config).await.unwrap();
        std::fs::remove_file(&file).unwrap();
        let [grpc, health, metrics] = bound.addresses().unwrap();
        let shutdown = CancellationToken::new();
        Self {
            grpc,
            health,
            metrics,
            running: tokio::spawn(baton_epp::run(bound, shutdown.clone())),
            shutdown,
        }
    }

    /// What health says of the service; 0 if nothing.
    pub(crate) async fn status(&self, service: &str) -> u8 {
        let answer = ask(self.health, CHECK, &text(1, service)).await;
        answer.last().copied().unwrap_or(0)
    }

    pub(crate) async fn until_status(&self, wanted: u8) {
        self.until(&format!("status {wanted}"), async || {
            (self.status("").await == wanted).then_some(())
        })
        .await;
    }

    /// Status line and page of `/metrics`.
    pub(crate) async fn page(&self, token: Option<&str>) -> String {
        let token = token.map_or(String::new(), |t| format!("authorization: Bearer {t}\r\n"));
        let request =
            format!("GET /metrics HTTP/1.1\r\nhost: m\r\nconnection: close\r\n{token}\r\n");
        let mut stream = TcpStream::connect(self.metrics).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).await.unwrap();
        page
    }

    /// Waits until a line of the metrics has all of these words.
    pub(crate) async fn until_metric(&self, token: Option<&str>, words: &[&str]) {
        self.until(&format!("{words:?}"), async || {
            let page = self.page(token).await;
            let has = |line: &str| words.iter().all(|word| line.contains(word));
            page.lines().any(has).then_some(())
        })
        .await;
    }

    /// A minute without `wanted` is a failure.
    pub(crate) async fn until<T>(&self, what: &str, wanted: impl AsyncFn() -> Option<T>) -> T {
        let found = async {
            loop {
                if let Some(found) = wanted().await {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(60), found).await;
        found.unwrap_or_else(|_| panic!("never: {what}"))
    }

    /// A request without a body for an objective, as a proxy tells of it.
    pub(crate) async fn request(&self, objective: &str) {
        let headers = [
            (":method", "GET"),
            (":path", "/v1/models"),
            ("x-llm-d-inference-objective", objective),
        ];
        let map: Vec<u8> = headers
            .iter()
            .flat_map(|(name, value)| bytes(1, &[text(1, name), text(3, value)].concat()))
            .collect();
        let ends = [3 << 3, 1];
        let head = [bytes(1, &map), ends.to_vec()].concat();
        ask(self.grpc, PROCESS, &bytes(2, &head)).await;
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        self.running.await.unwrap();
    }
}

/// One message of gRPC, and all that is answered.
async fn ask(at: SocketAddr, path: &str, message: &[u8]) -> Bytes {
    let stream = TokioIo::new(TcpStream::connect(at).await.unwrap());
    let (mut connection, driver) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream)
            .await
            .unwrap();
    let driver = tokio::spawn(driver);
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let body = [&[0], &length[..], message].concat();
    let request = http::Request::post(format!("http://{at}{path}"))
        .header("content-type", "application/grpc")
        .body(Full::new(Bytes::from(body)));
    let response = connection.send_request(request.unwrap()).await.unwrap();
    let answer = response.into_body().collect().await;
    driver.abort();
    answer.map(|answer| answer.to_bytes()).unwrap_or_default()
}

fn text(number: u8, value: &str) -> Vec<u8> {
    bytes(number, value.as_bytes())
}

/// A field of a message.
fn bytes(number: u8, value: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    let mut left = value.len();
    while left > 127 {
        field.push((left & 127) as u8 | 128);
        left >>= 7;
    }
    field.push(left as u8);
    field.extend_from_slice(value);
    field
}
