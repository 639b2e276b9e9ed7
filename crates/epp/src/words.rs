//! Prompts as the servers' models read them: in tokens, made as servers make them, so that they can be looked up in what
//! servers report. A prompt that cannot be read so, or not in time, is looked up by its bytes instead.

use crate::picker::Epp;
use baton_fleet::Fleet;
use baton_http::Pieces;
use baton_kv::BlockEvent;
use baton_openai::{ChatCompletionRequest, CompletionRequest, Prompt, SamplingFields};
use baton_scheduler::{Keys, TokenPrompt};
use baton_text::{AddSpecial, ChatTemplate, Conversation, Tokenizer};
use parking_lot::RwLock;
use std::collections::HashSet;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;

/// Longer bodies are read where they hold nobody up.
const LONG: usize = 4 << 10;
/// Longer ones are not read: what keys say of a prompt ends much earlier.
const TOO_LONG: usize = 4 << 20;
/// How long a request waits to be read, if the configuration does not say.
const PATIENCE: Duration = Duration::from_secs(2);

/// Most adapters that are told from the base model.
const MOST_ADAPTERS: usize = 4096;

/// A prompt that is being read.
pub(crate) type Reading = Pin<Box<dyn Future<Output = Option<Keys>> + Send>>;

/// Reads prompts.
pub(crate) struct Words {
    /// Without these only prompts that are tokens already can be read.
    text: Option<(Tokenizer, Option<ChatTemplate>)>,
    /// What servers' blocks are noted under: there is one base model behind a picker.
    pub(crate) model: Box<str>,
    /// Adapters that servers have reported blocks of.
    adapters: RwLock<HashSet<Box<str>>>,
    patience: Duration,
    /// Prompts that are read at a time: as many as there are processors.
    slots: Arc<Semaphore>,
}

/// What is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `/completions`.
    Completion,
    /// `/chat/completions`.
    Chat,
}

impl Kind {
    /// By the end of the path.
    pub(crate) fn of(path: &str) -> Option<Self> {
        let path = path.split(['?', '#']).next().unwrap_or(path);
        if path.ends_with("/chat/completions") {
            Some(Self::Chat)
        } else {
            path.ends_with("/completions").then_some(Self::Completion)
        }
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Words")
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

impl Words {
    pub(crate) fn new(
        text: Option<(Tokenizer, Option<ChatTemplate>)>,
        model: &str,
        patience: Option<Duration>,
    ) -> Self {
        let at_a_time = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            text,
            model: model.into(),
            adapters: RwLock::default(),
            patience: patience.unwrap_or(PATIENCE),
            slots: Arc::new(Semaphore::new(at_a_time)),
        }
    }

    /// Reads `body`, a request that is sent to `served`.
    pub(crate) fn read(
        self: &Arc<Self>,
        epp: &Epp,
        kind: Kind,
        body: &Pieces,
        served: &str,
    ) -> Reading {
        let (words, fleet) = (self.clone(), epp.fleet.clone());
        if body.len() > TOO_LONG {
            return Box::pin(async { None });
        }
        let (body, served) = (body.clone(), served.to_owned());
        let is_long = body.len() > LONG;
        let work = move || words.keys(&fleet, kind, &whole(&body), &served);
        if !is_long {
            return Box::pin(async move { work() });
        }
        let (slots, patience) = (self.slots.clone(), self.patience);
        let read = async move {
            let slot = slots.acquire_owned().await.ok()?;
            let work = move || {
                // Held until it is read, though nobody may wait any more.
                let _slot = slot;
                work()
            };
            tokio::task::spawn_blocking(work).await.ok()?
        };
        Box::pin(async move {
            let read = tokio::time::timeout(patience, read).await;
            read.unwrap_or_else(|_| {
                tracing::debug!("a prompt could not be read in time");
                None
            })
        })
    }

    /// Learns the adapters that `events` are about.
    pub(crate) fn learn(&self, events: &[BlockEvent]) {
        for event in events {
            let BlockEvent::Stored(stored) = event else {
                continue;
            };
            let Some(name) = stored.adapter.as_deref() else {
                continue;
            };
            let new = {
                let known = self.adapters.read();
                known.len() < MOST_ADAPTERS && !known.contains(name)
            };
            if new {
                self.adapters.write().insert(name.into());
            }
        }
    }

    fn keys(&self, fleet: &Fleet, kind: Kind, body: &[u8], served: &str) -> Option<Keys> {
        let (tokens, salt) = self.tokens(kind, body)?;
        fleet.keys(&TokenPrompt {
            model: &self.model,
            adapter: self.adapters.read().contains(served).then_some(served),
            tokens: &tokens,
            salt: salt.as_deref().filter(|salt| !salt.is_empty()),
            features: &[],
        })
    }

    /// The one prompt of a request, with its salt. None where a server would refuse it, or where only a server knows what
    /// it makes of it.
    fn tokens(&self, kind: Kind, body: &[u8]) -> Option<(Vec<u32>, Option<String>)> {
        let (mut tokens, sampling) = match kind {
            Kind::Completion => {
                let request = CompletionRequest::from_slice(body).ok()?;
                let tokens = self.prompt(request.fields.prompt?, &request.sampling)?;
                (tokens, request.sampling)
            }
            Kind::Chat => {
                let request = ChatCompletionRequest::from_slice(body).ok()?;
                (self.chat(&request)?, request.sampling)
            }
        };
        if let Some(keep) = sampling.truncate_prompt_tokens {
            let keep = usize::try_from(keep).ok().filter(|keep| *keep > 0)?;
            tokens.drain(..tokens.len().saturating_sub(keep));
        }
        Some((tokens, sampling.cache_salt))
    }

    fn prompt(&self, prompt: Prompt, sampling: &SamplingFields) -> Option<Vec<u32>> {
        let text = match prompt {
            Prompt::Ids(ids) => return Some(ids),
            Prompt::IdLists(mut lists) if lists.len() == 1 => return lists.pop(),
            Prompt::Text(text) => text,
            Prompt::Texts(mut texts) if texts.len() == 1 => texts.pop()?,
            Prompt::Texts(_) | Prompt::IdLists(_) => return None,
        };
        self.encode(&text, sampling.add_special_tokens.unwrap_or(true))
    }

    fn chat(&self, request: &ChatCompletionRequest) -> Option<Vec<u32>> {
        let fields = &request.fields;
        if fields.chat_template.is_some() || fields.documents.is_some() {
            return None;
        }
        let template = self.text.as_ref()?.1.as_ref()?;
        let conversation = Conversation::of_request(fields, &self.model).ok()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let today = baton_text::day(now.as_secs());
        let text = template.render(&conversation.input(&today)).ok()?;
        self.encode(&text, request.sampling.add_special_tokens.unwrap_or(false))
    }

    fn encode(&self, text: &str, add_special: bool) -> Option<Vec<u32>> {
        let add = if add_special {
            AddSpecial::Yes
        } else {
            AddSpecial::No
        };
        self.text.as_ref()?.0.encode(text, add).ok()
    }
}

fn whole(body: &Pieces) -> Vec<u8> {
    let mut whole = Vec::with_capacity(body.len());
    body.iter().for_each(|piece| whole.extend_from_slice(piece));
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer of one token a letter, and a template.
    fn words(template: &str) -> Words {
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false},
            "post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
            "model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,
            "fuse_unk":false,"byte_fallback":false,"vocab":{"a":0,"b":1,"c":2,"z":3},"merges":[]}}"#;
        let tokenizer = Tokenizer::from_json(json.as_bytes()).unwrap();
        let template = ChatTemplate::new(template, "", "").unwrap();
        Words::new(Some((tokenizer, Some(template))), "m", None)
    }

    #[test]
    fn every_form_of_one_prompt_is_the_same_tokens() {
        let words = words("{{ messages[0].content }}{{ extra }}");
        let (expected, _) = words
            .tokens(Kind::Completion, br#"{"prompt":"abc"}"#)
            .unwrap();
        assert_eq!(expected.len(), 3);
        let ids = format!(r#"{{"prompt":{expected:?}}}"#);
        let lists = format!(r#"{{"prompt":[{expected:?}]}}"#);
        for (kind, body) in [
            (Kind::Completion, r#"{"prompt":["abc"]}"#),
            (Kind::Completion, &ids),
            (Kind::Completion, &lists),
            (
                Kind::Completion,
                r#"{"prompt":"zzabc","truncate_prompt_tokens":3}"#,
            ),
            (
                Kind::Chat,
                r#"{"messages":[{"role":"user","content":"abc"}]}"#,
            ),
            (
                Kind::Chat,
                r#"{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"extra":"bc"}}"#,
            ),
        ] {
            let found = words.tokens(kind, body.as_bytes()).unwrap();
            assert_eq!(found, (expected.clone(), None), "{body}");
        }
    }

    #[test]
    fn what_is_not_one_prompt_of_text_is_not_read() {
        let words = words("{{ messages[0].content }}");
        for (kind, body) in [
            (Kind::Completion, r#"{"prompt":["a","b"]}"#),
            (
                Kind::Completion,
                r#"{"prompt":"abc","truncate_prompt_tokens":-1}"#,
            ),
            (Kind::Completion, r#"{"prompt":7}"#),
            (Kind::Chat, r#"{"messages":[]}"#),
            (
                Kind::Chat,
                r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#,
            ),
            (
                Kind::Chat,
                r#"{"messages":[{"role":"user","content":"a"}],"chat_template":"x"}"#,
            ),
        ] {
            assert_eq!(words.tokens(kind, body.as_bytes()), None, "{body}");
        }
    }

    #[test]
    fn paths_say_what_is_read() {
        assert_eq!(Kind::of("/v1/chat/completions?x=1"), Some(Kind::Chat));
        assert_eq!(Kind::of("/v1/completions"), Some(Kind::Completion));
        assert_eq!(Kind::of("/v1/messages"), None);
    }
}
