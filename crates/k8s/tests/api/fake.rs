//! An API server in memory: lists, watches from any version it remembers, versions checked on writes. What it does not know
//! it refuses as the real one does.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

pub(crate) const POOLS: &str = "/apis/inference.networking.k8s.io/v1/namespaces/ns/inferencepools";
pub(crate) const PODS: &str = "/api/v1/namespaces/ns/pods";
pub(crate) const OBJECTIVES: &str = "/apis/llm-d.ai/v1alpha2/namespaces/ns/inferenceobjectives";
pub(crate) const OLD_OBJECTIVES: &str =
    "/apis/inference.networking.x-k8s.io/v1alpha2/namespaces/ns/inferenceobjectives";
pub(crate) const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/ns/leases";

#[derive(Default)]
struct Store {
    version: u64,
    /// Collection -> name -> object.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    /// Version, collection, event.
    history: Vec<(u64, String, Value)>,
    /// Watches from before this version are refused.
    oldest: u64,
    /// They are refused by an event instead of a status.
    refuses_in_stream: bool,
    /// "VERB collection" -> status.
    refused: HashMap<String, u16>,
    /// "VERB collection" of each request that was served.
    used: Vec<String>,
}

/// The server. Dropped, it ends.
pub(crate) struct Fake {
    store: Arc<Mutex<Store>>,
    changed: watch::Sender<u64>,
    /// Incremented, all open watches end.
    cut: watch::Sender<u64>,
    server: Option<tokio::task::JoinHandle<()>>,
    address: std::net::SocketAddr,
}

#[derive(Clone)]
struct Shared {
    store: Arc<Mutex<Store>>,
    changed: watch::Sender<u64>,
    cut: watch::Sender<u64>,
}

impl Fake {
    /// A server that serves the given collections.
    pub(crate) async fn start(collections: &[&str]) -> Self {
        let mut fake = Self {
            store: Arc::default(),
            changed: watch::Sender::new(0),
            cut: watch::Sender::new(0),
            server: None,
            address: "127.0.0.1:0".parse().unwrap(),
        };
        for collection in collections {
            fake.serve(collection);
        }
        fake.listen().await;
        fake
    }

    /// Listens, again if it was stopped, at the same address.
    pub(crate) async fn listen(&mut self) {
        let listener = loop {
            match tokio::net::TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        self.address = listener.local_addr().unwrap();
        let shared = Shared {
            store: self.store.clone(),
            changed: self.changed.clone(),
            cut: self.cut.clone(),
        };
        let app = Router::new().fallback(answer).with_state(shared);
        self.server = Some(tokio::spawn(async move {
            axum::serve(listener, app).await.unwrap();
        }));
    }

    /// No longer listens; open watches are cut.
    pub(crate) async fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
            let _ = server.await;
        }
        self.cut_watches();
    }

    pub(crate) fn client(&self) -> kube::Client {
        kube::Client::try_from(kube::Config::new(self.url().parse().unwrap())).unwrap()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Serves one more collection, as after its definition was installed.
    pub(crate) fn serve(&self, collection: &str) {
        self.store
            .lock()
            .objects
            .entry(collection.to_owned())
            .or_default();
    }

    /// Creates or changes an object.
    pub(crate) fn put(&self, collection: &str, name: &str, object: Value) {
        self.store.lock().put(collection, name, object);
        self.changed.send_modify(|n| *n += 1);
    }

    pub(crate) fn delete(&self, collection: &str, name: &str) {
        {
            let mut store = self.store.lock();
            let mut gone = store
                .objects
                .get_mut(collection)
                .unwrap()
                .remove(name)
                .unwrap();
            store.version += 1;
            gone["metadata"]["resourceVersion"] = json!(store.version.to_string());
            let version = store.version;
            store.history.push((
                version,
                collection.to_owned(),
                json!({"type": "DELETED", "object": gone}),
            ));
        }
        self.changed.send_modify(|n| *n += 1);
    }

    pub(crate) fn get(&self, collection: &str, name: &str) -> Option<Value> {
        self.store
            .lock()
            .objects
            .get(collection)?
            .get(name)
            .cloned()
    }

    pub(crate) fn cut_watches(&self) {
        self.cut.send_modify(|n| *n += 1);
    }

    /// Forgets the past: whoever was away must list again, and is told so by an event or by the status of the answer.
    pub(crate) fn forget(&self, in_stream: bool) {
        let mut store = self.store.lock();
        store.refuses_in_stream = in_stream;
        store.history.clear();
        store.version += 10;
        store.oldest = store.version;
    }

    /// Refuses a verb on a collection with a status, or no longer.
    pub(crate) fn refuse(&self, verb: &str, collection: &str, status: Option<u16>) {
        let key = format!("{verb} {collection}");
        let mut store = self.store.lock();
        match status {
            Some(status) => store.refused.insert(key, status),
            None => store.refused.remove(&key),
        };
    }

    /// How often a verb on a collection was asked for, refusals included.
    pub(crate) fn count(&self, verb: &str, collection: &str) -> usize {
        let key = format!("{verb} {collection}");
        self.store
            .lock()
            .used
            .iter()
            .filter(|used| **used == key)
            .count()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(server) = &self.server {
            server.abort();
        }
        self.cut_watches();
    }
}

impl Store {
    fn put(&mut self, collection: &str, name: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["name"] = json!(name);
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let objects = self.objects.get_mut(collection).unwrap();
        let kind = if objects.insert(name.to_owned(), object.clone()).is_some() {
            "MODIFIED"
        } else {
            "ADDED"
        };
        self.history.push((
            self.version,
            collection.to_owned(),
            json!({"type": kind, "object": object}),
        ));
        object
    }

    /// The refusal of a verb, if any.
    fn asked(&mut self, verb: &str, collection: &str) -> Option<Response> {
        let key = format!("{verb} {collection}");
        let refused = self.refused.get(&key).copied();
        self.used.push(key);
        if let Some(status) = refused {
            return Some(failure(status));
        }
        (!self.objects.contains_key(collection)).then(|| failure(404))
    }
}

fn failure(status: u16) -> Response {
    (
        StatusCode::from_u16(status).unwrap(),
        refusal(status).to_string(),
    )
        .into_response()
}

fn refusal(status: u16) -> Value {
    let reason = match status {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        _ => "InternalError",
    };
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": status,
           "message": "refused", "reason": reason})
}

async fn answer(
    State(shared): State<Shared>,
    method: Method,
    uri: Uri,
    Query(query): Query<HashMap<String, String>>,
    body: Bytes,
) -> Response {
    let path = uri.path();
    if !path.contains("/namespaces/") {
        return discovery(&shared.store.lock(), path);
    }
    let mut store = shared.store.lock();
    // Leases alone are asked for by name.
    let parts = path
        .rsplit_once('/')
        .filter(|(rest, _)| rest.ends_with("/leases"));
    let (collection, name) = parts.map_or((path, None), |(rest, name)| (rest, Some(name)));
    let verb = match (method, name) {
        (Method::GET, None) if query.contains_key("watch") => "watch",
        (Method::GET, None) => "list",
        (Method::GET, Some(_)) => "get",
        (Method::POST, None) => "create",
        (Method::PUT, Some(_)) => "update",
        _ => return failure(405),
    };
    if let Some(refusal) = store.asked(verb, collection) {
        return refusal;
    }
    if verb == "watch" {
        drop(store);
        return follow(shared, collection.to_owned(), &query);
    }
    if verb == "list" {
        let objects = store.objects[collection].values();
        let items: Vec<_> = objects.filter(|o| selected(o, &query)).collect();
        let list =
            json!({"metadata": {"resourceVersion": store.version.to_string()}, "items": items});
        return list.to_string().into_response();
    }
    match one(&mut store, verb, collection, name, &body) {
        Ok(object) => object.to_string().into_response(),
        Err(status) => failure(status),
    }
}

/// Reads or writes one object.
fn one(
    store: &mut Store,
    verb: &str,
    collection: &str,
    name: Option<&str>,
    body: &[u8],
) -> Result<Value, u16> {
    let sent: Value = serde_json::from_slice(body).unwrap_or_default();
    let name = name
        .or(sent["metadata"]["name"].as_str())
        .ok_or(400_u16)?
        .to_owned();
    let before = store.objects[collection].get(&name).cloned();
    match (verb, before) {
        ("get", Some(before)) => Ok(before),
        ("create", None) => Ok(store.put(collection, &name, sent)),
        ("create", Some(_)) => Err(409),
        ("update", Some(before))
            if before["metadata"]["resourceVersion"] == sent["metadata"]["resourceVersion"] =>
        {
            Ok(store.put(collection, &name, sent))
        }
        ("update", Some(_)) => Err(409),
        _ => Err(404),
    }
}

/// The kinds of a group's version.
fn discovery(store: &Store, path: &str) -> Response {
    let prefix = format!("{path}/namespaces/ns/");
    let resources: Vec<_> = store
        .objects
        .keys()
        .filter_map(|c| c.strip_prefix(&prefix))
        .map(|name| json!({"name": name, "singularName": "", "namespaced": true, "kind": name, "verbs": []}))
        .collect();
    if resources.is_empty() {
        return failure(404);
    }
    let list = json!({"kind": "APIResourceList", "groupVersion": path.trim_start_matches("/apis/"), "resources": resources});
    list.to_string().into_response()
}

/// By one equality of a field or of labels, as those asked for here.
fn selected(object: &Value, query: &HashMap<String, String>) -> bool {
    let fields = query.get("fieldSelector").is_none_or(|selector| {
        object["metadata"]["name"].as_str() == selector.strip_prefix("metadata.name=")
    });
    let labels = query.get("labelSelector").is_none_or(|selector| {
        selector.split(',').all(|term| {
            let (key, value) = term.split_once('=').unwrap();
            object["metadata"]["labels"][key] == value
        })
    });
    fields && labels
}

/// Streams what happened after a version, until it is cut.
fn follow(shared: Shared, collection: String, query: &HashMap<String, String>) -> Response {
    let from: u64 = query["resourceVersion"].parse().unwrap();
    let (forgotten, in_stream) = {
        let store = shared.store.lock();
        (from < store.oldest, store.refuses_in_stream)
    };
    if forgotten && in_stream {
        let event = json!({"type": "ERROR", "object": refusal(410)});
        return format!("{event}\n").into_response();
    } else if forgotten {
        return failure(410);
    }
    let query = query.clone();
    let (mut changed, mut cut) = (shared.changed.subscribe(), shared.cut.subscribe());
    cut.mark_unchanged();
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<String, std::io::Error>>(16);
    tokio::spawn(async move {
        let mut from = from;
        loop {
            let news = shared.store.lock().news(&collection, &mut from, &query);
            for event in news {
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                _ = changed.changed() => {}
                _ = cut.changed() => return,
                () = sender.closed() => return,
            }
        }
    });
    let lines = futures_util::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|line| (line, receiver))
    });
    Body::from_stream(lines).into_response()
}

impl Store {
    /// Lines for events after `from`. A pod whose labels no longer fit is told of as deleted.
    fn news(
        &self,
        collection: &str,
        from: &mut u64,
        query: &HashMap<String, String>,
    ) -> Vec<String> {
        let events = self
            .history
            .iter()
            .filter(|(version, of, _)| *version > *from && of == collection);
        let lines = events.map(|(_, _, event)| {
            let mut event = event.clone();
            if !selected(&event["object"], query) {
                event["type"] = json!("DELETED");
            }
            format!("{event}\n")
        });
        let lines = lines.collect();
        *from = self.version;
        lines
    }
}
