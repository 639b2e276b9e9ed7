//! The proxy's side of the messages, for tests: what it sends, written by the ordinary derive.

use crate::inbound::Half;
use crate::proto::{Field, Kind};
use crate::proto::{ProtocolConfiguration, Struct, Value as Wire};
use prost::{Message, Oneof};

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Request {
    #[prost(oneof = "Part", tags = "2, 3, 4, 5, 6, 7")]
    pub(crate) part: Option<Part>,
    #[prost(message, optional, tag = "8")]
    pub(crate) metadata_context: Option<Metadata>,
    #[prost(bool, tag = "10")]
    pub(crate) observability_mode: bool,
    #[prost(message, optional, tag = "11")]
    pub(crate) protocol_config: Option<ProtocolConfiguration>,
}

#[derive(Clone, PartialEq, Oneof)]
pub(crate) enum Part {
    #[prost(message, tag = "2")]
    RequestHeaders(HttpHeaders),
    #[prost(message, tag = "3")]
    ResponseHeaders(HttpHeaders),
    #[prost(message, tag = "4")]
    RequestBody(HttpBody),
    #[prost(message, tag = "5")]
    ResponseBody(HttpBody),
    #[prost(message, tag = "6")]
    RequestTrailers(HttpTrailers),
    #[prost(message, tag = "7")]
    ResponseTrailers(HttpTrailers),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct HttpHeaders {
    #[prost(message, optional, tag = "1")]
    pub(crate) headers: Option<HeaderMap>,
    #[prost(bool, tag = "3")]
    pub(crate) end_of_stream: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct HeaderMap {
    #[prost(message, repeated, tag = "1")]
    pub(crate) headers: Vec<HeaderValue>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct HeaderValue {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(bytes, tag = "3")]
    pub(crate) raw_value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct HttpBody {
    #[prost(bytes, tag = "1")]
    pub(crate) body: Vec<u8>,
    #[prost(bool, tag = "2")]
    pub(crate) end_of_stream: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct HttpTrailers {
    #[prost(message, optional, tag = "1")]
    pub(crate) trailers: Option<HeaderMap>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Metadata {
    #[prost(message, repeated, tag = "1")]
    pub(crate) filter_metadata: Vec<Namespace>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Namespace {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) value: Option<Struct>,
}

fn request(part: Part) -> Request {
    Request {
        part: Some(part),
        ..Request::default()
    }
}

pub(crate) fn headers(half: Half, headers: &[(&str, &str)], end_of_stream: bool) -> Request {
    let headers = headers.iter().map(|(key, value)| HeaderValue {
        key: (*key).to_owned(),
        raw_value: value.as_bytes().to_vec(),
    });
    let headers = HttpHeaders {
        headers: Some(HeaderMap {
            headers: headers.collect(),
        }),
        end_of_stream,
    };
    request(match half {
        Half::Request => Part::RequestHeaders(headers),
        Half::Response => Part::ResponseHeaders(headers),
    })
}

pub(crate) fn body(half: Half, body: &[u8], end_of_stream: bool) -> Request {
    let body = HttpBody {
        body: body.to_vec(),
        end_of_stream,
    };
    request(match half {
        Half::Request => Part::RequestBody(body),
        Half::Response => Part::ResponseBody(body),
    })
}

pub(crate) fn trailers(half: Half) -> Request {
    let trailers = HttpTrailers::default();
    request(match half {
        Half::Request => Part::RequestTrailers(trailers),
        Half::Response => Part::ResponseTrailers(trailers),
    })
}

/// One text in one namespace.
pub(crate) fn metadata(namespace: &str, key: &str, text: &str) -> Metadata {
    let text = Wire {
        kind: Some(Kind::Text(text.to_owned().into())),
    };
    let fields = vec![Field {
        key: key.to_owned().into(),
        value: Some(text),
    }];
    Metadata {
        filter_metadata: vec![Namespace {
            key: namespace.to_owned(),
            value: Some(Struct { fields }),
        }],
    }
}
