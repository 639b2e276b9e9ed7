//! Keeps the library's regexes within their stack: a run of white space is cut before it grows too long for them.
//!
//! `\s+(?!\S)`, part of every byte-level tokenizer, takes a stack entry a character, and past a million the library
//! gives up in silence and leaves the rest of the text unsplit.

use serde::Deserialize;
use tokenizers::pattern::Pattern;
use tokenizers::{
    Offsets, PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Result, SplitDelimiterBehavior,
};

/// Characters of white space in a row that go into a regex at most. A power of two: vocabularies have tokens for runs of
/// such lengths, so that a cut falls where the tokens end anyway.
const MAX_RUN: usize = 1 << 19;

/// A pre-tokenizer that sees no longer run of white space than [`MAX_RUN`].
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct ShortRuns(PreTokenizerWrapper);

impl PreTokenizer for ShortRuns {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> Result<()> {
        text.split(|_, part| {
            if part.get().len() <= MAX_RUN {
                return Ok(vec![part]);
            }
            part.split(LongRun, SplitDelimiterBehavior::Isolated)
        })?;
        self.0.pre_tokenize(text)
    }
}

/// Matches [`MAX_RUN`] characters of white space that more white space follows. What goes before a word stays with it,
/// because regexes treat the last space of a run differently.
struct LongRun;

impl Pattern for LongRun {
    fn find_matches(&self, inside: &str) -> Result<Vec<(Offsets, bool)>> {
        let mut parts = Vec::new();
        let (mut done, mut run_start, mut run) = (0, 0, 0);
        for (at, c) in inside.char_indices() {
            if !c.is_whitespace() {
                run = 0;
                continue;
            }
            if run == 0 {
                run_start = at;
            }
            if run == MAX_RUN {
                if done < run_start {
                    parts.push(((done, run_start), false));
                }
                parts.push(((run_start, at), true));
                (done, run_start, run) = (at, at, 0);
            }
            run += 1;
        }
        if done < inside.len() || parts.is_empty() {
            parts.push(((done, inside.len()), false));
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(text: &str) -> Vec<(usize, bool)> {
        let parts = LongRun.find_matches(text).unwrap();
        parts
            .into_iter()
            .map(|((start, end), found)| (end - start, found))
            .collect()
    }

    #[test]
    fn only_long_runs_are_cut() {
        let run = |n: usize| " ".repeat(n);
        assert_eq!(lengths(""), [(0, false)]);
        assert_eq!(
            lengths(&format!("a{}b", run(MAX_RUN))),
            [(MAX_RUN + 2, false)]
        );
        let halves = format!("{}x{}", run(MAX_RUN), run(MAX_RUN));
        assert_eq!(lengths(&halves), [(2 * MAX_RUN + 1, false)]);
    }

    #[test]
    fn the_parts_of_a_cut_text_are_all_of_it() {
        let text = format!("a{}b\u{a0}", " ".repeat(2 * MAX_RUN + 3));
        assert_eq!(
            lengths(&text),
            [(1, false), (MAX_RUN, true), (MAX_RUN, true), (6, false)]
        );
        assert_eq!(lengths(&" ".repeat(MAX_RUN)), [(MAX_RUN, false)]);
        let twice = " ".repeat(2 * MAX_RUN) + "x";
        assert_eq!(lengths(&twice), [(MAX_RUN, true), (MAX_RUN + 1, false)]);
    }
}
