//! What passes through: whole, as it comes, and unread where nothing is to be changed.

use crate::fake::{ANSWER, Act, Fake, PARAMS, ask, post, send, sidecar, streaming};
use http::StatusCode;
use http_body_util::BodyExt as _;

#[tokio::test]
async fn a_body_of_twenty_megabytes_reaches_both_servers_and_a_longer_one_neither() {
    let (prefill, decode) = (
        Fake::start(Act::Json(PARAMS)).await,
        Fake::start(Act::Json(ANSWER)).await,
    );
    let sidecar = sidecar(decode.address, "--max-body-bytes=25000000").await;
    let body = format!(r#"{{"prompt":"{}","n":1}}"#, "x".repeat(20_000_000));
    let request = post(sidecar.address, Some(prefill.address), body.clone());
    assert_eq!(ask(request).await.unwrap(), ANSWER);
    let said = String::from_utf8(decode.nth(0).await.body.to_vec()).unwrap();
    let params = r#"{"uuid":7,"remote_host":"h","kvx":{"v":1,"tok":"a-_9"}}"#;
    assert!(said.replace(&format!(r#","kv_transfer_params":{params}"#), "") == body);
    let asked = prefill.nth(0).await.body.len();
    assert!((20_000_000..20_001_000).contains(&asked));

    let long = "x".repeat(25_000_001);
    let response = send(post(sidecar.address, Some(prefill.address), long)).await;
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(prefill.asked.borrow().len(), 1);
}

#[tokio::test]
async fn every_piece_of_a_stream_is_with_the_client_before_the_next_is_made_and_need_not_be_json() {
    let (pieces, act) = streaming("text/event-stream");
    let prefill = Fake::start(Act::Json(PARAMS)).await;
    let decode = Fake::start(act).await;
    let sidecar = sidecar(decode.address, "").await;
    let request = post(sidecar.address, Some(prefill.address), r#"{"stream":true}"#);
    let asked = tokio::spawn(send(request));
    pieces
        .send("data: {\"text\":\" I\"}\n\n".into())
        .await
        .unwrap();
    let mut body = asked.await.unwrap().into_body();
    let mut next = async || body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(next().await, "data: {\"text\":\" I\"}\n\n");
    for piece in [
        "data: {{{ no JSON\n\n",
        ": a comment\n",
        "\u{0}\u{1}\n",
        "data: [DONE]\n\n",
    ] {
        pieces.send(piece.into()).await.unwrap();
        assert_eq!(next().await, piece);
    }
}
