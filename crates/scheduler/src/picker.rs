//! Who is taken, of those that have scores. Chance is a number that the caller gives.

/// Takes some of the candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picker {
    /// How.
    pub by: Picking,
    /// Most candidates that are taken, at least 1.
    pub most: usize,
}

/// How candidates are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Picking {
    /// The best; chance decides between equals.
    MaxScore,
    /// The best; equals are used in turn, as the caller counts.
    MaxScoreInTurn,
    /// Any.
    Random,
    /// Any, a better one with a greater chance.
    WeightedRandom,
}

/// Numbers that look random, from one that was given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64: a good mix even of seeds that count up.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// A number from above 0 to 1.
    pub(crate) fn fraction(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

/// What picking needs and uses again.
#[derive(Debug, Default)]
pub(crate) struct Bench {
    order: Vec<u32>,
    keys: Vec<f64>,
}

impl Picker {
    /// One candidate, taken as `by` says.
    #[must_use]
    pub fn one(by: Picking) -> Self {
        Self { by, most: 1 }
    }

    /// Puts the positions of those that are taken into `picked`, best first. `turn` is what the caller counts, `dice`
    /// its chance.
    pub(crate) fn pick(
        &self,
        scores: &[f64],
        turn: u64,
        dice: &mut Dice,
        bench: &mut Bench,
        picked: &mut Vec<u32>,
    ) {
        picked.clear();
        if scores.is_empty() {
            return;
        }
        match (self.by, self.most) {
            (Picking::MaxScore, 0 | 1) => {
                let seed = dice.next();
                picked.extend(best(scores, |n| pick_below(seed, n)));
            }
            (Picking::MaxScoreInTurn, 0 | 1) => {
                picked.extend(best(scores, |n| (turn % n as u64) as usize));
            }
            (Picking::Random, 0 | 1) => picked.push(dice.below(scores.len()) as u32),
            (by, most) => {
                bench.shuffle(
                    scores.len(),
                    (by != Picking::MaxScoreInTurn).then_some(&mut *dice),
                );
                match by {
                    Picking::Random => {}
                    Picking::WeightedRandom => bench.sort(|i| reservoir_key(scores[i], dice)),
                    Picking::MaxScore => bench.sort(|i| scores[i]),
                    Picking::MaxScoreInTurn => {
                        let shift = (turn % scores.len() as u64) as usize;
                        bench.order.rotate_left(shift);
                        bench.sort(|i| scores[i]);
                    }
                }
                picked.extend(bench.order.iter().take(most.max(1)));
            }
        }
    }
}

fn pick_below(seed: u64, n: usize) -> usize {
    ((u128::from(seed) * n as u128) >> 64) as usize
}

/// The position of the highest score; of several, the one that `choose` says.
fn best(scores: &[f64], choose: impl FnOnce(usize) -> usize) -> Option<u32> {
    let highest = scores.iter().copied().max_by(f64::total_cmp)?;
    let is_best = |s: &&f64| s.total_cmp(&highest).is_eq();
    let n_best = scores.iter().filter(is_best).count();
    let chosen = choose(n_best);
    let of_best = scores.iter().enumerate().filter(|(_, s)| is_best(s));
    of_best.map(|(i, _)| i as u32).nth(chosen)
}

/// The logarithm of `u^(1/score)`, u being chance: the greatest of such keys fall on candidates in proportion to their
/// scores. A candidate without a score comes after all others.
fn reservoir_key(score: f64, dice: &mut Dice) -> f64 {
    if score > 0.0 {
        dice.fraction().ln() / score
    } else {
        f64::NEG_INFINITY
    }
}

impl Bench {
    /// All positions, in an order that `dice` decides, or in their own.
    fn shuffle(&mut self, n: usize, dice: Option<&mut Dice>) {
        self.order.clear();
        self.order.extend(0..n as u32);
        let Some(dice) = dice else { return };
        for i in (1..n).rev() {
            self.order.swap(i, dice.below(i + 1));
        }
    }

    /// Sorts the positions by descending `key`; equals keep their order.
    fn sort(&mut self, key: impl FnMut(usize) -> f64) {
        self.keys.clear();
        self.keys.extend((0..self.order.len()).map(key));
        let keys = &self.keys;
        self.order
            .sort_by(|a, b| keys[*b as usize].total_cmp(&keys[*a as usize]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(picker: Picker, scores: &[f64], turn: u64) -> Vec<u32> {
        let mut picked = Vec::new();
        let mut dice = Dice::new(turn);
        picker.pick(scores, turn, &mut dice, &mut Bench::default(), &mut picked);
        picked
    }

    fn share(picker: Picker, scores: &[f64]) -> Vec<f64> {
        let mut counts = vec![0; scores.len()];
        for seed in 0..4000 {
            counts[pick(picker, scores, seed)[0] as usize] += 1;
        }
        counts.iter().map(|c| f64::from(*c) / 4000.0).collect()
    }

    #[test]
    fn the_best_is_taken_and_chance_decides_between_equals() {
        for most in [1, 2] {
            let picker = Picker {
                by: Picking::MaxScore,
                most,
            };
            let shares = share(picker, &[1.0, 0.5, 1.0, 1.0, -1.0]);
            assert_eq!((shares[1], shares[4]), (0.0, 0.0));
            assert!(
                [0, 2, 3].iter().all(|i| (shares[*i] - 0.333).abs() < 0.05),
                "{shares:?}"
            );
        }
    }

    #[test]
    fn equals_are_used_in_turn_if_that_is_asked_for() {
        for most in [1, 3] {
            let picker = Picker {
                by: Picking::MaxScoreInTurn,
                most,
            };
            let taken: Vec<u32> = (0..3)
                .map(|turn| pick(picker, &[1.0, 1.0, 1.0], turn)[0])
                .collect();
            assert_eq!(taken, [0, 1, 2]);
        }
    }

    #[test]
    fn several_are_taken_best_first_and_no_more_than_there_are() {
        let by = |by| Picker { by, most: 3 };
        assert_eq!(
            pick(by(Picking::MaxScore), &[0.1, 0.9, 0.5, 0.7], 5),
            [1, 3, 2]
        );
        assert_eq!(pick(by(Picking::MaxScoreInTurn), &[0.1, 0.9], 5), [1, 0]);
        let mut any = pick(by(Picking::Random), &[0.0, 0.0], 5);
        any.sort_unstable();
        assert_eq!(any, [0, 1]);
        assert_eq!(pick(by(Picking::Random), &[], 5), [0; 0]);
    }

    #[test]
    fn weighted_chance_goes_by_score() {
        let picker = Picker::one(Picking::WeightedRandom);
        let shares = share(picker, &[3.0, 1.0, 0.0]);
        assert!(
            (shares[0] - 0.75).abs() < 0.04 && shares[2] == 0.0,
            "{shares:?}"
        );
        let none = share(picker, &[0.0, 0.0]);
        assert!((none[0] - 0.5).abs() < 0.04, "{none:?}");
        let any = share(Picker::one(Picking::Random), &[3.0, 1.0]);
        assert!((any[0] - 0.5).abs() < 0.04, "{any:?}");
    }
}
