//! Stop strings in streamed text: what could be the beginning of one is held back until it is certain.

/// Whether the stop string belongs to the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IncludeStop {
    /// `include_stop_str_in_output`.
    Yes,
    /// The answer ends before it.
    No,
}

/// Looks for stop strings in one sequence's text. The match that begins earliest wins; of two that begin at one place,
/// the one listed first.
#[derive(Debug)]
pub struct StopStrings {
    stops: Box<[String]>,
    include: IncludeStop,
    held: String,
}

impl StopStrings {
    /// Empty strings never match.
    pub fn new(stops: impl IntoIterator<Item = String>, include: IncludeStop) -> Self {
        let stops = stops.into_iter().collect();
        Self {
            stops,
            include,
            held: String::new(),
        }
    }

    /// Takes a piece of text; appends to `out` what is certain not to belong to a stop string. Returns the index of the
    /// stop string that ended the text; after that nothing more may be pushed.
    pub fn push(&mut self, piece: &str, out: &mut String) -> Option<usize> {
        if self.stops.is_empty() {
            out.push_str(piece);
            return None;
        }
        self.held.push_str(piece);
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty());
        let found = found
            .filter_map(|(i, stop)| self.held.find(stop.as_str()).map(|at| (at, i)))
            .min();
        if let Some((at, i)) = found {
            let end = if self.include == IncludeStop::Yes {
                at + self.stops[i].len()
            } else {
                at
            };
            out.push_str(&self.held[..end]);
            self.held.clear();
            return Some(i);
        }
        let certain = self.held.len() - self.undecided();
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        None
    }

    /// Appends what was held back: the text has ended without a stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Length of the longest end of `held` that a stop string begins with.
    fn undecided(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let most = held.len().min(stop.len().saturating_sub(1));
            (1..=most)
                .rev()
                .find(|&n| stop.as_bytes()[..n] == held[held.len() - n..])
                .unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
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

    proptest! {
        #[test]
        fn any_splitting_finds_what_a_plain_search_finds(
            text in "[abc]{0,40}", stops in prop::collection::vec("[abc]{1,4}", 1..4), cuts in prop::collection::vec(0usize..40, 0..8),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            // A match is known when its last character arrives; the one that ends first may begin later than another.
            let ends = (0..=text.len()).find_map(|end| {
                let seen = pieces.iter().scan(0, |sum, p| { *sum += p.len(); Some(*sum) }).find(|&s| s >= end)?;
                stops.iter().any(|s| text[..end].ends_with(s)).then_some(seen)
            });
            let expected = match ends {
                None => (text.clone(), None),
                Some(seen) => {
                    let (at, i) = stops.iter().enumerate().filter_map(|(i, s)| text[..seen].find(s).map(|at| (at, i))).min().unwrap();
                    (text[..at].to_owned(), Some(i))
                }
            };
            prop_assert_eq!(run(&stops, IncludeStop::No, &pieces), expected);
        }
    }
}
