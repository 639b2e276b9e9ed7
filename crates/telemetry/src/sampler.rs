//! Which traces are recorded. Pure.

use crate::context::{Context, TraceId};

/// Chooses traces.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// Of those that begin here, this part.
    pub ratio: f64,
    /// Whether who came with a trace has decided already.
    pub by_parent: bool,
}

/// As llm-d's picker: a tenth of what nobody has decided.
impl Default for Sampler {
    fn default() -> Self {
        Self {
            ratio: 0.1,
            by_parent: true,
        }
    }
}

impl Sampler {
    /// By the names of `OTEL_TRACES_SAMPLER`; `ratio` is its argument.
    #[must_use]
    pub fn named(name: &str, ratio: f64) -> Option<Self> {
        let (by_parent, root) = match name.strip_prefix("parentbased_") {
            Some(root) => (true, root),
            None => (false, name),
        };
        let ratio = match root {
            "always_on" => 1.0,
            "always_off" => 0.0,
            "traceidratio" => ratio,
            _ => return None,
        };
        Some(Self { ratio, by_parent })
    }

    /// Whether the trace is recorded of something that came with `parent`, and is `trace` without one. Who samples by the
    /// same ratio elsewhere chooses the same traces.
    #[must_use]
    pub fn takes(&self, parent: Option<Context>, trace: TraceId) -> bool {
        match parent {
            Some(parent) if self.by_parent => parent.sampled,
            _ => {
                let draw = trace.0 as u64 >> 1;
                // The highest draws are rounded up to what nothing is below.
                self.ratio >= 1.0 || (draw as f64) < self.ratio * (1u64 << 63) as f64
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpanId;

    #[test]
    fn a_parent_decides_and_without_one_the_trace_does() {
        let half = Sampler::named("parentbased_traceidratio", 0.5).unwrap();
        let (low, high) = (TraceId(7), TraceId(u128::from(u64::MAX)));
        let parent = |sampled| {
            let (trace, span) = (high, SpanId(1));
            Some(Context {
                trace,
                span,
                sampled,
            })
        };
        assert!(half.takes(None, low) && !half.takes(None, high));
        assert!(half.takes(parent(true), high) && !half.takes(parent(false), low));
        let alone = Sampler::named("traceidratio", 0.5).unwrap();
        assert!(!alone.takes(parent(true), high));
        let (on, off) = (
            Sampler::named("always_on", 0.0),
            Sampler::named("always_off", 1.0),
        );
        assert!(on.unwrap().takes(None, high) && !off.unwrap().takes(None, low));
        assert_eq!(Sampler::named("jaeger_remote", 1.0), None);
    }
}
