//! What is found in bodies, against serde_json as the judge of what a body is; and that it does not matter how a body
//! was cut into pieces.

use super::*;
use crate::ErrorKind;
use proptest::prelude::*;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

fn read(body: &str) -> Facts {
    Facts::read(&[body]).unwrap()
}

fn at<'a>(body: &'a str, span: Option<&Span>) -> &'a str {
    span.map_or("", |span| &body[span.clone()])
}

#[test]
fn model_and_prompt_are_found_wherever_they_are() {
    let body = r#" {"n":1, "messages":[{"role":"user","content":"hi"}],"tools":[1],"model":"a\u0062", "cache_salt":"s"} "#;
    let facts = read(body);
    assert_eq!(facts.model_name(&[body]).as_deref(), Some("ab"));
    assert_eq!(at(body, facts.model.as_ref()), r#""a\u0062""#);
    let pieces = [body];
    let prompt: Vec<&[u8]> = facts.prompt_slices(&pieces).collect();
    assert_eq!(
        prompt,
        [
            &br#""s""#[..],
            b"[1]",
            br#"[{"role":"user","content":"hi"}]"#
        ]
    );
    assert_eq!(
        (facts.form, facts.media),
        (Form::Messages(1), Media::default())
    );
    assert!(facts.kv_transfer_params.is_empty() && facts.tokens().is_none() && !facts.stream);
    assert_eq!(read(r#"{"model":7}"#).model_name(&[r#"{"model":7}"#]), None);
    let last = r#"{"model":"a","model":"b","system":"x","instructions":"y"}"#;
    assert_eq!(read(last).model_name(&[last]).as_deref(), Some("b"));
    assert_eq!(at(last, read(last).prompt[2].as_ref()), r#""y""#);
    assert_eq!(read("{}"), Facts::default());
}

#[test]
fn a_model_whose_name_stands_in_several_pieces_is_put_together() {
    let pieces = ["{\"mod", "el\":\"a", "", "b", "c\" }"];
    let facts = Facts::read(&pieces).unwrap();
    assert_eq!(facts.model_name(&pieces).as_deref(), Some("abc"));
    assert_eq!(
        slices(&pieces, &(0..9)).collect::<Vec<_>>(),
        [&b"{\"mod"[..], b"el\":"]
    );
    assert_eq!(slices(&pieces, &(50..90)).count(), 0);
}

#[test]
fn the_form_of_a_prompt_is_told() {
    let cases = [
        (r#"{"prompt":"x"}"#, Form::Text, None),
        (r#"{"prompt":["a,b","c"]}"#, Form::Texts(2), None),
        (r#"{"prompt":[1, 22,333]}"#, Form::Tokens(3), Some(3)),
        (r#"{"token_ids":[ 1 ]}"#, Form::Tokens(1), Some(1)),
        (
            r#"{"prompt":[[1,2],[3]]}"#,
            Form::TokenLists {
                lists: 2,
                tokens: 3,
            },
            Some(3),
        ),
        (
            r#"{"input":[{},{},{"content":[1]}]}"#,
            Form::Messages(3),
            None,
        ),
        (r#"{"items":[]}"#, Form::Other, None),
        (r#"{"prompt":null}"#, Form::Other, None),
        (r#"{"prompt":[1,2],"prompt":"last"}"#, Form::Text, None),
        (r#"{"x":[1,2]}"#, Form::Missing, None),
    ];
    for (body, form, tokens) in cases {
        let facts = read(body);
        assert_eq!((facts.form, facts.tokens()), (form, tokens), "{body}");
    }
}

#[test]
fn what_the_answer_shall_be_is_told() {
    let facts = read(r#"{"stream":true,"max_tokens":7,"max_completion_tokens":9}"#);
    assert_eq!((facts.stream, facts.max_tokens), (true, Some(9)));
    let max = |body: &str| read(body).max_tokens;
    assert_eq!(max(r#"{"max_output_tokens": 5 }"#), Some(5));
    assert_eq!(max(r#"{"max_tokens":99999999999}"#), Some(u32::MAX));
    for none in ["null", "-1", "1.5", "\"7\"", "[7]", "1e3"] {
        assert_eq!(
            max(&format!(
                r#"{{"max_tokens":{none},"x":[{{"max_tokens":3}}]}}"#
            )),
            None
        );
    }
    assert!(!read(r#"{"stream":false,"x":{"stream":true}}"#).stream);
}

#[test]
fn pictures_and_sound_are_seen_in_messages_and_nowhere_else() {
    let media = |body: &str| {
        let m = read(body).media;
        [m.image, m.audio, m.video]
    };
    let part = |part: &str| {
        format!(
            r#"{{"messages":[{{"role":"user","content":[{{"type":"text","text":"image"}},{part}]}}]}}"#
        )
    };
    assert_eq!(
        media(&part(r#"{"type":"image_url","image_url":{"url":"x"}}"#)),
        [true, false, false]
    );
    assert_eq!(
        media(&part(r#"{"type":"input_audio"},{"video_url":{}}"#)),
        [false, true, true]
    );
    assert_eq!(
        media(&part(r#"{"type":"text","text":"input_audio"}"#)),
        [false; 3]
    );
    let responses =
        r#"{"input":[{"role":"user","content":[{"image_url":"x","type":"input_image"}]}]}"#;
    assert_eq!(media(responses), [true, false, false]);
    let anthropic =
        r#"{"messages":[{"role":"user","content":[{"type":"image","source":{"type":"base64"}}]}]}"#;
    assert_eq!(media(anthropic), [true, false, false]);
    assert_eq!(
        media(r#"{"messages":[{"content":"image_url"}],"tools":[[[[{"type":"image"}]]]]}"#),
        [false; 3]
    );
}

#[test]
fn foreign_kv_is_found_under_every_spelling_of_its_name() {
    let body = r#"{"a":1.0,"kv_transfer_params": {"x":[1]} ,"kv_transfer_params":null, "k\u0076_transfer_params":7,"nested":{"kv_transfer_params":1}}"#;
    let found: Vec<&str> = read(body)
        .kv_transfer_params
        .iter()
        .map(|span| &body[span.clone()])
        .collect();
    assert_eq!(found, [r#"{"x":[1]}"#, "7"]);
    let all: String = "kv_transfer_params"
        .bytes()
        .map(|b| format!("\\u00{b:02X}"))
        .collect();
    assert_eq!(
        read(&format!(r#"{{"{all}":1}}"#)).kv_transfer_params.len(),
        1
    );
}

#[test]
fn what_is_not_one_object_is_refused_as_vllm_does() {
    let error = |body: &[u8]| Facts::read(&[body]).unwrap_err();
    for body in [
        "",
        " \n",
        "[1]",
        "1",
        "\"x\"",
        "null",
        "{",
        "{\"a\"",
        "{}x",
        "{} {}",
        "{\"a\":01}",
        "{a:1}",
        "{,}",
        "{\"a\":1,}",
        "{\"a\":[1,]}",
        "{\"a\":[}",
        "{\"a\":tru}",
        "{\"a\" 1}",
        "{\"a\":\"\n\"}",
        "{\"a\":\"\\x\"}",
        "{\"a\":\"\\u12g4\"}",
        "{\"a\":1.}",
        "{\"a\":-}",
        "{\"a\":+1}",
        "{\"a\":1e}",
        "{\"\\ud800\":1}",
    ] {
        let error = error(body.as_bytes());
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::Validation, Some("body")),
            "{body}"
        );
    }
    assert!(error(b"").message.contains("field required"));
    assert!(error(b"[").message.contains("valid object"));
    assert!(
        error(b"{\"a\":01}")
            .message
            .ends_with("not valid JSON: something that does not belong there at byte 6")
    );
    error(b"{\"x\":\"\xff\"}");
    error("[".repeat(1_000_000).as_bytes());
    error(format!("{{\"x\":{}", "[".repeat(1_000_000)).as_bytes());
    let nested = |n: usize| format!("{{\"x\":{}1{}}}", "[".repeat(n), "]".repeat(n));
    assert!(Facts::read(&[nested(500)]).is_ok());
    error(nested(512).as_bytes());
}

#[test]
fn what_means_something_in_a_string_is_found_at_every_place() {
    for len in 0..100 {
        for at in 0..=len {
            for special in [b'"', b'\\', b'\n', 0, 0x1f] {
                let mut text = vec![b' '; len];
                for (i, byte) in text.iter_mut().enumerate() {
                    *byte = [b' ', b'!', b'#', b'[', b']', 0x7f, 0x80, 0xa2, 0xdc, 0xff][i % 10];
                }
                text.insert(at, special);
                assert_eq!(scan::plain_len(&text), at);
                text.remove(at);
                assert_eq!(scan::plain_len(&text), len);
            }
        }
    }
}

#[test]
fn characters_may_be_cut_and_must_be_whole() {
    let body = "{\"a\":\"é€😀\"}".as_bytes();
    let cut: Vec<&[u8]> = body.chunks(1).collect();
    assert!(Facts::read(&cut).is_ok());
    for bad in [
        &b"\xe2\x82"[..],
        b"\xc3",
        b"\xf0\x9f\x98",
        b"\xed\xa0\x80",
        b"\xf5\x80\x80\x80",
    ] {
        let body = [b"{\"a\":\"", bad, b"\"}"].concat();
        let cut: Vec<&[u8]> = body.chunks(1).collect();
        assert!(Facts::read(&cut).is_err() && Facts::read(&[&body[..]]).is_err());
    }
}

/// The same, as serde_json finds it.
#[derive(Default, Debug, PartialEq)]
struct Judge<'a> {
    model: Option<&'a str>,
    text: Option<&'a str>,
    kv: Vec<&'a str>,
}

impl<'de> serde::Deserialize<'de> for Judge<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Judge<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut judge = Judge::default();
                while let Some(key) = map.next_key::<String>()? {
                    let value: &RawValue = map.next_value()?;
                    match &*key {
                        "model" => judge.model = Some(value.get()),
                        "prompt" => judge.text = Some(value.get()),
                        "kv_transfer_params" if value.get() != "null" => judge.kv.push(value.get()),
                        _ => {}
                    }
                }
                Ok(judge)
            }
        }
        deserializer.deserialize_map(Members)
    }
}

fn agrees(body: &[u8]) {
    let judged = serde_json::from_slice::<Judge<'_>>(body);
    let found = Facts::read(&[body]);
    assert_eq!(
        judged.is_ok(),
        found.is_ok(),
        "{:?}",
        String::from_utf8_lossy(body)
    );
    if let (Ok(judged), Ok(found)) = (judged, found) {
        let text = |span: &Span| std::str::from_utf8(&body[span.clone()]).unwrap();
        let found = Judge {
            model: found.model.as_ref().map(text),
            text: found.prompt[3].as_ref().map(text),
            kv: found.kv_transfer_params.iter().map(text).collect(),
        };
        assert_eq!(judged, found);
    }
}

fn cut(body: &[u8], cuts: &[usize]) -> Vec<Vec<u8>> {
    let (mut pieces, mut rest) = (Vec::new(), body);
    for &cut in cuts {
        let (piece, after) = rest.split_at(cut.min(rest.len()));
        pieces.push(piece.to_vec());
        rest = after;
    }
    pieces.push(rest.to_vec());
    pieces
}

fn json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        Just("true".to_owned()),
        "-?(0|[1-9][0-9]{0,3})(\\.[0-9]{1,2})?(e[+-]?[0-9])?",
        "\"([a-z é€😀]|\\\\[nt\"\\\\/]|\\\\u[0-9a-f]{4}){0,40}\"",
    ];
    leaf.prop_recursive(5, 40, 5, |inner| {
        let key = "(model|prompt|kv_transfer_params|k\\\\u0076_transfer_params|type|x)";
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(|v| format!("[{}]", v.join(" ,"))),
            prop::collection::vec((key, inner), 0..5).prop_map(|v| {
                let members: Vec<String> = v.iter().map(|(k, v)| format!("\"{k}\" :{v}")).collect();
                format!("{{{}}}", members.join(","))
            }),
        ]
    })
}

proptest! {
    #[test]
    fn serde_json_agrees_about_json(value in json()) {
        agrees(value.as_bytes());
        agrees(format!("{{\"model\":{value},\"x\":1}}").as_bytes());
    }

    #[test]
    fn serde_json_agrees_about_damaged_json(value in json(), at in 0usize..400, byte in prop_oneof![any::<u8>(), prop::sample::select(&b"{}[]\",:\\ 0-e."[..])]) {
        let mut body = format!("{{\"model\":{value}}}").into_bytes();
        let at = at % body.len();
        body[at] = byte;
        agrees(&body);
        body.remove(at);
        agrees(&body);
        body.truncate(at);
        agrees(&body);
    }

    #[test]
    fn how_a_body_is_cut_does_not_matter(value in json(), cuts in prop::collection::vec(0usize..20, 0..20)) {
        let body = format!("{{\"prompt\":{value},\"model\":\"m\"}}");
        prop_assert_eq!(Facts::read(&cut(body.as_bytes(), &cuts)), Facts::read(&[&body]));
    }
}
