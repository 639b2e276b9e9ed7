//! How good a candidate is: every scorer gives 0 to 1.

use crate::filter::Range;
use crate::plan::Source;
use crate::saturation::usage;
use crate::workspace::View;
use crate::{Adapters, Endpoint, Load};

/// Gives every candidate a number from 0 to 1. What a server said too long ago counts as the worst that it can be.
#[derive(Clone, Debug, PartialEq)]
pub enum Scorer {
    /// Few waiting requests: 1 for the shortest queue, 0 for the longest, 1 for all if they are equal.
    Queue,
    /// Few requests in the batch, likewise.
    Running,
    /// Part of the KV pool that is free.
    KvUsage,
    /// Few waiting requests, from 0.5 for none to 0 for `threshold`.
    LoadAware {
        /// Waiting requests that are too many.
        threshold: f64,
    },
    /// Few requests at all: 1 for none, 0 for the busiest.
    ActiveRequests {
        /// So many requests count as none.
        idle: u32,
        /// The best that a server with more of them gets.
        most_when_busy: f64,
    },
    /// Few tokens under way, from 1 for none to 0 for `threshold`.
    TokenLoad {
        /// Tokens that are too many.
        threshold: f64,
    },
    /// Whether the adapter is there: 1 if it is in use, 0.8 if there is room for it, 0.6 if somebody waits for it.
    LoraAffinity,
    /// Part of the prompt that is cached.
    Prefix {
        /// Who knows what is cached.
        source: Source,
        /// How much the length of the match counts beside its part of the prompt, 0 to 1.
        length_weight: f64,
        /// Tokens that count as a long match.
        long: f64,
    },
    /// For prompts that nobody has: 1 for the server that was not used for the longest time, 0 for the last one.
    NoHitLru {
        /// Who knows what is cached.
        source: Source,
    },
    /// The session's server.
    Session,
    /// Servers for contexts of this length, by a label `least-most`.
    ContextLength {
        /// The label.
        label: Box<str>,
    },
    /// KV pool, queue and prefix together: what is used where nobody predicts latencies.
    Composite {
        /// How much the free part of the KV pool counts.
        kv: f64,
        /// How much a short queue counts.
        queue: f64,
        /// How much the cached part of the prompt counts.
        prefix: f64,
        /// Who knows what is cached.
        source: Source,
    },
    /// Little to do before this request's first token, by the plan's [`Costs`](crate::Costs): the work of its own prompt
    /// as far as that is not cached there, a part of the work that waits there, and something for every request that is
    /// there. 1 for the least, 0 for the most.
    LeastWork {
        /// Who knows what is cached.
        source: Source,
    },
    /// Nothing: for scorers whose numbers nobody has here.
    Zero,
}

impl Scorer {
    /// What the scorer knows servers' caches by, if it asks.
    pub(crate) fn source(&self) -> Option<Source> {
        match self {
            Self::Prefix { source, .. }
            | Self::NoHitLru { source }
            | Self::LeastWork { source }
            | Self::Composite { source, .. } => Some(*source),
            _ => None,
        }
    }

    /// Scores every candidate.
    pub(crate) fn score(&self, view: &View<'_>, values: &mut Vec<f64>) {
        values.clear();
        let each = view.endpoints();
        let loads = view.endpoints().map(|e| &e.load);
        match self {
            Self::Queue => relative(view, |l| l.waiting, values),
            Self::Running => relative(view, |l| l.running, values),
            Self::KvUsage => values.extend(loads.map(free)),
            Self::LoadAware { threshold } => {
                values.extend(loads.map(|l| load_aware(l, *threshold)));
            }
            Self::ActiveRequests {
                idle,
                most_when_busy,
            } => active(view, *idle, *most_when_busy, values),
            Self::TokenLoad { threshold } => {
                values.extend(loads.map(|l| 1.0 - (l.tokens as f64 / threshold).min(1.0)));
            }
            Self::LoraAffinity => {
                let wanted = view.request.served_name();
                values.extend(each.map(|e| lora(e.adapters.as_deref(), wanted)));
            }
            Self::Prefix {
                source,
                length_weight,
                long,
            } => prefix(view, *source, (*length_weight, *long), values),
            Self::NoHitLru { source } => view.least_recently_used(*source, values),
            Self::Session => values.extend(each.map(|e| score_of(Some(e.id) == view.pinned))),
            Self::ContextLength { label } => {
                let length = view.request.prompt.tokens();
                values.extend(each.map(|e| context_length(e, label, length)));
            }
            Self::Composite {
                kv,
                queue,
                prefix: cached,
                source,
            } => composite(view, [*kv, *queue, *cached], *source, values),
            Self::LeastWork { source } => least_work(view, *source, values),
            Self::Zero => values.extend(each.map(|_| 0.0)),
        }
    }
}

fn score_of(is: bool) -> f64 {
    if is { 1.0 } else { 0.0 }
}

/// 1 for the least, 0 for the most, 1 for all if they are equal; 0 for numbers that are too old.
fn relative(view: &View<'_>, of: fn(&Load) -> u32, values: &mut Vec<f64>) {
    let fresh = || {
        view.endpoints()
            .map(|e| &e.load)
            .filter(|l| l.fresh)
            .map(of)
    };
    let (least, most) = fresh().fold((u32::MAX, 0), |(least, most), n| {
        (least.min(n), most.max(n))
    });
    let span = f64::from(most.saturating_sub(least));
    values.extend(view.endpoints().map(|e| match of(&e.load) {
        _ if !e.load.fresh => 0.0,
        _ if span == 0.0 => 1.0,
        n => f64::from(most - n) / span,
    }));
}

/// Part of the KV pool that is free.
fn free(load: &Load) -> f64 {
    if load.fresh {
        (1.0 - usage(load)).max(0.0)
    } else {
        0.0
    }
}

fn load_aware(load: &Load, threshold: f64) -> f64 {
    match load.waiting {
        _ if !load.fresh => 0.0,
        0 => 0.5,
        n => 0.5 * (1.0 - f64::from(n).min(threshold) / threshold),
    }
}

fn active(view: &View<'_>, idle: u32, most_when_busy: f64, values: &mut Vec<f64>) {
    let most = view.endpoints().map(|e| e.load.active).max().unwrap_or(0);
    values.extend(view.endpoints().map(|e| match e.load.active {
        n if n <= idle => 1.0,
        // More than `idle`, so that `most` is not 0.
        n => f64::from(most - n) / f64::from(most) * most_when_busy,
    }));
}

fn lora(adapters: Option<&Adapters>, wanted: Option<&str>) -> f64 {
    let (Some(adapters), Some(wanted)) = (adapters, wanted) else {
        return 0.0;
    };
    let has = |list: &[Box<str>]| list.iter().any(|name| **name == *wanted);
    if has(&adapters.running) {
        1.0
    } else if adapters.running.len() + adapters.waiting.len() < adapters.most as usize {
        0.8
    } else if has(&adapters.waiting) {
        0.6
    } else {
        0.0
    }
}

fn prefix(view: &View<'_>, source: Source, length: (f64, f64), values: &mut Vec<f64>) {
    let (weight, long) = length;
    values.extend(view.held(source).iter().map(|held| {
        let by_length = (held.tokens() / long).min(1.0).powi(2);
        weight * by_length + (1.0 - weight) * held.part()
    }));
}

/// Close ranges are better than wide ones, and room to grow is a little better than none.
fn context_length(endpoint: &Endpoint, label: &str, length: u32) -> f64 {
    let Some(range) = endpoint.identity.label(label) else {
        return 0.5;
    };
    let Some(range) = Range::parse(range) else {
        return 0.0;
    };
    let width = f64::from(range.most - range.least);
    if !range.has(length) {
        let distance = range
            .least
            .abs_diff(length)
            .min(range.most.abs_diff(length));
        return 0.3 / (1.0 + f64::from(distance) / 1000.0);
    }
    if width == 0.0 {
        return 1.0;
    }
    let narrow = 0.7 / (1.0 + width / 10_000.0);
    0.3 + 0.7 * (narrow + 0.3 * f64::from(range.most - length) / width)
}

/// The weighted mean of the three, in hundredths.
fn composite(view: &View<'_>, weights: [f64; 3], source: Source, values: &mut Vec<f64>) {
    relative(view, |l| l.waiting, values);
    let sum: f64 = weights.iter().sum();
    let rest = view.endpoints().zip(view.held(source));
    for (value, (endpoint, held)) in values.iter_mut().zip(rest) {
        let mean = if sum > 0.0 {
            (weights[0] * free(&endpoint.load) + weights[1] * *value + weights[2] * held.part())
                / sum
        } else {
            0.0
        };
        *value = (mean * 100.0).round() / 100.0;
    }
}

fn least_work(view: &View<'_>, source: Source, values: &mut Vec<f64>) {
    let costs = view.costs;
    let held = view.held(source);
    values.extend(view.endpoints().zip(held).map(|(endpoint, held)| {
        let load = &endpoint.load;
        costs.of(view.work(source, held), load.queued_work, load.active)
    }));
    let (least, most) = (values.iter()).fold((f64::INFINITY, 0.0f64), |(least, most), cost| {
        (least.min(*cost), most.max(*cost))
    });
    let span = most - least;
    for value in values {
        *value = if span > 0.0 {
            (most - *value) / span
        } else {
            1.0
        };
    }
}
