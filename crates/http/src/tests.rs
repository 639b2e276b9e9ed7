//! Client and server against each other, on loopback.

use crate::*;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

fn get(address: SocketAddr) -> Request<Full<Bytes>> {
    Request::get(format!("http://{address}/"))
        .body(Full::default())
        .unwrap()
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Answers `late` once `release` is notified; says so on `entered`.
async fn gated(
    entered: Arc<Notify>,
    release: Arc<Notify>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    entered.notify_one();
    release.notified().await;
    Ok(Response::new(Full::new(Bytes::from_static(b"late"))))
}

#[tokio::test]
async fn a_request_in_progress_is_finished_during_shutdown_and_new_ones_are_refused() {
    let (listener, address) = listener().await;
    let (entered, release, shutdown) = (
        Arc::new(Notify::new()),
        Arc::new(Notify::new()),
        CancellationToken::new(),
    );
    let (e, r) = (entered.clone(), release.clone());
    let service = service_fn(move |_: Request<Incoming>| gated(e.clone(), r.clone()));
    let server = tokio::spawn(serve(
        listener,
        service,
        ServeConfig::default(),
        shutdown.clone(),
    ));

    let client = Client::default();
    let request = tokio::spawn({
        let client = client.clone();
        async move { client.send(get(address)).await }
    });
    entered.notified().await;
    shutdown.cancel();
    loop {
        if let Err(e) = Client::default().send(get(address)).await {
            assert!(matches!(e, ClientError::Connect(_) | ClientError::Sent(_)));
            break;
        }
    }
    release.notify_one();
    let response = request.await.unwrap().unwrap();
    assert_eq!(collect(response.into_body(), 10).await.unwrap(), "late");
    server.await.unwrap();
}

#[tokio::test]
async fn what_is_still_running_after_the_grace_is_ended() {
    let (listener, address) = listener().await;
    let (entered, shutdown) = (Arc::new(Notify::new()), CancellationToken::new());
    let e = entered.clone();
    let service = service_fn(move |_: Request<Incoming>| gated(e.clone(), Arc::new(Notify::new())));
    let config = ServeConfig {
        grace: std::time::Duration::ZERO,
        ..ServeConfig::default()
    };
    let server = tokio::spawn(serve(listener, service, config, shutdown.clone()));
    let request = tokio::spawn(async move { Client::default().send(get(address)).await });
    entered.notified().await;
    shutdown.cancel();
    server.await.unwrap();
    assert!(matches!(request.await.unwrap(), Err(ClientError::Sent(_))));
}

#[tokio::test]
async fn dropping_a_request_drops_the_future_that_answers_it() {
    struct Tell(Option<oneshot::Sender<()>>);
    impl Drop for Tell {
        fn drop(&mut self) {
            let _ = self.0.take().map(|tx| tx.send(()));
        }
    }
    let (listener, address) = listener().await;
    let (tx, dropped) = oneshot::channel();
    let tell = Arc::new(parking_lot::Mutex::new(Some(Tell(Some(tx)))));
    let entered = Arc::new(Notify::new());
    let e = entered.clone();
    let service = service_fn(move |_: Request<Incoming>| {
        let (held, e) = (tell.lock().take(), e.clone());
        async move {
            let answer = gated(e, Arc::new(Notify::new())).await;
            drop(held);
            answer
        }
    });
    let shutdown = CancellationToken::new();
    let server = tokio::spawn(serve(
        listener,
        service,
        ServeConfig::default(),
        shutdown.clone(),
    ));
    let request = tokio::spawn(async move { Client::default().send(get(address)).await });
    entered.notified().await;
    request.abort();
    dropped.await.unwrap();
    shutdown.cancel();
    server.await.unwrap();
}

#[tokio::test]
async fn nobody_listening_is_a_connect_error() {
    let (listener, address) = listener().await;
    drop(listener);
    assert!(matches!(
        Client::default().send(get(address)).await,
        Err(ClientError::Connect(_))
    ));
}

#[tokio::test]
async fn a_server_that_hangs_up_without_an_answer_is_not_a_connect_error() {
    let (listener, address) = listener().await;
    let peer = tokio::spawn(async move { drop(listener.accept().await.unwrap()) });
    assert!(matches!(
        Client::default().send(get(address)).await,
        Err(ClientError::Sent(_))
    ));
    peer.await.unwrap();
}
