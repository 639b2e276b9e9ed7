//! What is sent to a server: the client's headers without those that are not the client's to set, and ours.

use baton_http::strip_hop_by_hop;
use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_LENGTH, EXPECT, HOST};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::Full;

/// Where the decode server gets the prompt's KV: `host:port` of the prefill server's API.
const PREFILLER: HeaderName = HeaderName::from_static("x-prefiller-host-port");

/// Names a request in logs and answers.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Headers with which servers are steered. A client that could set one could have a server connect to any address.
const STEERING: [&str; 6] = [
    "x-prefiller-host-port",
    "x-prefiller-url",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-data-parallel-rank",
    "x-kv-cache-source-host-port",
];
const STEERING_PREFIX: &str = "x-gateway-destination-endpoint";

/// Longest request id taken from a client.
const MAX_REQUEST_ID: usize = 128;

/// The part of a request that is the same whichever server it goes to.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    pub(crate) method: Method,
    pub(crate) path: PathAndQuery,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Outgoing {
    /// The request for `server`, which fetches KV from `prefill` if that is given.
    pub(crate) fn request(
        &self,
        server: &Authority,
        prefill: Option<&Authority>,
    ) -> Option<Request<Full<Bytes>>> {
        let uri = Uri::builder()
            .scheme(Scheme::HTTP)
            .authority(server.clone())
            .path_and_query(self.path.clone());
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = uri.build().ok()?;
        *request.headers_mut() = self.headers.clone();
        if let Some(prefill) = prefill {
            request
                .headers_mut()
                .insert(PREFILLER, HeaderValue::from_str(prefill.as_str()).ok()?);
        }
        Some(request)
    }
}

/// The client's headers, made fit to be forwarded.
pub(crate) fn forwardable(mut headers: HeaderMap, request_id: &HeaderValue) -> HeaderMap {
    strip_hop_by_hop(&mut headers);
    // Host and length are the connection's; a compressed answer could not be read event by event.
    for name in [HOST, CONTENT_LENGTH, EXPECT, ACCEPT_ENCODING] {
        headers.remove(name);
    }
    let steering: Vec<HeaderName> = headers
        .keys()
        .filter(|name| steers(name))
        .cloned()
        .collect();
    for name in steering {
        headers.remove(name);
    }
    headers.insert(REQUEST_ID, request_id.clone());
    headers
}

fn steers(name: &HeaderName) -> bool {
    STEERING.contains(&name.as_str()) || name.as_str().starts_with(STEERING_PREFIX)
}

/// The client's request id, if it is a sensible one, else a fresh one.
pub(crate) fn request_id(headers: &HeaderMap) -> HeaderValue {
    let sensible = |v: &&HeaderValue| {
        !v.is_empty() && v.len() <= MAX_REQUEST_ID && v.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    headers
        .get(REQUEST_ID)
        .filter(sensible)
        .cloned()
        .unwrap_or_else(fresh_request_id)
}

fn fresh_request_id() -> HeaderValue {
    // Without randomness an id that is not unique is better than no answer.
    let mut bytes = [0u8; 16];
    let _ = getrandom::fill(&mut bytes);
    let id = format!("{:032x}", u128::from_be_bytes(bytes));
    HeaderValue::from_str(&id).unwrap_or_else(|_| HeaderValue::from_static("0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steering_headers_of_clients_are_removed_and_others_stay() {
        let mut headers = HeaderMap::new();
        let names = STEERING.iter().copied().chain([
            "x-gateway-destination-endpoint",
            "x-gateway-destination-endpoint-subset",
            "host",
            "content-length",
            "connection",
            "authorization",
            "traceparent",
        ]);
        for name in names {
            headers.append(
                HeaderName::from_static(name),
                HeaderValue::from_static("evil:1"),
            );
            headers.append(
                HeaderName::from_static(name),
                HeaderValue::from_static("evil:2"),
            );
        }
        let kept = forwardable(headers, &HeaderValue::from_static("id"));
        let mut names: Vec<&str> = kept.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["authorization", "traceparent", "x-request-id"]);
    }

    #[test]
    fn the_prefill_server_travels_as_a_header() {
        let outgoing = Outgoing {
            method: Method::POST,
            path: PathAndQuery::from_static("/v1/completions?a=b"),
            headers: HeaderMap::new(),
            body: Bytes::from_static(b"{}"),
        };
        let prefill = Authority::from_static("[::1]:9");
        let request = outgoing
            .request(&Authority::from_static("d:1"), Some(&prefill))
            .unwrap();
        assert_eq!(request.uri(), "http://d:1/v1/completions?a=b");
        assert_eq!(request.headers()[PREFILLER], "[::1]:9");
    }

    #[test]
    fn a_request_id_is_kept_if_it_is_sensible() {
        let with = |id: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_bytes(id).unwrap());
            request_id(&headers)
        };
        assert_eq!(with(b"abc-1"), "abc-1");
        for id in [&b""[..], b"a b", b"\xff", &[b'a'; 129]] {
            assert_eq!(with(id).len(), 32);
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
