//! How many prompt tokens a step takes beside decodes, so that answers keep flowing: as many as earlier steps' times promise to
//! fit. Pure: whoever runs the steps says how long they took.
//!
//! A step may take so many times as long as its decodes would alone. What one takes beyond that is a debt, which steps of
//! decodes alone pay back; so prompts go on whatever a step costs, and answers are not held up more on average.

/// Rows that a step is filled up to. Kernels compute rows in groups, and a group that is not full costs no less.
const RUNGS: [usize; 8] = [4, 8, 16, 32, 64, 128, 256, 512];
/// Share of the newest time in an estimate.
const WEIGHT: f64 = 0.25;
/// Times its estimate that a step counts for at most: one that was held up says nothing of the next.
const OUTLIER: f64 = 2.0;
/// A rung that was never tried is taken to cost so many times what the one below costs.
const UNTRIED: f64 = 1.3;
/// What estimates of higher rungs keep at each step, so that those are tried again: costs change.
const FADING: f64 = 0.99;
/// Steps with prompts, after which one without shows again what decodes take alone.
const REFRESH: u32 = 16;
/// The highest debt, in steps of decodes alone.
const MAX_DEBT: f64 = 8.0;

/// What is known of steps' times, in seconds.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    stretch: f64,
    /// Of steps without prompts, by their decodes less one.
    alone: Vec<Option<f64>>,
    /// Of steps with prompts, by rung.
    together: [Option<f64>; RUNGS.len()],
    /// What steps with prompts took too long.
    debt: f64,
    /// Steps with prompts since one without.
    since_alone: u32,
}

impl Pace {
    /// Nothing is known yet of steps of at most `max_decodes` decodes. They may take `stretch` times as long with prompts.
    pub(crate) fn new(stretch: f64, max_decodes: usize) -> Self {
        Self {
            stretch,
            alone: vec![None; max_decodes],
            together: [None; RUNGS.len()],
            debt: 0.0,
            since_alone: 0,
        }
    }

    /// Prompt tokens for a step with so many decodes, at least one; perhaps none this time.
    pub(crate) fn tokens(&self, decodes: usize) -> usize {
        let first = RUNGS.partition_point(|&rows| rows <= decodes);
        let fill = |rung: usize| RUNGS.get(rung).map_or(1, |rows| rows - decodes);
        let Some(alone) = self.alone(decodes) else {
            return fill(first);
        };
        if self.since_alone >= REFRESH {
            return 0;
        }
        let limit = alone * self.stretch - self.debt;
        let mut cost = alone;
        let fits = |rung: &usize| {
            cost = self.together[*rung].unwrap_or(cost * UNTRIED);
            cost <= limit
        };
        match (first..RUNGS.len()).take_while(fits).last() {
            Some(rung) => fill(rung),
            None if self.debt > 0.0 => 0,
            None => fill(first),
        }
    }

    /// A step of so many decodes and, with the prompts', `rows` tokens took `seconds`.
    pub(crate) fn took(&mut self, decodes: usize, rows: usize, seconds: f64) {
        let Some(at) = decodes.checked_sub(1).filter(|&at| at < self.alone.len()) else {
            return;
        };
        if rows == decodes {
            learn(&mut self.alone[at], seconds);
            self.since_alone = 0;
            let alone = self.alone[at].unwrap_or(seconds);
            self.debt = (self.debt - alone * (self.stretch - 1.0)).max(0.0);
            return;
        }
        self.since_alone += 1;
        let mut counted = seconds;
        if let Ok(rung) = RUNGS.binary_search(&rows) {
            counted = learn(&mut self.together[rung], seconds);
            let higher = self.together[rung + 1..].iter_mut().flatten();
            higher.for_each(|cost| *cost *= FADING);
        }
        if let Some(alone) = self.alone(decodes) {
            let debt = self.debt + counted - alone * self.stretch;
            self.debt = debt.clamp(0.0, alone * MAX_DEBT);
        }
    }

    /// What so many decodes take alone; what fewer take, or more, where that is not known.
    fn alone(&self, decodes: usize) -> Option<f64> {
        let (fewer, more) = self.alone.split_at(decodes.min(self.alone.len()));
        let mut nearest = fewer.iter().rev().chain(more);
        *nearest.find(|time| time.is_some())?
    }
}

/// Enters a time, as far as it counts; returns that.
fn learn(estimate: &mut Option<f64>, seconds: f64) -> f64 {
    let known = estimate.unwrap_or(seconds);
    let counted = seconds.min(known * OUTLIER);
    *estimate = Some(known + (counted - known) * WEIGHT);
    counted
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What happened while a prompt was computed beside decodes.
    struct Run {
        /// How many times as long a step took as its decodes alone.
        stretch: f64,
        /// The same, of the longest step.
        longest: f64,
        /// Prompt tokens a second.
        rate: f64,
    }

    /// `n` steps on a device where a step of so many rows takes `cost` seconds.
    fn run(pace: &mut Pace, decodes: usize, n: usize, cost: impl Fn(usize) -> f64) -> Run {
        let (mut time, mut longest, mut tokens) = (0.0, 0.0_f64, 0);
        for _ in 0..n {
            let beside = pace.tokens(decodes);
            let rows = decodes + beside;
            pace.took(decodes, rows, cost(rows));
            time += cost(rows);
            longest = longest.max(cost(rows));
            tokens += beside;
        }
        let alone = cost(decodes);
        Run {
            stretch: time / n as f64 / alone,
            longest: longest / alone,
            rate: tokens as f64 / time,
        }
    }

    /// As a small model on two cores: reading the weights, then groups of four rows.
    fn small(rows: usize) -> f64 {
        match rows {
            0..=2 => 0.0025 + 0.0004 * rows as f64,
            _ => 0.002 + 0.0035 * rows.div_ceil(4) as f64,
        }
    }

    /// As a large model: next to the reading, a few rows cost nothing.
    fn large(rows: usize) -> f64 {
        0.1 + 0.001 * rows as f64
    }

    fn known(decodes: usize, cost: impl Fn(usize) -> f64) -> Pace {
        let mut pace = Pace::new(1.8, 8);
        for _ in 0..9 {
            pace.took(decodes, decodes, cost(decodes));
        }
        pace
    }

    #[test]
    fn prompts_stretch_steps_as_far_as_they_may_on_average() {
        for decodes in 1..=8 {
            let mut pace = known(decodes, small);
            let steady = run(&mut pace, decodes, 2000, small);
            assert!(steady.stretch < 1.85, "{decodes}: {}", steady.stretch);
            assert!(steady.rate > 300.0, "{decodes}: {}", steady.rate);
        }
    }

    #[test]
    fn where_rows_are_cheap_a_step_takes_many() {
        let mut pace = known(1, large);
        let steady = run(&mut pace, 1, 2000, large);
        assert!(steady.stretch < 1.8 && steady.longest < 2.5);
        assert!(steady.rate > 300.0, "{}", steady.rate);
    }

    #[test]
    fn a_step_that_cannot_fit_is_paid_back_and_prompts_go_on() {
        let dear = |rows: usize| if rows > 1 { 0.010 } else { 0.001 };
        let mut pace = known(1, dear);
        let steady = run(&mut pace, 1, 2000, dear);
        assert!(steady.stretch < 1.85, "{}", steady.stretch);
        assert!(steady.rate > 100.0, "{}", steady.rate);
    }

    #[test]
    fn it_follows_a_device_that_becomes_slower_and_faster_again() {
        let mut pace = known(1, small);
        let before = run(&mut pace, 1, 500, small);
        run(&mut pace, 1, 500, |rows| 4.0 * small(rows));
        let settled = run(&mut pace, 1, 500, |rows| 4.0 * small(rows));
        assert!(settled.stretch < 1.9 && settled.rate > before.rate / 5.0);
        run(&mut pace, 1, 200, small);
        let after = run(&mut pace, 1, 500, small);
        assert!(after.stretch < 1.9 && after.rate > before.rate * 0.9);
    }

    #[test]
    fn a_step_that_was_held_up_costs_prompts_little() {
        let mut pace = known(1, small);
        run(&mut pace, 1, 500, small);
        pace.took(1, 4, 1.0);
        let after = run(&mut pace, 1, 100, small);
        assert!(after.rate > 300.0, "{}", after.rate);
    }

    #[test]
    fn at_first_a_step_is_filled_up() {
        let pace = Pace::new(1.8, 1024);
        let first = [1, 3, 4, 7, 8, 600].map(|decodes| pace.tokens(decodes));
        assert_eq!(first, [3, 1, 4, 1, 8, 1]);
    }
}
