//! Traces in OpenTelemetry's words: which requests are traced, and how spans reach a collector.
//!
//! [`Settings`] are the standard `OTEL_*` variables. A [`Tracer`] says whether a request is traced, by the `traceparent`
//! that it came with or by drawing, and takes spans that are over; an [`Exporter`] sends them, over gRPC or HTTP. The
//! messages are written by hand (`proto`), so that nothing is generated and no second HTTP stack is built.
//! Invariants: what is not traced costs a comparison or two and no memory; spans that wait are bounded, and so is every
//! wait; while the collector cannot be reached nothing is traced, and what came with a `traceparent` keeps it.
#![forbid(unsafe_code)]

mod context;
mod export;
mod proto;
mod sampler;
mod settings;
mod tracer;

pub use context::{Context, SpanId, TRACEPARENT, TraceId};
pub use export::{ExportError, Exporter};
pub use proto::{Event, Kind, Span, Value, attribute};
pub use sampler::Sampler;
pub use settings::{Collector, Protocol, Settings, SettingsError};
pub use tracer::{Ids, Tracer, nanoseconds};
