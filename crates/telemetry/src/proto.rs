//! The few messages of OTLP that an exporter sends.
//!
//! Written by hand after `opentelemetry/proto/{collector/trace,trace,resource,common}/v1/*.proto`: the fields that are
//! used, with their numbers. What never changes of a message is encoded once, elsewhere.

use crate::context::{Context, SpanId};
use prost::{Message, Oneof};

/// `ExportTraceServiceRequest`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Export {
    #[prost(message, repeated, tag = "1")]
    pub(crate) resource_spans: Vec<ResourceSpans>,
}

/// `ResourceSpans`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    pub(crate) resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) scope_spans: Vec<ScopeSpans>,
}

/// `Resource`: who speaks.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Resource {
    #[prost(message, repeated, tag = "1")]
    pub(crate) attributes: Vec<Attribute>,
}

/// `ScopeSpans`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    pub(crate) scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) spans: Vec<Span>,
}

/// `InstrumentationScope`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Scope {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) version: String,
}

/// `Span`: something that took a while.
#[derive(Clone, PartialEq, Message)]
pub struct Span {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    pub(crate) parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    pub(crate) name: String,
    #[prost(enumeration = "Kind", tag = "6")]
    pub(crate) kind: i32,
    #[prost(fixed64, tag = "7")]
    pub(crate) start: u64,
    #[prost(fixed64, tag = "8")]
    pub(crate) end: u64,
    /// What is worth knowing of it.
    #[prost(message, repeated, tag = "9")]
    pub attributes: Vec<Attribute>,
    /// What happened meanwhile.
    #[prost(message, repeated, tag = "11")]
    pub events: Vec<Event>,
    #[prost(message, optional, tag = "15")]
    pub(crate) status: Option<Status>,
}

/// `Span.SpanKind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// Not said.
    Unspecified = 0,
    /// Within a process.
    Internal = 1,
    /// For somebody who asked.
    Server = 2,
}

/// `Span.Event`.
#[derive(Clone, PartialEq, Message)]
pub struct Event {
    /// When, in nanoseconds since 1970.
    #[prost(fixed64, tag = "1")]
    pub time: u64,
    /// What.
    #[prost(string, tag = "2")]
    pub name: String,
    /// The details.
    #[prost(message, repeated, tag = "3")]
    pub attributes: Vec<Attribute>,
}

/// `Status`, of which only failures are told.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Status {
    #[prost(string, tag = "2")]
    pub(crate) message: String,
    /// 2 is an error.
    #[prost(int32, tag = "3")]
    pub(crate) code: i32,
}

/// `KeyValue`.
#[derive(Clone, PartialEq, Message)]
pub struct Attribute {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) value: Option<AnyValue>,
}

/// `AnyValue`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct AnyValue {
    #[prost(oneof = "Value", tags = "1, 2, 3, 4, 5")]
    pub(crate) value: Option<Value>,
}

/// What an attribute says.
#[derive(Clone, PartialEq, Oneof)]
pub enum Value {
    /// A text.
    #[prost(string, tag = "1")]
    Text(String),
    /// Yes or no.
    #[prost(bool, tag = "2")]
    Flag(bool),
    /// A whole number.
    #[prost(int64, tag = "3")]
    Count(i64),
    /// A number.
    #[prost(double, tag = "4")]
    Number(f64),
    /// Several texts.
    #[prost(message, tag = "5")]
    Texts(Texts),
}

/// `ArrayValue`.
#[derive(Clone, PartialEq, Message)]
pub struct Texts {
    #[prost(message, repeated, tag = "1")]
    values: Vec<AnyValue>,
}

/// The attribute `key`.
pub fn attribute(key: impl Into<String>, value: impl Into<Value>) -> Attribute {
    Attribute {
        key: key.into(),
        value: Some(AnyValue {
            value: Some(value.into()),
        }),
    }
}

impl Span {
    /// The span at `context`, from `start` on, in nanoseconds since 1970.
    pub(crate) fn begin(
        context: Context,
        parent: Option<SpanId>,
        name: &str,
        kind: Kind,
        start: u64,
    ) -> Self {
        Self {
            trace_id: context.trace.0.to_be_bytes().to_vec(),
            span_id: context.span.0.to_be_bytes().to_vec(),
            parent_span_id: parent.map_or(Vec::new(), |p| p.0.to_be_bytes().to_vec()),
            name: name.to_owned(),
            kind: kind.into(),
            start,
            ..Self::default()
        }
    }

    /// Says something of it.
    pub fn say(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.attributes.push(attribute(key, value));
    }

    /// It failed.
    pub fn fail(&mut self, why: impl Into<String>) {
        self.status = Some(Status {
            message: why.into(),
            code: 2,
        });
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<i64> for Value {
    fn from(count: i64) -> Self {
        Self::Count(count)
    }
}

impl From<u32> for Value {
    fn from(count: u32) -> Self {
        Self::Count(count.into())
    }
}

impl From<usize> for Value {
    fn from(count: usize) -> Self {
        Self::Count(i64::try_from(count).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<Vec<&str>> for Value {
    fn from(texts: Vec<&str>) -> Self {
        let value = |text: &str| AnyValue {
            value: Some(text.into()),
        };
        Self::Texts(Texts {
            values: texts.into_iter().map(value).collect(),
        })
    }
}
