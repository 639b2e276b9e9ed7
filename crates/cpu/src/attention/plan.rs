//! How a step's attention is cut into parts. Pure.

use super::kernel::POSITIONS;
use std::ops::Range;

/// One sequence's share of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Row of its first token.
    pub(crate) first_row: usize,
    pub(crate) n_tokens: usize,
    /// Position of its first token.
    pub(crate) start: usize,
    /// Its block table in the batch.
    pub(crate) blocks: Range<usize>,
}

/// Some tokens of one sequence, one KV head, and some stretches of the context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) span: usize,
    pub(crate) head: usize,
    /// Tokens of the span.
    pub(crate) tokens: Range<usize>,
    /// Positions that are looked at; causality takes off more. It begins with a stretch.
    pub(crate) context: Range<usize>,
    /// If the context is split: where the partial results of its first stretch would go, in rows. Each stretch has one for
    /// every row of the tokens.
    pub(crate) partials: Option<usize>,
}

/// Partial results of the same tokens that become one: of each stretch of the context, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Merge {
    pub(crate) span: usize,
    pub(crate) head: usize,
    pub(crate) tokens: Range<usize>,
    /// Rows of partial results.
    pub(crate) partials: Range<usize>,
}

/// What the cutting depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub(crate) n_kv_heads: usize,
    /// Query heads of each KV head.
    pub(crate) group: usize,
    /// Tokens that one part computes together.
    pub(crate) tokens: usize,
    /// Parts of equal work that are wanted, as far as contexts are long enough.
    pub(crate) parts: usize,
}

/// A split context has no fewer positions in a part, but for the last.
const LEAST: usize = 2 * POSITIONS;

/// Cuts a step into parts. What has much more work than its share is split along the context. Parts that read the same KV
/// head follow each other, the longest first.
pub(crate) fn cut(spans: &[Span], cut: Cut, parts: &mut Vec<Part>, merges: &mut Vec<Merge>) {
    parts.clear();
    merges.clear();
    let work = |tokens: &Range<usize>, span: &Span| tokens.len() * (span.start + tokens.end);
    let all: usize = spans
        .iter()
        .flat_map(|span| groups(span, cut.tokens).map(|tokens| work(&tokens, span)))
        .sum();
    let share = (all * cut.n_kv_heads).div_ceil(cut.parts.max(1));
    let mut partials = 0;
    for (i, span) in spans.iter().enumerate() {
        for head in 0..cut.n_kv_heads {
            for tokens in groups(span, cut.tokens).rev() {
                let end = span.start + tokens.end;
                let length = if work(&tokens, span) > share + share / 2 {
                    let wanted = share / tokens.len();
                    wanted.next_multiple_of(POSITIONS).max(LEAST)
                } else {
                    end
                };
                let is_split = length < end;
                parts.extend((0..end).step_by(length).map(|first| Part {
                    span: i,
                    head,
                    tokens: tokens.clone(),
                    context: first..end.min(first + length),
                    partials: is_split.then_some(partials),
                }));
                if is_split {
                    let n = end.div_ceil(POSITIONS) * tokens.len() * cut.group;
                    merges.push(Merge {
                        span: i,
                        head,
                        tokens,
                        partials: partials..partials + n,
                    });
                    partials += n;
                }
            }
        }
    }
}

/// A span's tokens, as parts take them.
fn groups(span: &Span, tokens: usize) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
    let n_tokens = span.n_tokens;
    (0..n_tokens.div_ceil(tokens)).map(move |i| i * tokens..n_tokens.min((i + 1) * tokens))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first_row: usize, n_tokens: usize, start: usize) -> Span {
        Span {
            first_row,
            n_tokens,
            start,
            blocks: 0..0,
        }
    }

    #[test]
    fn every_token_looks_at_its_whole_context_once() {
        let spans = [span(0, 1, 5000), span(1, 13, 0), span(14, 40, 300)];
        for (tokens, wanted) in [(5, 1), (5, 8), (1, 64), (16, 1000)] {
            let (mut parts, mut merges) = (Vec::new(), Vec::new());
            let how = Cut {
                n_kv_heads: 2,
                group: 3,
                tokens,
                parts: wanted,
            };
            cut(&spans, how, &mut parts, &mut merges);
            for (i, span) in spans.iter().enumerate() {
                for place in (0..2).flat_map(|head| (0..span.n_tokens).map(move |t| (head, t))) {
                    check(span, (i, place), &parts, &merges);
                }
            }
        }
    }

    fn check(
        span: &Span,
        (i, (head, token)): (usize, (usize, usize)),
        parts: &[Part],
        merges: &[Merge],
    ) {
        let mut seen: Vec<_> = parts
            .iter()
            .filter(|p| p.span == i && p.head == head && p.tokens.contains(&token))
            .collect();
        seen.sort_by_key(|part| part.context.start);
        let mut at = 0;
        for part in &seen {
            assert_eq!(part.context.start, at);
            assert!(at.is_multiple_of(POSITIONS) && !part.context.is_empty());
            at = part.context.end;
        }
        assert!(at > span.start + token);
        let merged: Vec<_> = merges
            .iter()
            .filter(|m| m.span == i && m.head == head && m.tokens.contains(&token))
            .collect();
        if let [whole] = &seen[..] {
            assert!(whole.partials.is_none() && merged.is_empty());
            return;
        }
        let [merge] = &merged[..] else {
            panic!("{} merges", merged.len())
        };
        for part in &seen {
            assert_eq!(part.tokens, merge.tokens);
            assert_eq!(part.partials, Some(merge.partials.start));
        }
        let rows = at.div_ceil(POSITIONS) * merge.tokens.len() * 3;
        assert_eq!(merge.partials.len(), rows);
    }

    #[test]
    fn partial_results_lie_one_after_another() {
        let spans = [span(0, 1, 5000), span(1, 3, 4000)];
        let (mut parts, mut merges) = (Vec::new(), Vec::new());
        let how = Cut {
            n_kv_heads: 2,
            group: 4,
            tokens: 4,
            parts: 32,
        };
        cut(&spans, how, &mut parts, &mut merges);
        let mut at = 0;
        for merge in &merges {
            assert_eq!(merge.partials.start, at);
            at = merge.partials.end;
        }
        assert!(at > 0);
    }

    #[test]
    fn a_long_context_among_short_ones_is_split() {
        let spans = [span(0, 1, 16_000), span(1, 1, 100), span(2, 1, 100)];
        let (mut parts, mut merges) = (Vec::new(), Vec::new());
        let how = Cut {
            n_kv_heads: 1,
            group: 1,
            tokens: 16,
            parts: 8,
        };
        cut(&spans, how, &mut parts, &mut merges);
        assert_eq!(merges.len(), 1);
        assert!(parts.iter().all(|part| part.context.len() < 3000));
    }
}
