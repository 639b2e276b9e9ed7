//! Station 2, validate: from what a request says to what it asks for, checked against the model and our limits.
//! Pure. vLLM's rules, in its words where clients may look at them.

use std::sync::Arc;

use baton_engine::Sampling;
use baton_kv::KvTransferRequest;
use baton_openai::{ApiError, ChatFields, CompletionFields, ErrorKind, SamplingFields};
use baton_text::{AddSpecial, SpecialTokens};

use crate::logprobs::Spelling;
use crate::refuse;
use crate::{ModelCard, ServerConfig};

/// Below this a temperature is greedy, as in vLLM.
const GREEDY_BELOW: f64 = 1e-5;
/// The least temperature that is not greedy.
const LEAST_TEMPERATURE: f64 = 0.01;
/// vLLM's cap on `n`, told apart from our own limit.
const MAX_N: i64 = 16_384;

/// What requests are checked against.
#[derive(Clone, Copy)]
pub(crate) struct Rules<'a> {
    pub(crate) card: &'a ModelCard,
    pub(crate) config: &'a ServerConfig,
    pub(crate) vocab_size: u32,
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ask {
    /// The name that the client used.
    pub(crate) model: Arc<str>,
    pub(crate) n: u32,
    /// The seed is the client's, or the one drawn for it.
    pub(crate) sampling: Sampling,
    /// `None`: the endpoint's default.
    pub(crate) max_tokens: Option<u32>,
    pub(crate) stopping: Stopping,
    pub(crate) special_tokens: SpecialTokens,
    /// `None`: the endpoint's default.
    pub(crate) add_special: Option<AddSpecial>,
    pub(crate) truncate: Truncate,
    pub(crate) shape: Shape,
    pub(crate) kv: KvTransferRequest,
}

/// What ends a sequence besides its limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stopping {
    pub(crate) texts: Arc<[String]>,
    pub(crate) include_text: bool,
    pub(crate) tokens: Box<[u32]>,
    pub(crate) ignore_eos: bool,
}

/// How much of a long prompt is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Truncate {
    Never,
    /// The last tokens, so many.
    Last(usize),
}

/// What the answer shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) stream: bool,
    pub(crate) usage: StreamedUsage,
    pub(crate) token_ids: bool,
    pub(crate) spelling: Spelling,
}

/// When a stream reports usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum StreamedUsage {
    #[default]
    Never,
    AtEnd,
    Always,
}

/// A completion's request, checked. `drawn_seed` is used if the client names none.
pub(crate) fn completion(
    fields: &CompletionFields,
    sampling: &SamplingFields,
    rules: Rules<'_>,
    drawn_seed: u64,
) -> Result<Ask, ApiError> {
    let model = served_name(sampling, rules.card)?;
    let logprobs = logprobs(fields.logprobs, rules)?;
    let mut ask = common(model, sampling, rules, drawn_seed)?;
    refuse::unsupported_in_completion(fields)?;
    if fields.echo && logprobs.is_some() {
        let message = "`logprobs` of an echoed prompt are not supported by this server";
        return Err(ApiError::bad_param("logprobs", message));
    }
    ask.sampling.logprobs = logprobs;
    ask.max_tokens = match (sampling.max_tokens, fields.echo) {
        // Only the prompt is wanted back; the engine cannot generate nothing.
        (Some(0), true) => Some(1),
        (asked, _) => max_tokens(asked, rules)?,
    };
    min_tokens(sampling, &ask)?;
    Ok(ask)
}

/// A chat request, checked. `drawn_seed` is used if the client names none.
pub(crate) fn chat(
    fields: &ChatFields,
    sampling: &SamplingFields,
    rules: Rules<'_>,
    drawn_seed: u64,
) -> Result<Ask, ApiError> {
    let model = served_name(sampling, rules.card)?;
    if fields.top_logprobs.is_some_and(|k| k != 0) && !fields.logprobs {
        let message = "when using `top_logprobs`, `logprobs` must be set to true.";
        return Err(ApiError::bad_param("top_logprobs", message));
    }
    let asked = fields.logprobs.then(|| fields.top_logprobs.unwrap_or(0));
    let logprobs = logprobs(asked, rules)?;
    let mut ask = common(model, sampling, rules, drawn_seed)?;
    refuse::unsupported_in_chat(fields)?;
    ask.sampling.logprobs = logprobs;
    ask.max_tokens = max_tokens(fields.max_completion_tokens.or(sampling.max_tokens), rules)?;
    min_tokens(sampling, &ask)?;
    Ok(ask)
}

/// The served name that a request means.
pub(crate) fn served_name(
    sampling: &SamplingFields,
    card: &ModelCard,
) -> Result<Arc<str>, ApiError> {
    named(sampling.model.as_deref(), card)
}

/// The served name that `model` means; nothing means the first.
pub(crate) fn named(model: Option<&str>, card: &ModelCard) -> Result<Arc<str>, ApiError> {
    let Some(model) = model.filter(|name| !name.is_empty()) else {
        return Ok(card
            .served_names
            .first()
            .map_or_else(|| Arc::from(""), |name| Arc::from(name.as_str())));
    };
    if card.served_names.iter().any(|name| name == model) {
        return Ok(Arc::from(model));
    }
    Err(ApiError {
        kind: ErrorKind::NotFound,
        message: format!(
            "The model `{model}` does not exist. Valid aliases: {}.",
            card.served_names.join(", ")
        ),
        param: Some("model".into()),
    })
}

fn common(
    model: Arc<str>,
    fields: &SamplingFields,
    rules: Rules<'_>,
    drawn_seed: u64,
) -> Result<Ask, ApiError> {
    if fields.stream_options.is_some() && !fields.stream {
        let message = "Stream options can only be defined when `stream=True`.";
        return Err(ApiError::bad_param("stream_options", message));
    }
    refuse::unsupported(fields)?;
    let sampling = sampling(fields, rules, drawn_seed)?;
    Ok(Ask {
        model,
        n: n(fields.n, &sampling, rules)?,
        sampling,
        max_tokens: None,
        stopping: Stopping {
            texts: fields
                .stop
                .iter()
                .filter(|text| !text.is_empty())
                .cloned()
                .collect(),
            include_text: fields.include_stop_str_in_output,
            tokens: fields.stop_token_ids.clone().into(),
            ignore_eos: fields.ignore_eos,
        },
        special_tokens: match fields.skip_special_tokens {
            Some(false) => SpecialTokens::Keep,
            _ => SpecialTokens::Skip,
        },
        add_special: fields.add_special_tokens.map(add_special),
        truncate: truncate(fields.truncate_prompt_tokens, rules)?,
        shape: shape(fields, rules),
        kv: kv(fields)?,
    })
}

pub(crate) fn add_special(is_wanted: bool) -> AddSpecial {
    if is_wanted {
        AddSpecial::Yes
    } else {
        AddSpecial::No
    }
}

fn sampling(
    fields: &SamplingFields,
    rules: Rules<'_>,
    drawn_seed: u64,
) -> Result<Sampling, ApiError> {
    let defaults = rules.card.defaults;
    let temperature = fields
        .temperature
        .or(defaults.temperature.map(f64::from))
        .unwrap_or(1.0);
    let top_p = fields
        .top_p
        .or(defaults.top_p.map(f64::from))
        .unwrap_or(1.0);
    let min_p = fields
        .min_p
        .or(defaults.min_p.map(f64::from))
        .unwrap_or(0.0);
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(valued("top_p", "top_p must be in (0, 1]", top_p));
    }
    if !(0.0..=1.0).contains(&min_p) {
        return Err(ApiError::bad_request(format!(
            "min_p must be in [0, 1], got {min_p}."
        )));
    }
    #[expect(clippy::cast_possible_truncation, reason = "the device samples in f32")]
    Ok(Sampling {
        temperature: checked_temperature(temperature)? as f32,
        top_k: top_k(fields.top_k, defaults.top_k)?,
        // A top_p below what f32 can tell from 0 would keep nothing.
        top_p: (top_p as f32).max(f32::MIN_POSITIVE),
        min_p: min_p as f32,
        seed: fields.seed.unwrap_or(drawn_seed),
        logprobs: None,
    })
}

fn checked_temperature(temperature: f64) -> Result<f64, ApiError> {
    if temperature < 0.0 {
        return Err(valued(
            "temperature",
            "temperature must be non-negative",
            temperature,
        ));
    }
    if temperature > 2.0 || temperature.is_nan() {
        return Err(valued(
            "temperature",
            "temperature must be in [0, 2]",
            temperature,
        ));
    }
    Ok(if temperature < GREEDY_BELOW {
        0.0
    } else {
        temperature.max(LEAST_TEMPERATURE)
    })
}

fn top_k(asked: Option<i64>, default: Option<u32>) -> Result<u32, ApiError> {
    match asked {
        None => Ok(default.unwrap_or(0)),
        Some(-1) => Ok(0),
        Some(k) => match u32::try_from(k) {
            Ok(k) => Ok(k),
            // More than any vocabulary has.
            Err(_) if k > 0 => Ok(0),
            Err(_) => {
                let message = format!("top_k must be 0 (disable), or at least 1, got {k}.");
                Err(ApiError::bad_request(message))
            }
        },
    }
}

fn n(asked: Option<i64>, sampling: &Sampling, rules: Rules<'_>) -> Result<u32, ApiError> {
    let n = asked.unwrap_or(1);
    if n < 1 {
        return Err(ApiError::bad_request(format!(
            "n must be at least 1, got {n}."
        )));
    }
    let limit = MAX_N.min(i64::try_from(rules.config.max_sequences_per_request).unwrap_or(MAX_N));
    let n = u32::try_from(n)
        .ok()
        .filter(|&n| i64::from(n) <= limit)
        .ok_or_else(|| ApiError::bad_request(format!("n must be at most {limit}, got {n}.")))?;
    if n > 1 && sampling.temperature == 0.0 {
        return Err(ApiError::bad_request(format!(
            "n must be 1 when using greedy sampling, got {n}."
        )));
    }
    Ok(n)
}

/// -1 asks for the whole vocabulary, which is more than any sensible cap.
fn logprobs(asked: Option<i64>, rules: Rules<'_>) -> Result<Option<u32>, ApiError> {
    let Some(k) = asked else { return Ok(None) };
    if k < -1 {
        return Err(valued(
            "logprobs",
            "`logprobs` must be a positive value or -1.",
            k,
        ));
    }
    let wanted = if k == -1 {
        rules.vocab_size
    } else {
        u32::try_from(k).unwrap_or(u32::MAX)
    };
    if wanted > rules.config.max_logprobs {
        let message = format!(
            "Requested sample logprobs of {wanted}, which is greater than max allowed: {}",
            rules.config.max_logprobs
        );
        return Err(ApiError::bad_param("logprobs", message));
    }
    Ok(Some(wanted))
}

fn max_tokens(asked: Option<i64>, rules: Rules<'_>) -> Result<Option<u32>, ApiError> {
    let Some(asked) = asked else { return Ok(None) };
    let limit = rules.card.max_model_len;
    if asked < 1 {
        return Err(valued("max_tokens", "max_tokens must be at least 1", asked));
    }
    match u32::try_from(asked).ok().filter(|&asked| asked <= limit) {
        Some(asked) => Ok(Some(asked)),
        None => Err(ApiError::bad_param(
            "max_tokens",
            format_args!(
                "max_tokens={asked} cannot be greater than max_model_len={limit}. Please request fewer output tokens."
            ),
        )),
    }
}

/// A lower bound needs end-of-sequence masked on the device, which is not done yet. Where the token is of no account,
/// because the request is after the prompt's KV, a bound of one is let pass: llm-d's sidecar sets it on such requests.
fn min_tokens(fields: &SamplingFields, ask: &Ask) -> Result<(), ApiError> {
    let min = fields.min_tokens.unwrap_or(0);
    if let Some(max) = ask.max_tokens.filter(|&max| min > i64::from(max)) {
        let message =
            format!("min_tokens must be less than or equal to max_tokens={max}, got {min}.");
        return Err(ApiError::bad_request(message));
    }
    match min {
        0 => Ok(()),
        1 if ask.max_tokens == Some(1) && ask.kv == KvTransferRequest::Produce => Ok(()),
        1.. => Err(ApiError::bad_param(
            "min_tokens",
            "`min_tokens` is not supported by this server",
        )),
        _ => Err(ApiError::bad_request(format!(
            "min_tokens must be at least 0, got {min}."
        ))),
    }
}

fn truncate(asked: Option<i64>, rules: Rules<'_>) -> Result<Truncate, ApiError> {
    let limit = i64::from(rules.card.max_model_len);
    match asked {
        None => Ok(Truncate::Never),
        // One place is left for the token that is to be generated.
        Some(-1) => Ok(Truncate::Last(usize::try_from(limit - 1).unwrap_or(0))),
        Some(k) if k >= 1 && k <= limit => {
            Ok(Truncate::Last(usize::try_from(k).unwrap_or(usize::MAX)))
        }
        Some(k) => Err(valued(
            "truncate_prompt_tokens",
            &format!("truncate_prompt_tokens must be -1 or from 1 to {limit}"),
            k,
        )),
    }
}

fn shape(fields: &SamplingFields, rules: Rules<'_>) -> Shape {
    let options = fields.stream_options.unwrap_or_default();
    let usage = match (options.include_usage, options.continuous_usage_stats) {
        _ if rules.config.force_include_usage => StreamedUsage::Always,
        (true, true) => StreamedUsage::Always,
        (true, false) => StreamedUsage::AtEnd,
        (false, _) => StreamedUsage::Never,
    };
    Shape {
        stream: fields.stream,
        usage,
        token_ids: fields.return_token_ids,
        spelling: match fields.return_tokens_as_token_ids {
            true => Spelling::Id,
            false => Spelling::Text,
        },
    }
}

fn kv(fields: &SamplingFields) -> Result<KvTransferRequest, ApiError> {
    let Some(raw) = &fields.kv_transfer_params else {
        return Ok(KvTransferRequest::None);
    };
    KvTransferRequest::from_json(raw.get())
        .map_err(|e| ApiError::bad_param("kv_transfer_params", e))
}

/// How many tokens a sequence may generate: what was asked for, within what the context has left.
///
/// `Err` if the prompt leaves no room at all.
pub(crate) fn room(
    prompt_tokens: usize,
    asked: Option<u32>,
    max_model_len: u32,
) -> Result<u32, ApiError> {
    let left = u32::try_from(prompt_tokens)
        .ok()
        .and_then(|used| max_model_len.checked_sub(used));
    match left {
        None | Some(0) => Err(too_long(max_model_len)),
        Some(left) => Ok(asked.map_or(left, |asked| asked.min(left))),
    }
}

pub(crate) fn too_long(max_model_len: u32) -> ApiError {
    let least = u64::from(max_model_len) + 1;
    ApiError::bad_param(
        "input_tokens",
        format_args!(
            "This model's maximum context length is {max_model_len} tokens. However, your prompt contains at least \
             {least} input tokens, which exceeds this limit even without any output tokens. Please reduce the length \
             of the input prompt."
        ),
    )
}

fn valued(param: &str, rule: &str, got: impl std::fmt::Display) -> ApiError {
    let rule = rule.trim_end_matches('.');
    ApiError::bad_param(param, format_args!("{rule}, got {got}."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GenerationDefaults;
    use baton_openai::{ChatCompletionRequest, CompletionRequest};

    fn card() -> ModelCard {
        ModelCard {
            served_names: vec!["m".into(), "alias".into()],
            root: "/m".into(),
            max_model_len: 100,
            eos: Box::new([0]),
            defaults: GenerationDefaults {
                temperature: Some(0.5),
                top_k: Some(7),
                ..GenerationDefaults::default()
            },
        }
    }

    fn ask(fields: &str) -> Result<Ask, ApiError> {
        let body = format!(r#"{{"prompt":"x"{fields}}}"#);
        let request = CompletionRequest::from_slice(body.as_bytes()).unwrap();
        let (card, config) = (card(), ServerConfig::default());
        let rules = Rules {
            card: &card,
            config: &config,
            vocab_size: 256,
        };
        completion(&request.fields, &request.sampling, rules, 99)
    }

    fn ask_chat(fields: &str) -> Result<Ask, ApiError> {
        let body = format!(r#"{{"messages":[]{fields}}}"#);
        let request = ChatCompletionRequest::from_slice(body.as_bytes()).unwrap();
        let (card, config) = (card(), ServerConfig::default());
        let rules = Rules {
            card: &card,
            config: &config,
            vocab_size: 256,
        };
        chat(&request.fields, &request.sampling, rules, 99)
    }

    #[test]
    fn a_request_for_kv_may_ask_for_at_least_its_one_token() {
        let produce = r#","kv_transfer_params":{"do_remote_decode":true},"min_tokens":1"#;
        assert!(ask(&format!(r#"{produce},"max_tokens":1"#)).is_ok());
        assert!(ask(&format!(r#"{produce},"max_tokens":2"#)).is_err());
        assert!(ask(r#","min_tokens":1,"max_tokens":1"#).is_err());
    }

    #[test]
    fn the_models_defaults_hold_until_the_client_speaks() {
        let asked = ask("").unwrap();
        assert_eq!(
            (
                asked.sampling.temperature,
                asked.sampling.top_k,
                asked.sampling.seed
            ),
            (0.5, 7, 99)
        );
        assert_eq!((asked.n, asked.max_tokens, &*asked.model), (1, None, "m"));
        let asked = ask(r#","temperature":0,"top_k":-1,"seed":-1,"model":"alias""#).unwrap();
        assert_eq!(
            (
                asked.sampling.temperature,
                asked.sampling.top_k,
                asked.sampling.seed
            ),
            (0.0, 0, u64::MAX)
        );
        assert_eq!(&*asked.model, "alias");
    }

    #[test]
    fn tiny_temperatures_are_greedy_and_small_ones_are_lifted() {
        assert_eq!(
            ask(r#","temperature":0.000001"#)
                .unwrap()
                .sampling
                .temperature,
            0.0
        );
        assert_eq!(
            ask(r#","temperature":0.001"#).unwrap().sampling.temperature,
            0.01
        );
    }

    #[test]
    fn limits_are_refused_by_the_name_that_vllm_gives() {
        for (fields, param) in [
            (r#","temperature":-1"#, Some("temperature")),
            (r#","temperature":3"#, Some("temperature")),
            (r#","temperature":"nan""#, Some("temperature")),
            (r#","top_p":0"#, Some("top_p")),
            (r#","top_p":2"#, Some("top_p")),
            (r#","top_p":"nan""#, Some("top_p")),
            (r#","min_p":2"#, None),
            (r#","top_k":-5"#, None),
            (r#","n":0"#, None),
            (r#","n":100000"#, None),
            (r#","n":2,"temperature":0"#, None),
            (r#","max_tokens":0"#, Some("max_tokens")),
            (r#","max_tokens":-1"#, Some("max_tokens")),
            (r#","max_tokens":101"#, Some("max_tokens")),
            (r#","max_tokens":9223372036854775807"#, Some("max_tokens")),
            (r#","min_tokens":3,"max_tokens":2"#, None),
            (r#","min_tokens":1"#, Some("min_tokens")),
            (r#","logprobs":-2"#, Some("logprobs")),
            (r#","logprobs":-1"#, Some("logprobs")),
            (r#","logprobs":21"#, Some("logprobs")),
            (r#","logprobs":1,"echo":true"#, Some("logprobs")),
            (r#","stream_options":{}"#, Some("stream_options")),
            (
                r#","stream":true,"prompt_logprobs":1"#,
                Some("prompt_logprobs"),
            ),
            (
                r#","truncate_prompt_tokens":0"#,
                Some("truncate_prompt_tokens"),
            ),
            (
                r#","truncate_prompt_tokens":101"#,
                Some("truncate_prompt_tokens"),
            ),
            (r#","model":"nope""#, Some("model")),
            (
                r#","kv_transfer_params":{"uuid":1.5}"#,
                Some("kv_transfer_params"),
            ),
        ] {
            assert_eq!(ask(fields).unwrap_err().param.as_deref(), param, "{fields}");
        }
    }

    #[test]
    fn an_echo_of_nothing_new_generates_one_token_to_drop() {
        assert_eq!(
            ask(r#","max_tokens":0,"echo":true"#).unwrap().max_tokens,
            Some(1)
        );
    }

    #[test]
    fn chats_newer_limit_wins_and_top_logprobs_need_logprobs() {
        let asked = ask_chat(
            r#","max_tokens":5,"max_completion_tokens":6,"logprobs":true,"top_logprobs":2"#,
        )
        .unwrap();
        assert_eq!(
            (asked.max_tokens, asked.sampling.logprobs),
            (Some(6), Some(2))
        );
        assert_eq!(
            ask_chat(r#","logprobs":true"#).unwrap().sampling.logprobs,
            Some(0)
        );
        assert_eq!(
            ask_chat(r#","top_logprobs":2"#)
                .unwrap_err()
                .param
                .as_deref(),
            Some("top_logprobs")
        );
        assert_eq!(
            ask_chat(r#","logprobs":true,"top_logprobs":50"#)
                .unwrap_err()
                .param
                .as_deref(),
            Some("logprobs")
        );
    }

    #[test]
    fn usage_in_streams_needs_include_usage() {
        let usage = |fields| ask(fields).unwrap().shape.usage;
        assert_eq!(usage(r#","stream":true"#), StreamedUsage::Never);
        assert_eq!(
            usage(r#","stream":true,"stream_options":{"continuous_usage_stats":true}"#),
            StreamedUsage::Never
        );
        assert_eq!(
            usage(r#","stream":true,"stream_options":{"include_usage":true}"#),
            StreamedUsage::AtEnd
        );
    }

    #[test]
    fn what_the_prompt_leaves_is_the_room() {
        assert_eq!(room(5, Some(10), 100).unwrap(), 10);
        assert_eq!(room(95, Some(10), 100).unwrap(), 5);
        assert_eq!(room(5, None, 100).unwrap(), 95);
        for full in [100, 101, usize::MAX] {
            assert_eq!(
                room(full, None, 100).unwrap_err().param.as_deref(),
                Some("input_tokens")
            );
        }
    }
}
