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

    /// What the token stands for, which need not be whole characters, however it is spelled.
    fn bytes(&self, id: u32) -> Vec<u8> {
        self.tokenizer.token_bytes(id).to_vec()
    }

    /// The sampled token, then the `k` likeliest without it.
    fn ranked(
        token: &Spoken,
        logprobs: &TokenLogprobs,
        k: u32,
    ) -> impl Iterator<Item = (u32, f64)> {
        let sampled = std::iter::once((token.id, logprobs.sampled));
        let top = logprobs.top.iter().copied().take(k as usize);
        let rivals = top.filter(|(id, _)| *id != token.id);
        sampled
            .chain(rivals)
            .map(|(id, logprob)| (id, json_logprob(logprob)))
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
            for (id, logprob) in Self::ranked(token, logprobs, k) {
                let text = self.spell(id);
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
            let top = Self::ranked(token, logprobs, k).take(k as usize);
            Some(ChatTokenLogprob {
                token: self.spell(token.id),
                logprob: json_logprob(logprobs.sampled),
                bytes: self.bytes(token.id),
                top_logprobs: top.map(|rival| self.rival(rival)).collect(),
            })
        });
        ChatLogprobs {
            content: content.collect(),
        }
    }

    fn rival(&self, (id, logprob): (u32, f64)) -> ChatTopLogprob {
        ChatTopLogprob {
            token: self.spell(id),
            logprob,
            bytes: self.bytes(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice;

    /// The first half of `é`, then the likelier second half.
    fn halves() -> Vec<Spoken> {
        let logprobs = TokenLogprobs {
            sampled: -2.0,
            rank: 2,
            top: vec![(4, -0.5), (3, -2.0)],
        };
        vec![Spoken {
            id: 3,
            logprobs: Some(Box::new(logprobs)),
        }]
    }

    #[test]
    fn half_a_character_has_its_own_bytes() {
        for (spelling, text) in [(Spelling::Text, "\u{fffd}"), (Spelling::Id, "token_id:3")] {
            let speller = Speller::new(&choice::tests::tokenizer(), spelling);
            let told = speller.chat(&halves(), 2).content.remove(0);
            assert_eq!((told.token.as_str(), told.bytes), (text, vec![0xc3]));
            let rivals: Vec<_> = told.top_logprobs.into_iter().map(|r| r.bytes).collect();
            assert_eq!(rivals, [[0xc3], [0xa9]]);
        }
    }
}
