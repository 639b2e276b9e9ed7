//! Probes and small made-up servers, on loopback.

use super::*;
use crate::endpoint::{Address, EndpointSpec};
use baton_http::{Identity, ServeConfig, serve};
use baton_scheduler::config::{self, MetricsSource};
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
    fake_over(pages, None).await
}

async fn fake_over(pages: &[(&'static str, u16, &str)], tls: Option<Identity>) -> Fake {
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
        ServeConfig {
            tls,
            ..ServeConfig::default()
        },
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
    watched_by(specs, Probing::default())
}

fn watched_by(specs: &[EndpointSpec], probing: Probing) -> Watched {
    let scheduler = Scheduler::new(Policy::default(), PrefixIndex::new(100));
    let fleet = Arc::new(Fleet::new(scheduler, 7));
    fleet.set_endpoints(specs).unwrap();
    let mut probes = JoinSet::new();
    probes.spawn(watch(fleet.clone(), probing));
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

/// What a configuration says of https makes of it.
fn https(insecure_skip_verify: bool, port: Option<u16>) -> Probing {
    let mut data = config::load(&config::default_config()).unwrap().data;
    data.metrics = MetricsSource {
        https: true,
        insecure_skip_verify,
        port,
        ..data.metrics
    };
    data.asks_models = true;
    Probing::of(&data).unwrap()
}

#[tokio::test]
async fn metrics_over_https_are_read_from_whoever_has_a_certificate_that_counts() {
    let pages = [HEALTH, MODELS, ("/metrics", 200, BUSY)];
    let tls = || Some(Identity::self_signed().unwrap());
    let fake = fake_over(&pages, tls()).await;
    let anybody = watched_by(&[fake.spec("a")], https(true, None));
    let server = anybody.server(0);
    eventually(|| server.health() == Health::Healthy).await;
    assert_eq!(server.models().unwrap().len(), 2);
    assert_eq!(server.load(Duration::ZERO).waiting, 3);
    // On a port of their own they alone are asked for so.
    let api = self::fake(&[HEALTH, MODELS]).await;
    let apart = watched_by(&[api.spec("a")], https(true, Some(fake.address.port())));
    let server = apart.server(0);
    eventually(|| server.health() == Health::Healthy && server.load(Duration::ZERO).waiting == 3)
        .await;
    // Nobody vouches for a certificate that was made here.
    let verifies = Probing {
        metrics_tls: Some(ClientTls::new(&Trust::Roots(Vec::new())).unwrap()),
        ..https(true, Some(fake.address.port()))
    };
    let verified = watched_by(&[api.spec("a")], verifies);
    let server = verified.server(0);
    eventually(|| server.health() == Health::Healthy).await;
    assert_eq!(server.load(Duration::ZERO).waiting, 0);
}

#[test]
fn files_of_certificates_are_read_and_must_be_there() {
    let mut data = config::load(&config::default_config()).unwrap().data;
    data.metrics.https = true;
    data.metrics.insecure_skip_verify = false;
    data.metrics.ca_cert = Some("/no/such/file".into());
    assert!(matches!(Probing::of(&data), Err(ProbingError::File(..))));
    data.metrics.insecure_skip_verify = true;
    assert!(Probing::of(&data).is_ok());
    data.metrics.client_cert = Some(("/no/such/file".into(), "/nor/this".into()));
    assert!(matches!(Probing::of(&data), Err(ProbingError::File(..))));
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
