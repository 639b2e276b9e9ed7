//! Every refusal that was captured from vLLM 0.32.0 and applies here: same status, type and param from us.

use baton_server::{ApiKey, Role};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use serde_json::{Value, json};

use crate::support::{Reply, Server, Setup};

/// Requests and what vLLM answered, one a line; named after the captured exchanges. Long bodies are given by what
/// they are filled with.
const CAPTURED: &str = include_str!("fixtures/errors.json");

#[tokio::test]
async fn every_captured_refusal_is_ours_too() {
    let open = Server::start(Setup::role(Role::Both)).await;
    let mut setup = Setup::role(Role::Both);
    setup.config.api_keys = vec![ApiKey::new("secret-key")];
    let locked = Server::start(setup).await;
    let cases: Vec<Value> = serde_json::from_str(CAPTURED).unwrap();
    assert!(cases.len() > 80);
    let mut wrong = Vec::new();
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let server = if name.starts_with("opt_auth") {
            &locked
        } else {
            &open
        };
        let reply = Reply::read(server.send(request(server, case)).await).await;
        let (expect, got) = (expected(name, &case["expect"]), observed(&reply));
        if expect != got {
            wrong.push(format!(
                "{name}: {expect} expected, not {got}: {}",
                reply.text()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn expected(name: &str, expect: &Value) -> Value {
    let mut expect = expect.clone();
    match name {
        // pydantic names the first member of a union; we name the field.
        "error_messages_missing_role" => expect["param"] = "body.messages.0.role".into(),
        // Constrained decoding is refused altogether here, before its grammar is looked at.
        "error_bad_json_schema" => expect["param"] = "response_format".into(),
        "error_bad_regex" => expect["param"] = "structured_outputs".into(),
        _ => {}
    }
    expect
}

fn observed(reply: &Reply) -> Value {
    let status = reply.status.as_u16();
    let body: Value = serde_json::from_slice(&reply.body).unwrap_or(Value::Null);
    match &body["error"] {
        Value::Object(error) => {
            assert_eq!(error["code"], status, "{body}");
            assert!(!error["message"].as_str().unwrap().is_empty());
            json!({"status": status, "type": error["type"], "param": error["param"]})
        }
        _ => json!({"status": status, "body": body}),
    }
}

fn request(server: &Server, case: &Value) -> Request<Full<Bytes>> {
    let path = case["path"].as_str().unwrap_or("/v1/completions");
    let method = case["method"].as_str().unwrap_or("POST");
    let mut request = Request::builder()
        .method(method)
        .uri(format!("http://{}{path}", server.addr));
    match case.get("content_type") {
        None => request = request.header("content-type", "application/json"),
        Some(Value::String(other)) => request = request.header("content-type", other),
        Some(_) => {}
    }
    for (name, value) in case["headers"].as_object().into_iter().flatten() {
        request = request.header(name, value.as_str().unwrap());
    }
    request.body(Full::new(body(case).into())).unwrap()
}

fn body(case: &Value) -> Vec<u8> {
    if let Some(bytes) = case["body_bytes"].as_array() {
        return bytes.iter().map(|b| b.as_u64().unwrap() as u8).collect();
    }
    if let Some(text) = case["body_raw"].as_str() {
        return text.into();
    }
    if let Some(fill) = case.get("fill") {
        let unit = fill["unit"]
            .as_str()
            .unwrap()
            .repeat(fill["times"].as_u64().unwrap() as usize);
        return fill["template"]
            .as_str()
            .unwrap()
            .replace('%', &unit)
            .into();
    }
    case.get("body")
        .map(|body| body.to_string().into())
        .unwrap_or_default()
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused_in_the_common_form() {
    let mut setup = Setup::role(Role::Both);
    setup.config.max_body_bytes = 100;
    let server = Server::start(setup).await;
    let reply = server
        .post("/v1/completions", json!({"prompt": "x".repeat(150)}))
        .await;
    let error: Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(
        (reply.status.as_u16(), &error["error"]["code"]),
        (413, &json!(413))
    );
}

#[tokio::test]
async fn a_wrong_method_is_told_the_right_one() {
    let server = Server::start(Setup::role(Role::Both)).await;
    let reply = server.get("/v1/completions").await;
    assert_eq!(
        (reply.status.as_u16(), &reply.headers["allow"]),
        (405, &"POST".parse().unwrap())
    );
}
