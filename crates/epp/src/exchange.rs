//! One request, from its head to its answer's last byte.
//!
//! Stations: the body is scanned while it comes ([`Request::request_piece`]); it is decided once it is there
//! ([`Request::decide`]: who asks, for which model, may it come in, where does it go); the answer's head and bytes are
//! watched as far as somebody wants to know; the end, whatever it is, gives back what was counted.

use crate::account::Account;
use crate::intent::{self, Api};
use crate::names;
use crate::picker::Epp;
use crate::refusals;
use crate::restore::Restore;
use crate::route::{self, Ask};
use crate::usage::Tail;
use base64::Engine as _;
use baton_ext_proc::{
    Ended, Exchange, Refusal, Reply, RequestHead, ResponseBody, ResponseHead, Routed,
};
use baton_fleet::{Flight, Server};
use baton_http::Pieces;
use baton_openai::facts::{Facts, Form, ScanError, Scanner, json_string};
use baton_scheduler::Prompt;
use bytes::Bytes;
use std::sync::Arc;
use std::task::{Context, Poll};

/// What is known of a request until its answer has passed.
#[derive(Debug)]
pub(crate) struct Request {
    epp: Arc<Epp>,
    head: RequestHead,
    /// What is known of the body; an error once it is known to be none.
    scan: Result<Scanner, ScanError>,
    account: Account,
    under_way: Option<UnderWay>,
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
}

impl Request {
    pub(crate) fn new(epp: Arc<Epp>, head: RequestHead) -> Self {
        let account = Account::begin(&epp.metrics);
        Self {
            epp,
            head,
            scan: Ok(Scanner::new()),
            account,
            under_way: None,
        }
    }

    /// Where the request with `body` goes.
    fn decide(&mut self, body: &Pieces) -> Result<Routed, Refusal> {
        let epp = self.epp.clone();
        let text: Vec<&Bytes> = body.iter().collect();
        let api = intent::api(&self.head.headers);
        let facts = self.facts(api)?;
        let objects = epp.objects.load();
        let asked = facts.model_name(&text);
        let said = intent::first(&self.head.headers, &names::REWRITE);
        let ruled = objects.rewrite(asked.as_deref(), epp.chance());
        let target = ruled.map(|(_, target)| target).or(said);
        if api != Api::Other && asked.is_none() && target.is_none() {
            return Err(refusals::field("model", "model not found in request body"));
        }
        let renamed = target.filter(|target| Some(*target) != asked.as_deref());
        let objective = intent::first(&self.head.headers, &names::OBJECTIVE);
        let priority = objects.priority(objective);
        let fairness = intent::first(&self.head.headers, &names::FAIRNESS);
        let names = (asked.as_deref(), target.or(asked.as_deref()));
        self.account.knows(&epp.metrics, names, fairness, priority);
        if let Some((rule, target)) = ruled {
            epp.metrics
                .rewritten(&rule.object, asked.as_deref(), target);
        }
        epp.fleet.admit(priority).map_err(refusals::not_admitted)?;
        let slices: Vec<&[u8]> = facts.prompt_slices(&text).collect();
        let prompt = epp
            .fleet
            .prompt(names.1.unwrap_or(""), &slices, facts.tokens());
        let ask = Ask {
            head: &self.head,
            model: names.0,
            target: renamed,
            prompt: &prompt,
            multimodal: facts.media.any(),
            priority,
        };
        let (route, mut routed) = route::decide(&epp, &ask)
            .map_err(|why| refusals::unschedulable(why, names.1, &epp.fleet))?;
        if let (Some(target), Some(span)) = (renamed, facts.model.clone()) {
            let edit = (span, Bytes::from(json_string(target)));
            routed.body = Some(body.clone().replaced([edit]));
        }
        let renamed = renamed.zip(asked.as_deref());
        let decode = route.decode;
        self.account.sent(&epp.metrics, body.len());
        self.under_way = Some(UnderWay {
            decode,
            helpers: route.prefill.into_iter().chain(route.encode).collect(),
            renamed: renamed.map(|(target, asked)| (json_string(target), json_string(asked))),
            prompt,
            restore: None,
            tail: Tail::default(),
        });
        Ok(routed)
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

    /// The header by which the client's session stays where it is.
    fn session(&self, server: &Server) -> Option<(&'static str, Bytes)> {
        let header = self.epp.session_header?;
        let token = base64::engine::general_purpose::STANDARD.encode(server.name());
        Some((header, token.into()))
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

    fn poll_decide(&mut self, _: &mut Context<'_>, body: &Pieces) -> Poll<Result<Routed, Refusal>> {
        let decided = self.decide(body);
        if let Err(refusal) = &decided {
            self.account.refused(&self.epp.metrics, refusal);
        }
        Poll::Ready(decided)
    }

    fn response_head(&mut self, head: &ResponseHead) -> Reply {
        let mut reply = Reply::default();
        if self.epp.config.shows_served {
            let served = head.served.clone();
            let served = served.unwrap_or_else(|| "fail: missing envoy lb metadata".to_owned());
            reply.set.push((names::SHOW_SERVED, served.into()));
        }
        let status = head.status().unwrap_or(0);
        self.account.answered(&self.epp.metrics, status);
        let Some(under_way) = &mut self.under_way else {
            return reply;
        };
        under_way.helpers.clear();
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
        self.account.piece(&self.epp.metrics, piece.len());
        if let Some(under_way) = &mut self.under_way {
            under_way.decode.answered();
            under_way.tail.push(piece);
        }
    }

    fn rewrite_piece(&mut self, piece: Bytes, last: bool, out: &mut Pieces) {
        self.response_piece(&piece, last);
        match self.under_way.as_mut().and_then(|u| u.restore.as_mut()) {
            Some(restore) => restore.push(piece, last, out),
            None => out.push(piece),
        }
    }

    fn ended(&mut self, why: Ended) {
        let usage = self.under_way.take().map(|u| u.tail.usage());
        self.account
            .ended(&self.epp.metrics, why, usage.unwrap_or_default());
    }
}
