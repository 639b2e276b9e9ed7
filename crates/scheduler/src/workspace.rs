//! What a decision needs while it is made and the next one uses again: candidates, what is known of their caches, their
//! scores. Nothing here is allocated for each decision.

use crate::picker::{Bench, Dice};
use crate::plan::{Profile, Source};
use crate::recent::Recency;
use crate::request::{Candidate, Explanation, Stage};
use crate::{Endpoint, EndpointId, Match, PrefixIndex, Request, Unschedulable};

/// What a server has of a prompt, in leading blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Held {
    /// Including those that are only expected; a block in slow memory counts less than one.
    pub(crate) weighted: f32,
    /// Those that are there.
    pub(crate) computed: u32,
}

/// What is the same for all stages of a decision.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) fleet: &'a [Endpoint],
    pub(crate) request: &'a Request<'a>,
    pub(crate) index: &'a PrefixIndex,
    pub(crate) recency: &'a Recency,
    /// The session's server.
    pub(crate) pinned: Option<EndpointId>,
    pub(crate) turn: u64,
}

/// The candidates of a stage, as filters and scorers see them. Lists go by candidate.
pub(crate) struct View<'a> {
    cx: &'a Context<'a>,
    at: &'a [u32],
    held: &'a Caches,
    pub(crate) request: &'a Request<'a>,
    pub(crate) pinned: Option<EndpointId>,
}

#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// Positions in the fleet of those that may take the request at all, in the order of their ids: the order in which
    /// they were found does not matter.
    eligible: Vec<u32>,
    /// Positions in the fleet of this stage's candidates.
    at: Vec<u32>,
    held: Caches,
    keep: Vec<bool>,
    values: Vec<f64>,
    totals: Vec<f64>,
    picked: Vec<u32>,
    bench: Bench,
}

/// What the candidates have of the prompt, as each source knows it.
#[derive(Debug, Default)]
struct Caches {
    ids: Vec<EndpointId>,
    found: Vec<Match>,
    held: Vec<Held>,
    known: bool,
}

impl<'a> View<'a> {
    /// The candidates.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &'a Endpoint> + use<'a> {
        let fleet = self.cx.fleet;
        self.at.iter().map(move |&i| &fleet[i as usize])
    }

    /// What each candidate has of the prompt. Both sources are the same as long as there is only one index.
    pub(crate) fn held(&self, _source: Source) -> &'a [Held] {
        &self.held.held
    }

    /// The prompt's blocks.
    pub(crate) fn blocks(&self, _source: Source) -> u32 {
        self.request.prompt.blocks.len() as u32
    }

    /// Tokens of a block.
    pub(crate) fn block_tokens(&self, _source: Source) -> u32 {
        self.request.prompt.block_tokens()
    }

    /// Scores of candidates by when they were last used, if none has anything of the prompt; else 0.5 for all.
    pub(crate) fn least_recently_used(&self, source: Source, values: &mut Vec<f64>) {
        let n = self.at.len();
        if n < 2 || self.held(source).iter().any(|h| h.weighted > 0.0) {
            let cold = self.held(source).iter().all(|h| h.weighted == 0.0);
            values.extend(self.at.iter().map(|_| if cold { 1.0 } else { 0.5 }));
            return;
        }
        let mut ranked: Vec<(u64, u32)> = (self.endpoints().zip(0..))
            .map(|(e, i)| (self.cx.recency.of(e.id), i))
            .collect();
        ranked.sort_unstable();
        values.resize(n, 0.0);
        for (rank, (_, i)) in ranked.into_iter().enumerate() {
            values[i as usize] = 1.0 - rank as f64 / (n - 1) as f64;
        }
    }
}

impl Caches {
    fn start(&mut self) {
        self.known = false;
    }

    /// Looks up the candidates `at`, unless that is done.
    fn look_up(&mut self, cx: &Context<'_>, at: &[u32]) {
        if std::mem::replace(&mut self.known, true) {
            return;
        }
        self.ids.clear();
        self.ids.extend(at.iter().map(|&i| cx.fleet[i as usize].id));
        self.held.clear();
        self.held.resize(at.len(), Held::default());
        for chain in cx.request.prompt.chains() {
            cx.index.matches(chain, &self.ids, &mut self.found);
            for (held, found) in self.held.iter_mut().zip(&self.found) {
                held.weighted += found.expected as f32;
                held.computed += found.computed as u32;
            }
        }
    }

    fn retain(&mut self, keep: &[bool]) {
        if self.known {
            retain(&mut self.held, keep);
        }
    }
}

/// Keeps the elements of which `keep` says so.
fn retain<T>(list: &mut Vec<T>, keep: &[bool]) {
    let mut keep = keep.iter();
    list.retain(|_| keep.next().copied().unwrap_or(false));
}

impl Workspace {
    /// Makes the endpoints that may take the request at all eligible.
    pub(crate) fn gather(&mut self, fleet: &[Endpoint], request: &Request<'_>) {
        self.eligible.clear();
        let may = (0u32..).zip(fleet).filter(|(_, e)| may_take(e, request));
        self.eligible.extend(may.map(|(i, _)| i));
        self.eligible
            .sort_unstable_by_key(|&i| fleet[i as usize].id);
    }

    /// Runs `profile` over the eligible endpoints that `of_these` takes. Whom it picked is asked for afterwards.
    pub(crate) fn run(
        &mut self,
        profile: &Profile,
        cx: &Context<'_>,
        of_these: impl Fn(&Endpoint) -> bool,
        dice: &mut Dice,
        mut explain: Option<&mut Explanation>,
    ) -> Result<(), Unschedulable> {
        self.at.clear();
        let these = |i: &&u32| of_these(&cx.fleet[**i as usize]);
        self.at.extend(self.eligible.iter().filter(these));
        self.held.start();
        self.picked.clear();
        if let Some(explanation) = &mut explain {
            explanation.begin(profile, cx, &self.at);
        }
        self.filter(profile, cx, dice, explain.as_deref_mut())?;
        self.score(profile, cx, explain.as_deref_mut());
        let (totals, bench) = (&self.totals, &mut self.bench);
        (profile.picker).pick(totals, cx.turn, dice, bench, &mut self.picked);
        if let Some(explanation) = explain {
            explanation.end(self.picked(cx.fleet), &self.totals, cx, &self.at);
        }
        Ok(())
    }

    fn filter(
        &mut self,
        profile: &Profile,
        cx: &Context<'_>,
        dice: &mut Dice,
        mut explain: Option<&mut Explanation>,
    ) -> Result<(), Unschedulable> {
        if self.at.is_empty() {
            return Err(Unschedulable::NoneHealthy);
        }
        for filter in &profile.filters {
            if filter.is.source().is_some() {
                self.held.look_up(cx, &self.at);
            }
            let view = view(cx, &self.at, &self.held);
            filter.is.keep(&view, dice, &mut self.keep);
            if let Some(explanation) = &mut explain {
                explanation.dropped(&filter.name, cx, &self.at, &self.keep);
            }
            retain(&mut self.at, &self.keep);
            self.held.retain(&self.keep);
            if self.at.is_empty() {
                return Err(filter.is.emptied());
            }
        }
        Ok(())
    }

    fn score(
        &mut self,
        profile: &Profile,
        cx: &Context<'_>,
        mut explain: Option<&mut Explanation>,
    ) {
        // Always, because what is uncached is asked for afterwards.
        self.held.look_up(cx, &self.at);
        self.totals.clear();
        self.totals.resize(self.at.len(), 0.0);
        for weighted in &profile.scorers {
            let view = view(cx, &self.at, &self.held);
            weighted.scorer.score(&view, &mut self.values);
            for (total, value) in self.totals.iter_mut().zip(&mut self.values) {
                // Not-a-number is the worst, too.
                *value = if *value > 0.0 { value.min(1.0) } else { 0.0 };
                *total += weighted.weight * *value;
            }
            if let Some(explanation) = &mut explain {
                explanation.scored(cx, &self.at, &self.values);
            }
        }
    }

    /// Those that the last stage picked, best first.
    pub(crate) fn picked<'a>(
        &'a self,
        fleet: &'a [Endpoint],
    ) -> impl Iterator<Item = &'a Endpoint> {
        (self.picked.iter()).map(|&p| &fleet[self.at[p as usize] as usize])
    }

    /// The best of the last stage, its score, and what it has of the prompt.
    pub(crate) fn best<'a>(&self, fleet: &'a [Endpoint]) -> Option<(&'a Endpoint, f64, Held)> {
        let best = *self.picked.first()? as usize;
        let endpoint = &fleet[self.at[best] as usize];
        Some((endpoint, self.totals[best], self.held.held[best]))
    }

    /// Whether no candidate of the last stage had anything of the prompt.
    pub(crate) fn is_cold(&self) -> bool {
        self.held.held.iter().all(|h| h.weighted == 0.0)
    }
}

fn view<'a>(cx: &'a Context<'a>, at: &'a [u32], held: &'a Caches) -> View<'a> {
    View {
        cx,
        at,
        held,
        request: cx.request,
        pinned: cx.pinned,
    }
}

/// Whether `endpoint` could answer `request`, whatever it is there for.
pub(crate) fn may_take(endpoint: &Endpoint, request: &Request<'_>) -> bool {
    endpoint.is_healthy()
        && (request.subset).is_none_or(|subset| subset.binary_search(&endpoint.id).is_ok())
        && !request.avoid.contains(&endpoint.id)
        && endpoint.serves(request.served_name())
}

impl Explanation {
    fn begin(&mut self, profile: &Profile, cx: &Context<'_>, at: &[u32]) {
        let candidate = |&i: &u32| Candidate {
            id: cx.fleet[i as usize].id,
            dropped_by: None,
            values: Vec::new(),
            total: 0.0,
        };
        self.stages.push(Stage {
            profile: profile.name.clone(),
            scorers: (profile.scorers.iter())
                .map(|s| (s.name.clone(), s.weight))
                .collect(),
            candidates: at.iter().map(candidate).collect(),
            picked: Vec::new(),
        });
    }

    /// The candidates of the last stage that are at these positions of the fleet. Both lists go by id.
    fn last(&mut self, cx: &Context<'_>, at: &[u32]) -> impl Iterator<Item = &mut Candidate> {
        let ids = at.iter().map(|&i| cx.fleet[i as usize].id);
        let wanted: Vec<EndpointId> = ids.collect();
        let stage = self.stages.last_mut();
        let all = stage.into_iter().flat_map(|s| &mut s.candidates);
        all.filter(move |c| wanted.binary_search(&c.id).is_ok())
    }

    fn dropped(&mut self, filter: &str, cx: &Context<'_>, at: &[u32], keep: &[bool]) {
        for (candidate, _) in self.last(cx, at).zip(keep).filter(|(_, keep)| !**keep) {
            candidate.dropped_by = Some(filter.into());
        }
    }

    fn scored(&mut self, cx: &Context<'_>, at: &[u32], values: &[f64]) {
        for (candidate, value) in self.last(cx, at).zip(values) {
            candidate.values.push(*value);
        }
    }

    fn end<'a>(
        &mut self,
        picked: impl Iterator<Item = &'a Endpoint>,
        totals: &[f64],
        cx: &Context<'_>,
        at: &[u32],
    ) {
        for (candidate, total) in self.last(cx, at).zip(totals) {
            candidate.total = *total;
        }
        if let Some(stage) = self.stages.last_mut() {
            stage.picked.extend(picked.map(|e| e.id));
        }
    }
}
