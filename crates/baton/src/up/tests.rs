//! The supervisor with shell scripts for children.

use super::child::{Orders, keep};
use super::*;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

struct Script {
    _dir: RuntimeDir,
    path: PathBuf,
    folder: PathBuf,
}

/// A program that does `body`; `$0`'s folder is its own.
fn script(body: &str) -> Script {
    let dir = RuntimeDir::new().unwrap();
    let path = dir
        .write(
            "program",
            format!("#!/bin/sh\nhere=$(dirname \"$0\")\n{body}\n").as_bytes(),
        )
        .unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    let folder = path.parent().unwrap().to_owned();
    Script {
        _dir: dir,
        path,
        folder,
    }
}

struct Kept {
    events: mpsc::Receiver<Event>,
    orders: Orders,
    task: tokio::task::JoinHandle<()>,
}

fn keep_script(script: &Script, grace: Duration) -> Kept {
    let (sender, events) = mpsc::channel(8);
    let orders = Orders {
        stop: CancellationToken::new(),
        kill: CancellationToken::new(),
        grace,
    };
    let spec =
        Spec::new(0, "child", script.path.clone(), vec!["serve".into()]).env("BATON_TEST", "yes");
    let task = tokio::spawn(keep(spec, orders.clone(), sender, Arc::new(Screen::new())));
    Kept {
        events,
        orders,
        task,
    }
}

impl Kept {
    async fn ready(&mut self) -> SocketAddr {
        match self.events.recv().await.unwrap() {
            Event::Ready { child: 0, address } => address,
            other => panic!("{other:?}"),
        }
    }
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

const LONG: Duration = Duration::from_secs(600);

#[tokio::test]
async fn a_child_ends_by_itself_when_its_input_ends() {
    let script = script(
        "echo \"$BATON_TEST ready at http://127.0.0.1:41\"; cat >/dev/null; echo done >$here/end",
    );
    let mut kept = keep_script(&script, LONG);
    assert_eq!(kept.ready().await.port(), 41);
    kept.orders.stop.cancel();
    kept.task.await.unwrap();
    assert_eq!(lines(&script.folder.join("end")), ["done"]);
}

#[tokio::test]
async fn a_child_that_dies_is_started_again_and_its_new_address_told() {
    let script = script(
        "echo x >>$here/lives; n=$(wc -l <$here/lives); echo \"http://127.0.0.1:$((50 + n))\"; [ $n -gt 1 ] || { until [ -e $here/die ]; do sleep 0.01; done; kill -9 $$; }; cat >/dev/null",
    );
    let mut kept = keep_script(&script, LONG);
    assert_eq!(kept.ready().await.port(), 51);
    // It must not die before its address was read.
    std::fs::write(script.folder.join("die"), "").unwrap();
    match kept.events.recv().await.unwrap() {
        Event::Exited {
            status, again_in, ..
        } => {
            assert!(
                status.contains('9') && again_in == Duration::from_millis(500),
                "{status}"
            );
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(kept.ready().await.port(), 52);
    kept.orders.stop.cancel();
    kept.task.await.unwrap();
    assert_eq!(lines(&script.folder.join("lives")).len(), 2);
}

#[tokio::test]
async fn a_child_that_does_not_end_is_killed_after_the_grace_or_when_told() {
    for (grace, kill) in [(Duration::ZERO, false), (LONG, true)] {
        let script = script("echo http://127.0.0.1:42; while :; do sleep 0.05; done");
        let mut kept = keep_script(&script, grace);
        kept.ready().await;
        kept.orders.stop.cancel();
        if kill {
            kept.orders.kill.cancel();
        }
        kept.task.await.unwrap();
    }
}

fn options(script: &Script) -> Options {
    Options {
        baton: script.path.clone(),
        model: "m".into(),
        port: 0,
        n_prefill: 1,
        n_decode: 1,
        pd_threshold: 1,
        serve_args: vec!["--flag".into()],
    }
}

#[tokio::test]
async fn a_child_that_cannot_start_ends_the_whole_and_the_others_with_it() {
    let script = script(
        "case \"$*\" in *decode*) echo $* >>$here/args; exit 64;; esac; echo http://127.0.0.1:43; cat >/dev/null; echo p >$here/end",
    );
    let error = up(options(&script), CancellationToken::new())
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("decode-0") && error.contains("64"),
        "{error}"
    );
    let args = lines(&script.folder.join("args"));
    let [args] = args.as_slice() else {
        panic!("started more than once: {args:?}")
    };
    let (before, rest) = args.split_once(" --turns /").unwrap();
    assert_eq!(
        before,
        "serve m --role decode --port 0 --kv-port 0 --exit-with-parent"
    );
    assert!(rest.ends_with("/turns --flag"), "{rest}");
}

#[tokio::test]
async fn being_told_to_end_during_the_start_is_no_error_and_leaves_no_child() {
    let script = script("echo start >>$here/starts; cat >/dev/null; echo end >>$here/ends");
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(up(options(&script), shutdown.clone()));
    while lines(&script.folder.join("starts")).len() < 2 {
        tokio::task::yield_now().await;
    }
    shutdown.cancel();
    running.await.unwrap().unwrap();
    assert_eq!(lines(&script.folder.join("ends")).len(), 2);
}

#[tokio::test]
async fn a_taken_port_is_told_before_anything_is_started() {
    let script = script("echo x >>$here/starts");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let options = Options {
        port: taken.local_addr().unwrap().port(),
        ..options(&script)
    };
    let error = up(options, CancellationToken::new())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("--port"), "{error}");
    assert!(lines(&script.folder.join("starts")).is_empty());
}
