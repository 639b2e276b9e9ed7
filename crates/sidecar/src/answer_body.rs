//! The body of an answer, and what lives as long as it does.

use crate::metrics::Timer;
use crate::usage::Patched;
use baton_http::Pieces;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::task::JoinHandle;

/// A body on its way to the client. Dropping it before its end ends what is done for it.
#[derive(Debug)]
pub(crate) struct Answer {
    content: Content,
    /// Held for their drop.
    prefill: Option<Companion>,
    timer: Option<Timer>,
}

#[derive(Debug)]
enum Content {
    /// All there.
    Whole(Pieces),
    /// As a server sends it, behind what was read of it already.
    Passed(Pieces, Incoming),
    Patched(Box<Patched<Incoming>>),
}

impl Answer {
    pub(crate) fn whole(body: Pieces) -> Self {
        Self::of(Content::Whole(body))
    }

    pub(crate) fn passed(rest: Incoming) -> Self {
        Self::behind(Pieces::default(), rest)
    }

    /// `read` and then `rest`.
    pub(crate) fn behind(read: Pieces, rest: Incoming) -> Self {
        Self::of(Content::Passed(read, rest))
    }

    pub(crate) fn patched(body: Patched<Incoming>) -> Self {
        Self::of(Content::Patched(Box::new(body)))
    }

    fn of(content: Content) -> Self {
        Self {
            content,
            prefill: None,
            timer: None,
        }
    }

    /// With the prefill leg that runs beside it.
    pub(crate) fn beside(mut self, prefill: Companion) -> Self {
        self.prefill = Some(prefill);
        self
    }

    pub(crate) fn timed(mut self, timer: Timer) -> Self {
        self.timer = Some(timer);
        self
    }

    fn poll_content(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.content {
            Content::Whole(body) => poll_pieces(body, cx),
            Content::Passed(read, _) if !read.is_empty() => poll_pieces(read, cx),
            Content::Passed(_, rest) => Pin::new(rest).poll_frame(cx),
            Content::Patched(body) => Pin::new(body.as_mut()).poll_frame(cx),
        }
    }

    fn is_over(&self) -> bool {
        match &self.content {
            Content::Whole(body) => body.is_empty(),
            Content::Passed(read, rest) => read.is_empty() && rest.is_end_stream(),
            Content::Patched(body) => body.is_end_stream(),
        }
    }
}

fn poll_pieces(
    pieces: &mut Pieces,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
    Pin::new(pieces)
        .poll_frame(cx)
        .map(|frame| frame.map(|f| f.map_err(|never| match never {})))
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.poll_content(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.is_over()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(body) => body.size_hint(),
            Content::Passed(read, rest) => {
                let mut hint = rest.size_hint();
                let read = read.len() as u64;
                match hint.exact() {
                    Some(rest) => hint.set_exact(rest.saturating_add(read)),
                    None => hint.set_lower(hint.lower().saturating_add(read)),
                }
                hint
            }
            Content::Patched(_) => SizeHint::default(),
        }
    }
}

/// A prefill leg that runs beside decode. Ended when dropped: what decode has not had of it by the end of its answer
/// it does not need.
#[derive(Debug)]
pub(crate) struct Companion(JoinHandle<()>);

impl Companion {
    pub(crate) fn new(task: JoinHandle<()>) -> Self {
        Self(task)
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        self.0.abort();
    }
}
