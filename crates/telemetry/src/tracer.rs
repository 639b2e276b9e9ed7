//! Begins spans and takes those that are over.

use crate::context::{Context, SpanId, TraceId};
use crate::proto::{Kind, Span};
use crate::sampler::Sampler;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// Says what is traced. Shared by all requests.
#[derive(Debug)]
pub struct Tracer {
    sampler: Sampler,
    ids: Ids,
    spans: mpsc::Sender<Span>,
    pub(crate) state: Arc<State>,
}

/// What tracer and exporter tell each other.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// The collector does not answer.
    pub(crate) deaf: AtomicBool,
    /// Spans for which there was no room.
    pub(crate) lost: AtomicU64,
}

/// Names that nobody else has, without a system call for each.
#[derive(Debug)]
pub struct Ids {
    key: u64,
    next: AtomicU64,
}

impl Ids {
    /// Names that follow from a random `key`.
    #[must_use]
    pub fn new(key: u64) -> Self {
        Self {
            key,
            next: AtomicU64::new(1),
        }
    }

    /// The next one: never 0. SplitMix64 is a permutation, so that no two in a process agree.
    fn next(&self) -> u64 {
        loop {
            let n = self.next.fetch_add(1, Relaxed);
            let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(self.key);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            if z != 0 {
                return z;
            }
        }
    }
}

impl Tracer {
    pub(crate) fn new(sampler: Sampler, ids: Ids, spans: mpsc::Sender<Span>) -> Self {
        Self {
            sampler,
            ids,
            spans,
            state: Arc::default(),
        }
    }

    /// Where a request is, that came with `parent`, if it is traced. Costs no memory.
    pub fn admit(&self, parent: Option<Context>) -> Option<Context> {
        if self.state.deaf.load(Relaxed) {
            return None;
        }
        let trace = match parent {
            Some(parent) => parent.trace,
            None => TraceId(u128::from(self.ids.next()) << 64 | u128::from(self.ids.next())),
        };
        self.sampler.takes(parent, trace).then(|| Context {
            trace,
            span: SpanId(self.ids.next()),
            sampled: true,
        })
    }

    /// A span at `context`, which [`admit`](Self::admit) gave, from `start` on.
    #[must_use]
    pub fn root(&self, context: Context, parent: Option<Context>, name: &str, start: u64) -> Span {
        Span::begin(context, parent.map(|p| p.span), name, Kind::Server, start)
    }

    /// A span below `parent`, from `start` on; and where it is.
    pub fn child(&self, parent: Context, name: &str, start: u64) -> (Context, Span) {
        let context = Context {
            span: SpanId(self.ids.next()),
            ..parent
        };
        let span = Span::begin(context, Some(parent.span), name, Kind::Internal, start);
        (context, span)
    }

    /// `span` ended at `end`. Without room it is lost.
    pub fn end(&self, mut span: Span, end: u64) {
        span.end = end.max(span.start);
        if self.spans.try_send(span).is_err() {
            self.state.lost.fetch_add(1, Relaxed);
        }
    }
}

/// Nanoseconds since 1970.
#[must_use]
pub fn nanoseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_differ_and_none_is_0() {
        // The second one would be 0 if it were not passed over.
        let ids = Ids::new(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(2).wrapping_neg());
        let drawn: BTreeSet<u64> = (0..1000).map(|_| ids.next()).collect();
        assert!(drawn.len() == 1000 && !drawn.contains(&0));
    }

    fn tracer(room: usize) -> (Tracer, mpsc::Receiver<Span>) {
        let (sender, spans) = mpsc::channel(room);
        let all = Sampler {
            ratio: 1.0,
            by_parent: true,
        };
        (Tracer::new(all, Ids::new(5), sender), spans)
    }

    #[test]
    fn a_span_knows_its_trace_and_who_is_above() {
        let (tracer, mut spans) = tracer(8);
        let parent = Context::parse(b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        let at = tracer.admit(parent).unwrap();
        let root = tracer.root(at, parent, "a", 5);
        let (below, child) = tracer.child(at, "b", 6);
        assert_eq!(below.trace, parent.unwrap().trace);
        tracer.end(child, 3);
        tracer.end(root, 9);
        let (child, root) = (spans.try_recv().unwrap(), spans.try_recv().unwrap());
        assert_eq!(root.parent_span_id, 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes());
        assert_eq!(child.parent_span_id, root.span_id);
        assert_eq!(child.trace_id, root.trace_id);
        assert_eq!((child.start, child.end, root.end), (6, 6, 9));
        assert_eq!((root.kind(), child.kind()), (Kind::Server, Kind::Internal));
    }

    #[test]
    fn what_has_no_room_is_counted_and_a_deaf_collector_hears_nothing() {
        let (tracer, _spans) = tracer(1);
        let at = tracer.admit(None).unwrap();
        for _ in 0..3 {
            tracer.end(tracer.root(at, None, "a", 0), 1);
        }
        assert_eq!(tracer.state.lost.load(Relaxed), 2);
        tracer.state.deaf.store(true, Relaxed);
        assert_eq!(tracer.admit(Some(at)), None);
    }
}
