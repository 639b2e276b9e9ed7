//! What a client gets back, whole and streamed.

use baton_server::Role;
use serde_json::{Value, json};

use crate::support::{Server, Setup, streamed_texts, texts};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

async fn server() -> Server {
    Server::start(Setup::role(Role::Both)).await
}

fn with(mut body: Value, more: Value) -> Value {
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

/// A request answered whole and streamed gives the same, piece for piece.
async fn check_stream(server: &Server, path: &str, body: Value) -> Value {
    let whole = server.post(path, body.clone()).await.json();
    let streamed = with(
        body,
        json!({"stream": true, "stream_options": {"include_usage": true}}),
    );
    let events = server.post(path, streamed.clone()).await.events();
    let n = whole["choices"].as_array().unwrap().len();
    assert_eq!(streamed_texts(&events, n), texts(&whole), "{streamed}");
    let (last, others) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"],
        "{streamed}"
    );
    assert_eq!(
        last["usage"]["prompt_tokens"],
        whole["usage"]["prompt_tokens"]
    );
    for i in 0..n {
        let of_choice = others.iter().flat_map(|e| e["choices"].as_array().unwrap());
        let ends: Vec<_> = of_choice
            .filter(|c| c["index"] == i && !c["finish_reason"].is_null())
            .collect();
        let [end] = ends[..] else {
            panic!("choice {i} ends once: {ends:?}")
        };
        assert_eq!(end["finish_reason"], whole["choices"][i]["finish_reason"]);
        assert_eq!(end["stop_reason"], whole["choices"][i]["stop_reason"]);
    }
    whole
}

#[tokio::test]
async fn a_stream_put_together_is_the_whole_answer() {
    let server = server().await;
    for body in [
        json!({"prompt": "The capital of France is", "max_tokens": 40, "temperature": 0}),
        json!({"prompt": "a", "max_tokens": 60, "temperature": 0, "ignore_eos": true}),
        json!({"prompt": ["one", "two"], "max_tokens": 9, "temperature": 0}),
        json!({"prompt": [[1, 2, 3], [4]], "max_tokens": 9, "temperature": 0}),
        json!({"prompt": "n", "n": 3, "seed": 7, "max_tokens": 9}),
        json!({"prompt": "echo", "echo": true, "max_tokens": 3, "temperature": 0}),
        json!({"prompt": "echo", "echo": true, "max_tokens": 0, "temperature": 0}),
        json!({"prompt": "stop", "stop": ["a", "e", "i", " "], "max_tokens": 300, "temperature": 0, "ignore_eos": true}),
    ] {
        check_stream(&server, COMPLETIONS, body).await;
    }
    let messages = json!([{"role": "user", "content": "Say hi."}]);
    for body in [
        json!({"messages": messages, "max_tokens": 20, "temperature": 0}),
        json!({"messages": messages, "max_tokens": 5, "n": 2, "seed": 1, "logprobs": true, "top_logprobs": 2}),
    ] {
        check_stream(&server, CHAT, body).await;
    }
}

#[tokio::test]
async fn an_answer_has_every_field_of_vllms() {
    let server = server().await;
    let answer = server
        .post(
            COMPLETIONS,
            json!({"prompt": "hello", "max_tokens": 2, "ignore_eos": true}),
        )
        .await
        .json();
    let keys: Vec<_> = answer
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let expect = "id object created model choices service_tier system_fingerprint usage kv_transfer_params ec_transfer_params metrics";
    assert_eq!(keys.join(" "), expect);
    assert!(answer["kv_transfer_params"].is_null());
    assert_eq!(answer["model"], "smollm2");
    let usage = &answer["usage"];
    assert_eq!(
        (
            &usage["prompt_tokens"],
            &usage["completion_tokens"],
            &usage["total_tokens"]
        ),
        (&json!(5), &json!(2), &json!(7))
    );
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    let choice = &answer["choices"][0];
    let keys: Vec<_> = choice
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let expect = "index text logprobs finish_reason stop_reason token_ids prompt_logprobs prompt_token_ids routed_experts";
    assert_eq!(keys.join(" "), expect);
    assert_eq!(choice["finish_reason"], "length");
}

#[tokio::test]
async fn prompts_and_completions_are_numbered_prompt_by_prompt_and_usage_is_summed() {
    let server = server().await;
    let body = json!({"prompt": ["ab", "cde"], "n": 2, "max_tokens": 4, "seed": 5, "ignore_eos": true, "return_token_ids": true});
    let answer = server.post(COMPLETIONS, body).await.json();
    let prompts: Vec<_> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["prompt_token_ids"].clone())
        .collect();
    assert_eq!(
        prompts,
        [
            json!([97, 98]),
            json!([97, 98]),
            json!([99, 100, 101]),
            json!([99, 100, 101])
        ]
    );
    let indices: Vec<_> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(answer["usage"]["prompt_tokens"], 5);
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    let ids: Vec<_> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["token_ids"].clone())
        .collect();
    assert_ne!(ids[0], ids[1], "every completion has its own seed");
}

#[tokio::test]
async fn a_stop_text_ends_the_answer_before_it_or_after_it() {
    let server = server().await;
    let body =
        json!({"prompt": "stop here", "max_tokens": 400, "temperature": 0, "ignore_eos": true});
    let text = texts(&server.post(COMPLETIONS, body.clone()).await.json()).remove(0);
    let stop = text
        .chars()
        .filter(char::is_ascii_alphabetic)
        .nth(3)
        .unwrap()
        .to_string();
    let before = &text[..text.find(&stop).unwrap()];
    let answer = check_stream(
        &server,
        COMPLETIONS,
        with(body.clone(), json!({"stop": stop})),
    )
    .await;
    let choice = &answer["choices"][0];
    assert_eq!(
        (choice["text"].as_str().unwrap(), &choice["finish_reason"]),
        (before, &json!("stop"))
    );
    assert_eq!(choice["stop_reason"], json!(stop));
    let more = json!({"stop": [stop], "include_stop_str_in_output": true});
    let answer = check_stream(&server, COMPLETIONS, with(body, more)).await;
    assert_eq!(
        answer["choices"][0]["text"],
        json!(format!("{before}{stop}"))
    );
    server
        .until("vllm:num_requests_running", |n| n == 0.0)
        .await;
}

#[tokio::test]
async fn stop_tokens_and_the_end_of_sequence_are_told_apart() {
    let server = server().await;
    let body =
        json!({"prompt": "x", "max_tokens": 500, "temperature": 0, "return_token_ids": true});
    let ended = server.post(COMPLETIONS, body.clone()).await.json();
    let choice = &ended["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &Value::Null)
    );
    let ids = choice["token_ids"].as_array().unwrap();
    assert_eq!(ids.last(), Some(&json!(0)));
    let third = ids[2].clone();
    let stopped = server
        .post(
            COMPLETIONS,
            with(body.clone(), json!({"stop_token_ids": [third]})),
        )
        .await
        .json();
    assert_eq!(stopped["choices"][0]["stop_reason"], third);
    let ignored = server
        .post(COMPLETIONS, with(body, json!({"ignore_eos": true})))
        .await
        .json();
    assert_eq!(ignored["usage"]["completion_tokens"], 500);
}

#[tokio::test]
async fn an_echo_repeats_the_prompt_in_every_form() {
    let server = server().await;
    for prompt in [json!("The sky"), json!([84, 104, 101, 32, 115, 107, 121])] {
        let body = json!({"prompt": prompt, "echo": true, "max_tokens": 0, "temperature": 0});
        let answer = check_stream(&server, COMPLETIONS, body).await;
        assert_eq!(answer["choices"][0]["text"], "The sky");
        assert_eq!(answer["usage"]["completion_tokens"], 1);
    }
}

#[tokio::test]
async fn log_probabilities_come_in_the_form_of_their_endpoint() {
    let server = server().await;
    let body = json!({"prompt": "x", "max_tokens": 3, "temperature": 0, "logprobs": 2, "ignore_eos": true, "return_tokens_as_token_ids": true});
    let answer = server.post(COMPLETIONS, body.clone()).await.json();
    let lists = &answer["choices"][0]["logprobs"];
    let tokens: Vec<_> = lists["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_str().unwrap().to_owned())
        .collect();
    assert_eq!(lists["token_logprobs"], json!([-0.25, -0.25, -0.25]));
    let offset = |n: usize| tokens[..n].iter().map(String::len).sum::<usize>();
    assert_eq!(lists["text_offset"], json!([0, offset(1), offset(2)]));
    for (token, top) in tokens.iter().zip(lists["top_logprobs"].as_array().unwrap()) {
        assert!(token.starts_with("token_id:"));
        assert_eq!(
            (top.as_object().unwrap().len(), &top[token]),
            (2, &json!(-0.25))
        );
    }
    let events = server
        .post(COMPLETIONS, with(body, json!({"stream": true})))
        .await
        .events();
    let streamed: Vec<_> = events
        .iter()
        .flat_map(|e| {
            e["choices"][0]["logprobs"]["text_offset"]
                .as_array()
                .unwrap()
        })
        .cloned()
        .collect();
    assert_eq!(json!(streamed), lists["text_offset"]);

    let messages = json!([{"role": "user", "content": "x"}]);
    let body = json!({"messages": messages, "max_tokens": 2, "temperature": 0, "logprobs": true, "ignore_eos": true});
    let answer = server
        .post(CHAT, with(body.clone(), json!({"top_logprobs": 2})))
        .await
        .json();
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(content.len(), 2);
    for token in content {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(token["top_logprobs"][0]["token"], token["token"]);
    }
    let answer = server.post(CHAT, body).await.json();
    assert_eq!(
        answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"],
        json!([])
    );
}

#[tokio::test]
async fn usage_streams_with_every_event_if_asked() {
    let server = server().await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let messages = json!([{"role": "user", "content": "x"}]);
    let body = json!({"messages": messages, "max_tokens": 3, "ignore_eos": true, "stream": true, "stream_options": options});
    let events = server.post(CHAT, body).await.events();
    let first = &events[0];
    assert_eq!(
        first["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    assert_eq!(first["usage"]["completion_tokens"], 0);
    assert!(events.iter().all(|e| e["usage"]["prompt_tokens"].is_u64()));
    let last = events.last().unwrap();
    assert_eq!(
        (&last["choices"], &last["usage"]["completion_tokens"]),
        (&json!([]), &json!(3))
    );
    assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test]
async fn equal_seeds_give_equal_texts_and_ids_follow_the_client() {
    let server = server().await;
    let body = json!({"prompt": "seed", "seed": 9007199254740993u64, "max_tokens": 20});
    let a = server
        .post_with(COMPLETIONS, body.clone(), &[("x-request-id", "abc-123")])
        .await
        .json();
    let b = server.post(COMPLETIONS, body.clone()).await.json();
    let c = server
        .post(
            COMPLETIONS,
            with(body, json!({"seed": 9007199254740992u64})),
        )
        .await
        .json();
    assert_eq!(a["id"], "cmpl-abc-123");
    assert_eq!(texts(&a), texts(&b));
    assert_ne!(texts(&a), texts(&c), "seeds are exact");
}

#[tokio::test]
async fn the_last_tokens_are_kept_when_a_prompt_is_truncated() {
    let server = server().await;
    let body = json!({"prompt": "abcdef", "truncate_prompt_tokens": 3, "max_tokens": 1, "return_token_ids": true});
    let answer = server.post(COMPLETIONS, body).await.json();
    assert_eq!(
        answer["choices"][0]["prompt_token_ids"],
        json!([100, 101, 102])
    );
}

#[tokio::test]
async fn an_answer_ends_where_the_context_does() {
    let server = server().await;
    let body =
        json!({"prompt": vec![65; 2000], "max_tokens": 2048, "temperature": 0, "ignore_eos": true});
    let answer = server.post(COMPLETIONS, body).await.json();
    assert_eq!(answer["usage"]["total_tokens"], 2048);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let answer = server
        .post(COMPLETIONS, json!({"prompt": "x", "ignore_eos": true}))
        .await
        .json();
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    let messages = json!([{"role": "user", "content": "x"}]);
    let answer = server
        .post(CHAT, json!({"messages": messages, "ignore_eos": true}))
        .await
        .json();
    assert_eq!(answer["usage"]["total_tokens"], 2048);
}

#[tokio::test]
async fn texts_and_tokens_can_be_turned_into_each_other() {
    let server = server().await;
    let answer = server
        .post(
            "/tokenize",
            json!({"prompt": "hé ", "return_token_strs": true}),
        )
        .await
        .json();
    assert_eq!(
        answer,
        json!({"count": 4, "max_model_len": 2048, "tokens": [104, 195, 169, 32], "token_strs": ["h", "Ã", "©", "Ġ"]})
    );
    let chat =
        json!({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": false});
    assert_eq!(
        server.post("/tokenize", chat).await.json()["count"],
        "<user>x\n".len()
    );
    let answer = server
        .post("/detokenize", json!({"tokens": [104, 195, 169, 99999999]}))
        .await
        .json();
    assert_eq!(answer, json!({"prompt": "hé"}));
}
