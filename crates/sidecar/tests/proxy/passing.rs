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

#[tokio::test]
async fn decode_fetches_while_a_prefill_server_that_can_tell_how_still_computes() {
    const SAID: &str = r#"{"uuid":8,"remote_host":"h","kvx":{"v":1,"tok":"b-_9","early":true}}"#;
    const COUNTED: &str = r#"{"usage":{"prompt_tokens_details":{"cached_tokens":9}}}"#;
    let (rest, stream) = streaming("application/json");
    let acts = vec![
        Act::With("x-kv-early", "1", Box::new(Act::Json(PARAMS))),
        Act::With("x-kv-transfer-params", SAID, Box::new(stream)),
        Act::Json(PARAMS),
    ];
    let prefill = Fake::start(Act::InTurn(acts)).await;
    let (answer, decoded) = streaming("application/json");
    let decode = Fake::start(Act::InTurn(vec![
        Act::Json(ANSWER),
        decoded,
        Act::Json(ANSWER),
    ]));
    let decode = decode.await;
    let sidecar = sidecar(decode.address, "").await;
    let request = || post(sidecar.address, Some(prefill.address), r#"{"prompt":"x"}"#);
    // Nobody is asked for what it has not offered, whatever the client says.
    let mut first = request();
    first
        .headers_mut()
        .insert("x-kv-early", "1".parse().unwrap());
    assert_eq!(ask(first).await.unwrap(), ANSWER);
    assert!(!prefill.nth(0).await.headers.contains_key("x-kv-early"));
    // Prefill has not ended when decode is asked.
    let second = ask(request());
    let asked = decode.nth(1).await;
    assert!(prefill.nth(1).await.headers.contains_key("x-kv-early"));
    let said = String::from_utf8(asked.body.to_vec()).unwrap();
    assert_eq!(
        said,
        format!(r#"{{"prompt":"x","kv_transfer_params":{SAID}}}"#)
    );
    // What prefill had cached comes with its end, before decode's.
    rest.send(COUNTED.into()).await.unwrap();
    drop(rest);
    // Nothing tells from outside that it has come in.
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    answer
        .send(r#"{"usage":{"prompt_tokens":3}}"#.into())
        .await
        .unwrap();
    drop(answer);
    assert_eq!(
        second.await.unwrap(),
        r#"{"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":9}}}"#
    );
    // One that does not offer it any more is not asked again.
    assert_eq!(ask(request()).await.unwrap(), ANSWER);
    assert_eq!(ask(request()).await.unwrap(), ANSWER);
    assert!(!prefill.nth(3).await.headers.contains_key("x-kv-early"));
    assert_eq!(decode.asked.borrow().len(), 4);
}
