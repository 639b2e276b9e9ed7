//! What a decision needs while it is made and the next one uses again: candidates, what is known of their caches, their
//! scores. Nothing here is allocated for each decision.

use crate::picker::{Bench, Dice};
use crate::plan::{Profile, Source, Weighted};
use crate::recent::Recency;
use crate::request::{Candidate, Explanation, Stage};
use crate::{
    Costs, Endpoint, EndpointId, Found, Keys, Match, Observer, PreciseIndex, PrefixIndex, Request,
    Step, Unschedulable,
};

/// What a server has of a prompt, in leading blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Held {
    /// Including those that are only expected; a block in slow memory counts less than one.
    pub(crate) weighted: f32,
    /// Those that are there.
    pub(crate) computed: u32,
    /// Full blocks of the prompt.
    pub(crate) total: u32,
    /// Tokens of a block.
    pub(crate) block_tokens: u32,
}

impl Held {
    /// Part of the prompt that it has, 0 to 1.
    pub(crate) fn part(&self) -> f64 {
        match self.total {
            0 => 0.0,
            total => (f64::from(self.weighted) / f64::from(total)).min(1.0),
        }
    }

    fn of(found: &Found) -> Self {
        Self {
            weighted: found.weighted,
            computed: found.computed as u32,
            total: found.total as u32,
            block_tokens: found.block_tokens,
        }
    }

    /// Tokens that it has, by `weighted`.
    pub(crate) fn tokens(&self) -> f64 {
        f64::from(self.weighted) * f64::from(self.block_tokens)
    }
}

/// What is the same for all stages of a decision.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) fleet: &'a [Endpoint],
    pub(crate) request: &'a Request<'a>,
    pub(crate) recency: &'a Recency,
    /// The session's server.
    pub(crate) pinned: Option<EndpointId>,
    pub(crate) turn: u64,
    pub(crate) costs: &'a Costs,
    /// Whether the precise index can be asked about this request.
    pub(crate) precise: bool,
}

/// Who knows what is cached.
pub(crate) struct Indices<'a> {
    pub(crate) approximate: &'a PrefixIndex,
    /// With the keys of the prompt, if there are any.
    pub(crate) precise: Option<(&'a mut PreciseIndex, &'a Keys)>,
}

/// What a decision uses, and changes.
pub(crate) struct Means<'a, O> {
    pub(crate) indices: Indices<'a>,
    pub(crate) dice: Dice,
    pub(crate) observer: &'a mut O,
}

/// The candidates of a stage, as filters and scorers see them. Lists go by candidate.
pub(crate) struct View<'a> {
    cx: &'a Context<'a>,
    at: &'a [u32],
    caches: &'a Caches,
    pub(crate) request: &'a Request<'a>,
    pub(crate) pinned: Option<EndpointId>,
    pub(crate) costs: &'a Costs,
}

#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// Positions in the fleet of those that may take the request at all, in the order of their ids: the order in which
    /// they were found does not matter.
    eligible: Vec<u32>,
    /// Positions in the fleet of this stage's candidates.
    at: Vec<u32>,
    caches: Caches,
    /// Who knows what the last stage's candidates have.
    knows: Source,
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
    matches: Vec<Match>,
    found: Vec<Found>,
    approximate: Known,
    precise: Known,
}

/// What one source knows: nothing until it is asked, which is once a stage.
#[derive(Debug, Default)]
struct Known {
    held: Vec<Held>,
    is: bool,
}

impl Context<'_> {
    /// Whom to ask instead of `source`, if it cannot be.
    pub(crate) fn source(&self, source: Source) -> Source {
        match source {
            Source::Precise if self.precise => Source::Precise,
            _ => Source::Approximate,
        }
    }

    /// Tokens of the prompt that a server which has `held`, as `source` knows, does not even expect to have.
    pub(crate) fn uncached(&self, source: Source, held: &Held) -> f64 {
        let prompt = self.request.prompt;
        match self.source(source) {
            Source::Approximate => prompt.tokens_beyond(held.weighted as usize).into(),
            Source::Precise => (f64::from(prompt.tokens()) - held.tokens()).max(0.0),
        }
    }

    /// The work of the prompt at such a server. At least one token is computed, for its logits.
    pub(crate) fn work(&self, source: Source, held: &Held) -> f64 {
        let uncached = self.uncached(source, held).max(1.0);
        (self.costs).work(self.request.prompt.tokens().into(), uncached)
    }
}

impl<'a> View<'a> {
    /// The candidates.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &'a Endpoint> + use<'a> {
        let fleet = self.cx.fleet;
        self.at.iter().map(move |&i| &fleet[i as usize])
    }

    /// What each candidate has of the prompt.
    pub(crate) fn held(&self, source: Source) -> &'a [Held] {
        self.caches.held(self.cx.source(source))
    }

    /// The work of the prompt at a candidate that has `held`.
    pub(crate) fn work(&self, source: Source, held: &Held) -> f64 {
        self.cx.work(source, held)
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
        (self.approximate.is, self.precise.is) = (false, false);
    }

    fn held(&self, source: Source) -> &[Held] {
        match source {
            Source::Approximate => &self.approximate.held,
            Source::Precise => &self.precise.held,
        }
    }

    /// Asks `source` about the candidates `at`, unless that is done: then it says false.
    fn look_up(
        &mut self,
        source: Source,
        cx: &Context<'_>,
        at: &[u32],
        indices: &mut Indices<'_>,
    ) -> bool {
        let known = match source {
            Source::Approximate => &mut self.approximate,
            Source::Precise => &mut self.precise,
        };
        if std::mem::replace(&mut known.is, true) {
            return false;
        }
        self.ids.clear();
        self.ids.extend(at.iter().map(|&i| cx.fleet[i as usize].id));
        known.held.clear();
        match (source, &mut indices.precise) {
            (Source::Precise, Some((index, keys))) => {
                index.matches(keys, &self.ids, &mut self.found);
                known.held.extend(self.found.iter().map(Held::of));
            }
            _ => {
                let prompt = cx.request.prompt;
                let nothing = Held {
                    total: prompt.blocks.len() as u32,
                    block_tokens: prompt.block_tokens(),
                    ..Held::default()
                };
                known.held.resize(at.len(), nothing);
                for chain in prompt.chains() {
                    indices
                        .approximate
                        .matches(chain, &self.ids, &mut self.matches);
                    for (held, found) in known.held.iter_mut().zip(&self.matches) {
                        held.weighted += found.expected as f32;
                        held.computed += found.computed as u32;
                    }
                }
            }
        }
        true
    }

    fn retain(&mut self, keep: &[bool]) {
        for known in [&mut self.approximate, &mut self.precise] {
            if known.is {
                retain(&mut known.held, keep);
            }
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

    /// Runs `profile` over the eligible endpoints that `of_these` takes. Whom it picked is asked for afterwards, and what
    /// they have by `knows`. What is done for each endpoint has functions of its own: this one is compiled for every kind
    /// of observer, in the observer's crate.
    pub(crate) fn run<O: Observer>(
        &mut self,
        profile: &Profile,
        cx: &Context<'_>,
        of_these: impl Fn(&Endpoint) -> bool,
        means: &mut Means<'_, O>,
        knows: Source,
    ) -> Result<(), Unschedulable> {
        self.at.clear();
        let these = |i: &&u32| of_these(&cx.fleet[**i as usize]);
        self.at.extend(self.eligible.iter().filter(these));
        self.caches.start();
        self.picked.clear();
        if let Some(explanation) = means.observer.explanation() {
            explanation.begin(profile, cx, &self.at);
        }
        means.observer.did(Step::Other);
        self.filter(profile, cx, means)?;
        self.score(profile, cx, means);
        self.look_up(knows, cx, means);
        self.knows = knows;
        let (totals, bench) = (&self.totals, &mut self.bench);
        (profile.picker.is).pick(totals, cx.turn, &mut means.dice, bench, &mut self.picked);
        means.observer.did(Step::Picker);
        if let Some(explanation) = means.observer.explanation() {
            let picked = self.picked(cx.fleet).map(|e| e.id).collect();
            explanation.end(picked, &self.totals, cx, &self.at);
            means.observer.did(Step::Other);
        }
        Ok(())
    }

    fn filter<O: Observer>(
        &mut self,
        profile: &Profile,
        cx: &Context<'_>,
        means: &mut Means<'_, O>,
    ) -> Result<(), Unschedulable> {
        if self.at.is_empty() {
            return Err(Unschedulable::NoneHealthy);
        }
        for (i, filter) in profile.filters.iter().enumerate() {
            if let Some(source) = filter.is.source() {
                self.look_up(cx.source(source), cx, means);
            }
            let view = view(cx, &self.at, &self.caches);
            filter.is.keep(&view, &mut means.dice, &mut self.keep);
            means.observer.did(Step::Filter(i));
            if let Some(explanation) = means.observer.explanation() {
                explanation.dropped(&filter.name, cx, &self.at, &self.keep);
            }
            self.retain();
            means.observer.did(Step::Other);
            if self.at.is_empty() {
                return Err(filter.is.emptied());
            }
        }
        Ok(())
    }

    fn score<O: Observer>(
        &mut self,
        profile: &Profile,
        cx: &Context<'_>,
        means: &mut Means<'_, O>,
    ) {
        self.totals.clear();
        self.totals.resize(self.at.len(), 0.0);
        for (i, weighted) in profile.scorers.iter().enumerate() {
            if let Some(source) = weighted.scorer.source() {
                self.look_up(cx.source(source), cx, means);
            }
            self.add(weighted, cx);
            means.observer.did(Step::Scorer(i));
            if let Some(explanation) = means.observer.explanation() {
                explanation.scored(cx, &self.at, &self.values);
                means.observer.did(Step::Other);
            }
        }
    }

    /// Asks `source` about the candidates, unless that is done.
    fn look_up<O: Observer>(&mut self, source: Source, cx: &Context<'_>, means: &mut Means<'_, O>) {
        if (self.caches).look_up(source, cx, &self.at, &mut means.indices) {
            means.observer.did(Step::Lookup(source));
        }
    }

    /// Drops the candidates that a filter did not keep.
    fn retain(&mut self) {
        retain(&mut self.at, &self.keep);
        self.caches.retain(&self.keep);
    }

    /// Adds to the totals what a scorer gives.
    fn add(&mut self, weighted: &Weighted, cx: &Context<'_>) {
        let view = view(cx, &self.at, &self.caches);
        weighted.scorer.score(&view, &mut self.values);
        for (total, value) in self.totals.iter_mut().zip(&mut self.values) {
            // Not-a-number is the worst, too.
            *value = if *value > 0.0 { value.min(1.0) } else { 0.0 };
            *total += weighted.weight * *value;
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
        Some((
            endpoint,
            self.totals[best],
            self.caches.held(self.knows)[best],
        ))
    }

    /// Whether no candidate of the last stage had anything of the prompt.
    pub(crate) fn is_cold(&self) -> bool {
        let held = self.caches.held(self.knows);
        held.iter().all(|h| h.weighted == 0.0)
    }
}

fn view<'a>(cx: &'a Context<'a>, at: &'a [u32], caches: &'a Caches) -> View<'a> {
    View {
        cx,
        at,
        caches,
        request: cx.request,
        pinned: cx.pinned,
        costs: cx.costs,
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

    fn end(&mut self, picked: Vec<EndpointId>, totals: &[f64], cx: &Context<'_>, at: &[u32]) {
        for (candidate, total) in self.last(cx, at).zip(totals) {
            candidate.total = *total;
        }
        if let Some(stage) = self.stages.last_mut() {
            stage.picked = picked;
        }
    }
}
