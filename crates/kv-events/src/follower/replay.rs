//! Asks a server for batches that it published before.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::{connect, number};
use crate::endpoint::Peer;
use crate::track::Numbered;
use crate::zmtp::connection::ConnectionError;
use crate::zmtp::frame::{Incoming, Socket};

/// How long a server may be silent while it answers. At its own high-water mark a server drops what it answers, the end
/// included.
const IDLE: Duration = Duration::from_secs(2);

/// How long an answer may take in all.
const TOTAL: Duration = Duration::from_secs(120);

/// Before a server is asked again.
const PAUSE: Duration = Duration::from_millis(100);

/// Steps that wait to be taken.
const QUEUE: usize = 64;

/// How an answer goes on. After the two last nothing follows.
#[derive(Debug)]
pub(super) enum Step {
    Batch(Numbered),
    Ended,
    Failed,
}

/// A replay that was asked for; given up when dropped.
#[derive(Debug)]
pub(super) struct Replay {
    steps: mpsc::Receiver<Step>,
    task: JoinHandle<()>,
    is_over: bool,
}

impl Replay {
    /// Asks for all batches from `from` on, `again` after a pause.
    pub(super) fn ask(peer: Peer, from: u64, again: bool, replays: Arc<Semaphore>) -> Self {
        let (to, steps) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            if again {
                sleep(PAUSE).await;
            }
            let Ok(_permit) = replays.acquire().await else {
                return;
            };
            let answered = timeout(TOTAL, answer(&peer, from, &to)).await;
            let last = match answered.unwrap_or(Err(ConnectionError::Slow)) {
                Ok(()) => Step::Ended,
                Err(why) => {
                    debug!(?peer, %why, "KV events cannot be had again");
                    Step::Failed
                }
            };
            // If it is not wanted any more, nobody waits.
            let _ = to.send(last).await;
        });
        Self {
            steps,
            task,
            is_over: false,
        }
    }

    /// The next step; may be cancelled and called again.
    pub(super) async fn next(&mut self) -> Step {
        if self.is_over {
            return std::future::pending().await;
        }
        let step = self.steps.recv().await.unwrap_or(Step::Failed);
        self.is_over = !matches!(step, Step::Batch(_));
        step
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Passes the batches on until the one that ends the answer.
async fn answer(peer: &Peer, from: u64, to: &mpsc::Sender<Step>) -> Result<(), ConnectionError> {
    let (mut reader, mut writer) = connect(peer, Socket::Dealer).await?;
    writer.send(&[b"", &from.to_be_bytes()]).await?;
    loop {
        let incoming = timeout(IDLE, reader.next()).await;
        match incoming.map_err(|_| ConnectionError::Slow)?? {
            Incoming::Message(frames) => match replay_message(&frames) {
                Some(Answer::Batch(batch)) => {
                    if to.send(Step::Batch(batch)).await.is_err() {
                        return Ok(());
                    }
                }
                Some(Answer::End) => return Ok(()),
                None => return Err(ConnectionError::Closed),
            },
            Incoming::Ping(context) => writer.pong(&context).await?,
            _ => {}
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Batch(Numbered),
    End,
}

/// The last two frames are number and batch. Before them there may be an empty one, and a topic; which of them there are
/// depends on the server's version, and none says more than the live messages.
fn replay_message(frames: &[Bytes]) -> Option<Answer> {
    let [before @ .., seq, payload] = frames else {
        return None;
    };
    if before.len() > 2 {
        return None;
    }
    let seq = number(seq)?;
    Some(match (payload.is_empty(), seq) {
        (true, u64::MAX) => Answer::End,
        (true, _) => return None,
        (false, _) => Answer::Batch(Numbered {
            seq,
            payload: payload.clone(),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_several_forms() {
        let read = |frames: &[&[u8]]| {
            let frames: Vec<_> = frames.iter().map(|f| Bytes::copy_from_slice(f)).collect();
            replay_message(&frames)
        };
        let (seq, end): (&[u8], &[u8]) = (&[0, 0, 0, 0, 0, 0, 0, 5], &[0xff; 8]);
        let batch = || {
            Some(Answer::Batch(Numbered {
                seq: 5,
                payload: Bytes::from_static(b"x"),
            }))
        };
        assert_eq!(read(&[b"", b"kv@a@b", seq, b"x"]), batch());
        assert_eq!(read(&[b"", b"", seq, b"x"]), batch());
        assert_eq!(read(&[b"", seq, b"x"]), batch());
        assert_eq!(read(&[seq, b"x"]), batch());
        assert_eq!(read(&[b"", b"", end, b""]), Some(Answer::End));
        assert_eq!(read(&[b"", end, b""]), Some(Answer::End));
        for wrong in [
            &[seq, b""][..],
            &[b"short", b"x"],
            &[b"x"],
            &[b"", b"", b"", seq, b"x"],
            &[],
        ] {
            assert_eq!(read(wrong), None, "{wrong:?}");
        }
    }
}
