//! Log-probabilities as the two endpoints show them.

use std::sync::Arc;

use baton_engine::TokenLogprobs;
use baton_openai::{
    ChatLogprobs, ChatTokenLogprob, ChatTopLogprob, CompletionLogprobs, TopLogprobs, json_logprob,
};
use baton_text::Tokenizer;

use crate::choice::Spoken;

/// Writes the text of single tokens.
pub(crate) struct Speller {
    tokenizer: Arc<Tokenizer>,
    spelling: Spelling,
}

/// What stands for a token in log-probabilities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// Its text.
    #[default]
    Text,
    /// `token_id:` and its id, which is unambiguous.
    Id,
}

impl Speller {
    pub(crate) fn new(tokenizer: &Arc<Tokenizer>, spelling: Spelling) -> Self {
        Self {
            tokenizer: Arc::clone(tokenizer),
            spelling,
        }
    }

    fn spell(&self, id: u32) -> String {
        match self.spelling {
            Spelling::Id => format!("token_id:{id}"),
            Spelling::Text => String::from_utf8_lossy(self.tokenizer.token_bytes(id)).into_owned(),
        }
    }

    /// The sampled token, then the `k` likeliest without it.
    fn ranked<'a>(
        &self,
        token: &'a Spoken,
        logprobs: &'a TokenLogprobs,
        k: u32,
    ) -> impl Iterator<Item = (String, f64)> + use<'_, 'a> {
        let sampled = std::iter::once((token.id, logprobs.sampled));
        let top = logprobs.top.iter().copied().take(k as usize);
        let rivals = top.filter(|(id, _)| *id != token.id);
        sampled
            .chain(rivals)
            .map(|(id, logprob)| (self.spell(id), json_logprob(logprob)))
    }

    /// In parallel lists. `offset` is where the first token's text begins, and afterwards where the last one's ends.
    pub(crate) fn completion(
        &self,
        tokens: &[Spoken],
        k: u32,
        offset: &mut u64,
    ) -> CompletionLogprobs {
        let mut lists = CompletionLogprobs::default();
        for token in tokens {
            let Some(logprobs) = &token.logprobs else {
                continue;
            };
            let mut ranked: Vec<(String, f64)> = Vec::new();
            for (text, logprob) in self.ranked(token, logprobs, k) {
                // Different tokens can have the same text, an object's keys can't.
                if ranked.iter().all(|(seen, _)| *seen != text) {
                    ranked.push((text, logprob));
                }
            }
            let text = self.spell(token.id);
            lists.text_offset.push(*offset);
            *offset += text.chars().count() as u64;
            lists.tokens.push(text);
            lists.token_logprobs.push(json_logprob(logprobs.sampled));
            lists.top_logprobs.push(TopLogprobs(ranked));
        }
        lists
    }

    /// As a list of objects. With `k` = 0 only the sampled token is told; otherwise the sampled one counts among the `k`.
    pub(crate) fn chat(&self, tokens: &[Spoken], k: u32) -> ChatLogprobs {
        let content = tokens.iter().filter_map(|token| {
            let logprobs = token.logprobs.as_ref()?;
            let top = self.ranked(token, logprobs, k).take(k as usize);
            let text = self.spell(token.id);
            Some(ChatTokenLogprob {
                bytes: text.as_bytes().to_vec(),
                token: text,
                logprob: json_logprob(logprobs.sampled),
                top_logprobs: top.map(rival).collect(),
            })
        });
        ChatLogprobs {
            content: content.collect(),
        }
    }
}

fn rival((token, logprob): (String, f64)) -> ChatTopLogprob {
    ChatTopLogprob {
        bytes: token.as_bytes().to_vec(),
        token,
        logprob,
    }
}
