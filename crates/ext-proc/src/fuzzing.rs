//! The state machine with everything before it, shown to the fuzz target.

use crate::frames::Frames;
use crate::inbound::Inbound;
use crate::machine::{Machine, Step};
use crate::outbox::Outbox;
use crate::picker::{
    Destination, Ended, Exchange, Picker, Reply, RequestHead, ResponseBody, ResponseHead, Routed,
};
use crate::proto::ProcessingResponse;
use crate::refusal::Refusal;
use crate::status::Status;
use baton_http::{Budget, Pieces};
use bytes::{Buf, Bytes};
use prost::Message as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

/// What came of a conversation.
#[derive(Debug, PartialEq, Eq)]
pub struct Conversation {
    /// Exchanges that began.
    pub begun: usize,
    /// Times that one was told why it ended.
    pub ended: usize,
    /// What the proxy was sent, as it is on the wire.
    pub sent: Vec<u8>,
    /// Messages in it; nothing if they cannot be read.
    pub messages: Option<usize>,
}

/// How many exchanges began, and how many ended.
struct Counting {
    begun: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
}

struct Counted {
    response: ResponseBody,
    ended: Arc<AtomicUsize>,
}

impl Picker for Counting {
    type Exchange = Counted;

    fn begin(&self, head: RequestHead) -> Result<Counted, Refusal> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let uses = [
            ResponseBody::Pass,
            ResponseBody::Watch,
            ResponseBody::Rewrite,
        ];
        Ok(Counted {
            response: uses[head.headers.iter().count() % 3],
            ended: self.ended.clone(),
        })
    }
}

impl Exchange for Counted {
    fn poll_decide(&mut self, _: &mut Context<'_>, _: &Pieces) -> Poll<Result<Routed, Refusal>> {
        let endpoint = SocketAddr::from(([10, 0, 0, 1], 8000));
        Poll::Ready(Ok(Routed::to(Destination::from(endpoint))))
    }

    fn response_head(&mut self, _: &ResponseHead) -> Reply {
        Reply {
            body: self.response,
            ..Reply::default()
        }
    }

    fn rewrite_piece(&mut self, piece: Bytes, last: bool, out: &mut Pieces) {
        out.push(piece);
        if last {
            out.push("end");
        }
    }

    fn ended(&mut self, _: Ended) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// A whole stream of a proxy, in pieces that end at `cuts`.
#[must_use]
pub fn conversation(cuts: &[u8], stream: &[u8]) -> Conversation {
    let (begun, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let picker = Counting {
        begun: begun.clone(),
        ended: ended.clone(),
    };
    let mut machine = Machine::new(Budget::new(1 << 20).account(), 8 << 10);
    let (mut frames, mut out) = (Frames::new(64 << 10), Outbox::default());
    let mut rest = Bytes::copy_from_slice(stream);
    let pieces = cuts.iter().map(|&cut| usize::from(cut)).chain([usize::MAX]);
    for piece in pieces {
        frames.push(rest.split_to(piece.min(rest.len())));
        match heard(&mut frames, &mut machine, &picker, &mut out) {
            Ok(Step::Read | Step::Decide) => {}
            Ok(Step::End | Step::Ended) => break,
            Err(_) => {
                machine.broken();
                break;
            }
        }
    }
    drop(machine);
    let sent = drained(&mut out);
    Conversation {
        begun: begun.load(Ordering::Relaxed),
        ended: ended.load(Ordering::Relaxed),
        messages: messages(&sent),
        sent,
    }
}

/// Every message that is there.
fn heard(
    frames: &mut Frames,
    machine: &mut Machine<Counted>,
    picker: &Counting,
    out: &mut Outbox,
) -> Result<Step, Status> {
    while let Some(message) = frames.next()? {
        let step = match machine.on(picker, Inbound::read(message)?, out)? {
            Step::Decide => {
                let mut cx = Context::from_waker(Waker::noop());
                match machine.poll_decide(&mut cx, out) {
                    Poll::Ready(step) => step,
                    Poll::Pending => Step::Decide,
                }
            }
            step => step,
        };
        if step == Step::End {
            return Ok(step);
        }
    }
    Ok(Step::Read)
}

fn drained(out: &mut Outbox) -> Vec<u8> {
    let mut sent = Vec::new();
    while let Some(mut outgoing) = out.pop() {
        while outgoing.has_remaining() {
            let chunk = outgoing.chunk();
            let len = chunk.len();
            sent.extend_from_slice(chunk);
            outgoing.advance(len);
        }
    }
    sent
}

fn messages(sent: &[u8]) -> Option<usize> {
    let mut frames = Frames::new(1 << 20);
    frames.push(Bytes::copy_from_slice(sent));
    let mut n = 0;
    while let Some(message) = frames.next().ok()? {
        ProcessingResponse::decode(message).ok()?;
        n += 1;
    }
    frames.is_empty().then_some(n)
}
