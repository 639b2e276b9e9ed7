//! Answers to who missed batches: those that are kept, from the one asked for on, then a message that ends them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tracing::debug;

use super::Shared;
use super::live::accept;
use crate::config::ReplayForm;
use crate::zmtp::connection::{ConnectionError, Writer, open};
use crate::zmtp::frame::{Incoming, Socket};

/// Most peers at a time.
const MAX_PEERS: usize = 64;

/// Most bytes of a request.
const MAX_MESSAGE: usize = 1024;

/// The number in the message that ends an answer: -1.
const END: [u8; 8] = [0xff; 8];

/// Answers who connects, for as long as it is not dropped.
pub(super) async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    accept(listener, MAX_PEERS, |stream| {
        let shared = Arc::clone(&shared);
        async move { serve(&shared, stream).await }
    })
    .await;
}

/// One request after the other: the next is read when the last is answered, so that nobody makes answers pile up.
async fn serve(shared: &Shared, stream: TcpStream) -> Result<(), ConnectionError> {
    let (mut reader, mut writer) = open(stream, Socket::Router, MAX_MESSAGE).await?;
    loop {
        match reader.next().await? {
            Incoming::Message(frames) => match start_of(&frames) {
                Some(start) => answer(shared, &mut writer, start).await?,
                None => debug!("a request for KV events that is none"),
            },
            Incoming::Ping(context) => writer.pong(&context).await?,
            _ => {}
        }
    }
}

/// An empty frame, and the number of the first batch wanted.
fn start_of(frames: &[Bytes]) -> Option<u64> {
    match frames {
        [empty, start] if empty.is_empty() => {
            Some(u64::from_be_bytes(*start.first_chunk::<8>()?)).filter(|_| start.len() == 8)
        }
        _ => None,
    }
}

async fn answer(shared: &Shared, writer: &mut Writer, start: u64) -> Result<(), ConnectionError> {
    shared.counters.replays.fetch_add(1, Ordering::Relaxed);
    let config = &shared.config;
    let end = shared.log.lock().next();
    let mut at = start;
    while at < end {
        let found = shared.log.lock().at(at, config.buffer_steps);
        let Some((number, batch)) = found else { break };
        at = number.saturating_add(1);
        let number = number.to_be_bytes();
        match config.replay_form {
            ReplayForm::Topic => {
                let frames: [&[u8]; 4] = [b"", config.topic.as_bytes(), &number, &batch];
                writer.feed(&frames).await?;
            }
            ReplayForm::Plain => writer.feed(&[b"", &number, &batch]).await?,
        }
    }
    match config.replay_form {
        ReplayForm::Topic => writer.send(&[b"", b"", &END, b""]).await,
        ReplayForm::Plain => writer.send(&[b"", &END, b""]).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_an_empty_frame_and_a_number() {
        let frames = |frames: &[&[u8]]| -> Vec<Bytes> {
            frames.iter().map(|f| Bytes::copy_from_slice(f)).collect()
        };
        let asked: &[u8] = &[0, 0, 0, 0, 0, 0, 1, 2];
        assert_eq!(start_of(&frames(&[b"", asked])), Some(258));
        for wrong in [
            &[asked][..],
            &[b"x", asked],
            &[b"", b"short"],
            &[b"", &[0; 9]],
            &[],
        ] {
            assert_eq!(start_of(&frames(wrong)), None, "{wrong:?}");
        }
    }
}
