//! A streamed answer on its way to the client: passed through event by event, and never ended in silence.
//!
//! Bytes are not parsed or changed. Only whole events are passed on, so that when a server is lost in the middle of
//! one, the error event that follows stands by itself.

use crate::refusal::Refusal;
use baton_scheduler::flow;
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// Longest event that is held back until it is whole; a longer one is passed on in parts.
const MAX_EVENT: usize = 1 << 20;

/// How a stream of this kind ends when all is well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With `data: [DONE]`: completions.
    Done,
    /// In its own way.
    Own,
}

/// Why a stream is ended from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The server has stopped answering.
    Silent,
    /// The request has to make room for others.
    Evicted,
}

/// A future that ends when the stream is to be ended from here.
pub(crate) type Cutting = Pin<Box<dyn Future<Output = Cut> + Send>>;

/// What is held while an answer streams, and hears of its first bytes. Many servers send their headers before they have
/// computed anything.
pub(crate) trait Hears {
    fn first_bytes(&self);
}

/// For nobody.
impl Hears for () {
    fn first_bytes(&self) {}
}

/// The body of a streamed answer. Holds `T` (what counts the request as in progress) until the stream ends.
pub(crate) struct Events<B, T> {
    upstream: Option<(B, T)>,
    cut: Cutting,
    ending: Ending,
    held: Held,
}

impl<B, T> Events<B, T> {
    pub(crate) fn new(upstream: B, cut: Cutting, ending: Ending, guard: T) -> Self {
        Self {
            upstream: Some((upstream, guard)),
            cut,
            ending,
            held: Held::default(),
        }
    }

    /// The last bytes of a stream that is ended from here; dropping the connection tells its server.
    fn broken_off(&mut self, why: Refusal) -> Option<Bytes> {
        self.upstream = None;
        (!self.held.done).then(|| why.into_last_events())
    }

    /// The last bytes of a stream whose server was lost.
    fn lost(&mut self, cause: &dyn std::fmt::Display) -> Option<Bytes> {
        if !self.held.done {
            tracing::warn!(%cause, "server lost in the middle of a stream");
        }
        self.broken_off(Refusal::ServersFailed)
    }

    /// The last bytes of a stream that its server ended.
    fn ended(&mut self) -> Option<Bytes> {
        if self.ending == Ending::Done && !self.held.done {
            let rest_is_done = self.held.bytes.trim_ascii() == b"data: [DONE]";
            if !rest_is_done {
                return self.lost(&"it ended without [DONE]");
            }
        }
        self.upstream = None;
        Some(self.held.rest()).filter(|rest| !rest.is_empty())
    }
}

impl<B, T> Body for Events<B, T>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
    T: Hears + Unpin,
{
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        let last = loop {
            let Some((upstream, held)) = &mut this.upstream else {
                return Poll::Ready(None);
            };
            match this.cut.as_mut().poll(cx) {
                Poll::Ready(Cut::Silent) => break this.lost(&"it stopped answering"),
                Poll::Ready(Cut::Evicted) => {
                    break this.broken_off(Refusal::Queue(flow::Refusal::EVICTED));
                }
                Poll::Pending => {}
            }
            match ready!(Pin::new(upstream).poll_frame(cx)) {
                None => break this.ended(),
                Some(Err(error)) => break this.lost(&error),
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else {
                        continue;
                    };
                    held.first_bytes();
                    let whole = this.held.push(data);
                    if !whole.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(whole))));
                    }
                }
            }
        };
        Poll::Ready(last.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.upstream.is_none()
    }
}

/// The part of an event that has come so far.
#[derive(Debug, Default)]
struct Held {
    bytes: BytesMut,
    /// The last thing passed on was `[DONE]`.
    done: bool,
}

impl Held {
    /// Takes what came and gives what can be passed on: everything up to the end of the last whole event.
    fn push(&mut self, data: Bytes) -> Bytes {
        let whole = if self.bytes.is_empty() {
            self.split(data)
        } else {
            self.join(&data)
        };
        if !whole.is_empty() {
            self.done = ends_in_done(&whole);
        }
        whole
    }

    fn split(&mut self, mut data: Bytes) -> Bytes {
        let whole = data.split_to(end_of_last_event(&data));
        if data.len() > MAX_EVENT {
            return data;
        }
        self.bytes.extend_from_slice(&data);
        whole
    }

    fn join(&mut self, data: &[u8]) -> Bytes {
        self.bytes.extend_from_slice(data);
        let end = match end_of_last_event(&self.bytes) {
            0 if self.bytes.len() > MAX_EVENT => self.bytes.len(),
            end => end,
        };
        self.bytes.split_to(end).freeze()
    }

    fn rest(&mut self) -> Bytes {
        self.bytes.split().freeze()
    }
}

/// Where the blank line after the last whole event ends; 0 if no event is whole.
fn end_of_last_event(bytes: &[u8]) -> usize {
    let mut end = bytes.len();
    // From the end, where the blank line is nearly always.
    while let Some(newline) = bytes[..end].iter().rposition(|&b| b == b'\n') {
        let before = &bytes[..newline];
        if before.ends_with(b"\n") || before.ends_with(b"\n\r") {
            return newline + 1;
        }
        end = newline;
    }
    0
}

/// Whether the last event is `[DONE]`; text that only ends like it is not.
fn ends_in_done(events: &[u8]) -> bool {
    let before = events.strip_suffix(baton_openai::sse::DONE);
    before.is_some_and(|before| end_of_last_event(before) == before.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt as _;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    struct Upstream(VecDeque<Result<Bytes, &'static str>>);

    impl Body for Upstream {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
            Poll::Ready(self.0.pop_front().map(|item| item.map(Frame::data)))
        }
    }

    async fn frames(items: &[Result<&'static str, &'static str>], ending: Ending) -> Vec<String> {
        let items = items
            .iter()
            .map(|i| i.map(|s| Bytes::from_static(s.as_bytes())))
            .collect();
        let mut body = Events::new(
            Upstream(items),
            Box::pin(std::future::pending()),
            ending,
            (),
        );
        let mut out = Vec::new();
        while let Some(frame) = body.frame().await {
            out.push(String::from_utf8(frame.unwrap().into_data().unwrap().to_vec()).unwrap());
        }
        out
    }

    #[tokio::test]
    async fn whole_events_pass_as_they_come() {
        let got = frames(
            &[Ok("data: 1\n\n"), Ok("data: 2\n\ndata: [DONE]\n\n")],
            Ending::Done,
        )
        .await;
        assert_eq!(got, ["data: 1\n\n", "data: 2\n\ndata: [DONE]\n\n"]);
    }

    #[tokio::test]
    async fn a_lost_server_ends_the_stream_with_an_error_event_and_done() {
        let got = frames(
            &[Ok("data: 1\n\ndata: {\"half"), Err("reset")],
            Ending::Done,
        )
        .await;
        assert_eq!(got[0], "data: 1\n\n");
        let (event, rest) = got[1].split_once("\n\n").unwrap();
        let error: serde_json::Value =
            serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(error["error"]["code"], 502);
        assert_eq!(rest, "data: [DONE]\n\n");
        assert_eq!(got.len(), 2);
    }

    #[tokio::test]
    async fn an_end_without_done_is_a_loss_where_done_is_due() {
        assert!(frames(&[Ok("data: 1\n\n")], Ending::Done).await[1].contains("error"));
        assert_eq!(
            frames(&[Ok("data: 1\n\nrest")], Ending::Own).await,
            ["data: 1\n\n", "rest"]
        );
        assert_eq!(
            frames(&[Ok("data: [DONE]\n")], Ending::Done).await,
            ["data: [DONE]\n"]
        );
    }

    #[tokio::test]
    async fn what_only_ends_like_done_is_no_end() {
        for event in ["data: xdata: [DONE]\n\n", "data: x\ndata: [DONE]\n\n"] {
            let got = frames(&[Ok(event)], Ending::Done).await;
            assert_eq!(got.len(), 2, "{got:?}");
            assert!(got[1].contains("error") && got[1].ends_with("\n\ndata: [DONE]\n\n"));
        }
    }

    #[tokio::test]
    async fn a_reset_after_done_is_no_loss() {
        assert_eq!(
            frames(&[Ok("data: [DONE]\n\n"), Err("reset")], Ending::Done).await,
            ["data: [DONE]\n\n"]
        );
    }

    #[tokio::test]
    async fn a_server_that_stops_answering_ends_the_stream() {
        struct Never;
        impl Body for Never {
            type Data = Bytes;
            type Error = &'static str;
            fn poll_frame(
                self: Pin<&mut Self>,
                _: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
                Poll::Pending
            }
        }
        let (tx, rx) = tokio::sync::oneshot::channel::<()>();
        let cut: Cutting = Box::pin(async {
            drop(rx.await);
            Cut::Silent
        });
        let mut body = Events::new(Never, cut, Ending::Done, ());
        drop(tx);
        let last = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(last.ends_with(b"data: [DONE]\n\n") && body.frame().await.is_none());
    }

    proptest! {
        #[test]
        fn however_a_stream_is_cut_the_bytes_are_the_same_and_events_are_whole(
            events in prop::collection::vec("[a-z\r]{0,6}\n?[a-z]{1,4}", 1..6), crlf in any::<bool>(), cuts in prop::collection::vec(0usize..40, 0..8)
        ) {
            let end = if crlf { "\r\n\r\n" } else { "\n\n" };
            let text: String = events.iter().map(|e| format!("{e}{end}")).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let (mut held, mut out) = (Held::default(), String::new());
            for pair in cuts.windows(2) {
                let whole = held.push(Bytes::copy_from_slice(&text.as_bytes()[pair[0]..pair[1]]));
                prop_assert!(whole.is_empty() || whole.ends_with(b"\n\n") || whole.ends_with(b"\n\r\n"));
                out.push_str(std::str::from_utf8(&whole).unwrap());
            }
            prop_assert_eq!(out, text);
        }
    }

    #[test]
    fn an_endless_event_is_not_held_for_ever() {
        let mut held = Held::default();
        let passed: usize = (0..40)
            .map(|_| held.push(Bytes::from(vec![b'x'; 100_000])).len())
            .sum();
        assert!(passed + held.bytes.len() == 4_000_000 && held.bytes.len() <= MAX_EVENT);
        assert_eq!(
            held.push(Bytes::from(vec![b'x'; MAX_EVENT + 1])).len() + held.bytes.len(),
            4_000_000 - passed + MAX_EVENT + 1
        );
    }
}
