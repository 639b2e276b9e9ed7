//! When a process should end: on SIGTERM or Ctrl-C, or when the one that started it is gone.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A token that is cancelled by SIGTERM or SIGINT and, if asked, by the end of standard input: the kernel closes that
/// pipe whatever ends the parent, so no child can outlive it. Must be called inside a tokio runtime.
pub(crate) fn shutdown_token(exit_with_parent: ParentWatch) -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let on_signal = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        on_signal.cancel();
    });
    if exit_with_parent == ParentWatch::On {
        let on_orphaned = token.clone();
        std::thread::Builder::new()
            .name("parent-watch".to_owned())
            .spawn(move || {
                wait_for_end_of_input();
                on_orphaned.cancel();
                // A drain may take a while; an orphan does not get long.
                std::thread::sleep(std::time::Duration::from_secs(5));
                tracing::warn!("parent is gone; ending at once");
                end_now();
            })?;
    }
    Ok(token)
}

/// Whether the end of standard input ends this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ParentWatch {
    /// A child of `baton up`.
    On,
    /// Started by a person or a service manager.
    Off,
}

impl From<bool> for ParentWatch {
    fn from(flag: bool) -> Self {
        if flag { Self::On } else { Self::Off }
    }
}

fn wait_for_end_of_input() {
    use std::io::Read as _;
    let mut byte = [0u8; 64];
    let mut input = std::io::stdin().lock();
    // Anything but data ends the wait; what is written to us means nothing.
    while matches!(input.read(&mut byte), Ok(n) if n > 0) {}
}

#[expect(
    clippy::exit,
    reason = "an orphaned process that does not drain must not stay"
)]
fn end_now() {
    std::process::exit(0);
}
