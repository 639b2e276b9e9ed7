//! How a step's attention is cut into parts. Pure.

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

/// Some tokens of one sequence, one KV head, and a stretch of the context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) span: usize,
    pub(crate) head: usize,
    /// Tokens of the span.
    pub(crate) tokens: Range<usize>,
    /// Positions that are looked at; causality takes off more.
    pub(crate) context: Range<usize>,
    /// Where the partial result goes, if the context is split.
    pub(crate) partial: Option<usize>,
}

/// Partial results of the same tokens that become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Merge {
    pub(crate) span: usize,
    pub(crate) head: usize,
    pub(crate) tokens: Range<usize>,
    pub(crate) partials: Range<usize>,
}

/// What the cutting depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub(crate) n_kv_heads: usize,
    /// Tokens that one part computes together.
    pub(crate) tokens: usize,
    /// Parts that are wanted at least, as far as contexts are long enough.
    pub(crate) parts: usize,
}

/// No stretch of a split context is shorter, but for the last.
const LEAST_CONTEXT: usize = 256;

/// Cuts a step into parts. Contexts are split only if there are too few parts otherwise.
pub(crate) fn cut(spans: &[Span], cut: Cut, parts: &mut Vec<Part>, merges: &mut Vec<Merge>) {
    parts.clear();
    merges.clear();
    let groups = |span: &Span| span.n_tokens.div_ceil(cut.tokens);
    let whole: usize = spans.iter().map(groups).sum::<usize>() * cut.n_kv_heads;
    let splits = cut.parts.div_ceil(whole.max(1));
    let mut partials = 0;
    for (i, span) in spans.iter().enumerate() {
        for group in 0..groups(span) {
            let first = group * cut.tokens;
            let tokens = first..span.n_tokens.min(first + cut.tokens);
            let end = span.start + tokens.end;
            let stretch = end.div_ceil(splits).next_multiple_of(LEAST_CONTEXT);
            let n = end.div_ceil(stretch);
            for head in 0..cut.n_kv_heads {
                for k in 0..n {
                    parts.push(Part {
                        span: i,
                        head,
                        tokens: tokens.clone(),
                        context: k * stretch..end.min((k + 1) * stretch),
                        partial: (n > 1).then_some(partials + k),
                    });
                }
                if n > 1 {
                    merges.push(Merge {
                        span: i,
                        head,
                        tokens: tokens.clone(),
                        partials: partials..partials + n,
                    });
                    partials += n;
                }
            }
        }
    }
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
                tokens,
                parts: wanted,
            };
            cut(&spans, how, &mut parts, &mut merges);
            for (i, span) in spans.iter().enumerate() {
                for head in 0..2 {
                    for token in 0..span.n_tokens {
                        let mut seen: Vec<_> = parts
                            .iter()
                            .filter(|p| p.span == i && p.head == head && p.tokens.contains(&token))
                            .map(|p| (p.context.clone(), p.partial))
                            .collect();
                        seen.sort_by_key(|(context, _)| context.start);
                        let mut at = 0;
                        for (context, _) in &seen {
                            assert_eq!(context.start, at);
                            at = context.end;
                        }
                        assert!(at > span.start + token);
                        let merged = merges
                            .iter()
                            .filter(|m| m.span == i && m.head == head && m.tokens.contains(&token));
                        let merged: Vec<_> = merged.collect();
                        match &seen[..] {
                            [(_, None)] => assert!(merged.is_empty()),
                            _ => {
                                assert_eq!(merged.len(), 1);
                                let partials: Vec<_> =
                                    seen.iter().map(|(_, p)| p.unwrap()).collect();
                                assert_eq!(
                                    partials,
                                    merged[0].partials.clone().collect::<Vec<_>>()
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}
