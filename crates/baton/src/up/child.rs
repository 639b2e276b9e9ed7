//! One child: started, watched, started again when it ends, ended when told.

use super::backoff::Backoff;
use super::screen::Screen;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Longest line that is passed on in one piece.
const MAX_LINE: u64 = 16 << 10;
/// How long the rest of a dead child's output may take; a grandchild may hold its pipes open.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What to start.
#[derive(Clone, Debug)]
pub(super) struct Spec {
    index: usize,
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(&'static str, String)>,
}

impl Spec {
    /// The child number `index`, called `name`.
    pub(super) fn new(index: usize, name: &str, program: PathBuf, args: Vec<OsString>) -> Self {
        Self {
            index,
            name: name.to_owned(),
            program,
            args,
            env: Vec::new(),
        }
    }

    /// With an environment variable more.
    pub(super) fn env(mut self, name: &'static str, value: &str) -> Self {
        self.env.push((name, value.to_owned()));
        self
    }

    fn spawn(&self) -> std::io::Result<Child> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C on the terminal is for the supervisor, which ends its children in order.
            .process_group(0)
            .kill_on_drop(true);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "warn");
        }
        command.spawn()
    }
}

/// What happened to a child.
#[derive(Debug)]
pub(super) enum Event {
    /// It printed its address.
    Ready { child: usize, address: SocketAddr },
    /// It ended, without having been told to.
    Exited {
        child: usize,
        status: String,
        again_in: Duration,
    },
}

/// How a child is told to end.
#[derive(Clone, Debug)]
pub(super) struct Orders {
    /// End when what you have is done.
    pub(super) stop: CancellationToken,
    /// End now.
    pub(super) kill: CancellationToken,
    /// How long the former may take.
    pub(super) grace: Duration,
}

/// Keeps the child of `spec` running until it is told to stop.
pub(super) async fn keep(
    spec: Spec,
    orders: Orders,
    events: mpsc::Sender<Event>,
    screen: Arc<Screen>,
) {
    let mut backoff = Backoff::default();
    while !orders.stop.is_cancelled() {
        let (status, lived) = live(&spec, &orders, &events, &screen).await;
        if orders.stop.is_cancelled() {
            break;
        }
        let again_in = backoff.after(lived);
        // An error means that nobody listens because everything ends.
        let _ = events
            .send(Event::Exited {
                child: spec.index,
                status,
                again_in,
            })
            .await;
        tokio::select! {
            () = tokio::time::sleep(again_in) => {}
            () = orders.stop.cancelled() => {}
        }
    }
}

/// One life of the child: how it ended, and for how long it had been ready.
async fn live(
    spec: &Spec,
    orders: &Orders,
    events: &mpsc::Sender<Event>,
    screen: &Arc<Screen>,
) -> (String, Duration) {
    let mut child = match spec.spawn() {
        Ok(child) => child,
        Err(error) => {
            return (
                format!("{} cannot be started: {error}", spec.program.display()),
                Duration::ZERO,
            );
        }
    };
    let stdin = child.stdin.take();
    let (told, mut ready) = oneshot::channel();
    let mut pipes = JoinSet::new();
    pipes.spawn(pass_on(
        child.stdout.take(),
        Some(told),
        spec.clone(),
        screen.clone(),
    ));
    pipes.spawn(pass_on(
        child.stderr.take(),
        None,
        spec.clone(),
        screen.clone(),
    ));

    let mut since = None;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            Ok(address) = &mut ready, if since.is_none() => {
                since = Some(Instant::now());
                let _ = events.send(Event::Ready { child: spec.index, address }).await;
            }
            () = orders.stop.cancelled() => {
                // The end of its input is the order to end.
                drop(stdin);
                break end(&mut child, orders).await;
            }
        }
    };
    let last_words = async { while pipes.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
    (
        describe(status),
        since.map_or(Duration::ZERO, |s| s.elapsed()),
    )
}

async fn end(child: &mut Child, orders: &Orders) -> std::io::Result<ExitStatus> {
    tokio::select! {
        status = child.wait() => return status,
        () = tokio::time::sleep(orders.grace) => {}
        () = orders.kill.cancelled() => {}
    }
    child.start_kill()?;
    child.wait().await
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// Passes a child's output on, line by line; the first address in it is taken for the child's own.
async fn pass_on<R: AsyncRead + Unpin>(
    pipe: Option<R>,
    mut told: Option<oneshot::Sender<SocketAddr>>,
    spec: Spec,
    screen: Arc<Screen>,
) {
    let Some(pipe) = pipe else { return };
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .await
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let address = told.is_some().then(|| address_in(&text)).flatten();
        match address.zip(told.take_if(|_| address.is_some())) {
            // Nobody waits for it only if the child was told to end meanwhile.
            Some((address, told)) => drop(told.send(address)),
            None => screen.line(spec.index, &spec.name, text.trim_end()),
        }
    }
}

/// The address in a ready line: what follows `http://`.
fn address_in(line: &str) -> Option<SocketAddr> {
    let (_, rest) = line.split_once("http://")?;
    rest.split(|c: char| c.is_whitespace() || c == '/')
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found_in_a_ready_line() {
        let found = |line| address_in(line).map(|a| a.to_string());
        assert_eq!(
            found("decode smollm2 ready at http://127.0.0.1:4000\n").as_deref(),
            Some("127.0.0.1:4000")
        );
        assert_eq!(
            found("http://[::1]:80/v1 and more").as_deref(),
            Some("[::1]:80")
        );
        for line in [
            "",
            "http://",
            "http://localhost:80",
            "https://127.0.0.1:1",
            "http://127.0.0.1:99999",
        ] {
            assert_eq!(found(line), None, "{line}");
        }
    }
}
