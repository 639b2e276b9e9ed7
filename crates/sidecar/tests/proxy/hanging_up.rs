//! A client that goes away takes everything with it that was done for it.

use crate::fake::{ANSWER, Act, Fake, PARAMS, ask, post, send, sidecar, streaming};
use bytes::Bytes;
use http_body_util::BodyExt as _;

#[tokio::test]
async fn a_client_that_hangs_up_during_prefill_ends_prefill() {
    let (prefill, decode) = (
        Fake::start(Act::Hang).await,
        Fake::start(Act::Json(ANSWER)).await,
    );
    let sidecar = sidecar(decode.address, "").await;
    let asked = ask(post(sidecar.address, Some(prefill.address), "{}"));
    prefill.nth(0).await;
    asked.abort();
    prefill.is_given_up().await;
    assert!(decode.asked.borrow().is_empty());
}

#[tokio::test]
async fn a_client_that_hangs_up_before_decode_answers_has_its_kv_given_back() {
    let (prefill, decode) = (
        Fake::start(Act::Json(PARAMS)).await,
        Fake::start(Act::Hang).await,
    );
    let sidecar = sidecar(decode.address, "").await;
    let asked = ask(post(sidecar.address, Some(prefill.address), "{}"));
    decode.nth(0).await;
    asked.abort();
    decode.is_given_up().await;
    let release = prefill.nth(1).await;
    assert_eq!(
        (&*release.method, &*release.path),
        ("DELETE", "/kv/v1/leases/7")
    );
    assert_eq!(release.headers["x-kvx-token"], "a-_9");
}

#[tokio::test]
async fn a_client_that_hangs_up_in_a_stream_ends_decode_which_has_the_kv_by_then() {
    let (events, act) = streaming("text/event-stream");
    let (prefill, decode) = (Fake::start(Act::Json(PARAMS)).await, Fake::start(act).await);
    let sidecar = sidecar(decode.address, "").await;
    events
        .send(Bytes::from_static(b"data: {}\n\n"))
        .await
        .unwrap();
    let request = post(sidecar.address, Some(prefill.address), r#"{"stream":true}"#);
    let response = send(request).await;
    let mut body = response.into_body();
    // The first event is here although the stream has not ended.
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, "data: {}\n\n");
    drop(body);
    decode.is_given_up().await;
    assert_eq!(prefill.asked.borrow().len(), 1);
}

#[tokio::test]
async fn when_both_legs_run_at_once_a_client_that_hangs_up_ends_both() {
    let (prefill, decode) = (Fake::start(Act::Hang).await, Fake::start(Act::Hang).await);
    let sidecar = sidecar(decode.address, "--kv-connector=sglang").await;
    let asked = ask(post(sidecar.address, Some(prefill.address), "{}"));
    prefill.nth(0).await;
    decode.nth(0).await;
    asked.abort();
    prefill.is_given_up().await;
    decode.is_given_up().await;
}

const TWO: [&str; 2] = [
    r#"{"kv_transfer_params":{"uuid":7,"kvx":{"tok":"a"}}}"#,
    r#"{"kv_transfer_params":{"uuid":8,"kvx":{"tok":"b"}}}"#,
];

#[tokio::test]
async fn a_request_that_came_twice_is_two_requests_and_the_end_of_one_is_not_the_others() {
    let prefill = Fake::start(Act::InTurn(TWO.map(Act::Json).into())).await;
    let decode = Fake::start(Act::InTurn(vec![Act::Hang, Act::Json(ANSWER)])).await;
    let sidecar = sidecar(decode.address, "").await;
    let again = || {
        let mut request = post(sidecar.address, Some(prefill.address), "{}");
        let id = "the-same".parse().unwrap();
        request.headers_mut().insert("x-request-id", id);
        request
    };
    let first = ask(again());
    decode.nth(0).await;
    assert_eq!(ask(again()).await.unwrap(), ANSWER);
    first.abort();
    assert_eq!(prefill.nth(2).await.path, "/kv/v1/leases/7");
    assert!(
        decode
            .nth(1)
            .await
            .body
            .ends_with(br#"{"uuid":8,"kvx":{"tok":"b"}}}"#)
    );
    assert_eq!(
        (prefill.asked.borrow().len(), decode.asked.borrow().len()),
        (3, 2)
    );
}
