//! One side of a hand-over in a process of its own, which can be killed and may have a network of its own: this test program
//! once more, told by its environment to play a role. Both speak in lines.

use std::env;
use std::io::{BufRead, BufReader, Write, stdin, stdout};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use crate::common::*;
use baton_kv::KvTransferParams;
use baton_kv_transfer::{KvClient, PeerPolicy};

const ROLE: &str = "BATON_KVX_ROLE";
/// What the lines begin with that are meant for the other process.
const MARK: &str = "kvx ";

/// Lives as long as this value.
pub(crate) struct Process {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Process {
    /// In a network namespace, if one is named.
    pub(crate) fn start(role: &str, network: Option<&str>) -> Self {
        let program = env::current_exe().unwrap();
        let mut command = match network {
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(program);
                command
            }
            None => Command::new(program),
        };
        let mut child = command
            .args(["process::plays_its_role", "--exact", "--nocapture"])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (tx, lines) = channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Some(line) = line.strip_prefix(MARK) {
                    let _ = tx.send(line.to_owned());
                }
            }
        });
        Self {
            child,
            stdin,
            lines,
        }
    }

    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    pub(crate) fn hear(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("another line")
    }

    /// Says something until the answer is the one that is waited for.
    pub(crate) fn ask_until(&mut self, question: &str, answer: &str) {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            self.say(question);
            let heard = self.hear();
            if heard == answer {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{heard}");
            thread::park_timeout(Duration::from_millis(50));
        }
    }

    /// A producer that listens on `addr`, and how to fetch the `n` blocks that it has published.
    pub(crate) fn producer(addr: &str, n: u32, network: Option<&str>) -> (Self, KvTransferParams) {
        let mut producer = Self::start("producer", network);
        producer.say(addr);
        producer.say(&n.to_string());
        let params = serde_json::from_str(&producer.hear()).unwrap();
        (producer, params)
    }

    /// Dies as a process does that is out of memory.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tell(line: &str) {
    // On a line of its own, whatever the test harness has written.
    let line = format!("\n{MARK}{line}\n");
    stdout().write_all(line.as_bytes()).unwrap();
    stdout().flush().unwrap();
}

fn told() -> impl Iterator<Item = String> {
    stdin().lock().lines().map_while(Result::ok)
}

/// The seed of what a producer process publishes.
pub(crate) const SEED: u64 = 11;

fn play_producer() {
    let mut told = told();
    let mut cfg = server_config();
    cfg.bind = told.next().unwrap().parse().unwrap();
    cfg.advertise_host = cfg.bind.ip().to_string();
    // Nothing here ends because of its age: what ends does so for another reason.
    (cfg.lease_ttl, cfg.idle_timeout) = (10 * PATIENCE, 10 * PATIENCE);
    let server = start(cfg);
    let n = told.next().unwrap().parse().unwrap();
    let params = server.publish(&export(n, SEED)).unwrap();
    tell(&serde_json::to_string(&params).unwrap());
    for _ in told {
        tell(&format!("{} connections", server.stats().connections));
    }
}

/// Fetches whatever it is told of, with the patience that it is told first, and holds it.
fn play_consumer() {
    let mut told = told();
    let mut cfg = client_config();
    cfg.peers = PeerPolicy::Allow(Arc::new(|_, _| true));
    cfg.idle_timeout = Duration::from_millis(told.next().unwrap().parse().unwrap());
    cfg.total_timeout = PATIENCE;
    let client = KvClient::new(cfg).unwrap();
    // Who lets go of a lease releases it.
    let mut leases = Vec::new();
    for line in told {
        let params: KvTransferParams = serde_json::from_str(&line).unwrap();
        let held = client.hold(&params).unwrap();
        leases.push(held.clone());
        let (before, failed) = (client.stats().bytes_received, client.stats().failed);
        let (_guard, outcome) = start_pull(&client, &held, 0..held.n_blocks());
        eventually("bytes or an end", || {
            let stats = client.stats();
            stats.bytes_received > before || stats.failed > failed
        });
        tell("begun");
        tell(match outcome.recv_timeout(PATIENCE) {
            Ok(Ok(pulled)) if pulled.data() == bytes(held.n_blocks(), SEED) => "whole",
            Ok(Ok(pulled)) if pulled.shortfall.is_some() => "partial",
            Ok(Ok(_)) => "wrong",
            Ok(Err(error)) => error.code(),
            Err(_) => "stuck",
        });
    }
}

#[test]
fn plays_its_role() {
    match env::var(ROLE).as_deref() {
        Ok("producer") => play_producer(),
        Ok("consumer") => play_consumer(),
        _ => {}
    }
}
