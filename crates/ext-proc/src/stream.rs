//! One gRPC stream as a body that answers a body: reads a message when the ones before it are answered and gone.

use crate::frames::Frames;
use crate::inbound::Inbound;
use crate::machine::{Machine, Step};
use crate::outbox::{Outbox, Outgoing};
use crate::picker::Picker;
use crate::status::{Code, Status};
use baton_http::Account;
use bytes::Bytes;
use http_body::{Body, Frame};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::Sleep;

/// What one stream may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamLimits {
    /// Longest message, in bytes.
    pub(crate) message: usize,
    /// Longest body of a request, in bytes.
    pub(crate) body: usize,
    /// Longest wait for a decision.
    pub(crate) decision: Duration,
}

/// The answering side of a stream; `B` is what the proxy sends, `H` is held as long as the stream lives.
///
/// Dropping it, which is what happens when the proxy resets the stream, ends the exchange.
pub(crate) struct Stream<P: Picker, B, H> {
    picker: Arc<P>,
    incoming: B,
    frames: Frames,
    machine: Machine<P::Exchange>,
    outbox: Outbox,
    step: Step,
    decision: Duration,
    /// Only set while a decision waits: most are there at once.
    deadline: Option<Pin<Box<Sleep>>>,
    status: Option<Status>,
    _held: H,
}

impl<P, B, H> Stream<P, B, H>
where
    P: Picker,
    B: Body<Data = Bytes> + Unpin,
{
    pub(crate) fn new(
        picker: Arc<P>,
        incoming: B,
        account: Account,
        limits: StreamLimits,
        held: H,
    ) -> Self {
        Self {
            picker,
            incoming,
            frames: Frames::new(limits.message),
            machine: Machine::new(account, limits.body),
            outbox: Outbox::default(),
            step: Step::Read,
            decision: limits.decision,
            deadline: None,
            status: None,
            _held: held,
        }
    }

    /// Moves on by one message, one decision, or the end.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.step == Step::Decide
            && let Poll::Ready(step) = self.poll_decide(cx)
        {
            self.deadline = None;
            self.step = step;
            return Poll::Ready(());
        }
        if let Poll::Ready(step) = self.machine.poll_evicted(cx, &mut self.outbox) {
            self.step = step;
            return Poll::Ready(());
        }
        match ready!(self.poll_inbound(cx)) {
            Ok(Some(inbound)) => {
                self.deadline = None;
                match self.machine.on(&*self.picker, inbound, &mut self.outbox) {
                    Ok(step) => self.step = step,
                    Err(status) => self.end(status),
                }
            }
            Ok(None) => {
                self.machine.closed();
                self.end(Status::OK);
            }
            Err(status) => {
                self.machine.broken();
                self.end(status);
            }
        }
        Poll::Ready(())
    }

    fn poll_decide(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        if let Poll::Ready(step) = self.machine.poll_decide(cx, &mut self.outbox) {
            return Poll::Ready(step);
        }
        let wait = self.decision;
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(wait)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(self.machine.overdue(&mut self.outbox))
    }

    /// The next message, or nothing after the last.
    fn poll_inbound(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Inbound>, Status>> {
        loop {
            if let Some(message) = self.frames.next()? {
                return Poll::Ready(Ok(Some(Inbound::read(message)?)));
            }
            match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
                None if self.frames.is_empty() => return Poll::Ready(Ok(None)),
                // The proxy went away. Nobody reads what this says.
                None | Some(Err(_)) => {
                    return Poll::Ready(Err(Status::new(
                        Code::InvalidArgument,
                        "the stream broke off",
                    )));
                }
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.frames.push(data);
                    }
                }
            }
        }
    }

    fn end(&mut self, status: Status) {
        if status.code != Code::Ok {
            tracing::debug!(code = ?status.code, message = %status.message, "stream ended");
        }
        self.status = Some(status);
        self.step = Step::End;
    }
}

impl<P, B, H> Body for Stream<P, B, H>
where
    P: Picker,
    B: Body<Data = Bytes> + Unpin,
    H: Unpin,
{
    type Data = Outgoing;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Outgoing>, Infallible>>> {
        loop {
            if let Some(data) = self.outbox.pop() {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            self.machine.sent();
            if self.step == Step::End {
                // A stream without a bad end has a good one.
                self.step = Step::Ended;
                let status = self.status.take().unwrap_or(Status::OK);
                return Poll::Ready(Some(Ok(Frame::trailers(status.into_headers()))));
            }
            if self.step == Step::Ended {
                return Poll::Ready(None);
            }
            ready!(self.poll_step(cx));
        }
    }
}
