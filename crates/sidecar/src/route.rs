//! The five routes on which prefill and decode are kept apart, and what each calls its limits.

use crate::edit::{Edit, Object};
use crate::field::Field;
use http::Method;

/// A route whose requests are read; all others are passed on unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Chat,
    Completions,
    Responses,
    /// Anthropic's; read as chat.
    Messages,
    /// Tokens in, tokens out.
    Generate,
}

impl Route {
    pub(crate) const ALL: [Self; 5] = [
        Self::Chat,
        Self::Completions,
        Self::Responses,
        Self::Messages,
        Self::Generate,
    ];

    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Responses => "/v1/responses",
            Self::Messages => "/v1/messages",
            Self::Generate => "/inference/v1/generate",
        }
    }

    pub(crate) fn of(method: &Method, path: &str) -> Option<Self> {
        let here = |route: &Self| route.path() == path;
        Self::ALL
            .into_iter()
            .find(here)
            .filter(|_| method == Method::POST)
    }

    /// Whether `usage.prompt_tokens_details` is a field of its answers.
    pub(crate) fn details_prompt_tokens(self) -> bool {
        matches!(self, Self::Chat | Self::Completions)
    }
}

/// `edit` as it goes to a server that only computes the prompt: one token, no stream.
pub(crate) fn one_token<'a>(route: Route, edit: Edit<'a>) -> Edit<'a> {
    let edit = edit
        .set(Field::Stream, "false")
        .remove(Field::StreamOptions);
    match route {
        Route::Chat | Route::Completions | Route::Messages => edit
            .set(Field::MaxTokens, "1")
            .set(Field::MaxCompletionTokens, "1")
            .set(Field::MinTokens, "1"),
        // What `min_tokens` means here, if anything, is for the server to say.
        Route::Responses => edit.set(Field::MaxOutputTokens, "1"),
        Route::Generate => {
            let empty = || Object::parse("{}".into()).ok();
            let Some(params) = edit.object().object(Field::SamplingParams).or_else(empty) else {
                return edit;
            };
            let params = Edit::of(&params)
                .set(Field::MaxTokens, "1")
                .set(Field::MinTokens, "1")
                .finish();
            edit.set(Field::SamplingParams, params)
        }
    }
}

/// Why the decode server must compute this prompt itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whole {
    /// Several prompts, of which one object of transfer parameters could describe but one.
    ManyPrompts,
    /// Several answers. vLLM would fetch the KV once for each, and prefill frees it after the first.
    ManyChoices,
    /// It asks for something about every token of the prompt, which is not handed over with the KV.
    PromptLogprobs,
}

impl Whole {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::ManyPrompts => "many_prompts",
            Self::ManyChoices => "many_choices",
            Self::PromptLogprobs => "prompt_logprobs",
        }
    }
}

/// Whether the prompt of `body` must not be computed elsewhere.
pub(crate) fn whole(body: &Object) -> Option<Whole> {
    if body.given(Field::Prompt).is_some_and(|p| is_many(&p)) {
        return Some(Whole::ManyPrompts);
    }
    let nested = body.object(Field::SamplingParams);
    let either = |says: fn(&Object) -> bool| says(body) || nested.as_ref().is_some_and(says);
    if either(wants_choices) {
        return Some(Whole::ManyChoices);
    }
    either(wants_prompt_logprobs).then_some(Whole::PromptLogprobs)
}

/// Whatever is not plainly one: servers read `2.0` and `"2"` as numbers too.
fn wants_choices(object: &Object) -> bool {
    [Field::N, Field::BestOf]
        .into_iter()
        .any(|field| object.given(field).is_some_and(|n| n != "1"))
}

fn wants_prompt_logprobs(object: &Object) -> bool {
    let echoed = object.value(Field::Echo).is_some_and(|v| v == "true");
    object.given(Field::PromptLogprobs).is_some()
        || echoed && object.given(Field::Logprobs).is_some()
}

/// More than one text or more than one list of token ids.
fn is_many(prompt: &[u8]) -> bool {
    let inside = prompt
        .strip_prefix(b"[")
        .unwrap_or_default()
        .trim_ascii_start();
    let several =
        || serde_json::from_slice::<Vec<serde::de::IgnoredAny>>(prompt).map_or(0, |v| v.len());
    matches!(inside.first(), Some(b'"' | b'[' | b'{')) && several() > 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn object(text: &str) -> Object {
        Object::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    fn limited(route: Route, text: &str) -> String {
        let object = object(text);
        let text = one_token(route, Edit::of(&object)).finish().into_bytes();
        String::from_utf8(text.to_vec()).unwrap()
    }

    #[test]
    fn each_route_has_its_own_limits() {
        let body = r#"{"max_tokens":64,"min_tokens":9,"stream":true,"stream_options":{"include_usage":true}}"#;
        let expect = r#"{"max_tokens":1,"min_tokens":1,"stream":false,"max_completion_tokens":1}"#;
        for route in [Route::Chat, Route::Completions, Route::Messages] {
            assert_eq!(limited(route, body), expect);
        }
        assert_eq!(
            limited(Route::Responses, r#"{"min_tokens":9,"input":"x"}"#),
            r#"{"min_tokens":9,"input":"x","stream":false,"max_output_tokens":1}"#
        );
        assert_eq!(
            limited(
                Route::Generate,
                r#"{"sampling_params":{"max_tokens":8,"seed":1.0},"max_tokens":5}"#
            ),
            r#"{"sampling_params":{"max_tokens":1,"seed":1.0,"min_tokens":1},"max_tokens":5,"stream":false}"#
        );
        let created = r#"{"stream":false,"sampling_params":{"max_tokens":1,"min_tokens":1}}"#;
        assert_eq!(limited(Route::Generate, "{}"), created);
    }

    #[test]
    fn only_posts_to_the_five_paths_are_read() {
        for route in Route::ALL {
            assert_eq!(Route::of(&Method::POST, route.path()), Some(route));
            assert_eq!(Route::of(&Method::GET, route.path()), None);
        }
        assert_eq!(Route::of(&Method::POST, "/v1/messages/count_tokens"), None);
    }

    #[test]
    fn several_prompts_several_choices_and_prompt_logprobs_stay_on_one_server() {
        for (body, expect) in [
            (r#"{"prompt":"[\"a\",\"b\"]"}"#, None),
            (r#"{"prompt":["a"]}"#, None),
            (r#"{"prompt":[1,2,3]}"#, None),
            (r#"{"prompt":["a", "b"]}"#, Some(Whole::ManyPrompts)),
            (r#"{"prompt":[ [1],[2]]}"#, Some(Whole::ManyPrompts)),
            (r#"{"prompt":"x","n":1,"best_of":null}"#, None),
            (r#"{"prompt":"x","n":2}"#, Some(Whole::ManyChoices)),
            (r#"{"prompt":"x","n":"2"}"#, Some(Whole::ManyChoices)),
            (r#"{"best_of":3}"#, Some(Whole::ManyChoices)),
            (r#"{"sampling_params":{"n":2}}"#, Some(Whole::ManyChoices)),
            (r#"{"prompt":"x","echo":true}"#, None),
            (r#"{"prompt":"x","logprobs":1}"#, None),
            (r#"{"echo":true,"logprobs":1}"#, Some(Whole::PromptLogprobs)),
            (r#"{"prompt_logprobs":null}"#, None),
            (r#"{"prompt_logprobs":0}"#, Some(Whole::PromptLogprobs)),
            (
                r#"{"sampling_params":{"prompt_logprobs":1}}"#,
                Some(Whole::PromptLogprobs),
            ),
        ] {
            assert_eq!(whole(&object(body)), expect, "{body}");
        }
    }
}
