//! Exchanges as text: what the proxy says, and what it is told.
//!
//! A line with `>` is a message of the proxy: `> request headers a=b, c=d`, `> response body text`, `> request trailers`,
//! with `!` at the end if it ends the half; `> closed` is the stream's good end, `> evict` nothing of the proxy's. A line with `<` is a message to the
//! proxy, one with `=` what the exchange was told. Everything up to the next `>` follows from it.

use super::*;
use crate::cursor::Cursor;
use crate::outbox::tests::drained;
use crate::peer;
use crate::picker::Destination;
use crate::proto::{ImmediateResponse, OVERWRITE, ProcessingResponse, ProtocolConfiguration};
use baton_http::Budget;
use baton_openai::ErrorKind;
use parking_lot::Mutex;
use prost::Message as _;
use std::sync::Arc;
use std::task::Waker;

type Told = Arc<Mutex<Vec<String>>>;

/// Does what the request's headers say, and writes down what it is told.
struct Scripted {
    told: Told,
}

struct Script {
    told: Told,
    routed: Result<Routed, Refusal>,
    waits: bool,
    fallback: bool,
    reply: Reply,
    report: Option<Report>,
}

fn destination() -> Destination {
    Destination::from(std::net::SocketAddr::from(([10, 0, 0, 1], 8000)))
}

impl Picker for Scripted {
    type Exchange = Script;

    fn begin(&self, head: RequestHead) -> Result<Script, Refusal> {
        if let Some(subset) = &head.subset {
            self.told.lock().push(format!("subset of {}", subset.len()));
        }
        let says = |name: &str| head.headers.text(name);
        let bad = || Refusal::new(ErrorKind::BadRequest, "no");
        if says("begin") == Some("refuse") {
            return Err(bad());
        }
        let mut routed = Routed::to(destination());
        if let Some(prefill) = head.headers.bytes("prefill") {
            routed.set.push(("x-prefiller-host-port", prefill));
        }
        routed.body = says("replace").map(|body| Pieces::from(body.to_owned()));
        routed.remove.extend(says("remove").map(|_| "prefill"));
        routed
            .scores
            .extend(says("scores").map(|_| (destination(), 0.5)));
        let mut reply = Reply::default();
        reply
            .set
            .extend(says("reply").map(|v| ("x-reply", Bytes::copy_from_slice(v.as_bytes()))));
        reply.body = match says("response") {
            Some("watch") => ResponseBody::Watch,
            Some("rewrite") => ResponseBody::Rewrite,
            _ => ResponseBody::Pass,
        };
        Ok(Script {
            told: self.told.clone(),
            routed: match says("decide") {
                Some("refuse") => Err(bad()),
                _ => Ok(routed),
            },
            waits: says("decide") == Some("wait"),
            fallback: says("overdue").is_some(),
            reply,
            report: says("report").map(|_| Report {
                namespace: Bytes::from_static(b"envoy.lb"),
                name: Bytes::from_static(b"cost"),
                value: 7.0,
            }),
        })
    }
}

impl Exchange for Script {
    fn request_piece(&mut self, piece: &Bytes) {
        self.told.lock().push(format!("piece {:?}", text(piece)));
    }

    fn poll_decide(&mut self, _: &mut Context<'_>, body: &Pieces) -> Poll<Result<Routed, Refusal>> {
        self.told
            .lock()
            .push(format!("decide {:?}", text(&body.clone().into_bytes())));
        match self.waits {
            true => Poll::Pending,
            false => Poll::Ready(self.routed.clone()),
        }
    }

    fn overdue(&mut self, _: &Pieces) -> Result<Routed, Refusal> {
        if self.fallback {
            self.routed.clone()
        } else {
            Err(Refusal::overdue())
        }
    }

    fn poll_evicted(&mut self, _: &mut Context<'_>) -> Poll<Refusal> {
        Poll::Ready(Refusal::new(ErrorKind::TooManyRequests, "make room"))
    }

    fn response_head(&mut self, head: &ResponseHead) -> Reply {
        let (status, served) = (head.status(), head.served.as_deref());
        self.told.lock().push(format!(
            "response {status:?} {served:?} body {}",
            head.has_body
        ));
        self.reply.clone()
    }

    fn response_piece(&mut self, piece: &[u8], last: bool) {
        self.told.lock().push(format!(
            "seen {:?}{}",
            text(piece),
            if last { " !" } else { "" }
        ));
    }

    fn rewrite_piece(&mut self, piece: Bytes, last: bool, out: &mut Pieces) {
        out.push(piece.to_ascii_uppercase());
        if last {
            out.push("<end>");
        }
    }

    fn report(&mut self) -> Option<Report> {
        self.report.clone()
    }

    fn ended(&mut self, why: Ended) {
        self.told.lock().push(format!("ended {why:?}"));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Plays the lines with `>` and returns the whole conversation.
fn played(script: &str) -> String {
    let told: Told = Arc::default();
    let picker = Scripted { told: told.clone() };
    let budget = Budget::new(1 << 20);
    let mut machine = Machine::new(budget.account(), 20);
    let (mut out, mut seen) = (Outbox::default(), Vec::new());
    for line in script
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with('>'))
    {
        seen.push(line.to_owned());
        let step = said(
            &mut machine,
            &picker,
            line.trim_start_matches("> "),
            &mut out,
        );
        let answers = drained(&mut out);
        machine.sent();
        seen.extend(told.lock().drain(..).map(|told| format!("= {told}")));
        seen.extend(
            answers
                .iter()
                .map(|answer| format!("< {}", shown_answer(answer))),
        );
        match step {
            Ok(Step::Read | Step::Decide) => {}
            Ok(_) => seen.push("< end".to_owned()),
            Err(status) => seen.push(format!("< {:?}: {}", status.code, status.message)),
        }
    }
    drop(machine);
    seen.extend(told.lock().drain(..).map(|told| format!("= {told}")));
    seen.join("\n")
}

fn said(
    machine: &mut Machine<Script>,
    picker: &Scripted,
    line: &str,
    out: &mut Outbox,
) -> Result<Step, Status> {
    let mut cx = Context::from_waker(Waker::noop());
    let step = match line {
        "closed" => {
            machine.closed();
            return Ok(Step::End);
        }
        "overdue" => return Ok(machine.overdue(out)),
        "evict" => {
            return Ok(match machine.poll_evicted(&mut cx, out) {
                Poll::Ready(step) => step,
                Poll::Pending => Step::Read,
            });
        }
        _ => machine.on(picker, inbound(line), out)?,
    };
    match step {
        Step::Decide => Ok(match machine.poll_decide(&mut cx, out) {
            Poll::Ready(step) => step,
            Poll::Pending => Step::Decide,
        }),
        step => Ok(step),
    }
}

/// A message of the proxy, through its bytes.
fn inbound(line: &str) -> Inbound {
    let (line, end) = match line.strip_suffix('!') {
        Some(line) => (line.trim_end(), true),
        None => (line, false),
    };
    let (half, rest) = line.split_once(' ').unwrap();
    let half = if half == "request" {
        Half::Request
    } else {
        Half::Response
    };
    let (part, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut message = match part {
        "headers" => {
            let headers: Vec<(&str, &str)> =
                rest.split(", ").filter_map(|h| h.split_once('=')).collect();
            peer::headers(half, &headers, end)
        }
        "body" => peer::body(half, rest.as_bytes(), end),
        _ => peer::trailers(half),
    };
    if let Some((_, mode)) = rest.split_once("mode=") {
        let mut modes = mode
            .split(|c: char| !c.is_ascii_digit())
            .map(|n| n.parse().unwrap_or(0));
        message.protocol_config = Some(ProtocolConfiguration {
            request_body_mode: modes.next().unwrap(),
            response_body_mode: modes.next().unwrap(),
        });
    }
    message.observability_mode = rest.contains("observing");
    if rest.contains("served") {
        let key = "x-gateway-destination-endpoint-served";
        message.metadata_context = Some(peer::metadata("envoy.lb", key, "10.0.0.1:8000"));
    }
    let text: Bytes = message.encode_to_vec().into();
    let len = text.len();
    Inbound::read(Cursor::new(&mut [text].into(), len)).unwrap()
}

/// A message to the proxy in a few words.
fn shown_answer(message: &ProcessingResponse) -> String {
    let metadata = message
        .dynamic_metadata
        .as_ref()
        .map(|m| format!(" metadata {}", shown_struct(m)));
    let metadata = metadata.unwrap_or_default();
    match message.answer.as_ref().unwrap() {
        Answer::RequestHeaders(answer) => {
            format!("request headers{}{metadata}", shown_common(answer))
        }
        Answer::ResponseHeaders(answer) => {
            format!("response headers{}{metadata}", shown_common(answer))
        }
        Answer::RequestBody(answer) => format!("request body{}", shown_common(answer)),
        Answer::ResponseBody(answer) => {
            format!("response body{}{metadata}", shown_common(answer))
        }
        Answer::RequestTrailers(_) => "request trailers".to_owned(),
        Answer::ResponseTrailers(_) => format!("response trailers{metadata}"),
        Answer::Immediate(ImmediateResponse { status, .. }) => {
            format!("answer {}", status.unwrap().code)
        }
    }
}

fn shown_struct(message: &Struct) -> String {
    let fields = message.fields.iter().map(|field| {
        let value = match field.value.as_ref().unwrap().kind.as_ref().unwrap() {
            Kind::Text(value) => text(value),
            Kind::Number(value) => value.to_string(),
            Kind::Struct(value) => shown_struct(value),
        };
        format!("{}={value}", text(&field.key))
    });
    format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
}

fn shown_common(answer: &CommonAnswer) -> String {
    let Some(response) = &answer.response else {
        return String::new();
    };
    let mut shown = String::new();
    if let Some(changes) = &response.header_mutation {
        for header in &changes.set_headers {
            assert_eq!(header.append_action, OVERWRITE);
            let header = header.header.as_ref().unwrap();
            shown += &format!(" {}={}", text(&header.key), text(&header.raw_value));
        }
        for name in &changes.remove_headers {
            shown += &format!(" -{}", text(name));
        }
    }
    if let Some(body) = response
        .body_mutation
        .as_ref()
        .and_then(|b| b.streamed_response.as_ref())
    {
        shown += &format!(" {:?}", text(&body.body));
        shown += if body.end_of_stream { " !" } else { "" };
    }
    shown
        + if response.clear_route_cache {
            " reroute"
        } else {
            ""
        }
}

const CHOSEN: &str = "metadata {envoy.lb={x-gateway-destination-endpoint=10.0.0.1:8000}}";

/// Plays a conversation and compares it with itself; `CHOSEN` stands for the metadata of every decision.
#[track_caller]
fn holds(script: &str) {
    let lines: Vec<&str> = script
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    assert_eq!(played(script), lines.join("\n").replace("CHOSEN", CHOSEN));
}

#[test]
fn a_request_is_answered_as_a_whole_and_its_response_piece_by_piece() {
    holds(
        r#"> request headers :path=/v1/completions
         > request body hello
         = piece "hello"
         > request body , you
         = piece ", you"
         > request body !
         = piece ""
         = decide "hello, you"
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 content-length=10 reroute CHOSEN
         < request body "hello, you" !
         > response headers :status=200, served
         = response Some(200) Some("10.0.0.1:8000") body true
         < response headers
         > response body data: 1
         < response body "data: 1"
         > response body
         > response body data: 2!
         = ended Naturally
         < response body "data: 2" !
         > closed
         < end"#,
    );
}

#[test]
fn a_request_without_a_body_is_answered_at_once() {
    holds(
        r#"> request headers :path=/v1/models !
         = decide ""
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 reroute CHOSEN
         > response headers :status=204 !
         = response Some(204) None body false
         = ended Naturally
         < response headers"#,
    );
    // With an empty one, an empty piece is its end.
    holds(
        r#"> request headers a=b
         > request body !
         = piece ""
         = decide ""
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 reroute CHOSEN
         < request body "" !
         > closed
         = ended Disconnected
         < end"#,
    );
}

#[test]
fn trailers_end_a_body_and_are_answered() {
    holds(
        r#"> request headers a=b
         > request body hello
         = piece "hello"
         > request trailers
         = decide "hello"
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 reroute CHOSEN
         < request body "hello"
         < request trailers
         > response headers :status=200
         = response Some(200) None body true
         < response headers
         > response body grpc
         < response body "grpc"
         > response trailers
         = ended Naturally
         < response trailers"#,
    );
}

#[test]
fn headers_for_other_parts_of_the_system_come_from_here_or_not_at_all() {
    holds(
        r#"> request headers x-prefiller-host-port=evil:1, x-encoder-hosts-ports=evil:2, remove=1, scores=1 !
         = decide ""
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 -prefill -x-prefiller-host-port -x-encoder-hosts-ports reroute metadata {envoy.lb={x-gateway-destination-endpoint=10.0.0.1:8000, x-gateway-destination-endpoint-scores={10.0.0.1:8000=0.5}}}
         > closed
         = ended Disconnected
         < end"#,
    );
    holds(
        r#"> request headers x-prefiller-host-port=evil:1, prefill=10.0.0.2:8000 !
         = decide ""
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 x-prefiller-host-port=10.0.0.2:8000 reroute CHOSEN
         > closed
         = ended Disconnected
         < end"#,
    );
}

#[test]
fn a_body_may_be_replaced_and_a_response_watched_or_rewritten() {
    holds(
        r#"> request headers replace=other, response=watch, reply=yes
         > request body hello!
         = piece "hello"
         = decide "hello"
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 content-length=5 reroute CHOSEN
         < request body "other" !
         > response headers :status=200
         = response Some(200) None body true
         < response headers x-reply=yes
         > response body one
         = seen "one"
         < response body "one"
         > response body !
         = seen "" !
         = ended Naturally
         < response body "" !"#,
    );
    holds(
        r#"> request headers response=rewrite !
         = decide ""
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 reroute CHOSEN
         > response headers :status=200
         = response Some(200) None body true
         < response headers -content-length
         > response body one
         < response body "ONE"
         > response trailers
         = ended Naturally
         < response body "<end>"
         < response trailers"#,
    );
}

#[test]
fn a_number_of_a_response_goes_with_its_end() {
    holds(
        r#"> request headers response=watch, report=yes !
         = decide ""
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 reroute CHOSEN
         > response headers :status=200
         = response Some(200) None body true
         < response headers
         > response body one
         = seen "one"
         < response body "one"
         > response body two!
         = seen "two" !
         = ended Naturally
         < response body "two"
         < response body "" ! metadata {envoy.lb={cost=7}}"#,
    );
    holds(
        r#"> request headers response=rewrite, report=yes !
         = decide ""
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 reroute CHOSEN
         > response headers :status=200
         = response Some(200) None body true
         < response headers -content-length
         > response body one
         < response body "ONE"
         > response trailers
         = ended Naturally
         < response body "<end>"
         < response trailers metadata {envoy.lb={cost=7}}"#,
    );
}

#[test]
fn whoever_is_refused_gets_one_answer_and_the_stream_ends() {
    holds(
        r#"> request headers begin=refuse
         < answer 400
         < end"#,
    );
    holds(
        r#"> request headers decide=refuse !
         = decide ""
         = ended Refused
         < answer 400
         < end"#,
    );
    holds(
        r#"> request headers a=b
         > request body 20 bytes are allowed
         = piece "20 bytes are allowed"
         > request body .
         = piece "."
         = ended Refused
         < answer 413
         < end"#,
    );
}

#[test]
fn a_decision_that_takes_too_long_is_made_without_the_picker() {
    holds(
        r#"> request headers decide=wait !
         = decide ""
         > overdue
         = ended Refused
         < answer 503
         < end"#,
    );
    holds(
        r#"> request headers decide=wait, overdue=fallback !
         = decide ""
         > overdue
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 reroute CHOSEN
         > closed
         = ended Disconnected
         < end"#,
    );
}

#[test]
fn the_proxy_may_answer_itself_before_the_decision() {
    holds(
        r#"> request headers decide=wait
         > request body hello!
         = piece "hello"
         = decide "hello"
         > response headers :status=408
         = response Some(408) None body true
         < response headers
         > response body timeout!
         = ended Naturally
         < response body "timeout" !"#,
    );
    holds(
        r#"> request headers a=b
         > request body hello
         = piece "hello"
         > response headers :status=413 !
         = response Some(413) None body false
         = ended Naturally
         < response headers
         > request body late!"#,
    );
}

#[test]
fn bodies_that_the_proxy_keeps_are_not_waited_for() {
    holds(
        r#"> request headers a=b, mode=0,0
         = decide ""
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 reroute CHOSEN
         > response headers :status=200
         = response Some(200) None body false
         < response headers
         > closed
         = ended Naturally
         < end"#,
    );
    holds(
        r#"> request headers a=b, mode=2,4
         < Unimplemented: ext_proc: set request_body_mode to FULL_DUPLEX_STREAMED, or to NONE; it is mode 2"#,
    );
    holds("> request headers a=b, observing\n< end");
}

#[test]
fn what_comes_out_of_place_ends_the_stream() {
    for first in [
        "request body x",
        "request trailers",
        "response headers a=b",
        "response body x",
        "response trailers",
    ] {
        let seen = played(&format!("> {first}"));
        assert!(seen.contains("< InvalidArgument"), "{seen}");
    }
    let begun = "> request headers a=b\n> request body x!\n";
    for next in [
        "request headers a=b",
        "request body y",
        "request trailers",
        "response body y",
        "response trailers",
    ] {
        let seen = played(&format!("{begun}> {next}"));
        assert!(
            seen.contains("< InvalidArgument") && seen.matches("= ended Broken").count() == 1,
            "{seen}"
        );
        assert_eq!(seen.matches("= ended").count(), 1, "{seen}");
    }
    let over = format!("{begun}> response headers a=b !\n");
    for next in [
        "request headers a=b",
        "response headers a=b",
        "response body y",
        "response trailers",
    ] {
        let seen = played(&format!("{over}> {next}"));
        assert!(
            seen.contains("< InvalidArgument") && seen.contains("= ended Naturally"),
            "{seen}"
        );
        assert_eq!(seen.matches("= ended").count(), 1, "{seen}");
    }
}

#[test]
fn a_request_at_its_endpoint_may_be_given_up_until_its_answer_has_passed() {
    let decided = r#"> request headers a=b !
         = decide ""
         < request headers x-gateway-destination-endpoint=10.0.0.1:8000 reroute CHOSEN"#;
    holds(&format!(
        "{decided}
         > evict
         = ended Evicted
         < answer 429
         < end"
    ));
    holds(&format!(
        "{decided}
         > response headers :status=200
         = response Some(200) None body true
         < response headers
         > evict
         = ended Evicted
         < answer 429
         < end"
    ));
    holds(&format!(
        "{decided}
         > response headers :status=200 !
         = response Some(200) None body false
         = ended Naturally
         < response headers
         > evict"
    ));
}

#[test]
fn a_request_that_is_not_decided_on_is_not_given_up() {
    holds(
        r#"> evict
         > request headers decide=wait
         > evict
         > request body x !
         = piece "x"
         = decide "x"
         > evict
         > closed
         = ended Disconnected
         < end"#,
    );
}
