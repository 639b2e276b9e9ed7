//! Stop strings in streamed text: what could be the beginning of one is held back until it is certain.
//!
//! How the text was cut into pieces makes no difference. Time is linear in the text, whatever it and the stop strings
//! are: each stop string is followed by its own Knuth-Morris-Pratt automaton.

/// Whether the stop string belongs to the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IncludeStop {
    /// `include_stop_str_in_output`.
    Yes,
    /// The answer ends before it.
    No,
}

/// Looks for stop strings in one sequence's text. The match that is complete first wins, as if the text came a character
/// at a time; of several complete at once the longest, and of equal ones the one listed first.
#[derive(Debug)]
pub struct StopStrings {
    stops: Box<[Stop]>,
    include: IncludeStop,
    /// The end of the text so far that may belong to a stop string: no longer than the longest of them.
    held: String,
}

impl StopStrings {
    /// Empty strings never match.
    pub fn new(stops: impl IntoIterator<Item = String>, include: IncludeStop) -> Self {
        Self {
            stops: stops.into_iter().map(Stop::new).collect(),
            include,
            held: String::new(),
        }
    }

    /// Takes a piece of text; appends to `out` what is certain not to belong to a stop string. Returns the index of the
    /// stop string that ended the text; what followed it in the piece is dropped. A later
    /// piece begins a new search.
    pub fn push(&mut self, piece: &str, out: &mut String) -> Option<usize> {
        let complete = piece.bytes().enumerate().find_map(|(at, byte)| {
            // Every automaton takes the byte, also after one has found its string.
            let found = self.stops.iter_mut().enumerate().filter_map(|(i, stop)| {
                stop.advance(byte)
                    .then_some((stop.text.len(), std::cmp::Reverse(i)))
            });
            let (len, std::cmp::Reverse(i)) = found.max()?;
            Some((at + 1, len, i))
        });
        let Some((end, len, i)) = complete else {
            self.emit(piece, self.undecided(), out);
            return None;
        };
        let hidden = if self.include == IncludeStop::Yes {
            0
        } else {
            len
        };
        self.emit(&piece[..end], hidden, out);
        self.held.clear();
        self.stops.iter_mut().for_each(|stop| stop.matched = 0);
        Some(i)
    }

    /// Appends what was held back: the text has ended without a stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Moves what is held and the piece to `out`, but for the last `keep` bytes. They begin where a stop string could
    /// begin, hence not within a character.
    fn emit(&mut self, piece: &str, keep: usize, out: &mut String) {
        if let Some(certain) = piece.len().checked_sub(keep) {
            out.push_str(&self.held);
            out.push_str(&piece[..certain]);
            self.held.clear();
            self.held.push_str(&piece[certain..]);
        } else {
            self.held.push_str(piece);
            let certain = self.held.len() - keep;
            out.push_str(&self.held[..certain]);
            self.held.drain(..certain);
        }
    }

    /// Bytes at the end of the text that a stop string begins with.
    fn undecided(&self) -> usize {
        self.stops
            .iter()
            .map(|stop| stop.matched)
            .max()
            .unwrap_or(0)
    }
}

/// A stop string and how much of it the text ends with.
#[derive(Debug)]
struct Stop {
    text: Box<[u8]>,
    /// For each beginning of the string (by length, less one): the longest shorter beginning that it ends with.
    fallback: Box<[usize]>,
    matched: usize,
}

impl Stop {
    fn new(text: String) -> Self {
        let text = text.into_bytes().into_boxed_slice();
        let mut fallback = vec![0; text.len()].into_boxed_slice();
        for n in 1..text.len() {
            fallback[n] = longer(&text, &fallback, fallback[n - 1], text[n]);
        }
        Self {
            text,
            fallback,
            matched: 0,
        }
    }

    /// Takes the text's next byte. True when the text now ends with the whole string.
    fn advance(&mut self, byte: u8) -> bool {
        if self.text.is_empty() {
            return false;
        }
        self.matched = longer(&self.text, &self.fallback, self.matched, byte);
        self.matched == self.text.len()
    }
}

/// How much of `text` is matched after one more byte; `matched` is less than all of it.
fn longer(text: &[u8], fallback: &[usize], mut matched: usize, byte: u8) -> usize {
    while matched > 0 && text[matched] != byte {
        matched = fallback[matched - 1];
    }
    matched + usize::from(text[matched] == byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], include: IncludeStop, pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopStrings::new(stops.iter().map(|s| (*s).to_owned()), include);
        let mut out = String::new();
        for piece in pieces {
            if let Some(i) = matcher.push(piece, &mut out) {
                return (out, Some(i));
            }
        }
        matcher.finish(&mut out);
        (out, None)
    }

    #[test]
    fn a_stop_string_across_pieces_ends_the_text_before_it() {
        assert_eq!(
            run(&["END"], IncludeStop::No, &["text E", "N", "D more"]),
            ("text ".into(), Some(0))
        );
        assert_eq!(
            run(&["END"], IncludeStop::Yes, &["text E", "N", "D more"]),
            ("text END".into(), Some(0))
        );
    }

    #[test]
    fn a_false_start_comes_out_in_the_end() {
        assert_eq!(
            run(&["END"], IncludeStop::No, &["EN", "EN", "X", "E"]),
            ("ENENXE".into(), None)
        );
    }

    #[test]
    fn the_earliest_match_wins() {
        assert_eq!(
            run(&["bc", "ab"], IncludeStop::No, &["xabc"]),
            ("x".into(), Some(1))
        );
    }

    #[test]
    fn characters_of_several_bytes_are_not_cut() {
        assert_eq!(
            run(&["é!"], IncludeStop::No, &["aé", "è", "é", "!"]),
            ("aéè".into(), Some(0))
        );
    }

    #[test]
    fn the_stop_string_that_is_complete_first_wins() {
        assert_eq!(
            run(&["abcdef", "cd"], IncludeStop::No, &["xabcdef"]),
            ("xab".into(), Some(1))
        );
        assert_eq!(
            run(&["d", "cd"], IncludeStop::No, &["xabcdef"]),
            ("xab".into(), Some(1))
        );
        assert_eq!(
            run(&["cd", "cd"], IncludeStop::Yes, &["abcdef"]),
            ("abcd".into(), Some(0))
        );
    }

    #[test]
    fn empty_strings_and_no_strings_stop_nothing() {
        assert_eq!(
            run(&[], IncludeStop::No, &["a", "", "b"]),
            ("ab".into(), None)
        );
        assert_eq!(
            run(&["", "b"], IncludeStop::No, &["a", "", "b"]),
            ("a".into(), Some(1))
        );
    }

    #[test]
    fn only_what_could_be_a_stop_string_is_held_back() {
        let mut matcher = StopStrings::new(["aab".to_owned()], IncludeStop::No);
        let mut shown = Vec::new();
        for piece in ["xa", "a", "a", "c", "aa"] {
            let mut out = String::new();
            assert_eq!(matcher.push(piece, &mut out), None);
            shown.push(out);
        }
        assert_eq!(shown, ["x", "", "a", "aac", ""]);
    }

    /// The definition, word for word.
    fn naive(text: &str, stops: &[&str], include: IncludeStop) -> (String, Option<usize>) {
        for end in 0..=text.len() {
            let ended = |stop: &&str| text.as_bytes()[..end].ends_with(stop.as_bytes());
            let found = stops
                .iter()
                .enumerate()
                .filter(|(_, stop)| !stop.is_empty() && ended(stop));
            let Some((i, stop)) = found.max_by_key(|(i, stop)| (stop.len(), usize::MAX - i)) else {
                continue;
            };
            let shown = if include == IncludeStop::Yes {
                end
            } else {
                end - stop.len()
            };
            return (text[..shown].to_owned(), Some(i));
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn any_splitting_finds_what_a_plain_search_finds(
            text in "[abé]{0,40}", stops in prop::collection::vec("[abé]{0,5}", 0..4),
            cuts in prop::collection::vec(0usize..60, 0..12), is_included: bool,
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&c| text.is_char_boundary(c)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let include = if is_included { IncludeStop::Yes } else { IncludeStop::No };
            prop_assert_eq!(run(&stops, include, &pieces), naive(&text, &stops, include));
        }
    }
}
