//! A request as spans: why each candidate scored what it did, for whoever follows requests through a system.
//!
//! `gateway.request` lasts as long as the request; below it `gateway.request_orchestration`, from the body's end to the
//! decision; below that one `run_scheduler_profile` for each profile that ran, with an event for each candidate. The names
//! are those of llm-d's picker, as are attributes that begin with `llm_d` or `gen_ai`.

use crate::decisions::told;
use crate::names;
use crate::route::Ask;
use crate::usage::Usage;
use baton_ext_proc::{Headers, Refusal};
use baton_fleet::{Flight, Route, Server};
use baton_scheduler::{EndpointId, Explanation, Prefill, Stage, Unschedulable};
use baton_telemetry::{Context, Event, Span, TRACEPARENT, Tracer, attribute, nanoseconds};
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A request that is traced.
#[derive(Debug)]
pub(crate) struct Trace {
    tracer: Arc<Tracer>,
    at: Context,
    span: Span,
    /// When the body was there.
    whole: u64,
}

fn now() -> u64 {
    nanoseconds(SystemTime::now())
}

impl Trace {
    /// The trace of a request that begins now; nothing, if it is not traced.
    pub(crate) fn begin(tracer: &Arc<Tracer>, headers: &Headers) -> Option<Box<Self>> {
        let parent = headers.get(TRACEPARENT).and_then(Context::parse);
        let at = tracer.admit(parent)?;
        let whole = now();
        let mut span = tracer.root(at, parent, "gateway.request", whole);
        if let Some(id) = headers.text(names::REQUEST_ID) {
            span.say("gen_ai.request.id", id);
        }
        Some(Box::new(Self {
            tracer: tracer.clone(),
            at,
            span,
            whole,
        }))
    }

    /// The body is there.
    pub(crate) fn body_is_whole(&mut self) {
        self.whole = now();
    }

    /// The header by which the servers of the request know its trace.
    pub(crate) fn header(&self) -> (&'static str, Bytes) {
        (TRACEPARENT, self.at.to_string().into())
    }

    /// It was decided, by profiles that took so long, where the request goes, or that it goes nowhere.
    pub(crate) fn decided(
        &mut self,
        ask: &Ask<'_>,
        servers: &[Arc<Server>],
        decided: &Result<Route, Unschedulable>,
        (why, took): (&Explanation, Duration),
    ) {
        let end = now();
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let began = end.saturating_sub(took).max(self.whole);
        if let Some(model) = ask.model {
            self.span.say("gen_ai.request.model", model);
        }
        let name = "gateway.request_orchestration";
        let (at, mut span) = self.tracer.child(self.at, name, self.whole);
        span.say("target_model", ask.target.or(ask.model).unwrap_or(""));
        span.say("request_prio", i64::from(ask.priority));
        span.say("baton.prompt_tokens", ask.prompt.tokens());
        match decided {
            Ok(route) => say_route(&mut span, route),
            Err(error) => span.fail(error.to_string()),
        }
        for stage in &why.stages {
            let (_, mut span) = self.tracer.child(at, "run_scheduler_profile", began);
            say_stage(&mut span, stage, servers, end);
            self.tracer.end(span, end);
        }
        self.tracer.end(span, end);
    }

    /// It is answered here.
    pub(crate) fn refused(&mut self, refusal: &Refusal) {
        let code = crate::refusals::code(refusal);
        self.span.say("error.type", code);
        self.span.fail(code);
    }

    /// The answer begins.
    pub(crate) fn answered(&mut self, status: u16) {
        self.span
            .say("http.response.status_code", u32::from(status));
        if status >= 500 {
            self.span.fail("the model server failed");
        }
    }

    /// Nothing follows.
    pub(crate) fn ended(mut self, usage: Usage) {
        let told = [
            ("gen_ai.usage.input_tokens", usage.prompt),
            ("gen_ai.usage.output_tokens", usage.output),
            ("gen_ai.usage.cached_tokens", usage.cached),
        ];
        for (key, tokens) in told {
            if let Some(tokens) = tokens.and_then(|n| i64::try_from(n).ok()) {
                self.span.say(key, tokens);
            }
        }
        self.tracer.end(self.span, now());
    }
}

fn say_route(span: &mut Span, route: &Route) {
    let decision = &route.decision;
    span.say("baton.decision", decision.kind());
    span.say("baton.endpoint", route.decode.name());
    span.say("baton.uncached_tokens", decision.uncached_tokens);
    span.say("llm_d.epp.pd.disaggregation_used", route.prefill.is_some());
    match (&route.prefill, &decision.prefill) {
        (Some(prefill), _) => say_prefill(span, prefill),
        (None, Prefill::NoneHealthy) => {
            span.say("llm_d.epp.pd.reason", "no_prefill_profile_target_endpoints");
        }
        (None, _) => span.say("llm_d.epp.pd.reason", "no_prefill_profile_result"),
    }
}

fn say_prefill(span: &mut Span, prefill: &Flight) {
    span.say("baton.prefill_endpoint", prefill.name());
    let authority = prefill.address.authority();
    span.say("llm_d.epp.pd.prefill_pod_address", authority.host());
    if let Some(port) = authority.port() {
        span.say("llm_d.epp.pd.prefill_pod_port", port.as_str());
    }
}

/// What a profile made of its candidates: weights as attributes, candidates as events.
fn say_stage(span: &mut Span, stage: &Stage, servers: &[Arc<Server>], time: u64) {
    let name = |id: EndpointId| {
        let server = servers.iter().find(|s| s.id == id);
        server.map_or("gone", |s| s.name())
    };
    let picked: Vec<&str> = stage.picked.iter().map(|&id| name(id)).collect();
    span.say("baton.profile", &*stage.profile);
    span.say("baton.candidates", stage.candidates.len());
    if picked.is_empty() {
        span.fail("no candidate is left");
    }
    span.say("baton.picked", picked);
    for (scorer, weight) in &stage.scorers {
        span.say(format!("baton.weight.{scorer}"), *weight);
    }
    let scored = |c: &baton_scheduler::Candidate| {
        let values = stage.scorers.iter().zip(&c.values);
        let mut attributes = vec![attribute("baton.endpoint", name(c.id))];
        attributes.extend(
            values.map(|((scorer, _), value)| attribute(format!("baton.score.{scorer}"), *value)),
        );
        attributes.push(match &c.dropped_by {
            Some(filter) => attribute("baton.dropped_by", &**filter),
            None => attribute("baton.total", c.total),
        });
        Event {
            time,
            name: "candidate".to_owned(),
            attributes,
        }
    };
    span.events = told(stage).map(scored).collect();
}
