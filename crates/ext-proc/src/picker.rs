//! The seam: what decides implements [`Picker`], everything of the protocol calls it.
//!
//! One exchange is one HTTP request and its answer. Calls come in this order, from one task, never two at a time:
//! [`Picker::begin`]; [`Exchange::request_piece`] for every piece of the body; [`Exchange::poll_decide`] until it is
//! ready, or [`Exchange::overdue`] instead; from then on [`Exchange::poll_evicted`] between any two others;
//! [`Exchange::response_head`]; the pieces of the response, if that asked for them, and then [`Exchange::report`]; and in
//! the end, whatever happened, once, [`Exchange::ended`]. An exchange may end after any of them.

use crate::headers::Headers;
use crate::inbound::Malformed;
use crate::metadata::{self, Allowed};
use crate::refusal::Refusal;
use baton_http::Pieces;
use bytes::Bytes;
use std::net::SocketAddr;
use std::task::{Context, Poll};

/// Decides where requests go.
pub trait Picker: Send + Sync + 'static {
    /// What it keeps about one request.
    type Exchange: Exchange;

    /// A request begins.
    ///
    /// # Errors
    /// The answer for its client, if that is known already.
    fn begin(&self, head: RequestHead) -> Result<Self::Exchange, Refusal>;
}

/// One request and its answer.
pub trait Exchange: Send + Unpin + 'static {
    /// A piece of the request's body came; time to hash it. The pieces are not those of [`poll_decide`](Self::poll_decide):
    /// small ones are joined there.
    fn request_piece(&mut self, _piece: &Bytes) {}

    /// The whole body is here: where does the request go? Polled like a future, again after a wake-up.
    ///
    /// While it waits, the proxy may take the request back, and then [`ended`](Self::ended) follows.
    fn poll_decide(&mut self, cx: &mut Context<'_>, body: &Pieces)
    -> Poll<Result<Routed, Refusal>>;

    /// The decision took longer than it may. A proxy would wait for ever, so that this is the last word.
    ///
    /// # Errors
    /// The answer for the client, which is the default.
    fn overdue(&mut self, _body: &Pieces) -> Result<Routed, Refusal> {
        Err(Refusal::overdue())
    }

    /// Ready when the request is given up although it is at its endpoint, with what its client is told. Polled like a
    /// future, again after a wake-up. Once response headers have gone on, a proxy can only cut the client off.
    fn poll_evicted(&mut self, _cx: &mut Context<'_>) -> Poll<Refusal> {
        Poll::Pending
    }

    /// The endpoint, or the proxy in its place, answers.
    fn response_head(&mut self, _head: &ResponseHead) -> Reply {
        Reply::default()
    }

    /// A piece of the response, if [`Watch`](ResponseBody::Watch) was asked for. `last` comes once, perhaps with an
    /// empty piece.
    fn response_piece(&mut self, _piece: &[u8], _last: bool) {}

    /// A piece of the response, if [`Rewrite`](ResponseBody::Rewrite) was asked for: what is pushed to `out` goes to the
    /// client. What is held back must be pushed with the `last` one, which may be empty.
    fn rewrite_piece(&mut self, piece: Bytes, _last: bool, out: &mut Pieces) {
        out.push(piece);
    }

    /// The response's last piece has passed: a number for the proxy's metadata.
    fn report(&mut self) -> Option<Report> {
        None
    }

    /// Nothing follows.
    fn ended(&mut self, why: Ended);
}

/// A number for the proxy's metadata, which its log or its filters may read.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Namespace of the metadata.
    pub namespace: Bytes,
    /// Its name there.
    pub name: Bytes,
    /// The number.
    pub value: f64,
}

/// Why an exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The response went through to its end; or to its headers, if the proxy keeps response bodies to itself. Then Envoy
    /// closes the stream with them, and nobody tells how long the body takes.
    Naturally,
    /// The client was answered by a [`Refusal`].
    Refused,
    /// The request was given up while its endpoint had it; see [`Exchange::poll_evicted`].
    Evicted,
    /// The proxy closed the stream before the response's end, as it does when a client leaves.
    Disconnected,
    /// The proxy broke the protocol.
    Broken,
}

/// What is known when a request begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// Of the client, and of filters before this one.
    pub headers: Headers,
    /// The endpoints among which the proxy allows to choose; all if none are named, and none if the list is empty.
    pub subset: Option<Vec<Allowed>>,
    /// Whether a body follows.
    pub has_body: bool,
}

impl RequestHead {
    pub(crate) fn read(
        headers: Headers,
        metadata: &Bytes,
        has_body: bool,
    ) -> Result<Self, Malformed> {
        let subset = metadata::subset(metadata)?;
        Ok(Self {
            headers,
            subset,
            has_body,
        })
    }

    /// Whether the proxy allows `endpoint`.
    #[must_use]
    pub fn allows(&self, endpoint: &SocketAddr) -> bool {
        let subset = self.subset.as_deref();
        subset.is_none_or(|subset| subset.iter().any(|allowed| allowed.covers(endpoint)))
    }
}

/// What is known when a response begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    /// Of the endpoint, or of the proxy if it answers itself.
    pub headers: Headers,
    /// The endpoint that the proxy says has answered.
    pub served: Option<String>,
    /// Whether a body follows, as far as it will be seen here.
    pub has_body: bool,
}

impl ResponseHead {
    pub(crate) fn read(
        headers: Headers,
        metadata: &Bytes,
        has_body: bool,
    ) -> Result<Self, Malformed> {
        let served = metadata::served(metadata)?.map(str::to_owned);
        Ok(Self {
            headers,
            served,
            has_body,
        })
    }

    /// The status code; nothing if the proxy sent none.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        self.headers.text(":status")?.parse().ok()
    }
}

/// Where a request goes, and what changes on the way.
#[derive(Clone, Debug)]
pub struct Routed {
    /// The endpoints, best first.
    pub destination: Destination,
    /// Headers of the request to set; they take the place of the client's.
    pub set: Vec<(&'static str, Bytes)>,
    /// Headers of the request to remove. The internal ones of llm-d are removed anyway unless they are set here.
    pub remove: Vec<&'static str>,
    /// The body to send instead of the client's.
    pub body: Option<Pieces>,
    /// Scores of endpoints, for the proxy's log.
    pub scores: Vec<(Destination, f64)>,
}

impl Routed {
    /// To `destination`, otherwise as it came.
    #[must_use]
    pub fn to(destination: Destination) -> Self {
        Self {
            destination,
            set: Vec::new(),
            remove: Vec::new(),
            body: None,
            scores: Vec::new(),
        }
    }
}

/// One endpoint or several, as the proxy reads them: `ip:port`, IPv6 in brackets, with commas between. Cheap to clone,
/// so that it can be made once for each endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination(Bytes);

impl Destination {
    /// One endpoint, and others to try after it.
    #[must_use]
    pub fn new(first: SocketAddr, others: &[SocketAddr]) -> Self {
        let mut text = first.to_string();
        for other in others {
            text.push(',');
            text.push_str(&other.to_string());
        }
        Self(text.into())
    }

    pub(crate) fn text(&self) -> Bytes {
        self.0.clone()
    }
}

impl From<SocketAddr> for Destination {
    fn from(endpoint: SocketAddr) -> Self {
        Self::new(endpoint, &[])
    }
}

/// What happens to a response. The default is nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// Headers of the response to set; they take the place of the endpoint's.
    pub set: Vec<(&'static str, Bytes)>,
    /// Headers of the response to remove.
    pub remove: Vec<&'static str>,
    /// What to do with the body.
    pub body: ResponseBody,
}

/// Who looks at the pieces of a response's body. They go on as soon as they come, in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResponseBody {
    /// Nobody.
    #[default]
    Pass,
    /// The exchange sees them, by [`Exchange::response_piece`].
    Watch,
    /// The exchange changes them, by [`Exchange::rewrite_piece`].
    Rewrite,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_addresses_with_brackets_where_they_belong() {
        let v4 = "10.0.0.1:8000".parse().unwrap();
        let v6 = "[fd00::1]:8000".parse().unwrap();
        assert_eq!(Destination::from(v6).text(), "[fd00::1]:8000");
        assert_eq!(
            Destination::new(v4, &[v6]).text(),
            "10.0.0.1:8000,[fd00::1]:8000"
        );
    }
}
