//! One request, from its head to its answer's last byte.
//!
//! Stations: the body is scanned while it comes ([`Request::request_piece`]); once it is there, it is [understood]
//! (who asks, for which model), read (where what servers report is asked: in tokens), let in (at once, or through the queue), and [placed] (where it goes); the answer's head
//! and bytes are watched as far as somebody wants to know; the end, whatever it is, gives back what was counted.
//!
//! [understood]: Request::understand
//! [placed]: Request::place

use crate::account::Account;
use crate::intent::{self, Api};
use crate::names;
use crate::picker::Epp;
use crate::queue::{Claim, Waiting};
use crate::refusals;
use crate::restore::Restore;
use crate::route::{self, Ask};
use crate::trace::Trace;
use crate::usage::Tail;
use crate::words::{Kind, Reading};
use base64::Engine as _;
use baton_ext_proc::{
    Ended, Exchange, Refusal, Reply, Report, RequestHead, ResponseBody, ResponseHead, Routed,
};
use baton_fleet::{Eviction, Flight, Permit, Server};
use baton_http::Pieces;
use baton_openai::facts::{Facts, Form, ScanError, Scanner, Span, json_string};
use baton_scheduler::{Keys, Prompt};
use bytes::Bytes;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

/// What is known of a request until its answer has passed.
pub(crate) struct Request {
    epp: Arc<Epp>,
    head: RequestHead,
    /// What is known of the body; an error once it is known to be none.
    scan: Result<Scanner, ScanError>,
    account: Account,
    stage: Stage,
    under_way: Option<UnderWay>,
    /// What is told of it, if it is traced.
    trace: Option<Box<Trace>>,
}

/// How far a request has come that is not placed yet.
#[derive(Default)]
enum Stage {
    #[default]
    New,
    /// Its prompt is being read.
    Read(Asked, Reading),
    /// It waits for its turn.
    Wait(Asked, Waiting),
}

/// What a request wants.
#[derive(Debug)]
struct Asked {
    /// The model that the client names.
    model: Option<String>,
    /// The name that it gets on its way, if that is another.
    target: Option<String>,
    /// Where the name stands in the body.
    name_at: Option<Span>,
    prompt: Prompt,
    /// The prompt as what servers report has it, if it could be read.
    keys: Option<Keys>,
    multimodal: bool,
    priority: i32,
}

/// A request that was sent to servers.
#[derive(Debug)]
struct UnderWay {
    decode: Flight,
    /// Until the answer begins: then the prompt is done.
    helpers: Vec<Flight>,
    prompt: Prompt,
    /// The models' names as JSON, if the server knows it by another one: served, and asked for.
    renamed: Option<(String, String)>,
    restore: Option<Restore>,
    tail: Tail,
    /// When it is to make room for others.
    eviction: Eviction,
    /// Dropped last: it wakes others, who look at what is counted.
    permit: Option<Permit>,
}

impl Request {
    pub(crate) fn new(epp: Arc<Epp>, head: RequestHead) -> Self {
        let account = Account::begin(&epp.metrics);
        let tracer = epp.tracer.as_ref();
        Self {
            trace: tracer.and_then(|tracer| Trace::begin(tracer, &head.headers)),
            epp,
            head,
            scan: Ok(Scanner::new()),
            account,
            stage: Stage::New,
            under_way: None,
        }
    }

    /// Decides, in as many calls as reading and the queue need.
    fn poll(&mut self, cx: &mut Context<'_>, body: &Pieces) -> Poll<Result<Routed, Refusal>> {
        if let Stage::New = self.stage {
            if let Some(trace) = &mut self.trace {
                trace.body_is_whole();
            }
            let asked = self.understand(body)?;
            match self.read(&asked, body) {
                Some(reading) => self.stage = Stage::Read(asked, reading),
                None => return self.let_in(asked, cx, body),
            }
        }
        if let Stage::Read(asked, reading) = &mut self.stage {
            asked.keys = ready!(reading.as_mut().poll(cx));
            if let Stage::Read(asked, _) = std::mem::take(&mut self.stage) {
                return self.let_in(asked, cx, body);
            }
        }
        self.wait(cx, body)
    }

    /// Lets a request in that is understood and read: at once, or through the queue.
    fn let_in(
        &mut self,
        asked: Asked,
        cx: &mut Context<'_>,
        body: &Pieces,
    ) -> Poll<Result<Routed, Refusal>> {
        let Some(waiting) = self.enter(&asked, body)? else {
            return Poll::Ready(self.place(asked, None, body));
        };
        self.stage = Stage::Wait(asked, waiting);
        self.wait(cx, body)
    }

    fn wait(&mut self, cx: &mut Context<'_>, body: &Pieces) -> Poll<Result<Routed, Refusal>> {
        let Stage::Wait(_, waiting) = &mut self.stage else {
            return Poll::Ready(Err(refusals::broken()));
        };
        let permit = ready!(waiting.as_mut().poll(cx));
        let Stage::Wait(asked, _) = std::mem::take(&mut self.stage) else {
            return Poll::Ready(Err(refusals::broken()));
        };
        Poll::Ready(permit.and_then(|permit| self.place(asked, Some(permit), body)))
    }

    /// Reads the prompt, if that tells more of who has it cached.
    fn read(&self, asked: &Asked, body: &Pieces) -> Option<Reading> {
        let words = self.epp.words.as_ref()?;
        if intent::api(&self.head.headers) == Api::Other || asked.multimodal {
            return None;
        }
        let kind = Kind::of(intent::first(&self.head.headers, &names::PATHS)?)?;
        let served = asked.target.as_deref().or(asked.model.as_deref())?;
        Some(words.read(&self.epp, kind, body, served))
    }

    /// What the request with `body` wants.
    fn understand(&mut self, body: &Pieces) -> Result<Asked, Refusal> {
        let epp = self.epp.clone();
        let text: Vec<&Bytes> = body.iter().collect();
        let api = intent::api(&self.head.headers);
        let facts = self.facts(api)?;
        let objects = epp.objects.load();
        let model = facts.model_name(&text);
        let said = intent::first(&self.head.headers, &names::REWRITE);
        let ruled = objects.rewrite(model.as_deref(), epp.chance());
        let target = ruled.map(|(_, target)| target).or(said);
        if api != Api::Other && model.is_none() && target.is_none() {
            return Err(refusals::field("model", "model not found in request body"));
        }
        let target = target.filter(|target| Some(*target) != model.as_deref());
        let served = target.or(model.as_deref());
        let objective = intent::first(&self.head.headers, &names::OBJECTIVE);
        let priority = objects.priority(objective);
        let fairness = intent::first(&self.head.headers, &names::FAIRNESS);
        let labels = (model.as_deref(), served);
        self.account.knows(&epp.metrics, labels, fairness, priority);
        if let Some((rule, target)) = ruled {
            epp.metrics
                .rewritten(&rule.object, model.as_deref(), target);
        }
        let slices: Vec<&[u8]> = facts.prompt_slices(&text).collect();
        Ok(Asked {
            prompt: epp
                .fleet
                .prompt(served.unwrap_or(""), &slices, facts.tokens()),
            target: target.map(str::to_owned),
            model: model.as_deref().map(str::to_owned),
            name_at: facts.model,
            keys: None,
            multimodal: facts.media.any(),
            priority,
        })
    }

    /// What the body says. A body that no server could read is refused here, as servers would.
    fn facts(&mut self, api: Api) -> Result<Facts, Refusal> {
        let scan = std::mem::replace(&mut self.scan, Err(ScanError::Empty));
        let Api::Prompt(field) = api else {
            // Whatever it is, a picture or a form, its server knows what to make of it.
            return Ok(scan.and_then(Scanner::finish).unwrap_or_default());
        };
        let facts = scan.and_then(Scanner::finish).map_err(refusals::body)?;
        match facts.form {
            Form::Missing => Err(refusals::field(field, "a value is needed")),
            Form::Other => Err(refusals::field(field, "this makes no prompt")),
            _ => Ok(facts),
        }
    }

    /// Lets the request in, or into the queue if there is one. What only wants to know something need not wait.
    fn enter(&mut self, asked: &Asked, body: &Pieces) -> Result<Option<Waiting>, Refusal> {
        let queue = self.epp.queue.as_ref().filter(|_| self.head.has_body);
        let Some(queue) = queue else {
            let admitted = self.epp.fleet.admit(asked.priority);
            return admitted.map(|()| None).map_err(refusals::not_admitted);
        };
        let fairness = intent::first(&self.head.headers, &names::FAIRNESS);
        Ok(Some(queue.enter(&Claim {
            headers: &self.head.headers,
            series: self.account.series(&self.epp.metrics).clone(),
            fairness: fairness.unwrap_or(names::DEFAULT_FLOW),
            priority: asked.priority,
            tokens: asked.prompt.tokens(),
            bytes: body.len(),
        })))
    }

    /// Where the request goes, now that it may.
    fn place(
        &mut self,
        asked: Asked,
        mut permit: Option<Permit>,
        body: &Pieces,
    ) -> Result<Routed, Refusal> {
        let epp = self.epp.clone();
        let ask = Ask {
            head: &self.head,
            model: asked.model.as_deref(),
            target: asked.target.as_deref(),
            prompt: &asked.prompt,
            keys: asked.keys.as_ref(),
            multimodal: asked.multimodal,
            priority: asked.priority,
        };
        let served = ask.target.or(ask.model);
        let (route, mut routed) = route::decide(&epp, &ask, self.trace.as_deref_mut())
            .map_err(|why| refusals::unschedulable(why, served, &epp.fleet))?;
        permit.iter_mut().for_each(Permit::placed);
        if let (Some(target), Some(span)) = (ask.target, asked.name_at) {
            let edit = (span, Bytes::from(json_string(target)));
            routed.body = Some(body.clone().replaced([edit]));
        }
        let renamed = asked.target.as_deref().zip(asked.model.as_deref());
        self.account.sent(&epp.metrics, body.len());
        self.under_way = Some(UnderWay {
            decode: route.decode,
            helpers: route.prefill.into_iter().chain(route.encode).collect(),
            renamed: renamed.map(|(target, model)| (json_string(target), json_string(model))),
            prompt: asked.prompt,
            restore: None,
            tail: Tail::default(),
            eviction: permit.as_mut().map(Permit::eviction).unwrap_or_default(),
            permit,
        });
        Ok(routed)
    }

    /// Reads what is wanted of a piece of the answer.
    fn watch(&mut self, piece: &[u8], now: Instant) {
        self.account.piece(&self.epp.metrics, piece.len(), now);
        if let Some(under_way) = &mut self.under_way {
            under_way.decode.answered();
            under_way.tail.push(piece);
        }
    }

    /// The header by which the client's session stays where it is.
    fn session(&self, server: &Server) -> Option<(&'static str, Bytes)> {
        let header = self.epp.session_header?;
        let token = base64::engine::general_purpose::STANDARD.encode(server.name());
        Some((header, token.into()))
    }
}

impl UnderWay {
    /// The answer begins: whoever computed the prompt is done with it.
    fn prompt_done(&mut self) {
        if !self.helpers.is_empty() {
            self.helpers.clear();
            self.permit.iter().for_each(Permit::part_done);
        }
    }
}

impl Exchange for Request {
    fn request_piece(&mut self, piece: &Bytes) {
        if let Ok(scanner) = &mut self.scan
            && let Err(error) = scanner.push(piece)
        {
            self.scan = Err(error);
        }
    }

    fn poll_decide(
        &mut self,
        cx: &mut Context<'_>,
        body: &Pieces,
    ) -> Poll<Result<Routed, Refusal>> {
        let decided = ready!(self.poll(cx, body));
        if let Err(refusal) = &decided {
            self.account.refused(&self.epp.metrics, refusal);
            if let Some(trace) = &mut self.trace {
                trace.refused(refusal);
            }
        }
        Poll::Ready(decided)
    }

    fn poll_evicted(&mut self, cx: &mut Context<'_>) -> Poll<Refusal> {
        let Some(under_way) = &mut self.under_way else {
            return Poll::Pending;
        };
        ready!(Pin::new(&mut under_way.eviction).poll(cx));
        let refusal = refusals::evicted();
        self.account.evicted(&self.epp.metrics, &refusal);
        if let Some(trace) = &mut self.trace {
            trace.refused(&refusal);
        }
        Poll::Ready(refusal)
    }

    fn response_head(&mut self, head: &ResponseHead) -> Reply {
        let mut reply = Reply::default();
        if self.epp.config.shows_served {
            let served = head.served.clone();
            let served = served.unwrap_or_else(|| "fail: missing envoy lb metadata".to_owned());
            reply.set.push((names::SHOW_SERVED, served.into()));
        }
        let status = head.status().unwrap_or(0);
        let streams = intent::is_event_stream(&head.headers);
        self.account.answered(&self.epp.metrics, status, streams);
        if let Some(trace) = &mut self.trace {
            trace.answered(status);
        }
        let Some(under_way) = &mut self.under_way else {
            return reply;
        };
        if (200..=299).contains(&status) {
            under_way.helpers.iter().for_each(Flight::answered);
        }
        under_way.prompt_done();
        let server = under_way.decode.server().clone();
        match status {
            200..=299 => self.epp.fleet.answered(&server, &under_way.prompt),
            // The proxy itself says these if it cannot reach the server or loses it.
            502..=504 => self.epp.fleet.failed(&server),
            _ => {}
        }
        reply.body = ResponseBody::Watch;
        if let Some((served, asked)) = &under_way.renamed {
            under_way.restore = Some(Restore::new(served, asked));
            reply.body = ResponseBody::Rewrite;
            reply.remove.push("content-length");
        }
        reply.set.extend(self.session(&server));
        reply
    }

    fn response_piece(&mut self, piece: &[u8], _: bool) {
        let now = Instant::now();
        self.watch(piece, now);
        self.account.handled(now);
    }

    fn rewrite_piece(&mut self, piece: Bytes, last: bool, out: &mut Pieces) {
        let now = Instant::now();
        self.watch(&piece, now);
        match self.under_way.as_mut().and_then(|u| u.restore.as_mut()) {
            Some(restore) => restore.push(piece, last, out),
            None => out.push(piece),
        }
        self.account.handled(now);
    }

    fn report(&mut self) -> Option<Report> {
        // A configuration has at most one.
        let attribute = self.epp.config.attributes.first()?;
        let usage = self.under_way.as_ref()?.tail.object()?;
        Some(Report {
            value: attribute.of(&usage)?,
            namespace: Bytes::copy_from_slice(attribute.namespace.as_bytes()),
            name: Bytes::copy_from_slice(attribute.name.as_bytes()),
        })
    }

    fn ended(&mut self, why: Ended) {
        // Whoever still waits leaves the queue.
        self.stage = Stage::New;
        let usage = self.under_way.take().map(|u| u.tail.usage());
        let usage = usage.unwrap_or_default();
        self.account.ended(&self.epp.metrics, why, usage);
        if let Some(trace) = self.trace.take() {
            trace.ended(usage);
        }
    }
}
