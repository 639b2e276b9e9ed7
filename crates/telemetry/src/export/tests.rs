//! A collector of one answer after the other, over HTTP; gRPC is tried against others' code in `tests/envoy`.

use super::*;
use crate::context::Context;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

const PARENT: &[u8] = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn settings(address: std::net::SocketAddr) -> Settings {
    let read = Settings::read(|name| match name {
        "OTEL_EXPORTER_OTLP_PROTOCOL" => Some("http/protobuf".to_owned()),
        "OTEL_EXPORTER_OTLP_ENDPOINT" => Some(format!("http://{address}")),
        "OTEL_BSP_SCHEDULE_DELAY" => Some("1".to_owned()),
        _ => None,
    });
    read.unwrap().unwrap()
}

/// Reads one request and answers with `status`. Returns the body.
async fn serve(listener: &TcpListener, status: u16) -> Vec<u8> {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut bytes = Vec::new();
    let (head, length) = loop {
        assert!(stream.read_buf(&mut bytes).await.unwrap() > 0);
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        if let Some(end) = text.find("\r\n\r\n") {
            assert!(text.starts_with("post /v1/traces "));
            let length = text.split("content-length: ").nth(1).unwrap();
            let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
            break (end + 4, length);
        }
    };
    while bytes.len() < head + length {
        assert!(stream.read_buf(&mut bytes).await.unwrap() > 0);
    }
    let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    stream.write_all(answer.as_bytes()).await.unwrap();
    bytes.split_off(head)
}

#[tokio::test]
async fn a_collector_gets_every_span_even_if_it_answers_late() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (tracer, exporter) = Exporter::new(&settings(listener.local_addr().unwrap())).unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn(exporter.run(stop.clone()));
    let parent = Context::parse(PARENT);
    let at = tracer.admit(parent).unwrap();
    tracer.end(tracer.root(at, parent, "first", 1), 2);
    let first = serve(&listener, 503).await;
    let again = serve(&listener, 200).await;
    assert_eq!(first, again);
    let export = Export::decode(&*again).unwrap();
    let resource = export.resource_spans[0].resource.as_ref().unwrap();
    assert_eq!(resource.attributes[0].key, "service.name");
    assert_eq!(
        export.resource_spans[0].scope_spans[0].spans[0].name,
        "first"
    );
    while tracer.state.deaf.load(Relaxed) {
        tokio::task::yield_now().await;
    }
    // What is left when all ends is sent, too.
    tracer.end(tracer.root(at, parent, "last", 1), 2);
    stop.cancel();
    let last = serve(&listener, 200).await;
    assert!(Export::decode(&*last).is_ok());
    running.await.unwrap();
}

#[tokio::test]
async fn while_nobody_listens_nothing_is_traced() {
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let (tracer, exporter) = Exporter::new(&settings(closed)).unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn(exporter.run(stop.clone()));
    let parent = Context::parse(PARENT);
    let at = tracer.admit(parent).unwrap();
    tracer.end(tracer.root(at, parent, "lost", 1), 2);
    while tracer.admit(parent).is_some() {
        tokio::task::yield_now().await;
    }
    stop.cancel();
    running.await.unwrap();
}

#[test]
fn answers_say_whether_to_try_again() {
    let status = |code: &str| {
        HeaderMap::from_iter([("grpc-status".parse().unwrap(), code.parse().unwrap())])
    };
    let none = HeaderMap::new();
    assert_eq!(by_grpc(&none, &status("0")), Sent::Taken);
    assert!(matches!(by_grpc(&status("16"), &none), Sent::Refused(_)));
    assert!(matches!(by_grpc(&none, &status("14")), Sent::Lost(_)));
    assert!(matches!(by_grpc(&none, &none), Sent::Lost(_)));
    for (code, lost) in [(400, false), (404, false), (429, true), (503, true)] {
        let sent = by_http(StatusCode::from_u16(code).unwrap());
        assert_eq!(matches!(sent, Sent::Lost(_)), lost, "{code}");
    }
}
