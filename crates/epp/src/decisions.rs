//! The last decisions and their reasons, for people who ask why a request went where it did.

use baton_fleet::{Route, Server};
use baton_scheduler::{Candidate, EndpointId, Explanation, Prefill, Stage, Unschedulable};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most candidates of a stage that are kept: the best ones, and all that were picked.
const MAX_CANDIDATES: usize = 32;

/// A ring of decisions.
#[derive(Debug)]
pub(crate) struct Decisions {
    most: usize,
    last: Mutex<VecDeque<Value>>,
}

impl Decisions {
    /// Keeps the last `most`.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            last: Mutex::default(),
        }
    }

    /// Notes what was decided for the request `id`.
    pub(crate) fn keep(
        &self,
        id: &str,
        servers: &[Arc<Server>],
        decided: &Result<Route, Unschedulable>,
        why: &Explanation,
        took: Duration,
    ) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut entry = json!({
            "request_id": id,
            "at": at.unwrap_or_default().as_secs_f64(),
            "took_us": took.as_micros() as u64,
            "stages": stages(why, servers),
        });
        match decided {
            Ok(route) => {
                let decision = &route.decision;
                let skipped = match decision.prefill {
                    Prefill::At(..) => Value::Null,
                    Prefill::NotWorthIt => "too little is uncached".into(),
                    Prefill::NoneHealthy => "no prefill server can take it".into(),
                    Prefill::SameServer => "the server that answers is the best one".into(),
                };
                entry["decode"] = route.decode.name().into();
                entry["prefill"] = route.prefill.as_ref().map(|p| p.name()).into();
                entry["no_prefill_because"] = skipped;
                entry["uncached_tokens"] = decision.uncached_tokens.into();
                entry["kind"] = decision.kind().into();
            }
            Err(error) => entry["error"] = error.to_string().into(),
        }
        let mut last = self.last.lock();
        while last.len() >= self.most {
            last.pop_front();
        }
        last.push_back(entry);
    }

    /// All that are kept, oldest first, as JSON.
    pub(crate) fn render(&self) -> String {
        let last = self.last.lock();
        serde_json::to_string_pretty(&*last).unwrap_or_default()
    }
}

/// The candidates of a stage that are worth telling of, best first.
pub(crate) fn told(stage: &Stage) -> impl Iterator<Item = &Candidate> {
    let mut best: Vec<_> = stage.candidates.iter().collect();
    best.sort_by(|a, b| b.total.total_cmp(&a.total));
    let best = best.into_iter().enumerate();
    best.filter(|(i, c)| *i < MAX_CANDIDATES || stage.picked.contains(&c.id))
        .map(|(_, candidate)| candidate)
}

fn stages(why: &Explanation, servers: &[Arc<Server>]) -> Vec<Value> {
    let name = |id: EndpointId| {
        let server = servers.iter().find(|s| s.id == id);
        server.map_or("gone", |s| s.name())
    };
    let stage = |stage: &Stage| {
        let candidates = told(stage).map(|c| {
            json!({
                "endpoint": name(c.id), "total": c.total, "dropped_by": c.dropped_by,
                "scores": stage.scorers.iter().map(|(n, _)| &**n).zip(&c.values).collect::<std::collections::BTreeMap<_, _>>(),
            })
        });
        json!({
            "profile": stage.profile,
            "weights": stage.scorers.iter().map(|(n, w)| (&**n, w)).collect::<std::collections::BTreeMap<_, _>>(),
            "candidates": candidates.collect::<Vec<_>>(),
            "of": stage.candidates.len(),
            "picked": stage.picked.iter().map(|&id| name(id)).collect::<Vec<_>>(),
        })
    };
    why.stages.iter().map(stage).collect()
}
