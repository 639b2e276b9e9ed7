//! Ports, ranks, TLS, who may be asked, what is counted, and the end.

use crate::fake::{
    ANSWER, Act, Fake, PARAMS, PATH, ask, config, get, metric, neighbours, nobody, post, send,
    sidecar, streaming,
};
use baton_http::{Client, collect};
use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt as _, Full};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpListener;

#[tokio::test]
async fn every_rank_has_a_port_and_rank_zero_takes_requests_for_all() {
    let (first, second) = neighbours().await;
    let rank0 = Fake::serve(Act::Json(r#"{"rank":0}"#), first, None);
    let rank1 = Fake::serve(Act::Json(r#"{"rank":1}"#), second, None);
    let prefill = Fake::start(Act::Json(PARAMS)).await;
    let (first, second) = neighbours().await;
    let port = first.local_addr().unwrap().port();
    drop((first, second));
    let sidecar = sidecar(
        rank0.address,
        &format!("--data-parallel-size=2 --port={port}"),
    )
    .await;
    let at = |rank| SocketAddr::from(([127, 0, 0, 1], port + rank));
    assert_eq!(sidecar.address, at(0));
    assert_eq!(ask(post(at(0), None, "{}")).await.unwrap(), r#"{"rank":0}"#);
    assert_eq!(
        ask(post(at(1), Some(prefill.address), "{}")).await.unwrap(),
        r#"{"rank":1}"#
    );
    let named = |name: String| {
        let mut request = post(at(0), Some(prefill.address), "{}");
        request
            .headers_mut()
            .insert("x-data-parallel-host-port", name.parse().unwrap());
        request
    };
    assert_eq!(
        ask(named(at(1).to_string())).await.unwrap(),
        r#"{"rank":1}"#
    );
    assert_eq!(
        rank1.nth(1).await.headers["x-data-parallel-host-port"],
        at(1).to_string()
    );
    let before = prefill.asked.borrow().len();
    let unknown = send(named(format!("127.0.0.1:{}", port - 1))).await;
    assert_eq!(unknown.status(), StatusCode::BAD_REQUEST);
    assert_eq!(prefill.asked.borrow().len(), before);
    // The other ranks' ports are their own alone.
    let mut request = named(at(0).to_string());
    *request.uri_mut() = format!("http://{}{PATH}", at(1)).parse().unwrap();
    assert_eq!(ask(request).await.unwrap(), r#"{"rank":1}"#);
    for rank in [0, 1] {
        assert_eq!(
            send(get(at(rank), "/health")).await.status(),
            StatusCode::OK
        );
    }
}

#[tokio::test]
async fn it_is_healthy_by_itself_but_ready_only_when_decode_says_that_it_is_well() {
    let well = Fake::start(Act::Json("")).await;
    let sick = Fake::start(Act::Status(StatusCode::SERVICE_UNAVAILABLE, "{}")).await;
    for (decode, ready) in [
        (well.address, StatusCode::OK),
        (sick.address, StatusCode::SERVICE_UNAVAILABLE),
        (nobody().await, StatusCode::SERVICE_UNAVAILABLE),
    ] {
        let sidecar = sidecar(decode, "").await;
        let probe = async |path| send(get(sidecar.address, path)).await.status();
        assert_eq!(
            (probe("/health").await, probe("/ready").await),
            (StatusCode::OK, ready)
        );
    }
    assert_eq!(well.nth(0).await.path, "/health");
}

#[tokio::test]
async fn each_leg_speaks_tls_if_told_to() {
    use baton_http::{ClientConfig, ClientTls, Identity, Trust};
    let listen = || async { TcpListener::bind("127.0.0.1:0").await.unwrap() };
    let identity = || Some(Identity::self_signed().unwrap());
    let prefill = Fake::serve(Act::Json(PARAMS), listen().await, identity());
    let decode = Fake::serve(Act::Json(ANSWER), listen().await, identity());
    let anyone = ClientTls::new(&Trust::Anyone).unwrap();
    let client = Client::<Full<Bytes>>::with_tls(&ClientConfig::default(), anyone);
    let send = async |to: SocketAddr| {
        let mut request = post(to, Some(prefill.address), "{}");
        *request.uri_mut() = format!("https://{to}{PATH}").parse().unwrap();
        let response = client.send(request).await.unwrap();
        (
            response.status(),
            collect(response.into_body(), 1 << 20).await.unwrap(),
        )
    };
    let trusting = "--secure-proxy --enable-tls=prefiller,decoder --tls-insecure-skip-verify=decoder,prefiller";
    let running = sidecar(decode.address, trusting).await;
    assert_eq!(send(running.address).await, (StatusCode::OK, ANSWER.into()));
    assert_eq!(prefill.asked.borrow().len(), 1);
    // Nobody vouches for prefill: it is as good as not there.
    let wary = "--secure-proxy --enable-tls=prefiller,decoder --tls-insecure-skip-verify=decoder";
    if ClientTls::new(&Trust::System).is_ok() {
        let running = sidecar(decode.address, wary).await;
        assert_eq!(send(running.address).await, (StatusCode::OK, ANSWER.into()));
        assert_eq!(prefill.asked.borrow().len(), 1);
    }
    // Plain HTTP gets no answer from a port that speaks TLS.
    assert!(
        Client::default()
            .send(post(running.address, None, "{}"))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn servers_that_are_not_listed_are_not_asked() {
    let (prefill, decode) = (
        Fake::start(Act::Json(PARAMS)).await,
        Fake::start(Act::Json(ANSWER)).await,
    );
    let file = std::env::temp_dir().join(format!("baton-sidecar-{}", std::process::id()));
    std::fs::write(&file, "10.0.0.1:*\n").unwrap();
    let flags = format!(
        "--enable-ssrf-protection --allow-list={} --enable-p2p-pull",
        file.display()
    );
    let sidecar = sidecar(decode.address, &flags).await;
    std::fs::remove_file(&file).unwrap();
    let response = send(post(sidecar.address, Some(prefill.address), "{}")).await;
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    let pulling = async |source: &str| {
        let mut request = post(sidecar.address, None, "{}");
        let source = source.parse().unwrap();
        request
            .headers_mut()
            .insert("x-kv-cache-source-host-port", source);
        assert_eq!(ask(request).await.unwrap(), ANSWER);
        decode.asked.borrow().last().unwrap().body.clone()
    };
    assert_eq!(pulling("10.0.0.2:8000").await, "{}");
    assert_ne!(pulling("10.0.0.1:8000").await, "{}");
    assert!(prefill.asked.borrow().is_empty());
}

#[tokio::test]
async fn requests_in_progress_are_finished_and_new_ones_refused_when_it_is_told_to_end() {
    let (events, act) = streaming("text/event-stream");
    let (prefill, decode) = (Fake::start(Act::Json(PARAMS)).await, Fake::start(act).await);
    events.send("data: {}\n\n".into()).await.unwrap();
    let sidecar = sidecar(decode.address, "--shutdown-timeout=50ms").await;
    let request = post(sidecar.address, Some(prefill.address), "{}");
    let mut body = send(request).await.into_body();
    assert!(body.frame().await.unwrap().is_ok());
    sidecar.stop.cancel();
    while Client::default()
        .send(post(sidecar.address, None, "{}"))
        .await
        .is_ok()
    {}
    // It does not end by itself, so that the grace ends it.
    sidecar.ended.await.unwrap();
    assert!(body.frame().await.unwrap().is_err());
}

#[tokio::test]
async fn what_happened_can_be_read_from_its_metrics() {
    let decode = Fake::start(Act::Json(ANSWER)).await;
    let port = nobody().await.port();
    let flags =
        format!("--metrics-port={port} --prefill-max-retries=1 --prefill-retry-backoff=1ms");
    let sidecar = sidecar(decode.address, &flags).await;
    ask(post(sidecar.address, Some(nobody().await), "{}"))
        .await
        .unwrap();
    for (series, expect) in [
        (
            r#"baton_sidecar_requests_total{code="200",route="/v1/completions"}"#,
            "1",
        ),
        (
            r#"baton_sidecar_prefills_total{outcome="unreachable"}"#,
            "2",
        ),
        (r#"baton_sidecar_prefill_retries_total{server="same"}"#, "1"),
        (
            r#"baton_sidecar_fallbacks_total{reason="unreachable"}"#,
            "1",
        ),
    ] {
        assert_eq!(metric(port, series).await, expect, "{series}");
    }
    let elsewhere = send(get(([127, 0, 0, 1], port).into(), "/")).await;
    assert_eq!(elsewhere.status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_certificate_is_read_again_when_it_changes() {
    use baton_http::{ClientConfig, ClientTls, Trust};
    let folder = std::env::temp_dir().join(format!("baton-sidecar-tls-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let renew = || {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        std::fs::write(folder.join("tls.crt"), made.cert.pem()).unwrap();
        std::fs::write(folder.join("tls.key"), made.signing_key.serialize_pem()).unwrap();
        let trust = ClientTls::new(&Trust::Roots(made.cert.pem().into())).unwrap();
        Client::<Full<Bytes>>::with_tls(&ClientConfig::default(), trust)
    };
    let before = renew();
    let decode = Fake::start(Act::Json(ANSWER)).await;
    let flags = format!("--secure-proxy --cert-path={}", folder.display());
    let sidecar = sidecar(decode.address, &flags).await;
    let health = format!("https://{}/health", sidecar.address);
    assert!(before.get(&health, 1).await.is_ok());
    let after = renew();
    while after.get(&health, 1).await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_port_in_use_is_an_error_at_start() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port();
    let flags = format!("--host=127.0.0.1 --secure-proxy=false --port={port}");
    assert!(baton_sidecar::bind(config(&flags)).await.is_err());
}
