//! `GET /v1/models`: the lists of all servers that answer, as one.

use crate::front::{Gateway, ResponseBody};
use crate::outgoing::Outgoing;
use crate::refusal::{Refusal, json};
use baton_fleet::Server;
use baton_http::collect;
use baton_scheduler::Health;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use http::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Servers asked at a time.
const AT_ONCE: usize = 16;
const PATIENCE: Duration = Duration::from_secs(2);
const MAX_BYTES: usize = 1 << 20;

/// Asks every healthy server that decodes, with the client's own key. If none lists anything, what the first one said
/// is the answer (such as that the key is wrong).
pub(crate) async fn answer(
    gateway: &Gateway,
    outgoing: &Outgoing,
) -> Result<Response<ResponseBody>, Refusal> {
    let servers: Vec<Arc<Server>> = gateway
        .fleet
        .servers()
        .iter()
        .filter(|s| may_answer(s))
        .cloned()
        .collect();
    let answers: Vec<Option<(StatusCode, Bytes)>> = stream::iter(servers)
        .map(|server| ask(gateway, outgoing, server))
        .buffered(AT_ONCE)
        .collect()
        .await;
    let answers: Vec<(StatusCode, Bytes)> = answers.into_iter().flatten().collect();
    let lists: Vec<&Bytes> = answers
        .iter()
        .filter(|(s, _)| *s == StatusCode::OK)
        .map(|(_, body)| body)
        .collect();
    if lists.is_empty() {
        return answers
            .into_iter()
            .next()
            .map(|(status, body)| json(status, body))
            .ok_or(Refusal::NoServer);
    }
    Ok(json(StatusCode::OK, merge(&lists)))
}

fn may_answer(server: &Server) -> bool {
    server.role.decodes() && server.health() == Health::Healthy
}

async fn ask(
    gateway: &Gateway,
    outgoing: &Outgoing,
    server: Arc<Server>,
) -> Option<(StatusCode, Bytes)> {
    let request = outgoing.request(server.address.authority(), None)?;
    let exchange = async {
        let (parts, body) = gateway.client.send(request).await.ok()?.into_parts();
        Some((parts.status, collect(body, MAX_BYTES).await.ok()?))
    };
    tokio::time::timeout(PATIENCE, exchange).await.ok()?
}

/// One list of every model, each once, in the order of the servers. What is no list is skipped.
pub(crate) fn merge(lists: &[&Bytes]) -> Bytes {
    #[derive(Deserialize)]
    struct List<'a> {
        #[serde(borrow)]
        data: Vec<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Model<'a> {
        #[serde(borrow)]
        id: Cow<'a, str>,
    }
    #[derive(Serialize)]
    struct Merged<'a> {
        object: &'static str,
        data: Vec<&'a RawValue>,
    }
    let mut seen = BTreeSet::new();
    let mut merged = Merged {
        object: "list",
        data: Vec::new(),
    };
    for list in lists {
        let Ok(List { data }) = serde_json::from_slice(list) else {
            continue;
        };
        for raw in data {
            if serde_json::from_str::<Model<'_>>(raw.get())
                .is_ok_and(|m| seen.insert(m.id.into_owned()))
            {
                merged.data.push(raw);
            }
        }
    }
    serde_json::to_vec(&merged).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_merged_and_each_model_is_there_once_byte_for_byte() {
        let lists = [
            Bytes::from_static(br#"{"object":"list","data":[{"id":"a","x":1.50}]}"#),
            Bytes::from_static(br#"{"data":[{"id":"\u0061","x":2},{"id":"b"},{"noid":1},7]}"#),
            Bytes::from_static(b"nonsense"),
        ];
        let merged = merge(&lists.iter().collect::<Vec<_>>());
        assert_eq!(
            merged,
            r#"{"object":"list","data":[{"id":"a","x":1.50},{"id":"b"}]}"#
        );
    }
}
