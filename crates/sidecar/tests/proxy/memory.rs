//! Long bodies in little memory, measured on a sidecar in a process of its own.

use crate::fake::{ANSWER, Act, Fake, PARAMS, PATH, config, post, send, streaming};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use std::io::{BufRead as _, Write as _};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use tokio_util::sync::CancellationToken;

const MEGABYTE: usize = 1_000_000;

/// A sidecar in a process of its own, so that its memory is not the test's.
struct Apart {
    process: Child,
    address: SocketAddr,
}

impl Apart {
    fn start(decode: SocketAddr, flags: &str) -> Self {
        let flags = format!(
            "--host=127.0.0.1 --port=0 --secure-proxy=false --model-server-port={} {flags}",
            decode.port()
        );
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args([
                "memory::a_process_of_its_own",
                "--exact",
                "--ignored",
                "--nocapture",
            ])
            .env("SIDECAR_FLAGS", flags)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = std::io::BufReader::new(process.stdout.take().unwrap());
        let address = said.lines().find_map(|line| {
            let line = line.unwrap();
            line.split_once("listens at ")?.1.parse().ok()
        });
        let address = address.unwrap();
        Self { process, address }
    }

    /// A line of the process's status, in bytes.
    fn status(&self, name: &str) -> usize {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.trim_matches([':', ' ', '\t', 'k', 'B'])
            .parse::<usize>()
            .unwrap()
            << 10
    }

    /// What its memory grows by, at most, while `work` is done.
    async fn growth(&self, work: impl Future<Output = ()>) -> usize {
        // Sets the peak back to what is in use now.
        std::fs::write(format!("/proc/{}/clear_refs", self.process.id()), "5").unwrap();
        let before = self.status("VmRSS");
        work.await;
        self.status("VmHWM") - before
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
#[ignore = "runs in a process that another test starts"]
async fn a_process_of_its_own() {
    let Ok(flags) = std::env::var("SIDECAR_FLAGS") else {
        return;
    };
    let bound = baton_sidecar::bind(config(&flags)).await.unwrap();
    writeln!(std::io::stdout(), "listens at {}", bound.address().unwrap()).unwrap();
    baton_sidecar::run(bound, CancellationToken::new()).await;
}

/// Reads an answer without keeping it; how long it was.
async fn read(request: Request<Full<Bytes>>) -> usize {
    let mut body = send(request).await.into_body();
    let mut len = 0;
    while let Some(frame) = body.frame().await {
        len += frame.unwrap().into_data().unwrap().len();
    }
    len
}

#[tokio::test]
async fn an_answer_of_twenty_megabytes_passes_in_little_memory() {
    for (kind, line) in [
        ("application/json", "x".repeat(MEGABYTE / 10)),
        (
            "text/event-stream",
            format!("data: {}\n\n", "x".repeat(1000)).repeat(100),
        ),
    ] {
        let (pieces, act) = streaming(kind);
        let prefill = Fake::start(Act::Json(PARAMS)).await;
        let decode = Fake::start(Act::InTurn(vec![Act::Json(ANSWER), act])).await;
        let sidecar = Apart::start(decode.address, "");
        let request = || post(sidecar.address, Some(prefill.address), "{}");
        read(request()).await;
        let line = Bytes::from(line);
        let feeding = async move {
            pieces.send(r#"{"text":""#.into()).await.unwrap();
            for _ in 0..200 {
                pieces.send(line.clone()).await.unwrap();
            }
        };
        let reading = async {
            let (len, ()) = tokio::join!(read(request()), feeding);
            assert!(len >= 20 * MEGABYTE);
        };
        let grown = sidecar.growth(reading).await;
        assert!(grown < 6 * MEGABYTE, "{kind}: {grown} bytes");
    }
}

#[tokio::test]
async fn a_request_of_twenty_megabytes_takes_no_memory_where_it_is_not_read_and_little_more_than_itself_where_it_is()
 {
    let prefill = Fake::start(Act::Json(PARAMS)).await;
    let decode = Fake::start(Act::Json(ANSWER)).await;
    let sidecar = Apart::start(decode.address, "");
    let body = format!(r#"{{"prompt":"{}","n":1}}"#, "x".repeat(20 * MEGABYTE));
    let asked = |path: &str, body: String| {
        let mut request = post(sidecar.address, Some(prefill.address), body);
        *request.uri_mut() = format!("http://{}{path}", sidecar.address).parse().unwrap();
        async move { assert_eq!(read(request).await, ANSWER.len()) }
    };
    asked(PATH, "{}".to_owned()).await;
    let unread = sidecar.growth(asked("/tokenize", body.clone())).await;
    assert!(unread < 6 * MEGABYTE, "unread: {unread} bytes");
    let edited = sidecar.growth(asked(PATH, body)).await;
    assert!(edited < 32 * MEGABYTE, "edited: {edited} bytes");
}

#[tokio::test]
async fn many_long_requests_at_once_are_refused_before_they_take_all_memory() {
    let prefill = Fake::start(Act::Hang).await;
    let decode = Fake::start(Act::Json(ANSWER)).await;
    let sidecar = Apart::start(decode.address, "--max-body-bytes=2000000");
    let body = Bytes::from(format!(
        r#"{{"prompt":"{}"}}"#,
        "x".repeat(2 * MEGABYTE - 100)
    ));
    let flood = async {
        let mut asked = tokio::task::JoinSet::new();
        for _ in 0..40 {
            let request = post(sidecar.address, Some(prefill.address), body.clone());
            asked.spawn(async { send(request).await.status() });
        }
        // Eight find a place, the others an answer.
        for _ in 0..32 {
            let status = asked.join_next().await.unwrap().unwrap();
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        }
    };
    let grown = sidecar.growth(flood).await;
    // Eight bodies, what is made of them for prefill, and what forty connections read ahead: 40 to 60 MB, as pieces fall.
    // All forty would be 160.
    assert!(grown < 80 * MEGABYTE, "{grown} bytes");
}
