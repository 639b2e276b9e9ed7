//! Probes and small made-up servers, on loopback.

use super::*;
use crate::endpoint::{Address, EndpointSpec};
use baton_http::{ServeConfig, serve};
use baton_scheduler::{Policy, PrefixIndex, Scheduler};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use parking_lot::Mutex;
use std::convert::Infallible;
use std::net::SocketAddr;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

/// What a made-up server says, by path: a status and a body. Other paths are not found.
type Pages = Arc<Mutex<BTreeMap<&'static str, (u16, String)>>>;

struct Fake {
    address: SocketAddr,
    pages: Pages,
    _stop: DropGuard,
}

async fn fake(pages: &[(&'static str, u16, &str)]) -> Fake {
    let pages = pages
        .iter()
        .map(|(path, status, body)| (*path, (*status, (*body).to_owned())));
    let pages: Pages = Arc::new(Mutex::new(pages.collect()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let served = pages.clone();
    let service = service_fn(move |req: Request<Incoming>| {
        let page = served.lock().get(req.uri().path()).cloned();
        let (status, body) = page.unwrap_or((404, String::new()));
        let response = Response::builder()
            .status(status)
            .body(Full::new(Bytes::from(body)));
        async move { Ok::<_, Infallible>(response.unwrap()) }
    });
    tokio::spawn(serve(
        listener,
        service,
        ServeConfig::default(),
        stop.clone(),
    ));
    Fake {
        address,
        pages,
        _stop: stop.drop_guard(),
    }
}

const MODELS: (&str, u16, &str) = ("/v1/models", 200, r#"{"data":[{"id":"m"},{"id":"n"}]}"#);
const HEALTH: (&str, u16, &str) = ("/health", 200, "");
const BUSY: &str = "vllm:num_requests_waiting 3\nvllm:num_requests_running 2\nvllm:kv_cache_usage_perc 0.5\n\
    vllm:lora_requests_info{max_lora=\"2\",running_lora_adapters=\"a\",waiting_lora_adapters=\"\"} 1\n";

impl Fake {
    fn set(&self, path: &'static str, status: u16, body: &str) {
        self.pages.lock().insert(path, (status, body.to_owned()));
    }

    fn spec(&self, name: &str) -> EndpointSpec {
        EndpointSpec::new(name, Address::from(self.address))
    }
}

struct Watched {
    fleet: Arc<Fleet>,
    _probes: JoinSet<()>,
}

fn watched(specs: &[EndpointSpec]) -> Watched {
    let scheduler = Scheduler::new(Policy::default(), PrefixIndex::new(100));
    let fleet = Arc::new(Fleet::new(scheduler, 7));
    fleet.set_endpoints(specs).unwrap();
    let mut probes = JoinSet::new();
    probes.spawn(watch(fleet.clone(), Probing::default()));
    Watched {
        fleet,
        _probes: probes,
    }
}

impl Watched {
    fn server(&self, i: usize) -> Arc<Server> {
        self.fleet.servers()[i].clone()
    }
}

/// Waits for a condition that becomes true by itself, not for a time.
async fn eventually(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "never happened");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_server_is_found_healthy_with_what_it_says_of_itself() {
    let fake = fake(&[HEALTH, MODELS, ("/metrics", 200, BUSY)]).await;
    let watched = watched(&[fake.spec("a")]);
    let server = watched.server(0);
    eventually(|| server.health() == Health::Healthy).await;
    assert_eq!(server.models().unwrap().len(), 2);
    let load = server.load(Duration::ZERO);
    assert_eq!((load.waiting, load.active, load.kv_usage), (3, 5, 0.5));
    assert!(
        server
            .load(Duration::from_millis(watched.fleet.now()))
            .fresh
    );
    assert_eq!(&*server.adapters().unwrap().running[0], "a");
    assert_eq!(server.socket(), Some(fake.address));
    fake.set("/metrics", 200, "vllm:num_requests_waiting 0\n");
    eventually(|| server.load(Duration::ZERO).active == 0 && server.adapters().is_none()).await;
}

#[tokio::test]
async fn a_server_that_drains_or_goes_is_out_and_one_that_returns_is_in() {
    let fake = fake(&[HEALTH, MODELS]).await;
    let watched = watched(&[fake.spec("a")]);
    let server = watched.server(0);
    eventually(|| server.health() == Health::Healthy).await;
    fake.set("/health", 503, "");
    eventually(|| server.health() == Health::Draining).await;
    fake.set("/health", 404, "");
    eventually(|| server.health() == Health::Healthy).await;
    drop(fake);
    eventually(|| server.health() == Health::Unreachable).await;
}

#[tokio::test]
async fn names_are_resolved_and_metrics_may_be_elsewhere_in_another_engines_words() {
    let api = fake(&[HEALTH]).await;
    let metrics = fake(&[("/metrics", 200, "sglang:num_queue_reqs 4\n")]).await;
    let mut spec = EndpointSpec::new("a", Address::new("localhost", api.address.port()).unwrap());
    spec.metrics = Some(Address::from(metrics.address));
    spec.labels
        .insert(LEGACY_ENGINE_LABEL.to_owned(), "sglang".to_owned());
    let watched = watched(&[spec]);
    let server = watched.server(0);
    eventually(|| server.health() == Health::Healthy && server.load(Duration::ZERO).waiting == 4)
        .await;
    assert_eq!(server.models(), None);
    assert_eq!(server.socket().unwrap().port(), api.address.port());
}

#[tokio::test]
async fn probes_follow_the_list() {
    let (one, two) = (fake(&[HEALTH]).await, fake(&[HEALTH]).await);
    let watched = watched(&[one.spec("a")]);
    eventually(|| watched.server(0).health() == Health::Healthy).await;
    watched
        .fleet
        .set_endpoints(&[one.spec("a"), two.spec("b")])
        .unwrap();
    eventually(|| watched.server(1).health() == Health::Healthy).await;
    // The same endpoint on another port, which nobody serves.
    let address = Address::new("127.0.0.1", 1).unwrap();
    watched
        .fleet
        .set_endpoints(&[EndpointSpec::new("a", address)])
        .unwrap();
    eventually(|| watched.server(0).health() == Health::Unreachable).await;
    watched.fleet.set_endpoints(&[one.spec("a")]).unwrap();
    eventually(|| watched.server(0).health() == Health::Healthy).await;
}
