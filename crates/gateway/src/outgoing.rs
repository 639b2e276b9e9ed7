//! What is sent to a server: the client's headers without those that are not the client's to set, and ours.

use baton_http::{REQUEST_ID, strip_hop_by_hop};
use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_LENGTH, EXPECT, HOST};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::Full;

/// Where the decode server gets the prompt's KV: `host:port` of the prefill server's API.
const PREFILLER: HeaderName = HeaderName::from_static("x-prefiller-host-port");

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
}
