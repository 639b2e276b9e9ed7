//! The state of one exchange: messages of the proxy in, messages to the proxy out. No clock, no sockets, no waiting.
//!
//! Each half, request and response, is answered in the order headers, body, trailers, whatever the order in which the
//! other half moves. A request is answered as a whole once it was decided on; a response goes on piece by piece.

use crate::body::RequestBody;
use crate::cursor::Chunk;
use crate::headers::Headers;
use crate::inbound::{Event, Half, Inbound, Malformed};
use crate::outbox::{Outbox, set_header};
use crate::picker::{
    Ended, Exchange, Picker, Reply, Report, RequestHead, ResponseBody, ResponseHead, Routed,
};
use crate::proto::{
    Answer, BodyMutation, CommonAnswer, CommonResponse, FULL_DUPLEX_STREAMED, Field,
    HeaderMutation, Kind, NONE, StreamedBodyResponse, Struct, TrailersResponse, Value,
};
use crate::refusal::Refusal;
use crate::status::{Code, Status};
use baton_http::{Account, Pieces};
use bytes::Bytes;
use std::task::{Context, Poll};

/// Where the proxy looks for the endpoint, as a header and in its metadata.
const DESTINATION: &str = "x-gateway-destination-endpoint";
/// Its namespace there.
const NAMESPACE: &str = "envoy.lb";
/// Scores of endpoints, in the same namespace.
const SCORES: &str = "x-gateway-destination-endpoint-scores";

/// Headers by which parts of the system talk to each other: a client's own would make a server call addresses that the
/// client chose.
const INTERNAL: [&str; 6] = [
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    "x-gateway-destination-endpoint-subset",
    "x-gateway-destination-endpoint-served",
];

/// What the shell does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Waits for the next message.
    Read,
    /// Polls [`Machine::poll_decide`] until it is ready; a message that comes first takes the request back.
    Decide,
    /// Ends the stream once everything was sent.
    End,
    /// The stream ended; the machine never says so.
    Ended,
}

/// How far the request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    Head,
    Body,
    Deciding(Rest),
    Over,
}

/// What came with the end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// No body is to be sent back.
    NoBody,
    Body,
    BodyAndTrailers,
}

/// How far the response came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tell {
    Head,
    Body(ResponseBody),
    Over,
}

/// One exchange.
pub(crate) struct Machine<E: Exchange> {
    ask: Ask,
    tell: Tell,
    exchange: Told<E>,
    body: RequestBody,
    /// Internal headers that the client sent, a bit for each of [`INTERNAL`].
    spoofed: u8,
    /// Whether the proxy shows the response's body.
    shows_response: bool,
}

/// An exchange that learns once why it ended.
struct Told<E: Exchange> {
    exchange: Option<E>,
    /// What a stream's end means, if nothing was said before.
    meanwhile: Ended,
}

impl<E: Exchange> Told<E> {
    fn begin(exchange: Option<E>) -> Self {
        Self {
            exchange,
            meanwhile: Ended::Disconnected,
        }
    }

    fn end(&mut self, why: Ended) {
        if let Some(mut exchange) = self.exchange.take() {
            exchange.ended(why);
        }
    }
}

impl<E: Exchange> Drop for Told<E> {
    fn drop(&mut self) {
        self.end(self.meanwhile);
    }
}

/// What the proxy must not send now.
fn unexpected(what: &'static str) -> Status {
    Status::new(Code::InvalidArgument, what)
}

impl From<Malformed> for Status {
    fn from(error: Malformed) -> Self {
        Self::new(Code::InvalidArgument, error.to_string())
    }
}

impl<E: Exchange> Machine<E> {
    /// Before the first message. The request's body is charged to `account`, and refused beyond `max_body` bytes.
    pub(crate) fn new(account: Account, max_body: usize) -> Self {
        Self {
            ask: Ask::Head,
            tell: Tell::Head,
            exchange: Told::begin(None),
            body: RequestBody::new(account, max_body),
            spoofed: 0,
            shows_response: true,
        }
    }

    /// One message came.
    ///
    /// # Errors
    /// How the stream ends, because the proxy broke the protocol or speaks a part of it that is not spoken here.
    pub(crate) fn on<P: Picker<Exchange = E>>(
        &mut self,
        picker: &P,
        inbound: Inbound,
        out: &mut Outbox,
    ) -> Result<Step, Status> {
        let step = self.step(picker, inbound, out);
        if step.is_err() {
            self.exchange.end(Ended::Broken);
        }
        step
    }

    fn step<P: Picker<Exchange = E>>(
        &mut self,
        picker: &P,
        inbound: Inbound,
        out: &mut Outbox,
    ) -> Result<Step, Status> {
        match inbound.event {
            Event::Headers {
                half: Half::Request,
                ..
            } => self.request_head(picker, inbound, out),
            Event::Body {
                half: Half::Request,
                data,
                end,
            } => self.request_body(data, end, out),
            Event::Trailers(Half::Request) => self.request_trailers(),
            Event::Headers {
                half: Half::Response,
                headers,
                end,
            } => self.response_head(headers, &inbound.metadata, end, out),
            Event::Body {
                half: Half::Response,
                data,
                end,
            } => self.response_body(data, end, out),
            Event::Trailers(Half::Response) => self.response_trailers(out),
        }
    }

    fn request_head<P: Picker<Exchange = E>>(
        &mut self,
        picker: &P,
        inbound: Inbound,
        out: &mut Outbox,
    ) -> Result<Step, Status> {
        let Event::Headers { headers, end, .. } = inbound.event else {
            return Err(unexpected("no headers"));
        };
        if self.ask != Ask::Head || self.tell != Tell::Head {
            return Err(unexpected("a second request on one stream"));
        }
        if inbound.observing {
            self.ask = Ask::Over;
            return Ok(Step::End);
        }
        let mut has_body = !end;
        if let Some(protocol) = inbound.protocol {
            self.shows_response = shown(protocol.response_body_mode, "response_body_mode")?;
            has_body &= shown(protocol.request_body_mode, "request_body_mode")?;
        }
        self.spoofed = (0u8..)
            .zip(INTERNAL)
            .filter(|(_, name)| headers.get(name).is_some())
            .fold(0, |bits, (i, _)| bits | 1 << i);
        match picker.begin(RequestHead::read(headers, &inbound.metadata, has_body)?) {
            Ok(exchange) => self.exchange = Told::begin(Some(exchange)),
            Err(refusal) => return Ok(self.refuse(refusal, Ended::Refused, out)),
        }
        if has_body {
            self.ask = Ask::Body;
            return Ok(Step::Read);
        }
        self.ask = Ask::Deciding(Rest::NoBody);
        Ok(Step::Decide)
    }

    fn request_body(&mut self, data: Chunk, end: bool, out: &mut Outbox) -> Result<Step, Status> {
        match self.ask {
            Ask::Body => {}
            // The proxy answers the client itself and had sent this before.
            Ask::Over if self.tell != Tell::Head => return Ok(Step::Read),
            _ => return Err(unexpected("a request body out of place")),
        }
        for piece in data {
            if let Some(exchange) = &mut self.exchange.exchange {
                exchange.request_piece(&piece);
            }
            if let Err(refusal) = self.body.push(piece) {
                return Ok(self.refuse(refusal, Ended::Refused, out));
            }
        }
        if !end {
            return Ok(Step::Read);
        }
        self.ask = Ask::Deciding(Rest::Body);
        Ok(Step::Decide)
    }

    fn request_trailers(&mut self) -> Result<Step, Status> {
        match self.ask {
            Ask::Body => {
                self.ask = Ask::Deciding(Rest::BodyAndTrailers);
                Ok(Step::Decide)
            }
            Ask::Over if self.tell != Tell::Head => Ok(Step::Read),
            _ => Err(unexpected("request trailers out of place")),
        }
    }

    /// Asks the exchange for its decision; ready with the next step.
    pub(crate) fn poll_decide(&mut self, cx: &mut Context<'_>, out: &mut Outbox) -> Poll<Step> {
        let (Ask::Deciding(rest), Some(exchange)) = (self.ask, &mut self.exchange.exchange) else {
            return Poll::Ready(Step::Read);
        };
        exchange
            .poll_decide(cx, self.body.whole())
            .map(|decided| self.decided(rest, decided, out))
    }

    /// The decision took too long.
    pub(crate) fn overdue(&mut self, out: &mut Outbox) -> Step {
        let (Ask::Deciding(rest), Some(exchange)) = (self.ask, &mut self.exchange.exchange) else {
            return Step::Read;
        };
        let decided = exchange.overdue(self.body.whole());
        self.decided(rest, decided, out)
    }

    fn decided(&mut self, rest: Rest, decided: Result<Routed, Refusal>, out: &mut Outbox) -> Step {
        let mut routed = match decided {
            Ok(routed) => routed,
            Err(refusal) => return self.refuse(refusal, Ended::Refused, out),
        };
        self.ask = Ask::Over;
        let client = self.body.take();
        let body = match rest {
            Rest::NoBody => Pieces::default(),
            Rest::Body | Rest::BodyAndTrailers => routed.body.take().unwrap_or(client),
        };
        out.message(
            Answer::RequestHeaders(self.request_changes(&routed, rest, body.len())),
            Some(chosen(&routed)),
        );
        match rest {
            Rest::NoBody => {}
            Rest::Body => out.pieces(Half::Request, body, true),
            Rest::BodyAndTrailers => {
                out.pieces(Half::Request, body, false);
                out.message(Answer::RequestTrailers(TrailersResponse::default()), None);
            }
        }
        Step::Read
    }

    fn request_changes(&self, routed: &Routed, rest: Rest, body: usize) -> CommonAnswer {
        let mut set_headers = Vec::with_capacity(2 + routed.set.len());
        set_headers.push(set_header(DESTINATION, routed.destination.text()));
        if rest == Rest::Body && body > 0 {
            set_headers.push(set_header("content-length", body.to_string().into()));
        }
        for (name, value) in &routed.set {
            set_headers.push(set_header(name, value.clone()));
        }
        let set_here = |name: &str| routed.set.iter().any(|(set, _)| *set == name);
        let spoofed = (0u8..).zip(INTERNAL);
        let spoofed = spoofed.filter(|(i, name)| self.spoofed >> i & 1 == 1 && !set_here(name));
        let spoofed = spoofed.map(|(_, name)| name);
        let remove_headers = names(routed.remove.iter().copied().chain(spoofed));
        CommonAnswer {
            response: Some(CommonResponse {
                header_mutation: Some(HeaderMutation {
                    set_headers,
                    remove_headers,
                }),
                body_mutation: None,
                // The route may depend on what was set.
                clear_route_cache: true,
            }),
        }
    }

    /// Everything that was put out is sent: the request's body is not held any longer.
    pub(crate) fn sent(&mut self) {
        if self.ask == Ask::Over {
            self.body.release();
        }
    }

    /// Asks whether a request that was decided on is given up; ready with the next step.
    pub(crate) fn poll_evicted(&mut self, cx: &mut Context<'_>, out: &mut Outbox) -> Poll<Step> {
        match &mut self.exchange.exchange {
            Some(exchange) if self.ask == Ask::Over => exchange
                .poll_evicted(cx)
                .map(|refusal| self.refuse(refusal, Ended::Evicted, out)),
            _ => Poll::Pending,
        }
    }

    fn refuse(&mut self, refusal: Refusal, why: Ended, out: &mut Outbox) -> Step {
        (self.ask, self.tell) = (Ask::Over, Tell::Over);
        self.exchange.end(why);
        self.body.release();
        out.message(Answer::Immediate(refusal.into_message()), None);
        Step::End
    }

    fn response_head(
        &mut self,
        headers: Headers,
        metadata: &Bytes,
        end: bool,
        out: &mut Outbox,
    ) -> Result<Step, Status> {
        if self.ask == Ask::Head || self.tell != Tell::Head {
            return Err(unexpected("response headers out of place"));
        }
        // Before the decision it is the proxy's own answer, to a request that it gave up.
        self.ask = Ask::Over;
        self.body.release();
        let head = ResponseHead::read(headers, metadata, !end && self.shows_response)?;
        let reply = match &mut self.exchange.exchange {
            Some(exchange) => exchange.response_head(&head),
            None => Reply::default(),
        };
        self.tell = Tell::Body(reply.body);
        out.message(Answer::ResponseHeaders(response_changes(reply)), None);
        if end {
            self.response_over();
        } else if !self.shows_response {
            // The proxy closes the stream now or later; the body's own end is not told.
            self.exchange.meanwhile = Ended::Naturally;
        }
        Ok(Step::Read)
    }

    fn response_body(&mut self, data: Chunk, end: bool, out: &mut Outbox) -> Result<Step, Status> {
        let Tell::Body(body) = self.tell else {
            return Err(unexpected("a response body out of place"));
        };
        let len = data.len();
        let mut report = None;
        match (body, &mut self.exchange.exchange) {
            (ResponseBody::Pass, _) | (_, None) => out.body(Half::Response, data, len, end),
            (ResponseBody::Watch, Some(exchange)) => {
                data.each(end, |piece, last| exchange.response_piece(piece, last));
                report = end.then(|| exchange.report()).flatten();
                out.body(Half::Response, data, len, end && report.is_none());
            }
            (ResponseBody::Rewrite, Some(exchange)) => {
                let mut changed = Pieces::default();
                data.each(end, |piece, last| {
                    exchange.rewrite_piece(piece.clone(), last, &mut changed);
                });
                report = end.then(|| exchange.report()).flatten();
                out.pieces(Half::Response, changed, end && report.is_none());
            }
        }
        if let Some(report) = report {
            // With the end of the body, which is a message of its own.
            out.message(Answer::ResponseBody(the_end()), Some(reported(report)));
        }
        if end {
            self.response_over();
        }
        Ok(Step::Read)
    }

    fn response_trailers(&mut self, out: &mut Outbox) -> Result<Step, Status> {
        let Tell::Body(body) = self.tell else {
            return Err(unexpected("response trailers out of place"));
        };
        let mut report = None;
        match (body, &mut self.exchange.exchange) {
            (ResponseBody::Pass, _) | (_, None) => {}
            (ResponseBody::Watch, Some(exchange)) => {
                exchange.response_piece(&Bytes::new(), true);
                report = exchange.report();
            }
            (ResponseBody::Rewrite, Some(exchange)) => {
                let mut changed = Pieces::default();
                exchange.rewrite_piece(Bytes::new(), true, &mut changed);
                report = exchange.report();
                out.pieces(Half::Response, changed, false);
            }
        }
        let trailers = Answer::ResponseTrailers(TrailersResponse::default());
        out.message(trailers, report.map(reported));
        self.response_over();
        Ok(Step::Read)
    }

    fn response_over(&mut self) {
        self.tell = Tell::Over;
        self.exchange.end(Ended::Naturally);
    }

    /// The proxy sends nothing more, in good order.
    pub(crate) fn closed(&mut self) {
        self.exchange.end(self.exchange.meanwhile);
    }

    /// What the proxy sends makes no sense.
    pub(crate) fn broken(&mut self) {
        self.exchange.end(Ended::Broken);
    }
}

/// Whether bodies come here, in the filter's setting `mode`.
fn shown(mode: i32, setting: &str) -> Result<bool, Status> {
    match mode {
        NONE => Ok(false),
        FULL_DUPLEX_STREAMED => Ok(true),
        other => Err(Status::new(
            Code::Unimplemented,
            format!(
                "ext_proc: set {setting} to FULL_DUPLEX_STREAMED, or to NONE; it is mode {other}"
            ),
        )),
    }
}

fn names(names: impl Iterator<Item = &'static str>) -> Vec<Bytes> {
    names
        .map(|name| Bytes::from_static(name.as_bytes()))
        .collect()
}

fn response_changes(mut reply: Reply) -> CommonAnswer {
    if reply.body == ResponseBody::Rewrite {
        // The length is not known before the end.
        reply.remove.push("content-length");
    }
    if reply.set.is_empty() && reply.remove.is_empty() {
        return CommonAnswer::default();
    }
    let set = reply.set.into_iter();
    CommonAnswer {
        response: Some(CommonResponse {
            header_mutation: Some(HeaderMutation {
                set_headers: set.map(|(name, value)| set_header(name, value)).collect(),
                remove_headers: names(reply.remove.into_iter()),
            }),
            ..CommonResponse::default()
        }),
    }
}

/// The choice as metadata: the same text as in the header.
fn chosen(routed: &Routed) -> Struct {
    let mut fields = vec![field(
        Bytes::from_static(DESTINATION.as_bytes()),
        Kind::Text(routed.destination.text()),
    )];
    if !routed.scores.is_empty() {
        let scores = routed.scores.iter();
        let scores = scores.map(|(endpoint, score)| field(endpoint.text(), Kind::Number(*score)));
        let scores = Struct {
            fields: scores.collect(),
        };
        fields.push(field(
            Bytes::from_static(SCORES.as_bytes()),
            Kind::Struct(scores),
        ));
    }
    let namespace = Bytes::from_static(NAMESPACE.as_bytes());
    Struct {
        fields: vec![field(namespace, Kind::Struct(Struct { fields }))],
    }
}

/// The end of a body, without a piece of it.
fn the_end() -> CommonAnswer {
    let body_mutation = Some(BodyMutation {
        streamed_response: Some(StreamedBodyResponse {
            body: Bytes::new(),
            end_of_stream: true,
        }),
    });
    CommonAnswer {
        response: Some(CommonResponse {
            body_mutation,
            ..CommonResponse::default()
        }),
    }
}

/// A number of the response as metadata.
fn reported(report: Report) -> Struct {
    let fields = vec![field(report.name, Kind::Number(report.value))];
    Struct {
        fields: vec![field(report.namespace, Kind::Struct(Struct { fields }))],
    }
}

fn field(key: Bytes, kind: Kind) -> Field {
    Field {
        key,
        value: Some(Value { kind: Some(kind) }),
    }
}

#[cfg(test)]
mod tests;
