//! Whole exchanges as text: what a client sends, what servers are asked and answer, what the client gets.
//!
//! Each file in `tests/transcripts` is one exchange. Blocks that begin with `>>>` are its script, those with `<<<` what
//! must come of it, byte for byte except for dates, ports and random ids. `UPDATE=1 cargo test -p baton-sidecar --test
//! transcripts` writes the latter; read the diff before it is committed.
//!
//! A server's block is one answer. Instead of a status line it may say `!refuse` (nobody listens), `!reset` (hang up
//! without an answer), `!hang` (never answer), before it `!after decode` (once decode was asked); `!cut` as its last line hangs up in the middle of the body, `!hang` never ends it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use baton_sidecar::{Settings, bind, run};
use clap::Parser;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const SERVERS: [&str; 4] = ["prefill", "prefill2", "decode", "bootstrap"];

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

/// The blocks of a file, each with its name.
fn blocks(text: &str) -> Vec<(String, String)> {
    let mut out: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix(">>> ") {
            out.push((name.to_owned(), String::new()));
        } else if line.starts_with("<<< ") {
            break;
        } else if let Some((_, block)) = out.last_mut() {
            block.push_str(line);
            block.push('\n');
        }
    }
    out
}

/// A message as it goes over the wire: lines end in CRLF up to the empty one, the body's length is added.
fn message(block: &str, missing: usize) -> Vec<u8> {
    let (head, body) = block.split_once("\n\n").unwrap_or((block.trim_end(), ""));
    let body = body.strip_suffix('\n').unwrap_or(body);
    let mut out = head.replace('\n', "\r\n");
    let chunked = head.contains("transfer-encoding: chunked");
    if !chunked && !head.starts_with("GET") {
        write!(out, "\r\ncontent-length: {}", body.len() + missing).unwrap();
    }
    out.push_str("\r\n\r\n");
    if chunked && missing == 0 {
        write!(out, "{:x}\r\n{body}\r\n0\r\n\r\n", body.len()).unwrap();
    } else if chunked {
        write!(out, "{:x}\r\n{body}", body.len() + missing).unwrap();
    } else {
        out.push_str(body);
    }
    out.into_bytes()
}

/// A message as it came: head and decoded body, and whether it ended as it should.
fn readable(raw: &[u8]) -> String {
    let raw = String::from_utf8_lossy(raw);
    let Some((head, mut body)) = raw.split_once("\r\n\r\n") else {
        return if raw.is_empty() {
            "!closed\n".to_owned()
        } else {
            format!("{raw}!cut\n")
        };
    };
    let mut lines: Vec<&str> = head.split("\r\n").collect();
    lines.retain(|line| !line.starts_with("date: "));
    let head = lines.join("\n");
    let mut decoded = String::new();
    let mut whole = true;
    if head.contains("transfer-encoding: chunked") {
        loop {
            let Some((size, rest)) = body.split_once("\r\n") else {
                whole = false;
                break;
            };
            let size = usize::from_str_radix(size, 16).unwrap();
            if size == 0 {
                break;
            }
            decoded.push_str(&rest[..size.min(rest.len())]);
            body = rest.get(size + 2..).unwrap_or_default();
        }
    } else {
        let length = lines
            .iter()
            .find_map(|l| l.strip_prefix("content-length: "));
        whole = length.is_none_or(|n| n.parse::<usize>().unwrap() == body.len());
        decoded.push_str(body);
    }
    let cut = if whole { "" } else { "!cut\n" };
    if decoded.is_empty() {
        format!("{head}\n{cut}")
    } else {
        format!("{head}\n\n{decoded}\n{cut}")
    }
}

/// Reads one request from `stream`; nothing if there is none.
async fn request(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut raw = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&raw).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|l| l.strip_prefix("content-length: "));
            let done = match length {
                Some(n) => body.len() >= n.parse::<usize>().unwrap(),
                None => !head.contains("chunked") || body.ends_with("0\r\n\r\n"),
            };
            if done {
                return Some(raw);
            }
        }
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(n) => raw.extend_from_slice(&buffer[..n]),
        }
    }
}

type Answers = Arc<Mutex<VecDeque<String>>>;
/// The servers that were asked, in order.
type Asked = Arc<watch::Sender<Vec<&'static str>>>;

/// A server that gives its answers in order, and what it was asked.
struct Server {
    name: &'static str,
    address: String,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn port(&self) -> &str {
        self.address.rsplit_once(':').unwrap().1
    }

    async fn start(name: &'static str, answers: Vec<String>, asked: &Asked) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::default();
        let server = Self {
            name,
            address,
            seen,
        };
        if answers.first().is_some_and(|a| a.trim() == "!refuse") {
            return server;
        }
        let answers = Arc::new(Mutex::new(VecDeque::from(answers)));
        let (seen, asked) = (server.seen.clone(), asked.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let script = (answers.clone(), seen.clone());
                tokio::spawn(serve(stream, name, script, asked.clone()));
            }
        });
        server
    }
}

async fn serve(
    mut stream: TcpStream,
    name: &'static str,
    (answers, seen): (Answers, Arc<Mutex<Vec<String>>>),
    asked: Asked,
) {
    while let Some(raw) = request(&mut stream).await {
        seen.lock().unwrap().push(readable(&raw));
        asked.send_modify(|names| names.push(name));
        let answer = answers.lock().unwrap().pop_front();
        let mut answer = answer.unwrap_or_else(|| "HTTP/1.1 599 Unscripted\n".to_owned());
        if let Some((other, rest)) = answer
            .strip_prefix("!after ")
            .and_then(|a| a.split_once('\n'))
        {
            let mut asked = asked.subscribe();
            asked
                .wait_for(|names| names.contains(&other))
                .await
                .unwrap();
            answer = rest.to_owned();
        }
        match answer.trim() {
            "!reset" => return,
            "!hang" => std::future::pending().await,
            _ => {}
        }
        let (block, end) = match answer.trim_end().rsplit_once('\n') {
            Some((block, end @ ("!cut" | "!hang"))) => (format!("{block}\n"), Some(end)),
            _ => (answer, None),
        };
        let raw = message(&block, end.map_or(0, |_| 7));
        stream.write_all(&raw).await.unwrap();
        match end {
            Some("!hang") => std::future::pending().await,
            Some(_) => return,
            None => {}
        }
    }
}

/// `text` with everything that differs from run to run replaced by its name.
fn normal(mut text: String, servers: &[Server]) -> String {
    for server in servers {
        text = text.replace(&server.address, &server.name.to_uppercase());
        let port = server.port();
        text = text.replace(
            &format!("_port\":{port}"),
            &format!("_port\":{}-PORT", server.name.to_uppercase()),
        );
    }
    let mut out = String::new();
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let word = rest
            .find(|c: char| !(c.is_ascii_hexdigit() || c == '-'))
            .unwrap_or(rest.len());
        let word = if rest.starts_with('-') { 1 } else { word };
        let (head, tail) = rest.split_at(word.max(1));
        let is_uuid =
            head.len() == 36 && head.as_bytes()[14] == b'4' && head.matches('-').count() == 4;
        let is_id = head.len() == 32 && word == 32;
        out.push_str(if is_uuid {
            "UUID4"
        } else if is_id {
            "FRESH-ID"
        } else {
            head
        });
        rest = tail;
    }
    match out.split_once("\"bootstrap_room\":") {
        None => out,
        Some((before, after)) => {
            let after = after.trim_start_matches(|c: char| c.is_ascii_digit());
            // Rooms differ in length.
            let lines = before
                .split_inclusive('\n')
                .map(|line| match line.split_once(": ") {
                    Some(("content-length", _)) => "content-length: N\n",
                    _ => line,
                });
            format!(
                "{}\"bootstrap_room\":ROOM{after}",
                lines.collect::<String>()
            )
        }
    }
}

/// All blocks of a script called `name`.
fn named(blocks: &[(String, String)], name: &str) -> Vec<String> {
    let of = blocks.iter().filter(|(n, _)| n == name);
    of.map(|(_, block)| block.clone()).collect()
}

/// `text` with names of servers replaced by their addresses.
fn addressed(mut text: String, servers: &[Server]) -> String {
    for server in servers {
        let port = format!("{}-PORT", server.name.to_uppercase());
        text = text.replace(&port, server.port());
    }
    // The longer name first.
    for server in servers.iter().rev() {
        text = text.replace(&server.name.to_uppercase(), &server.address);
    }
    text
}

/// Sends a client's block and reads what comes until the connection ends.
async fn converse(to: SocketAddr, client: &str) -> String {
    let client = client.replacen("\n\n", "\nconnection: close\n\n", 1);
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(&message(&client, 0)).await.unwrap();
    let mut raw = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut raw)).await;
    // A reset is an end like any other.
    let _ = ended.expect("the client got an answer");
    readable(&raw)
}

/// Plays the script and returns the whole file as it should be.
async fn play(script: &str) -> String {
    let blocks = blocks(script);
    let mut servers = Vec::new();
    let asked = Asked::default();
    for name in SERVERS {
        servers.push(Server::start(name, named(&blocks, name), &asked).await);
    }
    let flags = addressed(named(&blocks, "flags").concat(), &servers);
    let decode = servers[2].port();
    let flags = format!(
        "{flags} --host=127.0.0.1 --port=0 --secure-proxy=false --model-server-port={decode}"
    );
    let line = Line::try_parse_from(flags.split_whitespace()).unwrap();
    let config = line.settings.resolve().unwrap().config;
    let bound = bind(config).await.unwrap();
    let address = bound.address().unwrap();
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(run(bound, shutdown.clone()));
    let mut answers = Vec::new();
    for client in named(&blocks, "client") {
        answers.push(converse(address, &addressed(client, &servers)).await);
    }
    shutdown.cancel();
    running.await.unwrap();
    let script = script.split("<<< ").next().unwrap().trim_end();
    let mut out = format!("{script}\n");
    for server in &servers {
        for seen in server.seen.lock().unwrap().iter() {
            out += &format!("<<< {}\n{}", server.name, normal(seen.clone(), &servers));
        }
    }
    for answer in answers {
        out += &format!("<<< client\n{}", normal(answer, &servers));
    }
    out
}

#[tokio::test]
async fn every_transcript_comes_out_as_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty());
    let mut differ = Vec::new();
    for file in files {
        let script = std::fs::read_to_string(&file).unwrap();
        let played = play(&script).await;
        if played == script {
            continue;
        }
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&file, played).unwrap();
        } else {
            differ.push(format!("--- {}\n{played}", file.display()));
        }
    }
    assert!(
        differ.is_empty(),
        "came out differently:\n{}",
        differ.join("\n")
    );
}
