//! Station 3, tokenize: texts and conversations to token ids. Also `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use baton_openai::{
    ApiError, ChatFields, DetokenizeRequest, DetokenizeResponse, Prompt, TokenizeInput,
    TokenizeRequest, TokenizeResponse,
};
use baton_text::{AddSpecial, Conversation, Ending, SpecialTokens};
use http::StatusCode;

use crate::answer::Echo;
use crate::app::App;
use crate::conversation;
use crate::rejection::{self, Rejection, json};
use crate::validate::{self, Ask, Truncate};

/// New tokens of a completion that does not say.
pub(crate) const DEFAULT_MAX_TOKENS: u32 = 16;
/// Texts longer than this are tokenized on a thread of their own.
const LONG_TEXT: usize = 16 << 10;
/// A text that is cut down after tokenizing may be so many times longer than the context.
const TRUNCATION_SLACK: usize = 16;

/// A prompt, ready for the engine.
#[derive(Clone, Debug)]
pub(crate) struct Encoded {
    pub(crate) ids: Vec<u32>,
    /// Its text, if the answer is to repeat it.
    pub(crate) text: Option<String>,
}

/// The prompts of a completion.
pub(crate) async fn prompts(
    app: &Arc<App>,
    prompt: Option<Prompt>,
    ask: &Ask,
    echo: Echo,
) -> Result<Vec<Encoded>, ApiError> {
    let missing = || {
        let message = "Either prompt or prompt_embeds must be provided and non-empty.";
        ApiError::bad_param("prompt", message)
    };
    let mut encoded = match prompt {
        None => return Err(missing()),
        Some(Prompt::Text(text)) if text.is_empty() => return Err(missing()),
        Some(Prompt::Text(text)) => texts(app, vec![text], ask, echo).await?,
        Some(Prompt::Texts(all)) => texts(app, all, ask, echo).await?,
        Some(Prompt::Ids(ids)) => vec![known(app, ids)?],
        Some(Prompt::IdLists(lists)) => lists
            .into_iter()
            .map(|ids| known(app, ids))
            .collect::<Result<_, _>>()?,
    };
    if encoded.is_empty() {
        return Err(ApiError::bad_request("You must pass at least one prompt"));
    }
    for prompt in &mut encoded {
        truncate(&mut prompt.ids, ask.truncate);
        if prompt.ids.is_empty() {
            return Err(ApiError::bad_request("The prompt cannot be empty"));
        }
        if echo != Echo::No && prompt.text.is_none() {
            prompt.text = Some(app.tokenizer.decode(&prompt.ids, SpecialTokens::Skip));
        }
    }
    Ok(encoded)
}

async fn texts(
    app: &Arc<App>,
    texts: Vec<String>,
    ask: &Ask,
    echo: Echo,
) -> Result<Vec<Encoded>, ApiError> {
    let add = ask.add_special.unwrap_or(AddSpecial::Yes);
    let mut encoded = Vec::with_capacity(texts.len());
    for text in texts {
        let kept = (echo != Echo::No && ask.truncate == Truncate::Never).then(|| text.clone());
        let ids = encode(app, text, add, ask.truncate).await?;
        encoded.push(Encoded { ids, text: kept });
    }
    Ok(encoded)
}

/// The prompt of a chat request.
pub(crate) async fn conversation(
    app: &Arc<App>,
    fields: &ChatFields,
    ask: &Ask,
) -> Result<Encoded, ApiError> {
    let conversation = Conversation::of_request(fields, &ask.model)?;
    let text = render(app, conversation).await?;
    let add = ask.add_special.unwrap_or(AddSpecial::No);
    let mut ids = encode(app, text, add, ask.truncate).await?;
    truncate(&mut ids, ask.truncate);
    if ids.is_empty() {
        return Err(ApiError::bad_request("The prompt cannot be empty"));
    }
    Ok(Encoded { ids, text: None })
}

async fn render(app: &Arc<App>, conversation: Conversation) -> Result<String, ApiError> {
    let app = Arc::clone(app);
    let is_long = conversation.text_len() > LONG_TEXT;
    let render = move || conversation::render(&conversation, app.chat_template.as_ref());
    if is_long {
        aside(render).await
    } else {
        render()
    }
}

/// Token ids of a text that has a chance to fit.
async fn encode(
    app: &Arc<App>,
    text: String,
    add: AddSpecial,
    truncate: Truncate,
) -> Result<Vec<u32>, ApiError> {
    let slack = if truncate == Truncate::Never {
        1
    } else {
        TRUNCATION_SLACK
    };
    may_fit(app, &text, slack)?;
    let (app, is_long) = (Arc::clone(app), text.len() > LONG_TEXT);
    let encode = move || {
        let encoded = app.tokenizer.encode(&text, add);
        encoded.map_err(|e| ApiError::bad_request(format!("the text cannot be tokenized: {e}")))
    };
    if is_long {
        aside(encode).await
    } else {
        encode()
    }
}

/// Runs long work where it holds nobody up.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(rejection::internal()))
}

/// Judges a text by its characters: tokenizing costs time, and no token has more than so many.
fn may_fit(app: &App, text: &str, slack: usize) -> Result<(), ApiError> {
    let limit = app.max_prompt_chars.saturating_mul(slack);
    // Bytes are at least as many as characters, and known without counting.
    if text.len() <= limit {
        return Ok(());
    }
    let n_chars = text.chars().count();
    if n_chars <= limit {
        return Ok(());
    }
    let max = app.card.max_model_len;
    Err(ApiError::bad_param(
        "input_text",
        format_args!(
            "This model's maximum context length is {max} tokens. However, your prompt contains {n_chars} characters \
             (more than {limit} characters, which is the upper bound for {max} input tokens). Please reduce the length \
             of the input prompt."
        ),
    ))
}

fn known(app: &App, ids: Vec<u32>) -> Result<Encoded, ApiError> {
    match ids.iter().find(|&&id| id >= app.vocab_size) {
        Some(id) => Err(ApiError::bad_request(format!(
            "Token id {id} is out of vocabulary"
        ))),
        None => Ok(Encoded { ids, text: None }),
    }
}

fn truncate(ids: &mut Vec<u32>, truncate: Truncate) {
    if let Truncate::Last(keep) = truncate {
        let surplus = ids.len().saturating_sub(keep);
        ids.drain(..surplus);
    }
}

/// `POST /tokenize`.
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Rejection> {
    let (head, body) = request.into_parts();
    let body = app.bodies.read(&head.headers, body).await?;
    let request = TokenizeRequest::from_slice(&body)?;
    let model = validate::named(request.model.as_deref(), &app.card)?;
    let add = request.add_special_tokens.map(validate::add_special);
    // Counting the tokens of a text that is too long is what this endpoint is for, within reason.
    let any_length = Truncate::Last(usize::MAX);
    let tokens = match request.input {
        TokenizeInput::Prompt(text) => {
            encode(&app, text, add.unwrap_or(AddSpecial::Yes), any_length).await?
        }
        TokenizeInput::Chat {
            messages,
            add_generation_prompt,
        } => {
            let ending = Ending::of_flags(add_generation_prompt, false)?;
            let text = render(&app, Conversation::new(&messages, ending, &model)?).await?;
            encode(&app, text, add.unwrap_or(AddSpecial::No), any_length).await?
        }
    };
    let name = |&id: &u32| app.tokenizer.token_name(id).unwrap_or_default();
    let response = TokenizeResponse {
        count: tokens.len(),
        max_model_len: app.card.max_model_len,
        token_strs: request
            .return_token_strs
            .then(|| tokens.iter().map(name).collect()),
        tokens,
    };
    Ok(json(
        StatusCode::OK,
        serde_json::to_vec(&response).unwrap_or_default(),
    ))
}

/// `POST /detokenize`.
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Rejection> {
    let (head, body) = request.into_parts();
    let body = app.bodies.read(&head.headers, body).await?;
    let request = DetokenizeRequest::from_slice(&body)?;
    validate::named(request.model.as_deref(), &app.card)?;
    let prompt = app.tokenizer.decode(&request.tokens, SpecialTokens::Keep);
    let response = DetokenizeResponse { prompt };
    Ok(json(
        StatusCode::OK,
        serde_json::to_vec(&response).unwrap_or_default(),
    ))
}
