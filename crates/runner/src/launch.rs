//! How a batch becomes launches: which rows go together, and the packed array of each launch's small inputs.

use baton_engine::{Batch, Row, Sampling};
use baton_graph::Packing;
use baton_model::llama::input;
use baton_model::{Ladder, Program};
use std::ops::Range;

/// One launch of a step program for some rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) program: Program,
    /// Which entries of [`Plan::order`].
    pub(crate) rows: Range<usize>,
}

/// A batch's launches. Reused from step to step.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Indices of the batch's rows in the order of launches.
    pub(crate) order: Vec<usize>,
    pub(crate) launches: Vec<Launch>,
}

impl Plan {
    /// Decodes share launches; every prefill has its own.
    pub(crate) fn make(&mut self, batch: &Batch, ladder: &Ladder) {
        self.order.clear();
        self.launches.clear();
        let single = |row: &Row| row.tokens.len() == 1 && !ladder.decode.is_empty();
        let most = ladder.decode.last().copied().unwrap_or(1);
        self.order
            .extend((0..batch.rows.len()).filter(|&i| single(&batch.rows[i])));
        let n_single = self.order.len();
        for start in (0..n_single).step_by(most) {
            let rows = start..n_single.min(start + most);
            let program = Program::Decode(Ladder::rung(&ladder.decode, rows.len()));
            self.launches.push(Launch { program, rows });
        }
        for (i, row) in batch
            .rows
            .iter()
            .enumerate()
            .filter(|(_, row)| !single(row))
        {
            let place = self.order.len();
            self.order.push(i);
            let program = Program::Prefill(Ladder::rung(&ladder.prefill, row.tokens.len()));
            self.launches.push(Launch {
                program,
                rows: place..place + 1,
            });
        }
    }
}

/// Writes a launch's small inputs over `words`. Everything not written is zero: padding rows have no tokens, are
/// greedy, and read block 0.
pub(crate) fn pack(batch: &Batch, rows: &[usize], packing: &Packing, words: &mut Vec<i32>) {
    words.clear();
    words.resize(packing.len, 0);
    let n_seqs = packing.range(input::LEN).map_or(1, |r| r.len()).max(1);
    let mut put = |name: &str, seq: usize, values: &mut dyn Iterator<Item = i32>| {
        let Some(field) = packing.range(name) else {
            return;
        };
        let each = field.len() / n_seqs;
        let part = &mut words[field.start + seq * each..][..each];
        part.iter_mut()
            .zip(values)
            .for_each(|(word, value)| *word = value);
    };
    for (seq, &i) in rows.iter().enumerate() {
        let row = &batch.rows[i];
        let sampling = row.sampling.as_ref().unwrap_or(&Sampling::GREEDY);
        let mut one = |name: &str, value: i32| put(name, seq, &mut std::iter::once(value));
        one(input::START, word(row.start));
        one(input::LEN, word(row.tokens.len()));
        one(
            input::TEMPERATURE,
            sampling.temperature.to_bits().cast_signed(),
        );
        one(
            input::TOP_K,
            i32::try_from(sampling.top_k).unwrap_or(i32::MAX),
        );
        one(input::TOP_P, sampling.top_p.to_bits().cast_signed());
        one(input::MIN_P, sampling.min_p.to_bits().cast_signed());
        put(
            input::TOKENS,
            seq,
            &mut batch.tokens[row.tokens.clone()]
                .iter()
                .map(|t| t.cast_signed()),
        );
        put(
            input::TABLES,
            seq,
            &mut batch.blocks[row.blocks.clone()]
                .iter()
                .map(|b| b.0.cast_signed()),
        );
        let seed = [low(sampling.seed), low(sampling.seed >> 32)];
        put(input::SEED, seq, &mut seed.into_iter());
    }
}

fn word(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the low word is what is wanted"
)]
fn low(n: u64) -> i32 {
    (n as u32).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_graph::Field;
    use baton_kv::BlockId;

    fn batch(lens: &[usize]) -> Batch {
        let mut batch = Batch::default();
        for (i, &n) in lens.iter().enumerate() {
            let (t, b) = (batch.tokens.len(), batch.blocks.len());
            batch
                .tokens
                .extend((0..n).map(|k| u32::try_from(100 * i + k).unwrap()));
            batch
                .blocks
                .extend([BlockId(u32::try_from(i).unwrap() + 1)]);
            batch.rows.push(Row {
                tokens: t..t + n,
                blocks: b..b + 1,
                start: i,
                sampling: None,
            });
        }
        batch
    }

    fn ladder() -> Ladder {
        Ladder {
            decode: vec![1, 2],
            prefill: vec![4, 8],
            transfer: vec![],
        }
    }

    #[test]
    fn decodes_share_launches_and_prefills_do_not() {
        let mut plan = Plan::default();
        plan.make(&batch(&[1, 5, 1, 1, 3]), &ladder());
        assert_eq!(plan.order, [0, 2, 3, 1, 4]);
        let programs: Vec<_> = plan
            .launches
            .iter()
            .map(|l| (l.program, l.rows.clone()))
            .collect();
        let expected = [
            (Program::Decode(2), 0..2),
            (Program::Decode(1), 2..3),
            (Program::Prefill(8), 3..4),
            (Program::Prefill(4), 4..5),
        ];
        assert_eq!(programs, expected);
    }

    #[test]
    fn a_server_without_decode_programs_prefills_single_tokens() {
        let mut plan = Plan::default();
        plan.make(
            &batch(&[1]),
            &Ladder {
                decode: vec![],
                ..ladder()
            },
        );
        assert_eq!(
            plan.launches,
            [Launch {
                program: Program::Prefill(4),
                rows: 0..1
            }]
        );
    }

    #[test]
    fn rows_are_packed_field_by_field_and_padding_is_zero() {
        let names = [
            (input::TOKENS, 4),
            (input::START, 2),
            (input::LEN, 2),
            (input::TABLES, 6),
            (input::SEED, 4),
        ];
        let mut packing = Packing::default();
        for (name, len) in names {
            packing.fields.push(Field {
                name: name.to_owned(),
                offset: packing.len,
                len,
            });
            packing.len += len;
        }
        let mut batch = batch(&[2, 1]);
        batch.rows[1].sampling = Some(Sampling {
            seed: 0x1_0000_0002,
            ..Sampling::GREEDY
        });
        let mut words = vec![7; 99];
        pack(&batch, &[1], &packing, &mut words);
        assert_eq!(
            words,
            [100, 0, 0, 0, 1, 0, 1, 0, 2, 0, 0, 0, 0, 0, 2, 1, 0, 0]
        );
    }
}
