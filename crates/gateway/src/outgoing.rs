//! What is sent to a server: the client's headers without those that are not the client's to set, and ours.

use baton_fleet::headers;
use baton_http::{Pieces, REQUEST_ID, strip_hop_by_hop};
use baton_openai::facts::Facts;
use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_LENGTH, EXPECT, HOST};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::Full;

/// Where the decode server gets the prompt's KV: `host:port` of the prefill server's API.
const PREFILLER: HeaderName = HeaderName::from_static(headers::PREFILLER);

/// Headers with which servers are steered. A client that could set one could have a server connect to any address.
const STEERING: [&str; 10] = [
    headers::PREFILLER,
    "x-prefiller-url",
    headers::ENCODERS,
    headers::DATA_PARALLEL,
    "x-data-parallel-rank",
    "x-kv-cache-source-host-port",
    // These are for us alone.
    headers::OBJECTIVE[0],
    headers::OBJECTIVE[1],
    headers::FAIRNESS[0],
    headers::FAIRNESS[1],
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

/// `body`, which says `facts`, with every top-level `kv_transfer_params` null: a client must not point a server at another
/// server's KV. All other bytes stay as they came.
pub(crate) fn without_foreign_kv(body: Bytes, facts: &Facts) -> Bytes {
    let spans = facts.kv_transfer_params.iter().cloned();
    let edits = spans.map(|span| (span, Bytes::from_static(b"null")));
    Pieces::from(body).replaced(edits).into_bytes()
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
    use proptest::prelude::*;

    fn cleaned(body: &str) -> String {
        let facts = Facts::read(&[body]).unwrap();
        let body = without_foreign_kv(Bytes::copy_from_slice(body.as_bytes()), &facts);
        String::from_utf8(body.to_vec()).unwrap()
    }

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
    fn kv_transfer_params_become_null_and_every_other_byte_stays() {
        assert_eq!(
            cleaned(
                r#"{"big": 12345678901234567890.0, "kv_transfer_params" : {"remote_host":"evil"} ,"x":"<&>" }"#
            ),
            r#"{"big": 12345678901234567890.0, "kv_transfer_params" : null ,"x":"<&>" }"#
        );
        assert_eq!(
            cleaned(r#"{"kv_transfer_params":null}"#),
            r#"{"kv_transfer_params":null}"#
        );
    }

    #[test]
    fn a_hidden_or_repeated_name_is_found_too() {
        assert_eq!(
            cleaned(
                r#"{"kv_transfer_params":1,"kv_transfer_par\u0061ms":{"a":[]},"kv_transfer_params":null}"#
            ),
            r#"{"kv_transfer_params":null,"kv_transfer_par\u0061ms":null,"kv_transfer_params":null}"#
        );
        let nested = r#"{"metadata":{"kv_transfer_params":1}}"#;
        assert_eq!(cleaned(nested), nested);
    }

    proptest! {
        #[test]
        fn whatever_the_params_are_they_are_null_afterwards(
            before in "[a-z\"\\\\ ]{0,10}", params in "[a-z{}\\[\\],:\"0-9\\\\]{0,20}", n in 0usize..3
        ) {
            let member = format!("\"kv_transfer_params\":{}", serde_json::to_string(&params).unwrap());
            let mut body = format!("{{\"p\":{}", serde_json::to_string(&before).unwrap());
            for _ in 0..n { body.push(','); body.push_str(&member); }
            body.push('}');
            let value: serde_json::Value = serde_json::from_str(&cleaned(&body)).unwrap();
            prop_assert!(value.get("kv_transfer_params").is_none_or(serde_json::Value::is_null));
            prop_assert_eq!(value["p"].as_str(), Some(before.as_str()));
        }
    }
}
