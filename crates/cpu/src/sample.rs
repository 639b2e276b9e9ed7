//! Draws tokens from logits: what the graph's sampling node means, for one row and without sorting it.
//!
//! Temperature, then min-p, top-k and top-p, then one draw; tokens as likely as the last one kept are kept too. The
//! draw is the first maximum of scores plus Gumbel noise, which Threefry-2x32 makes from (seed; position, token id).
//! So the same logits give the same token here and in a compiled program, except where the rounding of logarithms,
//! exponentials and sums decides. Nothing here knows of models, batches or threads.

use crate::simd::{Isa, Simd, Task};
use baton_engine::Sampling;

/// Scores that are looked at together.
const CHUNK: usize = 64;

/// Running sums side by side, which the compiler turns into vectors.
const LANES: usize = 16;

/// Above every noise: the greatest is `33 ln 2`.
const MOST_NOISE: f32 = 22.9;

/// Room that draws reuse; at most two numbers for each token of the vocabulary.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// Logits less their maximum, divided by the temperature; the last chunk is filled up with impossible tokens.
    scores: Vec<[f32; CHUNK]>,
    /// Scores among which a threshold is sought.
    candidates: Vec<f32>,
}

impl Sampler {
    /// The token that takes `position`: as many tokens are before it. It is `logits.len()` where logits give no
    /// probabilities: one is not a number or, unless the likeliest is asked for, the greatest is infinite.
    pub(crate) fn draw(&mut self, logits: &[f32], sampling: &Sampling, position: u32) -> u32 {
        Isa::detect().run(Draw {
            room: self,
            logits,
            sampling,
            position,
        })
    }

    /// Fills in the scores.
    #[inline(always)]
    fn temper(&mut self, logits: &[f32], peak: f32, temperature: f32) {
        let score = |x: f32| (x - peak) / temperature;
        let (chunks, rest) = logits.as_chunks();
        self.scores.clear();
        self.scores.extend(chunks.iter().map(|c| c.map(score)));
        if !rest.is_empty() {
            let mut last = [f32::NEG_INFINITY; CHUNK];
            for (to, &x) in last.iter_mut().zip(rest) {
                *to = score(x);
            }
            self.scores.push(last);
        }
    }

    /// The least score that min-p, top-k and top-p all keep; never above the likeliest token's, which is 0.
    #[inline(always)]
    fn threshold(&mut self, sampling: &Sampling, n_tokens: usize) -> f32 {
        let mut least = sampling.min_p.ln();
        let k = usize::try_from(sampling.top_k).unwrap_or(usize::MAX);
        if 0 < k && k < n_tokens {
            least = least.max(self.kth(k));
        }
        if sampling.top_p < 1.0 {
            least = least.max(self.nucleus(least, sampling.top_p));
        }
        least.min(0.0)
    }

    /// The `k`-th greatest score. Keeps the best ones seen so far, and whenever they are twice as many as needed drops
    /// the lesser half, so that most scores are only looked at.
    #[inline(always)]
    fn kth(&mut self, k: usize) -> f32 {
        let best = &mut self.candidates;
        best.clear();
        let mut bound = f32::NEG_INFINITY;
        for chunk in &self.scores {
            if has(chunk, |x| x > bound) {
                pick(chunk, |x| x > bound, best);
                if best.len() >= 2 * k.max(CHUNK) {
                    bound = descend(best, k - 1);
                    best.truncate(k);
                }
            }
        }
        if best.len() < k {
            return f32::NEG_INFINITY;
        }
        descend(best, k - 1)
    }

    /// The greatest score such that the tokens from it upwards have `share` of the probability of all that score at
    /// least `least`.
    #[inline(always)]
    fn nucleus(&mut self, least: f32, share: f32) -> f32 {
        let total = mass(self.scores.as_flattened(), least);
        let (target, n_tokens) = (f64::from(share) * total, CHUNK * self.scores.len());
        // All tokens below this together have no more than half of what the nucleus may lack.
        let bound = ((total - target) / (2 * n_tokens) as f64).ln() as f32;
        let bound = least.max(bound);
        let some = &mut self.candidates;
        some.clear();
        for chunk in &self.scores {
            if has(chunk, |x| x >= bound) {
                pick(chunk, |x| x >= bound, some);
            }
        }
        edge(some, bound, target)
    }
}

/// One draw, compiled for each instruction set.
struct Draw<'a> {
    room: &'a mut Sampler,
    logits: &'a [f32],
    sampling: &'a Sampling,
    position: u32,
}

impl Task for Draw<'_> {
    type Output = u32;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> u32 {
        let (logits, how) = (self.logits, self.sampling);
        let peak = greatest(logits);
        let random = how.temperature > 0.0;
        if !random {
            return id(first(logits, peak));
        }
        if !peak.is_finite() {
            return id(logits.len());
        }
        self.room.temper(logits, peak, how.temperature);
        let least = self.room.threshold(how, logits.len());
        let noise = Noise::new(how.seed, self.position);
        id(loudest(&self.room.scores, least, &noise))
    }
}

/// The greatest; not a number if any is not.
#[inline(always)]
fn greatest(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<CHUNK>();
    let mut most = [f32::NEG_INFINITY; CHUNK];
    most[..rest.len()].copy_from_slice(rest);
    let mut odd = has(&most, f32::is_nan);
    for chunk in chunks {
        for (most, &x) in most.iter_mut().zip(chunk) {
            *most = if *most < x { x } else { *most };
        }
        odd |= has(chunk, f32::is_nan);
    }
    if odd { f32::NAN } else { highest(&most) }
}

/// Whether a number fulfils the condition. It looks at all of them, which as vector code is faster than to stop.
#[inline(always)]
fn has(chunk: &[f32; CHUNK], holds: impl Fn(f32) -> bool) -> bool {
    chunk.iter().fold(0, |any, &x| any | u32::from(holds(x))) != 0
}

/// Appends the scores that fulfil the condition, without a branch that nobody can predict.
#[inline(always)]
fn pick(chunk: &[f32; CHUNK], holds: impl Fn(f32) -> bool, to: &mut Vec<f32>) {
    let (mut picked, mut n) = ([0.0; CHUNK], 0);
    for &x in chunk {
        picked[n] = x;
        n += usize::from(holds(x));
    }
    to.extend_from_slice(&picked[..n]);
}

/// The highest of numbers.
#[inline(always)]
fn highest(chunk: &[f32; CHUNK]) -> f32 {
    let mut most = *chunk;
    let mut half = CHUNK / 2;
    while half > 0 {
        let (low, high) = most.split_at_mut(half);
        for (low, &high) in low.iter_mut().zip(high.iter()) {
            *low = if *low < high { high } else { *low };
        }
        half /= 2;
    }
    most[0]
}

/// Where `value` is first; the number of all if nowhere.
#[inline(always)]
fn first(x: &[f32], value: f32) -> usize {
    let (chunks, _) = x.as_chunks::<CHUNK>();
    let chunk = chunks
        .iter()
        .position(|chunk| has(chunk, |x| x == value))
        .unwrap_or(chunks.len());
    let start = chunk * CHUNK;
    let within = x[start..].iter().position(|&x| x == value);
    within.map_or(x.len(), |i| start + i)
}

fn id(token: usize) -> u32 {
    u32::try_from(token).unwrap_or(u32::MAX)
}

/// The element after `n` others in descending order, which come to lie before it.
fn descend(x: &mut [f32], n: usize) -> f32 {
    *x.select_nth_unstable_by(n, |a, b| b.total_cmp(a)).1
}

/// The greatest score such that those from it upwards weigh at least `target`; all are at least `low`. Halves the range
/// of scores a few times, then the number of those that are left.
#[inline(always)]
fn edge(scores: &mut Vec<f32>, mut low: f32, mut target: f64) -> f32 {
    let (mut high, mut above) = (f32::MIN_POSITIVE, 0.0);
    for _ in 0..4 {
        let middle = 0.5 * (low + high);
        let mass = mass(scores, middle);
        if mass >= target {
            low = middle;
        } else {
            (high, above) = (middle, mass);
        }
    }
    scores.retain(|&x| low <= x && x < high);
    target -= above;
    let mut scores = scores.as_mut_slice();
    while scores.len() > 1 {
        let middle = scores.len() / 2;
        descend(scores, middle);
        let (upper, lower) = scores.split_at_mut(middle);
        let mass = mass(upper, f32::NEG_INFINITY);
        if mass >= target {
            scores = upper;
        } else {
            target -= mass;
            scores = lower;
        }
    }
    scores.first().copied().unwrap_or(f32::NEG_INFINITY)
}

/// Sum of `e^x` over all scores from `least` upwards.
#[inline(always)]
fn mass(scores: &[f32], least: f32) -> f64 {
    let weight = |x: f32| if x >= least { exp(x) } else { 0.0 };
    let (chunks, rest) = scores.as_chunks::<CHUNK>();
    let mut sum = 0.0;
    for chunk in chunks {
        if !has(chunk, |x| x >= least) {
            continue;
        }
        let mut lanes = [0.0; LANES];
        for part in chunk.as_chunks::<LANES>().0 {
            for (lane, &x) in lanes.iter_mut().zip(part) {
                *lane += weight(x);
            }
        }
        sum += f64::from(lanes.into_iter().sum::<f32>());
    }
    sum + f64::from(rest.iter().map(|&x| weight(x)).sum::<f32>())
}

/// `e^x` for `x` up to 0, to about 2e-7 of itself; never less than about `e^-87`, which is as good as nothing.
/// Unlike the library's it becomes vector code.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Added to a small number, leaves its nearest integer in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// `ln 2` in two parts; the first has few bits, so that its multiples are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = if x > -87.0 { x } else { -87.0 };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let whole = rounded - ROUND;
    let part = (x - whole * LN_2[0]) - whole * LN_2[1];
    let mut series = 1.0 / 5040.0;
    for divisor in [720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0_f32] {
        series = series * part + 1.0 / divisor;
    }
    let power = (rounded.to_bits() << 23).wrapping_add(1.0_f32.to_bits());
    series * f32::from_bits(power)
}

/// The first maximum of score plus noise among the scores from `least` upwards. Threefry alone tells of most tokens
/// that they cannot win; few logarithms are taken.
#[inline(always)]
fn loudest(scores: &[[f32; CHUNK]], least: f32, noise: &Noise) -> usize {
    let (mut best, mut token) = (f32::NEG_INFINITY, 0);
    for (start, chunk) in (0..).step_by(CHUNK).zip(scores) {
        let least = least.max(best - MOST_NOISE);
        if !has(chunk, |x| x >= least) {
            continue;
        }
        let top = highest(chunk);
        let bits = noise.bits(id(start));
        let limit = bits_above(best - top);
        let may_win = |i: usize| (bits[i] <= limit) & (chunk[i] >= least);
        if !(0..CHUNK).fold(false, |any, i| any | may_win(i)) {
            continue;
        }
        for i in (0..CHUNK).filter(|&i| may_win(i)) {
            let loudness = chunk[i] + gumbel(bits[i]);
            if loudness > best {
                (best, token) = (loudness, start + i);
            }
        }
    }
    token
}

/// `-ln(-ln(1 - u))` with u in (0, 1) from 32 random bits, exact where the noise is great.
fn gumbel(bits: u32) -> f32 {
    let u = (bits as f32 + 0.5) * 2f32.powi(-32);
    let u = u.min(1.0 - f32::EPSILON / 2.0);
    -(-(-u).ln_1p()).ln()
}

/// Bits above this give less than `noise`: `u` is at most `-ln(1 - u)`, which is `e^-noise`. Errs upwards.
#[inline(always)]
fn bits_above(noise: f32) -> u32 {
    let u = exp(-noise.max(0.0));
    (u * (1.0001 * 2f32.powi(32))) as u32
}

/// One position's random numbers.
struct Noise {
    keys: [u32; 3],
    position: u32,
}

impl Noise {
    fn new(seed: u64, position: u32) -> Self {
        let [low, high] = [seed as u32, (seed >> 32) as u32];
        Self {
            keys: [low, high, low ^ high ^ 0x1BD1_1BDA],
            position,
        }
    }

    /// Of the tokens from `start`.
    #[inline(always)]
    fn bits(&self, start: u32) -> [u32; CHUNK] {
        let mut bits = [0; CHUNK];
        for (token, bits) in (start..).zip(&mut bits) {
            *bits = self.threefry(token);
        }
        bits
    }

    /// First word of Threefry-2x32 with 20 rounds.
    #[inline(always)]
    fn threefry(&self, token: u32) -> u32 {
        const ROTATIONS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];
        let mut x = self.position.wrapping_add(self.keys[0]);
        let mut y = token.wrapping_add(self.keys[1]);
        for group in 0..5 {
            for bits in ROTATIONS[group % 2] {
                x = x.wrapping_add(y);
                y = y.rotate_left(bits) ^ x;
            }
            x = x.wrapping_add(self.keys[(group + 1) % 3]);
            y = y
                .wrapping_add(self.keys[(group + 2) % 3])
                .wrapping_add(group as u32 + 1);
        }
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLAIN: Sampling = Sampling {
        temperature: 1.0,
        seed: 0x1234_5678_9abc_def0,
        ..Sampling::GREEDY
    };

    fn draw(logits: &[f32], sampling: &Sampling, position: u32) -> u32 {
        Sampler::default().draw(logits, sampling, position)
    }

    /// The least score kept, by sorting.
    fn least_by_sorting(scores: &[f32], how: &Sampling) -> f32 {
        let mut sorted = scores.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let mut least = how.min_p.ln();
        if how.top_k > 0 && (how.top_k as usize) < sorted.len() {
            least = least.max(sorted[how.top_k as usize - 1]);
        }
        sorted.retain(|&x| x >= least);
        let total: f64 = sorted.iter().map(|&x| f64::from(x).exp()).sum();
        let mut mass = 0.0;
        let last = sorted.iter().find(|&&x| {
            mass += f64::from(x).exp();
            mass >= f64::from(how.top_p) * total
        });
        match last {
            Some(&last) if how.top_p < 1.0 => least.max(last),
            _ => least,
        }
    }

    fn scores(logits: &[f32], temperature: f32) -> Vec<f32> {
        let peak = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        logits.iter().map(|x| (x - peak) / temperature).collect()
    }

    /// The same with the bounds of probability looser (above 1) or tighter by that factor, to one side and the other
    /// of which rounding may fall.
    fn eased(how: &Sampling, by: f32) -> Sampling {
        let lack = (1.0 - how.top_p) / by;
        Sampling {
            top_p: if how.top_p < 1.0 {
                (how.top_p * by).min(1.0 - lack)
            } else {
                1.0
            },
            min_p: how.min_p / by,
            ..how.clone()
        }
    }

    fn settings() -> impl Strategy<Value = Sampling> {
        let top_k = prop_oneof![Just(0), 1..10_u32, 1..400_u32];
        let top_p = prop_oneof![Just(1.0_f32), Just(0.0), 0.0..1.0_f32, 0.9..1.0_f32];
        let min_p = prop_oneof![Just(0.0_f32), Just(1.0), 0.0..0.2_f32];
        (0.1..3.0_f32, top_k, top_p, min_p, any::<u64>()).prop_map(
            |(temperature, top_k, top_p, min_p, seed)| Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                seed,
                logprobs: None,
            },
        )
    }

    /// Many logits or few, with ties and impossible tokens, and one at least that is possible.
    fn logits() -> impl Strategy<Value = Vec<f32>> {
        let one = prop_oneof![
            8 => -20.0..5.0_f32,
            4 => (-9..3_i8).prop_map(f32::from),
            1 => Just(f32::NEG_INFINITY),
            1 => -3e38..5.0_f32,
        ];
        (prop::collection::vec(one, 1..300), -4.0..4.0_f32).prop_map(|(mut logits, first)| {
            logits[0] = first;
            logits
        })
    }

    proptest! {
        #[test]
        fn the_tokens_kept_are_those_that_sorting_keeps(logits in logits(), how in settings()) {
            let scores = scores(&logits, how.temperature);
            let mut room = Sampler::default();
            let peak = greatest(&logits);
            room.temper(&logits, peak, how.temperature);
            let found = room.threshold(&how, logits.len());
            let kept = |least: f32| scores.iter().filter(|&&x| x >= least).count();
            let [most, fewest] = [1.0 + 1e-6, 1.0 - 1e-6].map(|by| kept(least_by_sorting(&scores, &eased(&how, by)).min(0.0)));
            prop_assert!((fewest..=most).contains(&kept(found)), "{fewest} {} {most}", kept(found));
            let token = draw(&logits, &how, 5) as usize;
            prop_assert!(scores[token] >= found);
        }

        #[test]
        fn greedy_is_the_first_maximum(logits in logits()) {
            let peak = scores(&logits, 1.0).iter().position(|&x| x == 0.0).unwrap();
            prop_assert_eq!(draw(&logits, &Sampling::GREEDY, 0) as usize, peak);
        }

        #[test]
        fn a_draw_depends_on_neither_earlier_ones_nor_the_machine(logits in logits(), how in settings(), position: u32) {
            let mut used = Sampler::default();
            used.draw(&[1.0; 999], &PLAIN, 3);
            used.draw(&logits, &PLAIN, position);
            let expected = draw(&logits, &how, position);
            for isa in Isa::all() {
                let (room, logits, sampling) = (&mut used, logits.as_slice(), &how);
                let draw = Draw { room, logits, sampling, position };
                prop_assert_eq!(isa.run(draw), expected);
            }
        }

        #[test]
        fn the_token_is_the_loudest_of_all_kept(logits in logits(), how in settings(), position: u32) {
            let mut room = Sampler::default();
            let found = room.draw(&logits, &how, position);
            let least = room.threshold(&how, logits.len());
            let noise = Noise::new(how.seed, position);
            let mut best = (f32::NEG_INFINITY, 0);
            for (token, score) in (0..).zip(scores(&logits, how.temperature)) {
                let loudness = score + gumbel(noise.threefry(token));
                if score >= least && loudness > best.0 {
                    best = (loudness, token);
                }
            }
            prop_assert_eq!(found, best.1);
        }
    }

    #[test]
    fn threefry_gives_its_authors_known_answers() {
        let words = |seed, position, token| Noise::new(seed, position).threefry(token);
        assert_eq!(words(0, 0, 0), 0x6b20_0159);
        assert_eq!(words(u64::MAX, u32::MAX, u32::MAX), 0x1cb9_96fc);
        assert_eq!(
            words(0x0370_7344_1319_8a2e, 0x243f_6a88, 0x85a3_08d3),
            0xc492_3a9c
        );
    }

    #[test]
    fn every_equal_token_is_kept_and_drawn() {
        let logits = [2.5; 130];
        for how in [
            PLAIN,
            Sampling { top_k: 3, ..PLAIN },
            Sampling {
                top_p: 0.1,
                ..PLAIN
            },
            Sampling {
                min_p: 1.0,
                ..PLAIN
            },
        ] {
            let mut seen = [false; 130];
            for position in 0..2000 {
                seen[draw(&logits, &how, position) as usize] = true;
            }
            assert!(!seen.contains(&false), "{how:?}");
        }
        assert_eq!(draw(&logits, &Sampling::GREEDY, 0), 0);
    }

    #[test]
    fn logits_without_probabilities_give_the_vocabularys_size() {
        for n in [1, 63, 64, 65, 200] {
            for odd in [0, n / 2, n - 1] {
                let mut logits = vec![0.5; n];
                logits[odd] = f32::NAN;
                assert_eq!(draw(&logits, &Sampling::GREEDY, 0) as usize, n);
                assert_eq!(draw(&logits, &PLAIN, 0) as usize, n);
                logits[odd] = f32::INFINITY;
                assert_eq!(draw(&logits, &Sampling::GREEDY, 0) as usize, odd);
                assert_eq!(draw(&logits, &PLAIN, 0) as usize, n);
            }
            let never = vec![f32::NEG_INFINITY; n];
            assert_eq!(draw(&never, &Sampling::GREEDY, 0), 0);
            assert_eq!(draw(&never, &PLAIN, 0) as usize, n);
        }
        assert_eq!(draw(&[], &Sampling::GREEDY, 0), 0);
        assert_eq!(draw(&[], &PLAIN, 0), 0);
    }

    /// Chi-square with 9 degrees of freedom; 33.7 is exceeded once in ten thousand times.
    #[test]
    fn draws_follow_the_distribution() {
        let (n, mut counts) = (20_000_u32, [0_u32; 100]);
        let mut logits = [f32::NEG_INFINITY; 100];
        let weights: Vec<(usize, f32)> = (0..10).map(|i| (i * 11, 1.0 + i as f32)).collect();
        for &(token, weight) in &weights {
            logits[token] = weight.ln();
        }
        let mut room = Sampler::default();
        for i in 0..n {
            let how = Sampling {
                seed: u64::from(i / 100),
                ..PLAIN
            };
            counts[room.draw(&logits, &how, i % 100) as usize] += 1;
        }
        let chi2: f32 = weights
            .iter()
            .map(|&(token, weight)| {
                let expected = n as f32 * weight / 55.0;
                (counts[token] as f32 - expected).powi(2) / expected
            })
            .sum();
        assert_eq!(weights.iter().map(|w| counts[w.0]).sum::<u32>(), n);
        assert!(chi2 < 33.7, "{chi2}");
    }

    #[test]
    fn weights_are_those_of_the_library() {
        for i in 0..=8700 {
            let x = -0.01 * i as f32;
            let error = f64::from(exp(x)) / f64::from(x).exp() - 1.0;
            assert!(error.abs() < 3e-7, "{x}: {error}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    mod oracle {
        //! The same draws by the graph's program on XLA's CPU plugin.
        use super::*;
        use baton_graph::hlo::Element;
        use baton_graph::{Axis, Graph, KvRows, Lowerings, SampleRows, Source};
        use baton_pjrt::{Arg, Client, CompileOptions, LoadedExecutable, Plugin};

        const ROWS: usize = 8;
        const VOCAB: usize = 2003;
        const ROUNDS: u32 = 250;

        struct Program {
            program: LoadedExecutable,
            client: Client,
        }

        fn text() -> String {
            let mut g = Graph::new("sample");
            let seq = (Axis::Seq, ROWS);
            let mut step = |name: &str, element, axes: &[(Axis, usize)]| {
                g.param(name, Source::Step, element, axes)
            };
            let start = step("start", Element::I32, &[seq]);
            let len = step("len", Element::I32, &[seq]);
            let how = SampleRows {
                temperature: step("temperature", Element::F32, &[seq]),
                top_k: step("top_k", Element::I32, &[seq]),
                top_p: step("top_p", Element::F32, &[seq]),
                min_p: step("min_p", Element::F32, &[seq]),
                seed: step("seed", Element::U32, &[seq, (Axis::Part, 2)]),
            };
            let axes = [seq, (Axis::Vocab, VOCAB)];
            let logits = g.param("logits", Source::Bulk, Element::F32, &axes);
            let rows = KvRows {
                start,
                len,
                tables: start,
            };
            let token = g.sample(logits, how, rows).unwrap();
            g.set_outputs(vec![token]);
            Lowerings::plain().lower(&g).unwrap().text
        }

        impl Program {
            fn new() -> Self {
                let plugin = std::env::var_os("BATON_PJRT_CPU").expect(
                    "BATON_PJRT_CPU must name the CPU plugin's shared library; `baton fetch` brings it, `make test` sets it",
                );
                let plugin = Plugin::load(std::path::Path::new(&plugin)).unwrap();
                let client = Client::create(&plugin, &[("cpu_device_count", 1.into())]).unwrap();
                let program = client.compile(text(), &CompileOptions::default()).unwrap();
                Self { program, client }
            }

            fn draw(&self, logits: &[f32], rows: &[(Sampling, u32)]) -> Vec<i32> {
                let float =
                    |f: fn(&Sampling) -> f32| rows.iter().map(move |r| f(&r.0).to_bits() as i32);
                let mut words: Vec<i32> = rows.iter().map(|r| r.1 as i32 - 1).collect();
                words.extend([1; ROWS]);
                words.extend(float(|h| h.temperature));
                words.extend(rows.iter().map(|r| r.0.top_k as i32));
                words.extend(float(|h| h.top_p));
                words.extend(float(|h| h.min_p));
                words.extend(
                    rows.iter()
                        .flat_map(|r| [r.0.seed as i32, (r.0.seed >> 32) as i32]),
                );
                let device = &self.client.addressable_devices().unwrap()[0];
                let dims = [words.len() as i64];
                let step = self
                    .client
                    .buffer_from_slice(&words, &dims, device)
                    .unwrap();
                let dims = [ROWS as i64, VOCAB as i64];
                let logits = self
                    .client
                    .buffer_from_slice(logits, &dims, device)
                    .unwrap();
                let out = self
                    .program
                    .execute([Arg::Borrow(&step), Arg::Borrow(&logits)]);
                out.unwrap()[0].to_vec::<i32>().unwrap()
            }
        }

        /// Normally distributed; some rows have ties, and some impossible tokens.
        fn row(noise: &Noise, spread: f32, steps: Option<f32>) -> Vec<f32> {
            let uniform = |i| (noise.threefry(i) as f32 + 0.5) * 2f32.powi(-32);
            let normal = |i: u32| {
                let [a, b] = [uniform(2 * i), uniform(2 * i + 1)];
                (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
            };
            let coarse = |(i, x): (u32, f32)| match steps {
                Some(_) if i % 7 == 0 => f32::NEG_INFINITY,
                Some(steps) => (x * steps).round() / steps,
                None => x,
            };
            let normals = (0..VOCAB as u32).map(|i| (i, spread * normal(i)));
            normals.map(coarse).collect()
        }

        fn round(round: u32) -> [Sampling; ROWS] {
            let how = Sampling {
                seed: u64::from(round) * 0x1_2345_6789_abcd,
                ..PLAIN
            };
            let (part, top_k) = (round as f32 / ROUNDS as f32, 1 + round % 60);
            [
                Sampling::GREEDY,
                how.clone(),
                Sampling {
                    temperature: 0.7,
                    top_k,
                    ..how
                },
                Sampling {
                    temperature: 1.5,
                    top_p: part,
                    ..how
                },
                Sampling {
                    temperature: 0.9,
                    min_p: 0.3 * part,
                    ..how
                },
                Sampling {
                    temperature: 0.8,
                    top_k: 40,
                    top_p: 0.95,
                    ..how
                },
                Sampling {
                    temperature: 0.3 + 3.0 * part,
                    top_k: 10 * top_k,
                    top_p: 0.9,
                    min_p: 0.01,
                    ..how
                },
                Sampling {
                    temperature: 2.0 - part,
                    top_p: 0.99 + 0.01 * part,
                    ..how
                },
            ]
        }

        /// Whether rounding may decide between these tokens: both are about as loud, or one is about as likely as a
        /// bound.
        fn near(logits: &[f32], (how, position): &(Sampling, u32), tokens: [usize; 2]) -> bool {
            let scores = scores(logits, how.temperature);
            let noise = Noise::new(how.seed, *position);
            let loudness = tokens.map(|i| scores[i] + gumbel(noise.threefry(i as u32)));
            let [loose, tight] =
                [1.0001, 0.9999].map(|by| least_by_sorting(&scores, &eased(how, by)));
            (loudness[0] - loudness[1]).abs() < 1e-4
                || tokens
                    .iter()
                    .any(|&i| scores[i] >= loose && scores[i] < tight)
        }

        #[test]
        fn draws_are_those_of_the_compiled_program() {
            let program = Program::new();
            let (mut room, mut differ) = (Sampler::default(), 0);
            for i in 0..ROUNDS {
                let rows: Vec<(Sampling, u32)> =
                    round(i).into_iter().map(|how| (how, 1 + 37 * i)).collect();
                let logits: Vec<f32> = (0..ROWS as u32)
                    .flat_map(|r| {
                        let steps = (r + i) % 3 == 0;
                        row(
                            &Noise::new(u64::from(i), r),
                            0.5 + (i % 9) as f32,
                            steps.then_some(4.0),
                        )
                    })
                    .collect();
                let found = program.draw(&logits, &rows);
                for ((theirs, how), logits) in
                    found.into_iter().zip(&rows).zip(logits.chunks(VOCAB))
                {
                    let ours = room.draw(logits, &how.0, how.1) as usize;
                    let theirs = theirs as usize;
                    if ours != theirs {
                        differ += 1;
                        assert!(
                            near(logits, how, [ours, theirs]),
                            "{ours}, not {theirs}: {how:?}"
                        );
                    }
                }
            }
            assert!(
                200 * differ <= ROUNDS as usize * ROWS,
                "{differ} draws differ"
            );
        }
    }
}
